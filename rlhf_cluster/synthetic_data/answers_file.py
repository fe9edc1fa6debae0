"""Finished prompts of a data set, the file that holds them, and progress lines.

    groups.jsonl    one line per prompt, in the order in which prompts were finished

Promises:
- a complete line is in the file when `append` returns, and survives the death of any process;
- a last line truncated by a crash is deleted before the next one is written, and its prompt is
  treated as not done;
- a damaged line anywhere else, or a duplicated prompt, raises `DataError`;
- texts are those that the rewards read.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import DataError, RlhfError

GROUPS = "groups.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A critique by a principle, and the revision after it, as the model wrote them."""

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Revised:
    """A response after its last revision.

    `unusable` counts the replies that could not be used as a critique or revision, by problem
    (`synthetic_data.revise_answers.PROBLEMS`).
    """

    text: str
    reward: float
    parts: Mapping[str, float]
    num_tokens: int
    rounds: tuple[Round, ...]
    unusable: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unrevised:
    """A response whose revision was abandoned because of `problem`; it is not scored."""

    text: str
    num_tokens: int
    problem: str
    rounds: tuple[Round, ...]
    unusable: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One scored response. `step_rewards`: rewards of the completions from the end of each step."""

    text: str
    reward: float
    parts: Mapping[str, float]
    num_tokens: int
    cut: bool  # ended by the limit of tokens
    step_rewards: tuple[tuple[float, ...], ...] | None = None
    revised: Revised | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All responses to one prompt. `number` is the prompt's index in the stream of prompts."""

    number: int
    prompt_id: str
    prompt: str | list[dict[str, str]]
    answers: tuple[Answer, ...]
    scorer_version: str = ""
    unrevised: tuple[Unrevised, ...] = ()

    def to_line(self) -> bytes:
        text = json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Answers:
        """Parse a line. Raises `ValueError` for anything that `to_line` does not write."""
        try:
            tree = json.loads(line)
            answers = tuple(_answer(**each) for each in tree.pop("answers"))
            lost = tuple(Unrevised(**_rounds(each)) for each in tree.pop("unrevised", ()))
            return cls(answers=answers, unrevised=lost, **tree)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the answers to a prompt ({error})") from error


class AnswersFile:
    """Open file of finished prompts, of one process at a time. Threads that append take turns."""

    def __init__(self, path: Path) -> None:
        """Open the file for further prompts. Raises `DataError` for a damaged one."""
        self.path = path
        _cut_torn_line(path)
        self.done = {answers.number for answers in read_answers(path)}
        self._file = path.open("ab", buffering=0)
        self._turn = threading.Lock()

    def append(self, answers: Answers) -> None:
        """Write the answers to one prompt.

        Raises `DataError` where the file has the prompt already or the line cannot be written.

        Waits for: the disk, behind other threads. The caller has the deadline.
        """
        with self._turn:
            self._append(answers)

    def close(self) -> None:
        """Close the file, unless a write is still in progress. Waits for: nothing.

        A file whose write timed out stays open: the system could reuse the number of a closed file for
        another one before the disk answers.
        """
        if self._turn.acquire(blocking=False):
            try:
                self._file.close()
            finally:
                self._turn.release()

    def _append(self, answers: Answers) -> None:
        if answers.number in self.done:
            raise DataError(f"{self.path}: prompt {answers.number} is there already; each is once")
        rest = memoryview(answers.to_line())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise DataError(
                f"{self.path}: the answers to prompt {answers.number} cannot be written ({error}). "
                "Free space there, and give the same command again: it resumes from what is written"
            ) from error
        self.done.add(answers.number)


def read_answers(path: Path) -> Iterator[Answers]:
    """Yield the answers in the order of the file, without a torn last line. Raises `DataError`."""
    seen: set[int] = set()
    for line_number, line in _whole_lines(path):
        try:
            answers = Answers.from_line(line)
            if answers.number in seen:
                raise ValueError(f"prompt {answers.number} for the second time")
        except ValueError as error:
            raise DataError(
                f"{path}, line {line_number}: damaged ({error}). Remove that line; the same command "
                "then samples its prompt again"
            ) from error
        seen.add(answers.number)
        yield answers


