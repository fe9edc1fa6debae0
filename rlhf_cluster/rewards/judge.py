"""A language model as judge, behind an OpenAI-compatible chat endpoint (`url`/chat/completions).

- `pointwise`: it rates each completion from 0 to `scale`; the score is the rating / `scale`.
- `pairwise`: each completion meets the next `opponents` ones of its group (in a circle, each pair
  once at most). A pair is judged twice, with the positions swapped, since judges prefer one of them
  (Zheng et al. 2023, arXiv:2306.05685). The score is the share of judgements that it won; a tie is
  half of one. A judge that always answers "A" therefore gives every completion 0.5.

With `principles`, each judgement is by one of them, as in RLAIF (Bai et al. 2022, arXiv:2212.08073):
which one depends on the texts that are judged, so that a pair meets the same one in both positions.

A verdict is the last `[[...]]` of the answer: a number, or A, B or C (tie). An answer without one,
or a rating off the scale, is asked again `verdict_attempts` times in all and then a `RewardFailure`:
no completion gets a score that was not given. `http_client.py` says how often and how long is asked.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from xxhash import xxh3_64_intdigest

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.http_client import (
    PATH,
    RemoteSection,
    Server,
    content_of,
    prompt_text,
    question_of,
)
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, column

_VERDICT = re.compile(r"\[\[\s*([^\[\]]{1,20}?)\s*\]\]")
_FIRST_SHARE = {"A": 1.0, "B": 0.0, "C": 0.5}
_POINTWISE = """Rate the answer to the question from 0 (useless) to {scale} (could not be better).
{criteria}Reason briefly, then end with the rating alone in double brackets, such as [[{scale}]].

<question>
{prompt}
</question>
{reference}<answer>
{completion}
</answer>"""
_PAIRWISE = """Which of two answers to the question is better? Their order and length mean nothing.
{criteria}Reason briefly, then end with [[A]], [[B]], or [[C]] where neither is better.

<question>
{prompt}
</question>
{reference}<answer A>
{completion}
</answer A>
<answer B>
{other}
</answer B>"""


class JudgeConfig(RemoteSection):
    """A language model judges the completions."""

    type: Literal["judge"] = "judge"
    url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """Base of the endpoint, such as http://judge:8000/v1; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """Name of the model at that endpoint."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """A rating of each completion, or comparisons within the group."""
    scale: PositiveInt = 10
    """Highest rating of `pointwise`; the lowest is 0."""
    opponents: PositiveInt = 2
    """Completions that each one meets at its right in `pairwise`; each meeting costs two requests."""
    criteria: str = ""
    """Text of the criteria; goes to the judge unchanged."""
    principles: tuple[str, ...] = ()
    """Principles of which each judgement is given one, after `criteria`."""
    reference_column: str | None = None
    """Column with a reference answer that the judge is shown."""
    max_tokens: PositiveInt = 1024
    """Longest answer of the judge, in its tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the judge."""
    verdict_attempts: PositiveInt = 2
    """Attempts of one judgement until it has a verdict."""
    parallel: PositiveInt = 8
    """Requests of each scoring worker at once."""
    timeout_s: PositiveFloat = 280.0
    """Deadline of one group, all its judgements."""

    @property
    def scores_alone(self) -> bool:
        return self.mode == "pointwise" and self.temperature == 0

    @model_validator(mode="after")
    def _check(self) -> JudgeConfig:
        for text in (self.criteria, *self.principles):
            if "[[" in text:
                key = "criteria" if text is self.criteria else "a principle"
                raise ValueError(f"{key} holds '[[', which marks a verdict. Write it otherwise")
        if any(not principle.strip() for principle in self.principles):
            raise ValueError("principles holds a blank text. Remove it")
        return self


