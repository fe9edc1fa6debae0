"""All rewards of a run: from the rewards' answers to the parts and the reward of each rollout.

    answers --clip--> parts --objective--> reward
       |
       +--> watched: what is shown and never optimised

Promises:
- `parts` has exactly the rewards that are optimised, as the objective sees them. What is watched can
  reach neither it nor the reward;
- `watched` has the scores of rewards with `watch = true`, the details of all (`<name>.<detail>`), a
  score before it was clipped (`<name>.unclipped`), and what a part adds to the reward
  (`<name>.counted`) where that is not its weight times itself. The reward is the sum of what its parts
  add;
- a reward that gives no score fails the whole group with a `ScoringError` that names the reward, the
  group and the reason: an error is never a score. One that is watched costs the group nothing: it is
  counted, told, and absent from `watched`;
- a score is kept and given again only for rewards that say it is the same every time
  (`scoring.cache`);
- `version` is equal where the rewards' settings, their models and the objective are.

Several threads may call `score` at once. Shapes: B rollouts, S steps.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from xxhash import xxh3_128_hexdigest

from rlhf_cluster.config.scoring import Scoring
from rlhf_cluster.errors import RlhfError, ScoringError
from rlhf_cluster.records import RolloutGroup
from rlhf_cluster.rewards import RewardConfig, build_rewards
from rlhf_cluster.rewards.base import CountsOutcomes, Detailed, Reward, StepReward, Versioned
from rlhf_cluster.rewards.failure import RewardFailure, check_scores, check_step_scores
from rlhf_cluster.scoring.cache import Row, ScoreCache, content_key
from rlhf_cluster.scoring.totals import Totals

log = logging.getLogger(__name__)

_NO_PART_OF_VERSION = {"name", "timeout_s", "weight", "watch", "clip"}
_PLACES = {"path", "paths"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of one rollout; see the module."""

    reward: float
    parts: dict[str, float]
    watched: dict[str, float]
    step_rewards: np.ndarray  # [S] float64, weighted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """What one reward gave: [B] rows of its score and its details, and the scores of steps."""

    rows: Sequence[Row]
    steps: Sequence[Sequence[float]] | None = None


