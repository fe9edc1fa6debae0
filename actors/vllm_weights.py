"""Loading a version of the weight store inside a vLLM worker process.

vLLM imports this module in every worker (it holds `worker_extension_cls`), before the model is
loaded, which is what registers the transfer backend there.

An update has two phases, so that a bad version never touches a model, with any number of workers:

    stage   read and verify every tensor, compare names and shapes with the model's checkpoint
    apply   vLLM's start_weight_update, update_weights, finish_weight_update

Promises: a version that is damaged, incomplete, or not of this model fails in `stage`, and the old
weights keep serving; `apply` takes only what was staged, and consumes it. While a version is
staged, a worker holds a second copy of the weights in host memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from actors.vllm_arguments import TRANSFER_BACKEND
from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights import store
from rlhf_cluster.weights.hashing import digest_of

_TIED_HEAD = "lm_head.weight"
_NAMES_SHOWN = 5


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: versions are folders."""


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A verified version that waits in host memory."""

    version: int
    tensors: list[tuple[str, torch.Tensor]]


class StoreTransferEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """vLLM's weight-transfer port over the weight store."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo
    supports_draft_weight_update = False

    _shapes: Mapping[str, tuple[int, ...]]
    _staged: Staged | None = None

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        tied = bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))
        self._shapes = _without_tied_head(checkpoint_shapes(self.model_config.model), tied)
        self._tied = tied

    def stage(self, version: int, path: str, digest: str) -> dict[str, Any]:
        """Read version `version`; returns its digest and number of tensors, or an `error`.

        The digest is computed from the tensors in memory, not taken from what was announced.
        Errors are values here: an exception would cross process borders as a bare text, and with
        several workers one must be able to refuse before any of them applies.
        """
        self._staged = None
        try:
            tensors = list(store.read(path, verify=True, expected_digest=digest))
            found = {name: tuple(tensor.shape) for name, tensor in tensors}
            refuse_other_model(path, _without_tied_head(found, self._tied), self._shapes)
        except WeightError as error:
            return {"error": str(error)}
        self._staged = Staged(version=version, tensors=tensors)
        return {"digest": digest_of(tensors), "num_tensors": len(tensors)}

    def start_weight_update(self) -> None:
        if self._staged is None:
            raise WeightError("no version is staged; call stage_version before an update")
        # Moves parameters to the meta device, then loads and re-packs layer by layer. A plain
        # load_weights would miss every linear layer on CPU, whose weights live in packed form.
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        staged, self._staged = self._staged, None
        if staged is None or staged.version != update_info.version:
            raise WeightError(
                f"asked to apply version {update_info.version}, staged is "
                f"{staged.version if staged else 'nothing'}; stage it first"
            )
        load_weights: Callable[..., object] = self.model.load_weights  # type: ignore[assignment]
        load_weights((name, t.to(self.device)) for name, t in staged.tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._tied:
            # A tied head has no tensor of its own, so the reload above passes it by; on CPU it
            # computes with a packed copy, which would stay at the old weights.
            for head in self.model.modules():
                if isinstance(head, ParallelLMHead):
                    head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self._staged = None


class WorkerExtension:
    """Methods that vLLM adds to its worker class, for `collective_rpc`."""

    weight_transfer_engine: StoreTransferEngine

    def stage_version(self, version: int, path: str, digest: str) -> dict[str, Any]:
        return self.weight_transfer_engine.stage(version, path, digest)


def checkpoint_shapes(model_dir: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Hugging Face folder. Raises `WeightError`."""
    index = Path(model_dir) / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [Path(model_dir) / name for name in sorted(set(names))]
    else:
        files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise WeightError(
            f"{model_dir}: no .safetensors file, so published weights cannot be compared with the "
            "model. Save the model in safetensors format"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def refuse_other_model(
    path: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
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


def _without_tied_head(shapes: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    return {name: shape for name, shape in shapes.items() if not (tied and name == _TIED_HEAD)}


def _is_news(record: logging.LogRecord) -> bool:
    return "Failed to load weights" not in record.getMessage()


# vLLM warns at every reload of layers that no tensor was meant for (rotary embeddings, tied heads).
# Tensors that are really missing were refused by name before.
logging.getLogger(finalize_layerwise_reload.__module__).addFilter(_is_news)

if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, StoreTransferEngine)
