"""Parts of a weight version that one learner rank writes.

Promises:
- names and shapes are those of the Hugging Face checkpoint that training started from. Adapters are
  merged into a copy for that (`lora.merged`). Weights in 4 bits are published as the values that they
  encode;
- tied tensors appear once;
- the parts of all ranks together have every element once;
- without adapters nothing is communicated: each rank reads its own memory.

Versions of format `adapter` also have the parts from which readers merge
(`weights.formats.lora_factors`). Tensors that never change are copied only when they are written, while
a step runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.learner.sharding import (
    lora,
    qlora,
)
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.models.policy_model import (
    PolicyLM,
    checkpoint_name,
)
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.formats.stochastic_rounding import (
    round_stochastically,
    stream_key,
)
from rlhf_cluster.weights.manifest import LocalPart
from rlhf_cluster.weights.shards import ShardBase


def local_parts(
    model: ShardedModel, as_adapters: bool = False, streams_of: int | None = None
) -> Iterator[LocalPart]:
    """Yield this rank's share, possibly empty, of every tensor of the checkpoint.

    Parts may be views of the live weights: copy them before the next step. Rank 0 yields the complete
    buffers of the checkpoint. With adapters every rank must take part.

    Args:
        as_adapters: yield the parts of a version between anchors. These are the adapters, and the
            weights that readers merge from them and from `anchor_parts`. The latter are marked by their
            `scale` and are not stored.
        streams_of: version whose random streams merged weights get, by which `host_copy` rounds them.
    """
    policy = cast(PolicyLM, model.module)
    for part in model.shards():
        if lora.is_adapter(part.name):
            name = lora.factor_name(part.name) if as_adapters else None
            found = [] if name is None else [replace(part, name=name)]
        else:
            weight = qlora.unpacked(model, part)
            if not lora.is_adapted(weight.name):
                found = [] if as_adapters else [weight]
            else:
                whole, *gain = lora.merged(model, weight)
                if streams_of is not None:
                    name = checkpoint_name(weight.name)
                    whole = replace(whole, stream=stream_key(streams_of, name))
                found = [whole, *gain] if as_adapters else [replace(whole, scale=None)]
        for own in found:
            yield replace(own, name=checkpoint_name(own.name))
    if not as_adapters:
        yield from _buffer_parts(policy)


def _buffer_parts(policy: PolicyLM) -> Iterator[LocalPart]:
    if dist.get_rank() == 0:
        for name, buffer in _checkpoint_buffers(policy):
            flat = buffer.detach().reshape(-1)
            yield LocalPart(name=name, shape=tuple(buffer.shape), offset=0, tensor=flat)


def tensor_shapes(model: ShardedModel) -> dict[str, tuple[int, ...]]:
    """Return name and full shape of every tensor that the `local_parts` of all ranks make up."""
    buffers = _checkpoint_buffers(cast(PolicyLM, model.module))
    shapes = {
        checkpoint_name(name): shape
        for name, shape in (qlora.stands_for(model.module, part) for part in model.shards())
        if not lora.is_adapter(name)
    }
    return shapes | {name: tuple(buffer.shape) for name, buffer in buffers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """This rank's shards of the tensors that never change while adapters are trained; not copied."""

    parts: Sequence[LocalPart]
    base_dtype: torch.dtype
    """Type in which weights under adapters are stored."""
    num_unadapted: int
    """Floating-point elements that are not under an adapter."""


def frozen(model: ShardedModel, dtype: torch.dtype) -> Frozen:
    """Collect the tensors that never change, and choose the type in which they are stored.

    Weights under adapters are stored in `dtype` if it represents all of them exactly, in float32
    otherwise.

    Waits for: all ranks.
    """
    parts = [part for part in model.shards() if not lora.is_adapter(part.name)]
    parts += _buffer_parts(cast(PolicyLM, model.module))
    num_rounded, num_unadapted = 0, 0
    for part in parts:
        weight = qlora.unpacked(model, part)
        if lora.is_adapted(weight.name):
            num_rounded += int((weight.tensor.to(dtype).float() != weight.tensor).sum())
        elif weight.tensor.is_floating_point():
            num_unadapted += weight.tensor.numel()
    device = next(model.module.parameters()).device
    summed = torch.tensor(num_rounded, dtype=torch.int64, device=device)
    dist.all_reduce(summed)
    base_dtype = torch.float32 if summed.item() else dtype
    return Frozen(parts=parts, base_dtype=base_dtype, num_unadapted=num_unadapted)


def anchor_parts(model: ShardedModel, frozen: Frozen, dtype: torch.dtype) -> Iterator[LocalPart]:
    """Yield copies in host memory of the tensors that never change, as an anchor stores them.

    Any thread may call this, concurrently with a step.
    """
    for part in frozen.parts:
        weight = qlora.unpacked(model, part)
        name = checkpoint_name(weight.name)
        if lora.is_adapted(weight.name):
            yield _on_host(replace(weight, name=name + lora_factors.BASE), frozen.base_dtype)
        else:
            yield _on_host(replace(weight, name=name), dtype)