class Rewards:
    """Call `build` first; `close` when done."""

    def __init__(self, scoring: Scoring, totals: Totals) -> None:
        self._scoring, self._totals = scoring, totals
        self._configs = {r.name or r.type: r for r in scoring.rewards}
        self._optimised = {n: r.weight for n, r in self._configs.items() if not r.watch}
        self._built: dict[str, Reward | StepReward] = {}
        self._versions: dict[str, str] = {}
        self._cache = ScoreCache(scoring.cache_entries)
        self.version = ""

    @property
    def pays_steps(self) -> bool:
        """A reward that is optimised scores reasoning steps."""
        return any(self._configs[name].scores_steps for name in self._optimised)

    def build(self, tokenizer_dir: str, device: str) -> None:
        """Load the models and start what the rewards need. Raises `ConfigError`, `DataError`."""
        scoring = self._scoring
        built = build_rewards(
            scoring.rewards,
            tokenizer_dir,
            device,
            scoring.request_timeout_s,
            scoring.step_separator,
        )
        self._built = {name: reward for name, (reward, _) in built.items()}
        self._versions = {n: reward_version(self._configs[n], r) for n, r in self._built.items()}
        joined = {
            name: [self._versions[name], config.weight, config.clip, config.watch]
            for name, config in self._configs.items()
        }
        objective = self._scoring.objective.model_dump(mode="json")
        self.version = _digest([joined, objective, self._scoring.step_separator])

    def score(
        self, group: RolloutGroup, completions: Sequence[str], steps: Sequence[Sequence[str]]
    ) -> list[Scores]:
        """[B]. `steps` are the reasoning steps of each of `completions`. Raises `ScoringError`."""
        size = len(group.rollouts)
        parts: list[dict[str, float]] = [{} for _ in range(size)]
        watched: list[dict[str, float]] = [{} for _ in range(size)]
        step_rewards = [np.zeros(len(own)) for own in steps]
        for name, config in self._configs.items():
            found = self._answers(name, group, completions, steps)
            if found is None:
                continue
            for index, (score, *details) in enumerate(found.rows):
                named = zip(config.details, details, strict=True)
                watched[index] |= {f"{name}.{detail}": value for detail, value in named}
                if config.clip is not None:
                    watched[index][f"{name}.unclipped"] = score
                    score = min(max(score, config.clip[0]), config.clip[1])
                (watched if config.watch else parts)[index][name] = score
            if found.steps is not None and not config.watch:
                for total, own in zip(step_rewards, found.steps, strict=True):
                    total += config.weight * np.array(own)
        return [self._joined(group, *one) for one in zip(parts, watched, step_rewards, strict=True)]

    def stats(self) -> dict[str, float]:
        """`outcomes/<reward>/<outcome>`, and where scores are kept `cache_hits`, `cache_misses`."""
        totals: dict[str, float] = {}
        if self._scoring.cache_entries:
            totals |= {"cache_hits": self._cache.hits, "cache_misses": self._cache.misses}
        for name, reward in self._built.items():
            if isinstance(reward, CountsOutcomes):
                totals |= {f"outcomes/{name}/{own}": n for own, n in reward.outcomes().items()}
        return totals

    def close(self) -> None:
        built, self._built = self._built, {}
        for reward in built.values():
            reward.close()

    def _joined(
        self,
        group: RolloutGroup,
        parts: dict[str, float],
        watched: dict[str, float],
        step_rewards: np.ndarray,
    ) -> Scores:
        counted = self._scoring.objective.counted(parts, self._optimised)
        try:
            reward = math.fsum(counted.values())
        except (OverflowError, ValueError):  # sums that overflow, infinities of both signs
            reward = math.nan
        if not math.isfinite(reward):
            self._totals.add("errors/sum/infinite")
            raise ScoringError(
                f"the sum of rewards, group {group.group_id}: [infinite] the sum of {counted}, of the "
                f"parts {parts}, is not finite; lower the weights"
            )
        if self._scoring.objective.type != "weighted_sum":
            watched |= {f"{name}.counted": value for name, value in counted.items()}
        return Scores(reward=reward, parts=parts, watched=watched, step_rewards=step_rewards)

    def _answers(
        self,
        name: str,
        group: RolloutGroup,
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> _Scored | None:
        """None: it is only watched, and failed."""
        try:
            with self._totals.timed(name):
                if self._configs[name].scores_steps:
                    return self._of_steps(name, group, completions, steps)
                return _Scored(rows=self._of_responses(name, group, completions))
        except RlhfError as error:
            reason = error.reason if isinstance(error, RewardFailure) else type(error).__name__
            text = f"reward {name!r}, group {group.group_id}: [{reason}] {error}"
            self._totals.add(f"errors/{name}/{reason}")
            if self._configs[name].watch:
                self._totals.add(f"watched_errors/{name}")
                log.warning("watched %s", text)
                return None
            raise ScoringError(text) from error

    def _of_steps(
        self,
        name: str,
        group: RolloutGroup,
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> _Scored:
        reward = cast("StepReward", self._built[name])
        found = reward.score_steps(group.prompt, group.rollouts, completions, steps)
        checked = check_step_scores(found, [len(own) for own in steps])
        return _Scored(rows=[(sum(own),) for own in checked], steps=checked)

    def _of_responses(
        self, name: str, group: RolloutGroup, completions: Sequence[str]
    ) -> Sequence[Row]:
        config, reward = self._configs[name], cast("Reward", self._built[name])

        def ask(places: Sequence[int]) -> list[Row]:
            rollouts = [group.rollouts[place] for place in places]
            return _rows(reward, config, group, rollouts, [completions[place] for place in places])

        if not (self._scoring.cache_entries and config.scores_alone):
            return ask(range(len(completions)))
        version = f"{name}/{self._versions[name]}"
        keys = [
            content_key(version, group.prompt, rollout, text)
            for rollout, text in zip(group.rollouts, completions, strict=True)
        ]
        return self._cache.through(keys, ask)


def reward_version(config: RewardConfig, reward: Any) -> str:
    """A digest of what decides the reward's scores: its settings, and its own version where it has
    one, then without the folders that its models came from."""
    left_out = _NO_PART_OF_VERSION | (_PLACES if isinstance(reward, Versioned) else set())
    settings = config.model_dump(mode="json", exclude=left_out)
    return _digest([settings, reward.version if isinstance(reward, Versioned) else ""])


def _rows(
    reward: Reward,
    config: RewardConfig,
    group: RolloutGroup,
    rollouts: Sequence[Any],
    completions: Sequence[str],
) -> list[Row]:
    """[B], each number checked."""
    if not isinstance(reward, Detailed):
        found = reward.score(group.prompt, rollouts, completions)
        return [(score,) for score in check_scores(found, len(rollouts))]
    found, details = reward.score_in_detail(group.prompt, rollouts, completions)
    if details.keys() != set(config.details):
        raise RewardFailure(
            f"told {sorted(details)} beside its scores, expected {sorted(config.details)}", "reply"
        )
    columns = [found, *(details[name] for name in config.details)]
    return [*zip(*(check_scores(column, len(rollouts)) for column in columns), strict=True)]


def _digest(value: Any) -> str:
    """16 characters of a value of JSON."""
    return xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())[:16]
