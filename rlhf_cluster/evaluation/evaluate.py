"""One evaluation: answers to held-out prompts by one version, and the numbers that they give."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cluster.errors import RlhfError, WorkerError
from rlhf_cluster.failures import is_group_failure
from rlhf_cluster.pipeline import generate_and_score
from rlhf_cluster.ports import GenerationPort, ScoringPort
from rlhf_cluster.records import GroupSummary, Prompt, Sampling, Ticket
from rlhf_cluster.util.waiting import gather_or_cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Outcomes of held-out prompts, each kind in the order of the prompts."""

    answers: Sequence[GroupSummary]
    failures: Sequence[RlhfError]


async def evaluate(
    generation: GenerationPort,
    scoring: ScoringPort,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    version: int,
    at_once: int | None = None,
) -> Evaluation:
    """Answer held-out prompts with `version`, which must be live, and score them.

    A prompt that no worker could answer or score is one of `failures`. `at_once` limits the prompts in
    flight, so that groups to train on do not queue behind all of them. Raises `WorkerError` when a
    token came from other weights, and what ends a run (`rlhf_cluster.failures`).
    """
    turns = asyncio.Semaphore(at_once or max(1, len(prompts)))

    async def one(number: int, prompt: Prompt) -> GroupSummary | RlhfError:
        ticket = Ticket(number=number, version=version, purpose="evaluate")
        try:
            async with turns:
                _, summary = await generate_and_score(
                    lambda: generation.generate(ticket, prompt, sampling), scoring.score
                )
        except RlhfError as error:
            if not is_group_failure(error):
                raise
            return error
        for other in (summary.oldest_version, summary.newest_version):
            if other not in (version, None):
                raise WorkerError(
                    f"evaluation of version {version}: group {summary.group_id} was sampled with "
                    f"version {other}"
                )
        return summary

    outcomes = await gather_or_cancel(one(number, prompt) for number, prompt in enumerate(prompts))
    return Evaluation(
        answers=[outcome for outcome in outcomes if isinstance(outcome, GroupSummary)],
        failures=[outcome for outcome in outcomes if isinstance(outcome, RlhfError)],
    )


def reward_of(answer: GroupSummary, weights: Mapping[str, float]) -> float | None:
    """Return the mean reward of the answers to one prompt.

    That is the weighted sum of the named parts, or the run's own reward where `weights` is empty. None
    where a part is missing: the scorer of a watched reward failed.
    """
    if not weights:
        return float(np.mean(answer.rewards))
    if weights.keys() - answer.parts.keys():
        return None
    return math.fsum(weight * answer.parts[name] for name, weight in weights.items())


def point_metrics(
    name: str, found: Evaluation, weights: Mapping[str, float], version: int, lag_steps: int
) -> dict[str, float]:
    """Return the metrics of one point of the curve of the set `name`, as the metric table names them.

    The standard error is over prompts: several answers to one prompt are not independent. It is left
    out with fewer than two prompts, and the mean without any.
    """
    rewards = [reward_of(answer, weights) for answer in found.answers]
    known = [reward for reward in rewards if reward is not None]
    num_answers = sum(answer.num_rollouts for answer in found.answers)
    values = {
        "set_answers": float(num_answers),
        "set_failed_prompts": float(len(found.failures) + len(rewards) - len(known)),
        "set_version": float(version),
        "set_lag_steps": float(lag_steps),
    }
    if known:
        values["set_reward_mean"] = float(np.mean(known))
    if len(known) > 1:
        values["set_reward_error"] = float(np.std(known, ddof=1) / math.sqrt(len(known)))
    if num_answers:
        values["set_length_mean_tokens"] = sum(a.num_tokens for a in found.answers) / num_answers
    return {f"evaluation/{metric}/{name}": value for metric, value in values.items()}
