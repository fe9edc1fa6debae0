"""One scorer: all rewards and the reference model, for one group after another.

    RolloutGroup  -->  decode, rewards, reference  -->  ExperienceGroup

Promises:
- responses are decoded for the rewards only; the token ids pass through untouched;
- a rollout's reward is the weighted sum of its parts, all of them finite, or the whole group fails
  with a `ScoringError` that names the reward, the group and the reason: an error is never a score;
- several threads may score at once: a reward that waits for its child process holds up no other
  group's rewards and not the reference model.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import RlhfError, ScoringError, WorkerError
from rlhf_cluster.records import ExperienceGroup, RolloutGroup, ScoredRollout
from rlhf_cluster.rewards import build_rewards
from rlhf_cluster.rewards.base import Reward
from rlhf_cluster.rewards.failure import RewardFailure, check_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.scoring.reference import Reference


class Scorer:
    """Call `setup` first; `close` when done."""

    def __init__(self, config: RunConfig, model_dir: str, name: str) -> None:
        self._config = config
        self._model_dir = model_dir
        self._name = name
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rewards: dict[str, tuple[Reward, float]] = {}
        self._weights = {r.name or r.type: r.weight for r in config.scoring.rewards}
        self._device = "cuda" if config.scoring.num_gpus else "cpu"
        self._reference: Reference | None = None
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()  # held for an addition only

    def setup(self) -> None:
        """Load the tokenizer and the rewards, and the reference unless a warm-up comes first.

        Raises `ConfigError`, `DataError`.
        """
        scoring = self._config.scoring
        tokenizer_dir = self._config.model.tokenizer or self._model_dir
        tokenizer = load_tokenizer(tokenizer_dir)
        if scoring.reference and not self._config.sft.steps:
            self.load_reference(self._model_dir)
        self._rewards = build_rewards(
            scoring.rewards, tokenizer_dir, self._device, scoring.request_timeout_s
        )
        self._tokenizer = tokenizer

    def load_reference(self, folder: str) -> None:
        """The frozen reference: the policy as it is when reinforcement learning begins."""
        from rlhf_cluster.scoring.reference import Reference

        scoring = self._config.scoring
        self._reference = Reference(
            folder,
            scoring.dtype,
            self._device,
            scoring.tokens_per_batch,
            scoring.request_timeout_s,
        )

    def score(self, group: RolloutGroup, with_reference: bool = True) -> ExperienceGroup:
        """Score one group.

        Args:
            group: its rollouts belong to its prompt.
            with_reference: False leaves `ref_logprobs` out, as for greedy answers.

        Raises:
            ScoringError: a reward or the reference gave no usable answer.
            StalledError: other groups held the reference past the deadline.
            WorkerError: `setup` has not been called.
        """
        completions = self._decode(group)
        parts = {
            name: self._parts(name, reward, group, completions)
            for name, (reward, _) in self._rewards.items()
        }
        references = self._reference_logprobs(group) if with_reference else None
        scored = []
        for index, rollout in enumerate(group.rollouts):
            own = {name: values[index] for name, values in parts.items()}
            scored.append(
                ScoredRollout(
                    rollout=rollout,
                    reward=self._weighted_sum(group, own),
                    reward_parts=own,
                    ref_logprobs=references[index] if references is not None else None,
                    scorer=self._name,
                )
            )
        self._count("num_groups")
        self._count("num_rollouts", len(scored))
        return ExperienceGroup(ticket=group.ticket, prompt=group.prompt, scored=tuple(scored))

    def stats(self) -> dict[str, float]:
        """Totals: groups, rollouts, seconds, and `errors/<reward>/<reason>` for each kind seen."""
        with self._counting:
            return dict(self._totals)

    def close(self) -> None:
        """Release the rewards. Calls that are running may fail."""
        rewards, self._rewards = self._rewards, {}
        self._tokenizer = None
        for reward, _ in rewards.values():
            reward.close()

    def _decode(self, group: RolloutGroup) -> list[str]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise WorkerError(f"{self._name}: nothing is loaded; call setup before score")
        return [
            str(
                tokenizer.decode(
                    rollout.response_ids.tolist(),
                    skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )
            )
            for rollout in group.rollouts
        ]

    def _parts(
        self, name: str, reward: Reward, group: RolloutGroup, completions: Sequence[str]
    ) -> list[float]:
        started = time.perf_counter()
        try:
            scores = reward.score(group.prompt, group.rollouts, completions)
            return check_scores(scores, len(group.rollouts))
        except RlhfError as error:
            reason = error.reason if isinstance(error, RewardFailure) else type(error).__name__
            raise self._failed(f"reward {name!r}", name, group, reason, str(error)) from error
        finally:
            self._count(f"seconds/{name}", time.perf_counter() - started)

    def _weighted_sum(self, group: RolloutGroup, parts: dict[str, float]) -> float:
        products = [part * self._weights[name] for name, part in parts.items()]
        try:
            total = math.fsum(products)
        except (OverflowError, ValueError):  # sums that overflow, infinities of both signs
            total = math.nan
        if not math.isfinite(total):
            detail = f"the weighted sum of {parts} is not finite; lower the weights"
            raise self._failed("the sum of rewards", "sum", group, "infinite", detail)
        return total

    def _reference_logprobs(self, group: RolloutGroup) -> list[np.ndarray] | None:
        if not self._config.scoring.reference:
            return None
        if self._reference is None:
            raise WorkerError(f"{self._name}: no reference is loaded; call load_reference first")
        started = time.perf_counter()
        try:
            return self._reference.logprobs(group.rollouts)
        except ScoringError as error:
            detail = str(error)
            raise self._failed("reference", "reference", group, "sequence", detail) from error
        finally:
            self._count("seconds/reference", time.perf_counter() - started)

    def _failed(
        self, what: str, name: str, group: RolloutGroup, reason: str, detail: str
    ) -> ScoringError:
        self._count(f"errors/{name}/{reason}")
        return ScoringError(f"{what}, group {group.group_id}: [{reason}] {detail}")

    def _count(self, name: str, amount: float = 1.0) -> None:
        with self._counting:
            self._totals[name] += amount
