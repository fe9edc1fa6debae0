"""Which weights the reference has, and when it moves: decided and written in one place.

References are versions of a weight store of their own, each under the number of the policy version
that was live when it was made. Version 0 is the policy as reinforcement learning begins. When a
policy version v goes live, `every` or more after the last reference r, the reference moves:

    fixed       never
    periodic    reference := policy of version v
    ema         reference := k * reference + (1 - k) * policy of version v,
                k = decay^((v - r) / every)

Versions are skipped when publishing is slow; the exponent makes the average forget by versions, not
by publishes. The average is kept in float32: in bfloat16 a step of (1 - k) times a small change
would be lost altogether. An average of equal weights is those weights exactly.

Promises: a reference is written once, by the one process that owns the `ReferenceKeeper`, and read
by all: workers that join later hold the same bytes, verified by digest; what it is follows from the
versions that went live and nothing else; it survives a power cut; an attempt of the run that was
given up, and a call past its deadline, write none. The last two are kept, so a worker
that is loading one while it is replaced gets it whole, or a `WeightError`.

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
from rlhf_cluster.sections.reference_update import (
    EmaReference,
    FixedReference,
    ReferenceUpdate,
)
from rlhf_cluster.util.slow_disk import check_wanted
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
    """Owns the references in folder `root`. Serves one thread at a time; others wait."""

    def __init__(
        self,
        root: str | Path,
        update: ReferenceUpdate,
        max_file_bytes: int = MAX_FILE_BYTES,
        fence: str | Path | None = None,
    ) -> None:
        """`fence` is the weight store whose writer may move the reference."""
        self._root, self._fence = Path(root), fence
        self._turn = threading.Lock()
        self._update = update
        self._max_file_bytes = max_file_bytes

    def follow(self, live: WeightVersion, writer: Writer | None = None) -> WeightVersion:
        """The reference now that the policy version `live` is live: a new one, or that of before.

        `writer` is the attempt that published `live`. Waits for: an earlier call that was given up and
        still runs. Raises `WeightError`: a version cannot be read, or the reference cannot be written;
        `FencedError`: another attempt has begun; `StalledError`: the call was given up.
        """
        with self._turn:
            check_wanted(self._root)
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
            return self._write(live, averaged(_tensors(current), _tensors(live), kept), writer)
        return self._write(live, _tensors(live), writer)

    def _first(self, live: WeightVersion) -> _Named:
        if isinstance(self._update, EmaReference):
            return _changed(_tensors(live), _in_float32)
        return _tensors(live)

    def _write(self, live: WeightVersion, tensors: _Named, writer: Writer | None) -> WeightVersion:
        """One shard file after another, so that not all tensors are in memory at once. Synced: a
        checkpoint, which survives a power cut, may need it."""
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


def averaged(reference: _Named, policy: _Named, kept: float) -> _Named:
    """kept * reference + (1 - kept) * policy, by name, in float32; other than floating-point
    tensors are the policy's. Raises `WeightError` when the names differ."""
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


def _changed(tensors: _Named, change: Callable[[Tensor], Tensor]) -> _Named:
    return ((name, change(tensor)) for name, tensor in tensors)


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _files(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[LocalPart]]:
    """The tensors in runs of at most `max_bytes`, or of one tensor that is larger."""
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
