"""Assignment of processes to learner ranks when hot spares are ready.

A hot spare is a process that has imported all modules that a rank needs, and is in no process group yet
(`learner.spares`). After a failure all ranks start again in processes that were in no group. A process
that was in one may keep counters of a library (DeepSpeed), or a collective that waits for a dead rank
(NCCL). So each spare saves the start of one process, and the search for its resources.

    a spare, for as many ranks as there are spares, failed ranks first
    else a new process, in free resources
    else, with learner.on_loss = "shrink", no rank
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TypeVar

S = TypeVar("S")

_RANK = re.compile(r"learner-(\d+)")


def rank_of(process: str) -> frozenset[int]:
    """Return the rank in the name of a process, such as "learner-1"; empty for other names."""
    found = _RANK.fullmatch(process)
    return frozenset() if found is None else frozenset({int(found[1])})


def seats(num_ranks: int, lost: Collection[int], spares: Sequence[S]) -> tuple[S | None, ...]:
    """Assign spares to ranks. Returns the spare of each of `num_ranks` ranks, None for a new process.

    Spares are assigned in their order, at most one rank each: first to `lost` ranks, then to the lowest
    ranks. A `lost` rank that a smaller group does not have gets none.
    """
    first = sorted(rank for rank in set(lost) if 0 <= rank < num_ranks)
    order = [*first, *(rank for rank in range(num_ranks) if rank not in set(first))]
    taken = dict(zip(order, spares, strict=False))
    return tuple(taken.get(rank) for rank in range(num_ranks))


def told(taken: Sequence[object | None], lost: Collection[int]) -> str:
    """Describe an assignment of `seats`, `taken`, in one line of text."""
    parts = [
        f"rank {rank}{' (lost)' if rank in lost else ''} is {spare}"
        for rank, spare in enumerate(taken)
        if spare is not None
    ]
    new = [rank for rank, spare in enumerate(taken) if spare is None]
    if new:
        parts.append(
            f"{'ranks' if len(new) > 1 else 'rank'} {', '.join(map(str, new))} a new process"
        )
    return f"learner ranks from hot spares: {'; '.join(parts)}"
