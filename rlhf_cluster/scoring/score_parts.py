"""Score parts of the pools, and the reward of each rollout that is computed from them.

    answers --clip--> parts --objective--> reward
       |
       +--> watched: logged, never optimised

Each pool of a run serves some rewards and models (`Scoring.served_by`). It returns their answers
unweighted, as one `ScorePart`.

Promises:
- `parts` has exactly the rewards that are optimised, as the objective sees them. A watched reward
  reaches neither the objective nor the reward;
- `watched` has the scores of rewards with `watch = true`, the details of all (`<name>.<detail>`),
  a score before it was clipped (`<name>.unclipped`), and what a part adds to the reward
  (`<name>.counted`) if that is not its weight times itself. The reward is the sum of what its
  parts add;
- nothing depends on which pool gave an answer: rewards are in the order of the configuration, and
  `scorer_version` is equal if the rewards' settings, their models and the objective are;
- an answer that is missing, duplicated, or of another number of rollouts raises.

Shapes: B rollouts, R answers: B or, with a greedy response, B + 1; S steps; T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from xxhash import xxh3_128_hexdigest

from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.errors import RecordError, ScoringError

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardAnswer:
    """Answer of one reward: [R] rows of its score and its details; [R][S] the scores of steps."""

    rows: Sequence[Row]
    steps: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePart:
    """Answers of one pool for one group.

    `rewards` by name; None for a watched reward that failed. `versions` of these rewards, by name.
    `logprobs` by model (`config.pools.MODELS`): [B] arrays [T] float32, in nats.
    `reference_version`: of the newest reference that these may have used, -1 without a reference.
    """

    rewards: Mapping[str, RewardAnswer | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    logprobs: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    reference_version: int = -1


V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Reward of one rollout, and the parts that it is made of; see the module."""

    reward: float
    parts: dict[str, float]
    watched: dict[str, float]
    step_rewards: np.ndarray  # [S] float64, weighted


class InfiniteSum(ScoringError):
    """The sum of a group's rewards is not finite."""


def join_parts(
    parts: Sequence[ScorePart], scoring: Scoring, group_id: str, is_trained: bool
) -> ScorePart:
    """Join the answers of all pools. Raises `RecordError` where one is missing, or came twice."""
    everything = ScorePart(
        rewards=_merge([part.rewards for part in parts], group_id),
        versions=_merge([part.versions for part in parts], group_id),
        logprobs=_merge([part.logprobs for part in parts], group_id),
        reference_version=max((part.reference_version for part in parts), default=-1),
    )
    there = everything.rewards.keys() | everything.logprobs.keys()
    wanted = {reward.name or reward.type for reward in scoring.rewards}
    if missing := sorted((wanted | scoring.models if is_trained else wanted) - there):
        raise RecordError(
            f"group {group_id}: no pool gave {missing[0]!r}; there are {sorted(there)}. This is a "
            "fault of the system"
        )
    return everything


def compute_scores(
    found: ScorePart, scoring: Scoring, num_steps: Sequence[int], group_id: str
) -> list[Scores]:
    """Compute the scores of each response, [R], from all answers.

    `num_steps`: the number of reasoning steps of each response. Raises `InfiniteSum`; `RecordError`
    for answers of another number of responses or steps.
    """
    parts: list[dict[str, float]] = [{} for _ in num_steps]
    watched: list[dict[str, float]] = [{} for _ in num_steps]
    step_rewards = [np.zeros(size) for size in num_steps]
    for config in scoring.rewards:
        name = config.name or config.type
        answer = found.rewards[name]
        if answer is None:
            continue
        _check_shape(answer, name, num_steps, group_id)
        for index, (score, *details) in enumerate(answer.rows):
            named = zip(config.details, details, strict=True)
            watched[index] |= {f"{name}.{detail}": value for detail, value in named}
            if config.clip is not None:
                watched[index][f"{name}.unclipped"] = score
                score = min(max(score, config.clip[0]), config.clip[1])
            (watched if config.watch else parts)[index][name] = score
        if answer.steps is not None and not config.watch:
            for total, own in zip(step_rewards, answer.steps, strict=True):
                total += config.weight * np.array(own)
    return [
        _sum_parts(scoring, group_id, *one)
        for one in zip(parts, watched, step_rewards, strict=True)
    ]


def scorer_version(scoring: Scoring, versions: Mapping[str, str]) -> str:
    """Return a digest of everything that a reward depends on. `versions`: of every reward by name."""
    rewards = {
        name: [versions[name], config.weight, config.clip, config.watch]
        for config in scoring.rewards
        for name in (config.name or config.type,)
    }
    return digest([rewards, scoring.objective.model_dump(mode="json"), scoring.step_separator])


def digest(value: Any) -> str:
    """Return a digest of a JSON value, 16 characters."""
    return xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())[:16]


def _sum_parts(
    scoring: Scoring,
    group_id: str,
    parts: dict[str, float],
    watched: dict[str, float],
    step_rewards: np.ndarray,
) -> Scores:
    weights = {r.name or r.type: r.weight for r in scoring.rewards if not r.watch}
    counted = scoring.objective.count_parts(parts, weights)
    try:
        reward = math.fsum(counted.values())
    except (OverflowError, ValueError):  # sums that overflow, infinities of both signs
        reward = math.nan
    if not math.isfinite(reward):
        raise InfiniteSum(
            f"the sum of rewards, group {group_id}: [infinite] the sum of {counted}, of the "
            f"parts {parts}, is not finite; lower the weights"
        )
    if scoring.objective.type != "weighted_sum":
        watched |= {f"{name}.counted": value for name, value in counted.items()}
    return Scores(reward=reward, parts=parts, watched=watched, step_rewards=step_rewards)


def _check_shape(answer: RewardAnswer, name: str, num_steps: Sequence[int], group_id: str) -> None:
    steps = None if answer.steps is None else [len(own) for own in answer.steps]
    if len(answer.rows) != len(num_steps) or steps not in (None, list(num_steps)):
        raise RecordError(
            f"group {group_id}: the reward {name!r} has {len(answer.rows)} rows with steps {steps}; "
            f"the responses have {list(num_steps)} steps. This is a fault of the system"
        )


def _merge(mappings: Sequence[Mapping[str, V]], group_id: str) -> dict[str, V]:
    found: dict[str, V] = {}
    for mapping in mappings:
        if twice := sorted(found.keys() & mapping.keys()):
            raise RecordError(
                f"group {group_id}: {twice[0]!r} came from two pools. This is a fault of the system"
            )
        found |= mapping
    return found
