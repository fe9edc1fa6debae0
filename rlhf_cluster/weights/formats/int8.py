"""INT8 weights for generation, while training and publishing keep full precision.

The format is W8A8 of compressed-tensors, which vLLM loads on CPUs and GPUs:

    scale = max |row| / 127 (float32, one per row)    weight = round(row / scale), int8

for every linear layer but the output's. The engine quantises activations itself, token by token.

A generation worker quantises a version after it was read and verified. So the store holds one kind of
tensors, and every reader checks the digest that was published, whatever precision it uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.durable_files import apply_umask, make_whole_folder
from rlhf_cluster.weights.formats.huggingface import (
    INDEX_NAME,
    copy_companions,
)

if TYPE_CHECKING:
    from torch import Tensor

SCALE_SUFFIX = "_scale"
"""Suffix that makes the name of a quantised weight the name of its scales."""
_WEIGHTS_8_BITS = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
}  # fmt: skip
_INPUTS_8_BITS = {**_WEIGHTS_8_BITS, "strategy": "token", "dynamic": True}


def linear_weights(model_dir: str | Path) -> frozenset[str]:
    """Return the names of the weights that are quantised: of all linear layers but the output's.

    Reads the configuration only. Raises `WeightError` for a model with fused experts.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim > 2]
    if fused:
        raise WeightError(
            f"{model_dir}: {fused[0]} has more than two dimensions; INT8 generation knows dense "
            "models only. Remove generation.quantization"
        )
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )


def quantized(
    tensors: Iterable[tuple[str, Tensor]], linear: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, each one named in `linear` as INT8 [out, in] and its scales [out, 1]."""
    from rlhf_cluster.models.int8_linear import round_to_int8

    for name, tensor in tensors:
        if name not in linear:
            yield name, tensor
            continue
        codes, scale = round_to_int8(tensor)
        yield name, codes
        yield name + SCALE_SUFFIX, scale


def write_start_folder(model_dir: str | Path, out_dir: str | Path) -> Path:
    """Write the model of `model_dir` in INT8: the folder in which an engine starts. Returns `out_dir`.

    An engine whose weights will be updated in INT8 must start with INT8 weights. Any number of
    processes may call this at once: the folder appears complete, once. A folder that exists is used
    unchanged. Memory: the tensors of one file. Raises `WeightError`.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if out_dir.is_dir():
        return out_dir
    try:
        with make_whole_folder(out_dir) as partial:
            _write_weights(model_dir, partial)
            copy_companions(model_dir, partial)
            config = json.loads((model_dir / "config.json").read_bytes())
            config["quantization_config"] = _quantization_config()
            (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    except OSError as error:
        if not out_dir.is_dir():  # else another process was first
            raise WeightError(f"{out_dir}: cannot write the INT8 model ({error})") from error
    return out_dir


def _write_weights(model_dir: Path, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    linear, where = linear_weights(model_dir), {}
    files = sorted(model_dir.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as file:
            # A safetensors file has keys, but is not a mapping, so it cannot be iterated.
            read = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            tensors = dict(quantized(read, linear))
        save_file(tensors, target / path.name, metadata={"format": "pt"})
        apply_umask(target / path.name)
        where |= dict.fromkeys(tensors, path.name)
    if missing := sorted(linear - where.keys()):
        raise WeightError(
            f"{model_dir}: no .safetensors file has {missing[0]} and {len(missing) - 1} more of "
            "the model's linear weights. Save the model in safetensors format"
        )
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": where}
        (target / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def _quantization_config() -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _WEIGHTS_8_BITS,
                "input_activations": _INPUTS_8_BITS,
                "output_activations": None,
            }
        },
    }