def in_order(path: Path) -> Iterator[Answers]:
    """Yield the answers in the order of their prompts, one at a time in memory. Raises `DataError`."""
    places: list[tuple[int, int]] = []
    offset = 0
    for answers, (_, line) in zip(read_answers(path), _whole_lines(path), strict=True):
        places.append((answers.number, offset))
        offset += len(line) + 1
    if not places:
        return
    with path.open("rb") as file:
        for _, place in sorted(places):
            file.seek(place)
            yield Answers.from_line(file.readline())


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and content, without the newline, of every complete line."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line[:-1]


def _answer(
    *,
    step_rewards: list[list[float]] | None = None,
    revised: dict[str, Any] | None = None,
    **others: Any,
) -> Answer:
    steps = None if step_rewards is None else tuple(tuple(each) for each in step_rewards)
    own = None if revised is None else Revised(**_rounds(revised))
    return Answer(step_rewards=steps, revised=own, **others)


def _rounds(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "rounds": tuple(Round(**each) for each in tree["rounds"])}


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    whole = sum(len(line) + 1 for _, line in _whole_lines(path))
    if whole < path.stat().st_size:
        os.truncate(path, whole)


class Progress:
    """Counts of finished prompts. `add` returns True every `every` prompts; `take` returns metrics."""

    def __init__(self, every: int, prompts: int, samples_per_prompt: int) -> None:
        """Begin with `prompts` that are already done."""
        self._every, self._samples = every, samples_per_prompt
        self.prompts = prompts
        self.prompt_s = 0.0  # wall time of one of the last prompts
        self._new: list[Answers] = []
        names = ("discarded_total", "unrevised_total", "unusable_replies_total")
        self._totals: dict[str, Counter[str]] = {name: Counter() for name in names}
        self._began: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether prompts were added after the last `take`."""
        return bool(self._new)

    def begin(self, now: float) -> None:
        """Start the wall clock of the next metrics. `now` is in seconds."""
        self._began = now

    def add(self, answers: Answers) -> bool:
        self._new.append(answers)
        self.prompts += 1
        revised = [each.revised for each in answers.answers if each.revised is not None]
        for each in (*revised, *answers.unrevised):
            self._totals["unusable_replies_total"].update(each.unusable)
        for lost in answers.unrevised:
            self._totals["unrevised_total"][lost.problem] += 1
        return len(self._new) >= self._every

    def discard(self, error: RlhfError) -> None:
        self._totals["discarded_total"][type(error).__name__] += 1

    def take(self, now: float) -> Mapping[str, float]:
        """Return metrics by name of the prompts added after the last call. There must be one."""
        groups, self._new = self._new, []
        answers = [answer for group in groups for answer in group.answers]
        took = 0.0 if self._began is None else now - self._began
        self._began = now
        self.prompt_s = took / len(groups)
        tokens = sum(answer.num_tokens for answer in answers)
        found = {
            "generate/prompts": float(self.prompts),
            "generate/samples": float(self.prompts * self._samples),
            "generate/tokens_per_s": tokens / took if took > 0 else 0.0,
        }
        for name, counts in self._totals.items():
            found |= {f"generate/{name}/{key}": float(number) for key, number in counts.items()}
        if answers:  # there are none if the revisions of all were abandoned
            best = [max(a.reward for a in group.answers) for group in groups if group.answers]
            found |= {
                "generate/reward_mean": sum(answer.reward for answer in answers) / len(answers),
                "generate/best_reward_mean": sum(best) / len(best),
                "generate/cut_fraction": sum(answer.cut for answer in answers) / len(answers),
            }
        if revised := [answer.revised.reward for answer in answers if answer.revised is not None]:
            found["generate/revised_reward_mean"] = sum(revised) / len(revised)
        return found