class Judge:
    def __init__(self, config: JudgeConfig, context: RewardContext) -> None:
        """Read the key. Raises `ConfigError` where its environment variable is not set."""
        self._config = config
        self._server = Server(config, PATH)
        self._threads = ThreadPoolExecutor(config.parallel, thread_name_prefix="judge")

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """Scores in [0, 1]. Raises `RewardFailure` where one judgement could not be had."""
        if self._config.mode == "pointwise":
            texts = [self._question(prompt, text) for text in completions]
            return self._judgements(texts, self._rating)
        pairs = meetings(len(completions), self._config.opponents)
        if not pairs:
            raise RewardFailure(
                f"prompt {prompt.prompt_id}: pairwise judgements need two completions, and the group "
                "has one. Use mode = 'pointwise'",
                "length",
            )
        orders = [order for a, b in pairs for order in ((a, b), (b, a))]
        texts = [self._question(prompt, completions[a], completions[b]) for a, b in orders]
        return shares(orders, self._judgements(texts, _first_share), len(completions))

    def close(self) -> None:
        self._server.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _question(self, prompt: Prompt, completion: str, other: str | None = None) -> str:
        asked, reference = prompt_text(prompt.source), ""
        texts = [completion] if other is None else [completion, other]
        criteria = [self._config.criteria, *principle_of(self._config.principles, asked, texts)]
        if self._config.reference_column is not None:
            shown = column(prompt, self._config.reference_column)
            reference = f"<reference answer>\n{shown}\n</reference answer>\n"
        return (_POINTWISE if other is None else _PAIRWISE).format(
            scale=self._config.scale,
            criteria="".join(f"{text.strip()}\n" for text in criteria if text.strip()),
            prompt=asked,
            reference=reference,
            completion=completion,
            other=other,
        )

    def _judgements(self, texts: Sequence[str], read: Callable[[str], float | None]) -> list[float]:
        deadline = time.monotonic() + self._config.timeout_s
        running = [self._threads.submit(self._judgement, text, read, deadline) for text in texts]
        try:
            # Waits for: every judgement. Unblocked by: an answer, a failure, or the deadline.
            return [one.result(max(deadline - time.monotonic(), 0.0)) for one in running]
        except FutureTimeout:
            raise RewardFailure(
                f"the group's {len(texts)} judgements were not done after "
                f"{self._config.timeout_s:g} s. Raise timeout_s or parallel",
                "timeout",
            ) from None
        finally:
            for one in running:
                one.cancel()

    def _judgement(self, text: str, read: Callable[[str], float | None], deadline: float) -> float:
        config = self._config
        question = question_of(config.model, text, config.temperature, config.max_tokens)
        answer = ""
        for _ in range(self._config.verdict_attempts):
            answer = content_of(self._server.ask(question, deadline))
            verdicts = _VERDICT.findall(answer)
            found = read(verdicts[-1]) if verdicts else None
            if found is not None:
                return found
        raise RewardFailure(
            f"the judge gave no verdict in {self._config.verdict_attempts} answers; the last ends "
            f"with {answer[-80:]!r}. Raise max_tokens, or take another judge",
            "reply",
        )

    def _rating(self, verdict: str) -> float | None:
        try:
            rating = float(verdict)
        except ValueError:
            return None
        return rating / self._config.scale if 0 <= rating <= self._config.scale else None


def principle_of(
    principles: Sequence[str], prompt: str, completions: Sequence[str]
) -> Sequence[str]:
    """The one by which these completions are judged, whatever their order; none of none."""
    if not principles:
        return ()
    seed = xxh3_64_intdigest(json.dumps([prompt, *sorted(completions)]).encode())
    return (principles[seed % len(principles)],)


def meetings(count: int, opponents: int) -> list[tuple[int, int]]:
    """Pairs of `count` completions, each once, where everyone meets as many others."""
    pairs = {
        (min(a, b), max(a, b))
        for a in range(count)
        for step in range(1, opponents + 1)
        if (b := (a + step) % count) != a and step < count
    }
    return sorted(pairs)


def shares(orders: Sequence[tuple[int, int]], firsts: Sequence[float], count: int) -> list[float]:
    """The share of its judgements that each completion won; `firsts` are those of the first."""
    won, met = [0.0] * count, [0] * count
    for (first, second), share in zip(orders, firsts, strict=True):
        won[first] += share
        won[second] += 1.0 - share
        met[first] += 1
        met[second] += 1
    return [own / number for own, number in zip(won, met, strict=True)]


def _first_share(verdict: str) -> float | None:
    return _FIRST_SHARE.get(verdict.upper())
