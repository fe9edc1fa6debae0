"""Which process becomes which learner rank, when ranks are started and hot spares wait.

A hot spare is a process that has imported all that a rank needs and belongs to no group yet
(`learner.spares`). After a loss all ranks begin anew in processes that were in no group: what a library
counts for itself in each process (DeepSpeed), and a collective that waits for a dead rank (NCCL), would
stay with those that were. So what spares save is the start of as many processes, and the search for
the room of as many.

    a spare, for as many ranks as there are spares, the lost ones first
    else a new process, in the room that there is
    else, with learner.on_loss = "shrink", no rank
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TypeVar

S = TypeVar("S")

_RANK = re.compile(r"learner-(\d+)")


def rank_of(process: str) -> frozenset[int]:
    """The rank that a process has by its name, such as "learner-1"; none for any other."""
    found = _RANK.fullmatch(process)
    return frozenset() if found is None else frozenset({int(found[1])})


def seats(num_ranks: int, lost: Collection[int], spares: Sequence[S]) -> tuple[S | None, ...]:
    """For each of `num_ranks` ranks the spare that takes it, or None for a new process.

    Every spare takes one rank at most, in their order; `lost` ranks come first, then the lowest. A rank
    that was lost and is left out of a smaller group needs none.
    """
    first = sorted(rank for rank in set(lost) if 0 <= rank < num_ranks)
    order = [*first, *(rank for rank in range(num_ranks) if rank not in set(first))]
    taken = dict(zip(order, spares, strict=False))
    return tuple(taken.get(rank) for rank in range(num_ranks))


def told(taken: Sequence[object | None], lost: Collection[int]) -> str:
    """What is done with which rank, in one line. `taken` is from `seats`, of what can be shown."""
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
