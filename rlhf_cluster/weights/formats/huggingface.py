"""Export of a published version as a Hugging Face folder.

Promises:
- Every tensor is verified before it is written.
- The names are those of the starting model (a tied `lm_head.weight` may be in one and not in the
  other).
- The folder appears complete, by a rename, or not at all.

Memory: the tensors of one output file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.durable_files import apply_umask, make_whole_folder
from rlhf_cluster.weights.assemble import check_names
from rlhf_cluster.weights.manifest import Manifest
from rlhf_cluster.weights.store import open_version, read

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 4 * 10**9
INDEX_NAME = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
}  # fmt: skip
_TIED = "lm_head.weight"
_CLASSIFIER = "score.weight"


def export_hf(
    version: WeightVersion,
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    num_values: int | None = None,
    tokenizer_dir: str | Path | None = None,
) -> Path:
    """Write `version` as a folder that transformers and vLLM load. Returns `out_dir`.

    Everything but the weights is copied from `model_dir`: configuration, tokenizer and other files.
    With `tokenizer_dir`, the tokenizer is copied from there. The weights are one `model.safetensors`,
    or, where they need more than `max_file_bytes`, numbered files with an index. With `num_values`,
    the result is a sequence-classification model with this number of labels.

    Raises `WeightError`: `out_dir` is in use, `model_dir` is not a model, names do not match.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if out_dir.exists():
        raise WeightError(
            f"{out_dir}: already exists; an export never overwrites. Give another folder"
        )
    config = _read_config(model_dir)
    manifest = open_version(version.path)
    _check_names(manifest, model_dir, config, num_values)
    if num_values is not None:
        config |= _as_classifier(config, num_values)
    config.pop("torch_dtype", None)
    config["dtype"] = _main_dtype(manifest)
    text = json.dumps(config, indent=2) + "\n"
    try:
        with make_whole_folder(out_dir) as partial:
            copy_companions(model_dir, partial)
            if tokenizer_dir is not None:
                load_tokenizer(tokenizer_dir).save_pretrained(partial)
            (partial / "config.json").write_text(text, encoding="utf-8")
            tensors = read(version.path, expected_digest=version.digest)
            _write_weights(tensors, manifest, partial, max_file_bytes)
    except OSError as error:
        raise WeightError(f"{out_dir}: cannot write the export ({error})") from error
    return out_dir


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightError(
            f"{path}: cannot be read ({error}). Give the folder of the model that was trained"
        ) from error
    if not isinstance(config, dict):
        raise WeightError(f"{path}: holds {type(config).__name__}, expected an object")
    return config


def _as_classifier(config: dict[str, Any], num_values: int) -> dict[str, Any]:
    """Return the keys of the configuration that a classifier with `num_values` labels changes.

    The padding token, where `config` names none, is the end token: such a model needs one to find the
    last token of a padded sequence.
    """
    end = config.get("eos_token_id")
    padding = config.get("pad_token_id")
    labels = [f"LABEL_{i}" for i in range(num_values)]
    return {
        "architectures": [
            name.replace("ForCausalLM", "ForSequenceClassification")
            for name in config.get("architectures") or ()
        ],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": (end[0] if isinstance(end, list) else end) if padding is None else padding,
        "problem_type": "regression",
    }


def _check_names(
    manifest: Manifest, model_dir: Path, config: dict[str, Any], num_values: int | None
) -> None:
    original = _original_shapes(model_dir)
    if not original:
        return
    if num_values is not None:
        original.pop(_TIED, None)
        original[_CLASSIFIER] = (num_values, int(config["hidden_size"]))
    found = {name: entry.shape for name, entry in manifest.tensors.items()}
    if config.get("tie_word_embeddings"):
        original.pop(_TIED, None)
        found.pop(_TIED, None)
    check_names(f"version {manifest.version}, against {model_dir}", found, original)


def _original_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return shapes


def _main_dtype(manifest: Manifest) -> str:
    num_bytes: dict[str, int] = {}
    for entry in manifest.tensors.values():
        num_bytes[entry.dtype] = num_bytes.get(entry.dtype, 0) + entry.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype])


def copy_companions(model_dir: Path, target: Path) -> None:
    """Copy all files of a model folder but the weights and `config.json`."""
    for path in sorted(model_dir.iterdir()):
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name != "config.json":
            shutil.copyfile(path, target / path.name)


def _write_weights(
    tensors: Iterator[tuple[str, Tensor]], manifest: Manifest, folder: Path, max_file_bytes: int
) -> None:
    from safetensors.torch import save_file

    groups = _plan_files(manifest, max_file_bytes)
    where: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        single = len(groups) == 1
        file = (
            "model.safetensors"
            if single
            else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        # The store yields tensors in the manifest's order, which the plan follows.
        batch = dict(next(tensors) for _ in names)
        save_file(batch, folder / file, metadata={"format": "pt"})
        apply_umask(folder / file)
        where |= dict.fromkeys(names, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": manifest.num_bytes}, "weight_map": where}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_files(manifest: Manifest, max_file_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, entry in manifest.tensors.items():
        if groups[-1] and filled + entry.num_bytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += entry.num_bytes
    return groups
