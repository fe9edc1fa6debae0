r"""1.0 when the completion's final answer equals the expected one as mathematics, 0.0 otherwise.

Numbers, LaTeX expressions, equations, intervals, sets, tuples and matrices, as the library
math-verify reads and compares them (`1/2`, `0.5` and `\frac{2}{4}` are one answer; sets in any
order; decimals to six places).

What is compared of a text is the first line after its last `####`; else the content of its last
`\boxed{}`; else what the library finds (after words like "the answer is", else the last formula or
number). An expected answer without either mark, and without words, is read as one formula. In such
answers dollar signs do not count, and `1 1/2` and `1.5e3` are numbers.

Comparing may take for ever or all memory (`9^{9^{9^9}}`), also in C code that no signal reaches: it
runs in a child process that is killed. A comparison that ran out of time, or killed the child, is
tried against the machine: where the expected answer then equals itself in a new child, the
completion is at fault, scores 0.0 and is counted as "undecided"; else it is a `RewardFailure`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.base import RewardContext, RewardSection
from rlhf_cluster.rewards.columns import column
from rlhf_cluster.rewards.failure import RewardFailure
from rlhf_cluster.rewards.process import FunctionPool

_FUNCTION = "rlhf_cluster.rewards.maths_child:compare"
_OWN_FAULT = ("timeout", "died")


class MathsConfig(RewardSection):
    """The final answer equals that of a column, as mathematics."""

    type: Literal["maths"] = "maths"
    target_column: str = "answer"
    """Column with the expected answer: a number, LaTeX, or text with its answer marked."""
    compare_s: float = Field(default=5.0, gt=0)
    """Deadline of comparing one completion."""
    max_answer_characters: PositiveInt = 20_000
    """Only this much of the end of a completion is read."""
    processes: PositiveInt = 1
    """Child processes of each scoring worker."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of starting a child, the import of the library included."""


class Maths:
    def __init__(
        self, config: MathsConfig, context: RewardContext, pool: FunctionPool | None = None
    ) -> None:
        """Starts a child and imports the library. Raises `ConfigError` when that fails."""
        self._config = config
        self._pool = pool or FunctionPool(
            _FUNCTION, config.processes, config.start_timeout_s, context.wait_timeout_s
        )
        self._pool.check()
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()  # held for an addition only

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 a rollout. Raises `RewardFailure` without a usable target, or child."""
        expected = self._expected(prompt)
        return [self._score(expected, text) for text in completions]

    def outcomes(self) -> dict[str, float]:
        """Completions so far that are "right", "wrong" and "undecided"."""
        with self._counting:
            return {name: float(count) for name, count in self._counts.items()}

    def close(self) -> None:
        self._pool.close()

    def _expected(self, prompt: Prompt) -> str:
        target: Any = column(prompt, self._config.target_column)
        usable = isinstance(target, str | int | float) and not isinstance(target, bool)
        if not usable or not self._compare(str(target), None):
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: no answer can "
                f"be read in {type(target).__name__} {str(target)[-60:]!r}. Correct the row, or set "
                "target_column to the column with the answer",
                "column",
            )
        return str(target)

    def _score(self, expected: str, completion: str) -> float:
        text = completion[-self._config.max_answer_characters :]
        try:
            outcome = "right" if self._compare(expected, text) else "wrong"
        except RewardFailure as failure:
            if failure.reason not in _OWN_FAULT:
                raise
            if not self._compare(expected, expected):
                raise
            outcome = "undecided"
        with self._counting:
            self._counts[outcome] += 1
        return 1.0 if outcome == "right" else 0.0

    def _compare(self, expected: str, completion: str | None) -> bool:
        arguments = {"expected": expected, "completion": completion}
        return bool(self._pool.call(arguments, self._config.compare_s))


def final_answer(text: str) -> str | None:
    """The marked answer of a text by the rule above; None where nothing marks one."""
    _, marker, after = text.rpartition("####")
    if marker:
        lines = after.strip().splitlines()
        return lines[0] if lines else ""
    _, marker, after = text.rpartition("\\boxed{")
    if not marker:
        return None
    depth = 1
    for place, character in enumerate(after):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return after[:place]
    return after