class Bases:
    """Version against which this rank can write differences.

    It is the last one that the rank wrote, or its last anchor if versions are adapters.
    """

    def __init__(self, rank: int, weights_format: str) -> None:
        self._rank, self._format = rank, weights_format
        self._last: ShardBase | None = None

    def find(self, version: int | None) -> ShardBase | None:
        """Return the base for `version`; None for None.

        Raises: `WeightError` if this rank has another version, or none.
        """
        if version is None:
            return None
        last = self._last
        if last is None or last.version != version:
            holds = last.version if last else "none"
            raise WeightError(
                f"learner rank {self._rank} holds version {holds} and cannot store what changed "
                f"since version {version}. Publish a full snapshot"
            )
        return last

    def wrote(self, version: int, parts: Sequence[LocalPart], base: ShardBase | None) -> None:
        if self._format == "delta":
            self._last = ShardBase(version=version, parts={part.name: part for part in parts})
        elif self._format == "adapter" and base is None:
            self._last = ShardBase(version=version, parts={})


def host_copy(parts: Iterable[LocalPart], dtype: torch.dtype) -> list[LocalPart]:
    """Copy parts to host memory: floating-point ones in `dtype`, those of adapters in float32.

    Parts with a random stream are rounded with it to bfloat16, so `dtype` is bfloat16 then.
    """
    return [
        _on_host(part, torch.float32 if lora_factors.is_factor(part.name) else dtype)
        for part in parts
    ]


def _on_host(part: LocalPart, dtype: torch.dtype) -> LocalPart:
    if part.stream is not None:
        rounded = round_stochastically(part.tensor, part.offset, part.stream)
        return replace(part, tensor=rounded.to("cpu"))
    keep = dtype if part.tensor.is_floating_point() else part.tensor.dtype
    return replace(part, tensor=part.tensor.to(keep, copy=True).to("cpu"))


def count_changed_bf16(
    before: Sequence[LocalPart], after: Sequence[LocalPart], unchanged: int = 0
) -> tuple[int, int]:
    """Count (changed, all) elements of this rank's floating-point parts, compared as bfloat16.

    Args:
        before, after: copies of this rank's parts, in the same order. Parts of adapters are not
            counted.
        unchanged: number of elements that were not copied, and are counted.
    """
    changed, total = 0, unchanged
    for old, new in zip(before, after, strict=True):
        if new.tensor.is_floating_point() and not lora_factors.is_factor(new.name):
            differs = old.tensor.to(torch.bfloat16) != new.tensor.to(torch.bfloat16)
            changed += int(differs.sum())
            total += new.tensor.numel()
    return changed, total


class ChangedShare:
    """Metric `learner/params_changed_fraction_bf16`: share of elements that changed between snapshots.

    It compares the last two snapshots over all ranks. A thread counts while the step after the second
    snapshot runs.

    An update far smaller than a weight is rounded away when the weight is published in bfloat16. A
    share near 0 means that generation does not see what the learner learns. Stochastically rounded
    weights are drawn again for each version, so their share says little.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(1, "changed")
        self._last: list[LocalPart] | None = None
        self._counting: Future[tuple[int, int]] | None = None

    def copied(self, parts: list[LocalPart], unchanged: int) -> None:
        """Start to compare a new snapshot, `parts`, with the last one. It must not change any more.

        `unchanged`: see `count_changed_bf16`.
        """
        if self._last is not None:
            args = self._last, parts, unchanged
            self._counting = self._threads.submit(count_changed_bf16, *args)
        self._last = parts

    def take(self, device: torch.device) -> dict[str, float]:
        """Return the metric; {} unless a second snapshot was taken since the last call.

        Raises: `StalledError` after `timeout_s`.
        Waits for: the count, then all ranks.
        """
        counting, self._counting = self._counting, None
        if counting is None:
            return {}
        try:
            summed = torch.tensor(
                counting.result(self._timeout_s), dtype=torch.int64, device=device
            )
        except TimeoutError:
            raise StalledError(
                f"the elements that changed between two snapshots were not counted after "
                f"{self._timeout_s:g} s, a share of learner.step_timeout_s: memory that swaps, or no "
                "free core"
            ) from None
        dist.all_reduce(summed)
        changed, total = summed.tolist()
        return {"learner/params_changed_fraction_bf16": changed / total}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._last = self._counting = None


def _checkpoint_buffers(policy: PolicyLM) -> Iterator[tuple[str, Tensor]]:
    stored = cast(dict[str, Any], policy.lm.state_dict(keep_vars=True))
    for name, buffer in policy.named_buffers():
        if checkpoint_name(name) in stored:
            yield checkpoint_name(name), buffer
