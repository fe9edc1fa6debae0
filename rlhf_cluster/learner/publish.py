"""The parts of a version of the weights that one learner rank writes.

Promises: names and shapes are those of the Hugging Face checkpoint that training started from, also
when adapters are trained (they are merged into a copy, see `lora.merged`) on weights in 4 bits
(published as what these stand for); tied tensors appear
once; all ranks' parts hold every element once. Without adapters nothing is communicated: each rank
reads its own memory.

For versions of format `adapter` there are also the parts that readers merge from
(`weights.formats.lora_factors`). What never changes is copied only when it is written, beside a step.
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
    """This rank's share of every tensor of the checkpoint. A share may be empty.

    `as_adapters` gives what is written between anchors: adapters, and, marked by their `scale` and
    not to be stored, the weights that readers merge from them and from `anchor_parts`. What is
    merged gets the streams of version `streams_of`, if there is one, by which `host_copy` rounds it.

    Parts may be views of the live weights: copy them before the next step. Buffers that belong to
    the checkpoint come from rank 0 whole. With adapters every rank must take part.
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
    """Name and whole shape of every tensor that all ranks' `local_parts` make up together."""
    buffers = _checkpoint_buffers(cast(PolicyLM, model.module))
    shapes = {
        checkpoint_name(name): shape
        for name, shape in (qlora.stands_for(model.module, part) for part in model.shards())
        if not lora.is_adapter(name)
    }
    return shapes | {name: tuple(buffer.shape) for name, buffer in buffers}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """This rank's part of all that no step changes where adapters are trained, not copied."""

    parts: Sequence[LocalPart]
    base_dtype: torch.dtype
    """In what type weights under adapters are stored."""
    num_unadapted: int
    """Floating-point elements that are not under an adapter."""


def frozen(model: ShardedModel, dtype: torch.dtype) -> Frozen:
    """Weights under adapters are stored in `dtype` where it holds all of them to the bit, in float32
    otherwise. Waits for all ranks."""
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
    """Copies in host memory of what never changes, as the first version stores it. Any thread may
    call this, beside a step."""
    for part in frozen.parts:
        weight = qlora.unpacked(model, part)
        name = checkpoint_name(weight.name)
        if lora.is_adapted(weight.name):
            yield _on_host(replace(weight, name=name + lora_factors.BASE), frozen.base_dtype)
        else:
            yield _on_host(replace(weight, name=name), dtype)


class Bases:
    """What this rank can write a version against: the last one that it wrote, or, where versions are
    adapters, its last anchor."""

    def __init__(self, rank: int, weights_format: str) -> None:
        self._rank, self._format = rank, weights_format
        self._last: ShardBase | None = None

    def find(self, version: int | None) -> ShardBase | None:
        """Raises `WeightError` unless `version`, if there is one, is that version."""
        if version is None:
            return None
        last = self._last
        if last is None or last.version != version:
            holds = last.version if last else "none"
            raise WeightError(
                f"learner rank {self._rank} holds version {holds} and cannot store what changed "
                f"since version {version}. Publish in full"
            )
        return last

    def wrote(self, version: int, parts: Sequence[LocalPart], base: ShardBase | None) -> None:
        if self._format == "delta":
            self._last = ShardBase(version=version, parts={part.name: part for part in parts})
        elif self._format == "adapter" and base is None:
            self._last = ShardBase(version=version, parts={})


def host_copy(parts: Iterable[LocalPart], dtype: torch.dtype) -> list[LocalPart]:
    """Copies in host memory, floating-point ones in `dtype`, the parts of adapters in float32.

    What has a stream is rounded by it, which `dtype` bfloat16 goes with.
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
    """(changed, all) elements of this rank's floating-point parts, compared as bfloat16.

    Both are copies of the same rank's parts, in the same order. Parts of adapters do not count;
    `unchanged` elements that were not copied do.
    """
    changed, total = 0, unchanged
    for old, new in zip(before, after, strict=True):
        if new.tensor.is_floating_point() and not lora_factors.is_factor(new.name):
            differs = old.tensor.to(torch.bfloat16) != new.tensor.to(torch.bfloat16)
            changed += int(differs.sum())
            total += new.tensor.numel()
    return changed, total


class ChangedShare:
    """`learner/params_changed_fraction_bf16`: how much of all ranks' parts differs between the last two
    snapshots, counted in a thread, beside the step after the second of them.

    An update far smaller than a weight is lost when the weight is published in bfloat16: a share
    near 0 says that generation does not see what the learner learns. Weights that a stream rounds
    are drawn again for each version: their share says little.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(1, "changed")
        self._last: list[LocalPart] | None = None
        self._counting: Future[tuple[int, int]] | None = None

    def copied(self, parts: list[LocalPart], unchanged: int) -> None:
        """A snapshot was taken: `parts`, which nobody writes to."""
        if self._last is not None:
            args = self._last, parts, unchanged
            self._counting = self._threads.submit(count_changed_bf16, *args)
        self._last = parts

    def take(self, device: torch.device) -> dict[str, float]:
        """Empty unless a second snapshot was taken since the last call. Waits for: the count, and
        then all ranks. Raises `StalledError` after `timeout_s`."""
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
