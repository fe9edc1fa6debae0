r"""1.0 when the completion's final answer equals the expected one as mathematics, 0.0 otherwise.

`final_answer.py` says where a text states its answer. Where the expected answer is one number
(`quantities.py`) the completion's has to be one as well, of the same value: exactly, or to six places
where one has decimals, and `50\%` is 50 and 0.5. Two units that are known must be the same (5 m is not
5 cm). Everything else, such as expressions, equations, intervals, sets, tuples and matrices, the
library math-verify reads and compares (sets in any order; decimals to six places).

With `simplified`, what still has to be worked out is wrong, else restating the problem would be right:
arithmetic in place of a number (`40 + 32`, `\gcd(144, 216)`, a fraction that is not in lowest terms),
and in other answers such operations, and products of sums, as the expected answer does not have. An
equation is not a value, unless every side before its last is a name (`x = 72`) or has that value too.

An expected answer is a number, a formula, or text with its answer after `####` or in `\boxed{}`. Prose
without a mark is refused: which of its numbers is meant would be a guess.

Comparing may take for ever or all memory (`9^{9^{9^9}}`), also in C code that no signal reaches: it
runs in a child process that is killed. A comparison that ran out of time, or killed the child, is
tried against the machine: where the expected answer then equals itself in a new child, the
completion is at fault, scores 0.0 and is counted as "undecided"; else it is a `RewardFailure`.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.programs.function_pool import FunctionPool
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, column
from rlhf_cluster.rewards.rules.final_answer import target_statement
from rlhf_cluster.rewards.rules.quantities import read_formula
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection

_FUNCTION = "rlhf_cluster.rewards.rules.math_comparison:compare"
_OWN_FAULT = ("timeout", "died")
_NAMES = (
    "sin|cos|tan|cot|sec|csc|log|exp|sqrt|frac|inf|infinity|and|gcd|lcm|min|max|mod|det|percent"
)
_WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_NAMES})(?![A-Za-z]))[A-Za-z]{{3,}}")
_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mbox|begin|end|operatorname)\s?\{[^{}]*\}")
_COUNTED = re.compile(r"[^A-Za-z]*(?:[A-Za-z]+\W*){1,4}")


class MathsConfig(ReasoningSection):
    """The final answer equals that of a column, as mathematics."""

    type: Literal["maths"] = "maths"
    target_column: str = "answer"
    """Column with the expected answer: a number, LaTeX, or text with its answer marked."""
    compare_s: float = Field(default=5.0, gt=0)
    """Deadline of comparing one completion."""
    max_answer_characters: PositiveInt = 20_000
    """Characters that are read at the end of a completion without its reasoning."""
    simplified: bool = True
    """An answer must be worked out; without this key `40 + 32` is right where 72 is."""
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
        """1.0 or 0.0 per rollout. Raises `RewardFailure` without a usable target, or child."""
        expected = self._read_target(prompt)
        # Reasoning goes before a cut, which could lose its opening tag and let a guess count.
        texts = self._config.without_reasoning(completions)
        return [self._score(expected, text) for text in texts]

    def outcomes(self) -> dict[str, float]:
        """Completions so far that are "right", "wrong" and "undecided"."""
        with self._counting:
            return {name: float(count) for name, count in self._counts.items()}

    def close(self) -> None:
        self._pool.close()

    def _read_target(self, prompt: Prompt) -> str:
        target: Any = column(prompt, self._config.target_column)
        usable = isinstance(target, str | int | float) and not isinstance(target, bool)
        if isinstance(target, str) and is_prose(target):
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: no answer is "
                f"marked in the text that ends with {target[-60:]!r}. Put it after #### on a line of "
                "its own, or in \\boxed{}, or words of an answer in \\text{}, or set target_column to "
                "the column with the answer alone",
                "column",
            )
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
        arguments = {
            "expected": expected,
            "completion": completion,
            "simplified": self._config.simplified,
        }
        return bool(self._pool.call(arguments, self._config.compare_s))


def is_prose(target: str) -> bool:
    """Whether a target is words without a mark; a number with what it counts is none."""
    if target_statement(target) is not None or not has_words(target):
        return False
    return not (_COUNTED.fullmatch(target.strip()) and read_formula(target, is_target=True))


def has_words(text: str) -> bool:
    """Whether the text has words that are neither of mathematics nor in `\\text{}`."""
    return _WORD.search(_TEXT.sub("", text)) is not None
