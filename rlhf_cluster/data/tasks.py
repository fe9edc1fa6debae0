"""Built-in tasks: verifiable prompts generated from a seed, without a file.

Promises:
- the same seed gives the same rows on every machine;
- training rows and held-out rows never share a prompt. A hash of its text decides whether a prompt is
  held out (one in `HELD_OUT_ONE_IN`), whatever the seed, the number of rows and the worker;
- training rows may repeat; held-out rows are distinct.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Protocol

from xxhash import xxh3_64_intdigest

from rlhf_cluster.errors import DataError

Row = dict[str, str]

HELD_OUT_ONE_IN = 16
# draws after which a task has too few distinct prompts for the request
_DRAWS_PER_ROW = 100 * HELD_OUT_ONE_IN


class Task(Protocol):
    def rows(self, num: int, rng: random.Random) -> list[Row]:
        """Draw `num` independent rows with the keys `prompt` and `answer`."""
        ...


class SortDigits:
    """Six random digits and "=", such as "503917="; the answer is the digits in order, "013579"."""

    num_digits = 6

    def rows(self, num: int, rng: random.Random) -> list[Row]:
        rows = []
        for _ in range(num):
            digits = rng.choices("0123456789", k=self.num_digits)
            rows.append({"prompt": "".join(digits) + "=", "answer": "".join(sorted(digits))})
        return rows


TASKS: Mapping[str, Task] = {"sort_digits": SortDigits()}


def train_rows(task: str, seed: str | int, block: int, num: int) -> list[Row]:
    """Return block `block` of the endless stream of training rows, with `num` rows."""
    rng = random.Random(f"{task}/train/{seed}/{block}")
    rows: list[Row] = []
    for _ in range(_DRAWS_PER_ROW):
        rows += [r for r in find_task(task).rows(num, rng) if not is_held_out(r["prompt"])]
        if len(rows) >= num:
            return rows[:num]
    raise DataError(f"task {task!r}: nearly all of its prompts are held out, none left to train on")


def held_out_rows(task: str, seed: int, num: int) -> list[Row]:
    """Return `num` distinct rows that no training stream contains."""
    rng = random.Random(f"{task}/held_out/{seed}")
    rows: dict[str, Row] = {}
    for _ in range(_DRAWS_PER_ROW):
        for row in find_task(task).rows(num, rng):
            if is_held_out(row["prompt"]):
                rows.setdefault(row["prompt"], row)
        if len(rows) >= num:
            return list(rows.values())[:num]
    raise DataError(
        f"task {task!r}: found only {len(rows)} distinct held-out prompts, {num} are asked for. "
        "Lower evaluation.num_prompts"
    )


def is_held_out(prompt: str) -> bool:
    return xxh3_64_intdigest(prompt.encode()) % HELD_OUT_ONE_IN == 0


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise DataError(f"task {name!r} is unknown; known: {', '.join(TASKS)}")
    return TASKS[name]
