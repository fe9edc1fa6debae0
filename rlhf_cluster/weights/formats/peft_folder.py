"""PEFT folder of a version's adapters, for an engine that serves adapters without merging them.

    adapter_config.json          rank, alpha, names of the layers
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight, .lora_B.weight, in float32

Such an engine adds B A to the weights in its own model folder. So `refuse_other_base` compares that
folder with the base weights of the version: equal hashes, tensor by tensor, in the version's type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.errors import WeightError
from rlhf_cluster.models.model_folder import (
    TIED_HEAD,
    checkpoint_shapes,
    checkpoint_tensors,
    drop_tied_head,
    refuse_other_model,
)
from rlhf_cluster.util.tensor_hashing import hash_pieces, tensor_bytes, tensor_hash
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.manifest import Manifest
from rlhf_cluster.weights.transports.transport import Deadline

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KINDS = {lora_factors.DOWN: ".lora_A.weight", lora_factors.UP: ".lora_B.weight"}


def write_peft_folder(folder: Path, manifest: Manifest, factors: Mapping[str, Tensor]) -> None:
    """Write the adapters of a version, `factors` by their stored names, into a new `folder`.

    Raises `WeightError`: DoRA, adapters of several ranks or scales, a disk that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    gains = [name for name in factors if name.endswith(lora_factors.GAIN)]
    if gains:
        raise WeightError(
            f"version {manifest.version}: {gains[0]!r} is DoRA's, which no engine serves. Set "
            "generation.lora = 'merged'"
        )
    scales = {name: entry.scale for name, entry in manifest.tensors.items() if entry.scale}
    ranks = {factors[name + lora_factors.DOWN].shape[0] for name in scales}
    if len(ranks) != 1 or len(set(scales.values())) != 1:
        raise WeightError(
            f"version {manifest.version}: {len(scales)} adapters of ranks {sorted(ranks)} and scales "
            f"{sorted(set(scales.values()))}; a served adapter has one of each. Set generation.lora = "
            "'merged'"
        )
    (rank,), scale = ranks, next(iter(scales.values()))
    layers = [name.removesuffix(".weight") for name in scales]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        "bias": "none",
    }
    tensors = {
        _PREFIX + layer + suffix: factors[name + kind].contiguous()
        for name, layer in zip(scales, layers, strict=True)
        for kind, suffix in _KINDS.items()
    }
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # save_file reports a full disk as the latter
        raise WeightError(
            f"{folder}: version {manifest.version} cannot be written for the engine ({error}). Make "
            "room there, or set TMPDIR to another folder"
        ) from error


def refuse_other_base(
    model_dir: str | Path, manifest: Manifest, deadline: Deadline | None = None
) -> None:
    """Check that the folder has the tensors that the version's adapters are added to.

    The tensors that the version does not change must be equal too. Reads the whole folder. Raises
    `WeightError` where one differs; `StalledError` past the deadline.
    """
    import torch

    stands_on = {
        name: (name, entry)
        if entry.scale is None
        else (name + lora_factors.BASE, manifest.factors[name + lora_factors.BASE])
        for name, entry in manifest.tensors.items()
    }
    tied = TIED_HEAD not in stands_on
    expected = drop_tied_head(checkpoint_shapes(model_dir), tied)
    shapes = {name: tuple(entry.shape) for name, (_, entry) in stands_on.items()}
    refuse_other_model(f"version {manifest.version}", shapes, expected)
    for name, tensor in checkpoint_tensors(model_dir):
        if name not in expected:
            continue
        if deadline is not None:
            deadline.left_s(f"tensor {name!r} of {model_dir}")
        stored_as, entry = stands_on[name]
        data = tensor_bytes(tensor.to(getattr(torch, entry.dtype)).contiguous())
        if tensor_hash(stored_as, entry.dtype, entry.shape, hash_pieces(data, 0)) != entry.hash:
            raise WeightError(
                f"version {manifest.version}: its adapters are added to another {name!r} than that "
                f"of {model_dir}, over which this engine would serve them. Give engine and learner one "
                "model folder, or set generation.lora = 'merged'"
            )
