"""Weight updates from the store inside a vLLM worker process.

vLLM imports this module in every worker before the model is loaded, because it defines
`worker_extension_cls`. The import registers the transfer backend.

An update has two phases, so that a bad version never changes a model, with any number of workers:

    stage   read and verify every tensor, compare names and shapes with the model's checkpoint,
            in a thread of each worker process (`weights.read_version`), while steps continue
    apply   vLLM's start_weight_update, update_weights, finish_weight_update

Promises:
- a version that is damaged, incomplete, or of another model fails in `stage`, and the old weights keep
  serving;
- `apply` uses only the staged version, and consumes it. While a version is staged, a worker holds a
  second copy of the weights in host memory.

A draft model for speculation has tensors of the policy, by name. It gets them from the same staged
version, right after the policy and before the next step.

With `hold_base`, every worker process keeps its last version in host memory, complete and as published,
and reads only the changes since then (`read_version.Held`). If versions are adapters, it keeps the
weights that they are trained over. After a failure it drops the copy and reads the next version from
its anchor on.

With `int8`, the tensors are quantised after they were read and verified, before they are staged. The
reported digest is that of the published tensors.
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
    drop_tied_head,
    refuse_other_model,
)
from rlhf_cluster.util.tensor_hashing import compute_digest
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
    """Arguments of the transfer engine, the same in every worker process.

    `checkpoint`: folder of the trained model, whose tensor names versions have. `draft`: folder of the
    draft model, if there is one.
    """

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
    """Verified version in host memory: tensors as published, and as the model loads them."""

    version: int
    published: dict[str, torch.Tensor]
    tensors: list[tuple[str, torch.Tensor]]


class StoreTransferEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Weight-transfer engine of vLLM that reads from the weight store."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo
    supports_draft_weight_update = True

    _shapes: Mapping[str, tuple[int, ...]]
    _draft_names: frozenset[str]
    _staged: Staged | None = None
    _held: Held | None = None

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        self._tied = _is_tied(self.model_config)
        self._shapes = drop_tied_head(checkpoint_shapes(init_info.checkpoint), self._tied)
        draft = checkpoint_shapes(init_info.draft) if init_info.draft else {}
        self._draft_names = frozenset(draft)
        self._held = Held() if init_info.hold_base else None
        self.staging = Staging()
        self._linear = linear_weights(init_info.checkpoint) if init_info.int8 else frozenset()

    def begin_stage(self, deadline: Deadline, **announced: Any) -> dict[str, Any] | None:
        """Start to read a version; returns an `error` if an earlier read still hangs, else None."""
        return self.staging.begin(lambda: self.stage(deadline=deadline, **announced), deadline)

    def stage(
        self,
        version: int,
        path: str,
        digest: str,
        deadline: Deadline | None = None,
    ) -> dict[str, Any]:
        """Read and stage a version; returns its digest and number of tensors, or an `error`.

        The digest is computed from the tensors in memory; the announced one is not trusted.
        """
        self._staged = None  # it shares memory with `_held`, which the read changes
        try:
            tensors = dict(store.read(path, True, digest, self._held, deadline=deadline))
            found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            refuse_other_model(path, drop_tied_head(found, self._tied), self._shapes)
        except (WeightError, StalledError) as error:
            return {"error": str(error)}
        found_digest = compute_digest(tensors.items())
        self._staged = Staged(
            version=version,
            published=tensors,
            tensors=list(quantized(tensors.items(), self._linear)),
        )
        return {"digest": found_digest, "num_tensors": len(tensors)}

    def start_weight_update(self) -> None:
        if self._staged is None:
            raise WeightError("no version is staged; call begin_stage before an update")
        # This moves parameters to the meta device, then loads and re-packs layer by layer. A plain
        # load_weights would miss every linear layer on CPU, whose weights are packed.
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
            # A tied head has no separate tensor, so the reload above skips it. On CPU it computes
            # with a packed copy, which would keep the old weights.
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


# At every reload vLLM warns about layers that have no tensor in a version (rotary embeddings, tied
# heads). `stage` has refused a version with missing tensors before.
logging.getLogger(finalize_layerwise_reload.__module__).addFilter(_is_news)


def keep_scales_alive(ops: Any) -> None:
    """Work around a defect of vLLM's INT8 layers on CPU, by patching `ops`.

    The layers' handler keeps only the address of the scales. A reload in place frees the tensor at that
    address, and later steps compute with arbitrary memory. The patch lets the handler also hold the
    tensor.
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
