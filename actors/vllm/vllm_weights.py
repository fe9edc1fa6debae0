"""Loading a version of the weight store inside a vLLM worker process.

vLLM imports this module in every worker (it holds `worker_extension_cls`), before the model is
loaded, which is what registers the transfer backend there.

An update has two phases, so that a bad version never touches a model, with any number of workers:

    stage   read and verify every tensor, compare names and shapes with the model's checkpoint,
            in a thread of each worker process (`weights.read_version`), while steps go on
    apply   vLLM's start_weight_update, update_weights, finish_weight_update

Promises: a version that is damaged, incomplete, or not of this model fails in `stage`, and the old
weights keep serving; `apply` takes only what was staged, and consumes it. While a version is
staged, a worker holds a second copy of the weights in host memory.

A draft model for speculation holds tensors of the policy's, by name. It is given them from the same
staged version, right after the policy and before the next step.

With `hold_base`, every worker process keeps its last version in host memory, whole and as
published, and reads only what changed since (`reading.Held`); where versions are adapters it keeps
the weights under them. After a failure it lets go of it and reads the next version from its anchor
on. With `int8`, what was read and verified is quantised before it is
staged: the digest that is reported stays that of the published tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from vllm import _custom_ops
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

from actors.vllm.vllm_arguments import TRANSFER_BACKEND
from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.models.model_folder import (
    checkpoint_shapes,
    refuse_other_model,
    without_tied_head,
)
from rlhf_cluster.util.tensor_hashing import digest_of
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.int8 import (
    linear_weights,
    quantized,
)
from rlhf_cluster.weights.read_version import Held, Staging
from rlhf_cluster.weights.transports.transport import (
    Deadline,
)


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """`checkpoint`: the folder of the model that is trained, whose names versions have; `draft`:
    that of the draft model, where there is one."""

    checkpoint: str
    draft: str | None
    hold_base: bool
    int8: bool


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    version: int
    draft: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A verified version that waits in host memory: as published, and as the model loads it."""

    version: int
    published: dict[str, torch.Tensor]
    tensors: list[tuple[str, torch.Tensor]]


class StoreTransferEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """vLLM's weight-transfer port over the weight store."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo
    supports_draft_weight_update = True

    _shapes: Mapping[str, tuple[int, ...]]
    _draft_names: frozenset[str]
    _staged: Staged | None = None
    _held: Held | None = None

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        self._tied = _is_tied(self.model_config)
        self._shapes = without_tied_head(checkpoint_shapes(init_info.checkpoint), self._tied)
        draft = checkpoint_shapes(init_info.draft) if init_info.draft else {}
        self._draft_names = frozenset(draft)
        self._held = Held() if init_info.hold_base else None
        self.staging = Staging()
        self._linear = linear_weights(init_info.checkpoint) if init_info.int8 else frozenset()

    def begin_stage(self, deadline: Deadline, **announced: Any) -> dict[str, Any] | None:
        """Start to read a version; an `error` where an earlier read still hangs."""
        return self.staging.begin(lambda: self.stage(deadline=deadline, **announced), deadline)

    def stage(
        self,
        version: int,
        path: str,
        digest: str,
        deadline: Deadline | None = None,
    ) -> dict[str, Any]:
        """Read version `version`; returns its digest and number of tensors, or an `error`.

        The digest is computed from the tensors in memory, not taken from what was announced.
        """
        self._staged = None  # shares memory with what is held, which the read changes
        try:
            tensors = dict(store.read(path, True, digest, self._held, deadline=deadline))
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            refuse_other_model(path, without_tied_head(found, self._tied), self._shapes)
        except (WeightError, StalledError) as error:
            return {"error": str(error)}
        found_digest = digest_of(tensors.items())
        self._staged = Staged(
            version=version,
            published=tensors,
            tensors=list(quantized(tensors.items(), self._linear)),
        )
        return {"digest": found_digest, "num_tensors": len(tensors)}

    def start_weight_update(self) -> None:
        if self._staged is None:
            raise WeightError("no version is staged; call begin_stage before an update")
        # Moves parameters to the meta device, then loads and re-packs layer by layer. A plain
        # load_weights would miss every linear layer on CPU, whose weights live in packed form.
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        staged = self._staged
        if update_info.draft or not self._draft_names:
            self._staged = None
        if staged is None or staged.version != update_info.version:
            raise WeightError(
                f"asked to apply version {update_info.version}, staged is "
                f"{staged.version if staged else 'nothing'}; stage it first"
            )
        tensors = staged.tensors
        if update_info.draft:
            tensors = [(name, staged.published[name]) for name in sorted(self._draft_names)]
        load_weights: Callable[..., object] = self.model.load_weights  # type: ignore[assignment]
        load_weights((name, t.to(self.device)) for name, t in tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if _is_tied(self.model_config):
            # A tied head has no tensor of its own, so the reload above passes it by; on CPU it
            # computes with a packed copy, which would stay at the old weights.
            for head in self.model.modules():
                if isinstance(head, ParallelLMHead):
                    head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self._staged = self._held = None


class WorkerExtension:
    """Methods that vLLM adds to its worker class, for `collective_rpc`."""

    weight_transfer_engine: StoreTransferEngine

    def begin_stage(self, **announced: Any) -> dict[str, Any] | None:
        return self.weight_transfer_engine.begin_stage(**announced)

    def stage_report(self) -> dict[str, Any] | None:
        return self.weight_transfer_engine.staging.report()

    def cancel_stage(self) -> None:
        self.weight_transfer_engine.staging.cancel()


def _is_tied(model_config: Any) -> bool:
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))


def _is_news(record: logging.LogRecord) -> bool:
    return "Failed to load weights" not in record.getMessage()


# vLLM warns at every reload of layers that no tensor was meant for (rotary embeddings, tied heads).
# Tensors that are really missing were refused by name before.
logging.getLogger(finalize_layerwise_reload.__module__).addFilter(_is_news)


def keep_scales_alive(ops: Any) -> None:
    """Mend vLLM's INT8 layers on CPU: their handler keeps the address of the scales and no more.

    A reload in place frees the tensor at that address, and later steps compute with whatever is
    there. With this, the handler also holds the tensor.
    """
    create = getattr(ops, "create_onednn_scaled_mm", None)
    if create is None or hasattr(create, "__wrapped__"):
        return

    @wraps(create)
    def create_and_hold(weight: Any, weight_scales: Any, *arguments: Any, **named: Any) -> Any:
        handler = create(weight, weight_scales, *arguments, **named)
        handler.held_scales = weight_scales
        return handler

    ops.create_onednn_scaled_mm = create_and_hold


keep_scales_alive(_custom_ops)

if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, StoreTransferEngine)
