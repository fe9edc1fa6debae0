"""Names and shapes of a model folder's tensors, and comparison with other tensors.

Promises: only `checkpoint_tensors` reads more than the headers of the files. Errors name the tensors
that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.errors import ConfigError, WeightError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]

TIED_HEAD = "lm_head.weight"
_NAMES_SHOWN = 5
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


def checkpoint_shapes(model_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the tensor names and shapes of a Hugging Face folder. Raises `WeightError`."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(Path(model_dir)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def checkpoint_files(model_dir: str | Path) -> dict[str, Path]:
    """Return the file of each tensor of a Hugging Face folder. Raises `WeightError`."""
    from safetensors import safe_open

    files: dict[str, Path] = {}
    for file in _files(Path(model_dir)):
        with safe_open(file, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def materialize(
    module: nn.Module,
    files: Mapping[str, Path],
    device: torch.device,
    stored_name: Callable[[str], str],
) -> None:
    """Read the parameters of `module` that are on the meta device, in float32. Raises `WeightError`.

    `files` has the file of each tensor, and `stored_name` maps the name of a parameter to that of its
    tensor. The new parameters are frozen.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        stored = stored_name(name)
        try:
            with safe_open(files[stored], framework="pt") as tensors:
                weight = tensors.get_tensor(stored).to(device, torch.float32)
        except (KeyError, OSError, SafetensorError) as error:
            raise WeightError(
                f"{files.get(stored, 'no file')}: tensor {stored} cannot be read ({error!r}). Copy the "
                "file again from where the model came from"
            ) from error
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(weight, False)


def checkpoint_tensors(model_dir: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a Hugging Face folder, one in memory at a time. Raises `WeightError`."""
    from safetensors import safe_open

    for file in _files(Path(model_dir)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)


def _files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        files = [model_dir / name for name in sorted(set(read_index(index).values()))]
    else:
        files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise WeightError(
            f"{model_dir}: no .safetensors file, so published weights cannot be compared with the "
            "model. Save the model in safetensors format"
        )
    return files


def read_index(index: Path) -> dict[str, str]:
    """Read a `model.safetensors.index.json`, and return the file name of each tensor.

    Raises `WeightError` for an index that cannot be read, or that names a file outside its folder.
    """
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(
            f"{index}: no index of a model's files can be read ({error!r}). Save the model again"
        ) from error
    for name, file in found.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise WeightError(
                f"{index}: tensor {name!r} is said to be in {file!r}, which is not a .safetensors "
                "file of that folder; nothing outside of it is read. Save the model again"
            )
    return found


def drop_tied_head(shapes: Shapes, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes without the output projection if it is tied to the embeddings."""
    return {name: shape for name, shape in shapes.items() if not (tied and name == TIED_HEAD)}


def refuse_other_model(path: str, found: Shapes, expected: Shapes) -> None:
    """Raise `WeightError` unless names and shapes are those of the model's checkpoint."""
    problems = []
    for label, names in (
        ("missing", expected.keys() - found),
        ("unknown", found.keys() - expected),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            problems.append(f"{label} {shown}{more}")
    problems += [
        f"{name} has shape {list(found[name])}, the model has {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ][:_NAMES_SHOWN]
    if problems:
        raise WeightError(
            f"{path}: not the tensors of the served model: {'; '.join(problems)}. Publish exactly "
            "the tensors of the model's checkpoint"
        )


def refuse_other_draft(draft_dir: str | Path, draft: Shapes, policy: Shapes) -> None:
    """Raise `ConfigError` unless each tensor of the draft is a tensor of the policy.

    Only then does a published version include the draft's weights.
    """
    others = sorted(name for name, shape in draft.items() if policy.get(name) != shape)
    if not others:
        return
    name = others[0]
    in_policy = f"shape {list(policy[name])}" if name in policy else "no such tensor"
    raise ConfigError(
        f"generation.speculative.model = {str(draft_dir)!r}: {name} has shape {list(draft[name])} "
        f"there, and the policy has {in_policy} ({len(others)} of {len(draft)} tensors differ). What "
        "is published are the policy's tensors, so this draft would stay as it is while the policy "
        "moves away from it. Give a folder with tensors of the policy's (all, or its first layers), "
        "or use method = 'ngram'"
    )
