"""Moving reference: decides when the reference moves, and writes its weights.

References are versions of a separate weight store, each with the number of the policy version that was
live when it was made. Version 0 is the policy as reinforcement learning begins. When a policy version
v goes live, `every` or more after the last reference r, the reference moves:

    fixed       never
    periodic    reference := policy of version v
    ema         reference := k * reference + (1 - k) * policy of version v,
                k = decay^((v - r) / every)

Versions are skipped when publishing is slow. With the exponent, the weight of old versions decays per
version, not per publish. The average is kept in float32: in bfloat16 a step of (1 - k) times a small
change would be lost completely. An average of equal weights is exactly these weights.

Promises:
- A reference is written once, by the one process that owns the `ReferenceKeeper`, and read by all.
  Workers that join later hold the same bytes, verified by digest.
- A reference is determined by the versions that went live and nothing else.
- It survives a power cut.
- An earlier attempt of the run, or a call past its deadline, does not write one.
- The last two are kept, so a worker that is loading one while it is replaced gets it complete, or a
  `WeightError`.

Memory: `max_file_bytes` of one reference and one policy version. Disk: two references, of the size
of a published version, as float32 with `ema`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.sections.values import (
    EmaReference,
    FixedReference,
    ReferenceUpdate,
)
from rlhf_cluster.util.slow_disk import check_not_abandoned
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import LocalPart
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.writer_fence import Writer

if TYPE_CHECKING:
    from torch import Tensor

MAX_FILE_BYTES = 2 * 10**9
KEPT = 2

_Named = Iterator[tuple[str, "Tensor"]]


class ReferenceKeeper:
    """Owner of the references in folder `root`. Serves one thread at a time; others wait."""

    def __init__(
        self,
        root: str | Path,
        update: ReferenceUpdate,
        max_file_bytes: int = MAX_FILE_BYTES,
        fence: str | Path | None = None,
    ) -> None:
        """Write nothing yet. `fence` is the weight store whose writer may move the reference."""
        self._root, self._fence = Path(root), fence
        self._turn = threading.Lock()
        self._update = update
        self._max_file_bytes = max_file_bytes

    def follow(self, live: WeightVersion, writer: Writer | None = None) -> WeightVersion:
        """Return the reference for the live policy version `live`: a new one, or the one before.

        `writer` is the attempt that published `live`. Waits for: an earlier call that timed out and
        still runs. Raises `WeightError`: a version cannot be read, or the reference cannot be written;
        `FencedError`: another attempt has begun; `StalledError`: this call has timed out.
        """
        with self._turn:
            check_not_abandoned(self._root)
            return self._follow(live, writer)

    def _follow(self, live: WeightVersion, writer: Writer | None) -> WeightVersion:
        current = store.latest(self._root)
        if current is None:
            return self._write(live, self._first(live), writer)
        update, gap = self._update, live.version - current.version
        if isinstance(update, FixedReference) or gap < update.every:
            return current
        if isinstance(update, EmaReference):
            kept = update.decay ** (gap / update.every)
            return self._write(live, average(_tensors(current), _tensors(live), kept), writer)
        return self._write(live, _tensors(live), writer)

    def _first(self, live: WeightVersion) -> _Named:
        if isinstance(self._update, EmaReference):
            return _map_tensors(_tensors(live), _in_float32)
        return _tensors(live)

    def _write(self, live: WeightVersion, tensors: _Named, writer: Writer | None) -> WeightVersion:
        """Write a reference, one shard file after another, so that not all tensors are in memory.

        The files are synced, because a checkpoint, which survives a power cut, may need them.
        """
        attempt = 0 if writer is None else writer.attempt
        sinks = [FileSink(self._root, fsync=True, attempt=attempt)]
        reports = [
            send_shard(sinks, live.version, number, parts)
            for number, parts in enumerate(_files(tensors, self._max_file_bytes))
        ]
        return store.commit(
            self._root,
            live.version,
            reports,
            keep=KEPT,
            fsync=True,
            writer=writer,
            fence=self._fence,
        )


def average(reference: _Named, policy: _Named, kept: float) -> _Named:
    """Yield kept * reference + (1 - kept) * policy, by name, in float32.

    Tensors that are not floating-point are the policy's. Raises `WeightError` when the names differ.
    """
    for ours, theirs in zip_longest(reference, policy, fillvalue=("nothing", None)):
        (name, old), (other, new) = ours, theirs
        if name != other or old is None or new is None:
            raise WeightError(
                f"the reference has {name} where the policy has {other}: they are not versions of "
                "one model. Start the run in a new folder"
            )
        yield name, old.lerp(new.float(), 1 - kept) if new.is_floating_point() else new


def _tensors(version: WeightVersion) -> _Named:
    return store.read(version.path, expected_digest=version.digest)


def _map_tensors(tensors: _Named, change: Callable[[Tensor], Tensor]) -> _Named:
    return ((name, change(tensor)) for name, tensor in tensors)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _files(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[LocalPart]]:
    """Yield the tensors in lists of at most `max_bytes`, or of one tensor that is larger."""
    parts: list[LocalPart] = []
    filled = 0
    for name, tensor in tensors:
        if parts and filled + tensor.nbytes > max_bytes:
            yield parts
            parts, filled = [], 0
        parts.append(
            LocalPart(name=name, shape=tuple(tensor.shape), offset=0, tensor=tensor.reshape(-1))
        )
        filled += tensor.nbytes
    yield parts
