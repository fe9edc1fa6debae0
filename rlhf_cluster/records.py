"""Records that the services exchange.

    Prompt -> Rollout -> RolloutGroup -> ScoredRollout -> ExperienceGroup

A group that is generated in segments is a PartialGroup until its last segment.

Promises:
- records are frozen, and arrays are numpy arrays of one dimension;
- every per-token array of a rollout has exactly one entry per response token. This is checked when
  the record is built (`RecordError`);
- token ids are those that the engine sampled, never decoded and encoded again;
- every record has an id, so a trained token can be traced to its prompt, its worker and the weights
  that sampled it.

Shapes: P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from rlhf_cluster.errors import RecordError

Array = np.ndarray


class FinishReason(StrEnum):
    """Reason why sampling of a response ended."""

    STOP = "stop"  # the model ended its answer; the end token is part of the response
    LENGTH = "length"  # cut at max_response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, tokenized once.

    `source` is the prompt as the data set has it (text or chat messages). `columns` are the data
    set's other columns by name. Rewards receive both.
    """

    prompt_id: str
    token_ids: Array  # [P] int32
    source: str | list[dict[str, str]]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_array(self, "token_ids", np.int32)
        if len(self.token_ids) == 0:
            raise RecordError(f"prompt {self.prompt_id} has no tokens; expected at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Permission to start one group. `number` is its index in admission order.

    `version` is the oldest weight version that any generation worker could have sampled with
    when the ticket was admitted. `attempt` counts the starts of the run and its restarts from a
    checkpoint. The versions of one attempt form one timeline (`buffer.group_recovery`).
    """

    number: int
    version: int
    purpose: Literal["train", "evaluate"] = "train"
    attempt: int = 0

    @property
    def group_id(self) -> str:
        return f"{'g' if self.purpose == 'train' else 'e'}{self.number:08d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of one group. `temperature = 0` is greedy (evaluation only).

    `greedy_baseline` asks for one greedy response in addition to the samples (`RolloutGroup.greedy`).
    """

    num_samples: int
    temperature: float
    max_tokens: int
    greedy_baseline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response, exactly as the engine produced it.

    `sampled_logprobs` are natural logarithms of the probabilities with which the engine sampled
    each token. The temperature is applied, and the vocabulary is not truncated (the configuration
    refuses top-p and top-k).
    """

    rollout_id: str
    prompt_id: str
    prompt_ids: Array  # [P] int32
    response_ids: Array  # [T] int32
    sampled_logprobs: Array  # [T] float32
    versions: Array  # [T] int32, the weight version that sampled each token
    response_mask: Array  # [T] bool, True = trained
    finish_reason: FinishReason
    temperature: float
    worker: str  # names of the workers that sampled it, in order, separated by commas
    started_s: float  # unix time
    finished_s: float

    def __post_init__(self) -> None:
        _check_array(self, "prompt_ids", np.int32)
        _check_tokens(self, ("sampled_logprobs", "versions", "response_mask"))
        if len(self.response_ids) == 0:
            raise RecordError(f"rollout {self.rollout_id} has no response tokens")

    @property
    def oldest_version(self) -> int:
        return int(self.versions.min())


_PER_TOKEN = {"sampled_logprobs": np.float32, "versions": np.int32, "response_mask": np.bool_}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All rollouts of one prompt, for one ticket.

    `greedy` is used for its reward only. It is not in `rollouts` and never trained.
    """

    ticket: Ticket
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    greedy: Rollout | None = None

    @property
    def group_id(self) -> str:
        return self.ticket.group_id


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialResponse:
    """Tokens of one response so far. Sampling continues while `finish_reason` is None."""

    rollout_id: str
    response_ids: Array  # [T] int32
    sampled_logprobs: Array  # [T] float32
    versions: Array  # [T] int32
    temperature: float
    workers: tuple[str, ...] = ()  # names of the workers that sampled it, in order
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        _check_tokens(self, ("sampled_logprobs", "versions"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialGroup:
    """A group between two segments: samples in order, then the greedy response if asked for."""

    group_id: str
    responses: tuple[PartialResponse, ...]
    started_s: float  # unix time

    @property
    def num_tokens(self) -> int:
        return sum(len(r.response_ids) for r in self.responses)

    @property
    def num_unfinished(self) -> int:
        return sum(r.finish_reason is None for r in self.responses)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its rewards and the log-probabilities of other models.

    Rewards: `reward` is the result of `scoring.objective` on `reward_parts`, by default their weighted
    sum. A part that scores reasoning steps is the sum of its steps' scores. `step_rewards` has the
    weighted sum of such parts for each step, so `reward` = `outcome_reward` + sum of `step_rewards`.
    `watched` has values that are logged and that no algorithm reads: monitor-only scores, and values
    about the other scores (`scoring.score_parts`).

    Log-probabilities are at the rollout's temperature: `ref_logprobs` of the reference policy,
    `teacher_logprobs` of the teacher, `exact_logprobs` of the version that sampled each token,
    computed as the learner does. `reference_kl` is computed by the learner: the KL of its policy to
    the reference over the whole vocabulary, at the start of the step. None when not configured.
    """

    rollout: Rollout
    reward: float
    reward_parts: Mapping[str, float]
    ref_logprobs: Array | None  # [T] float32
    scorer: str
    exact_logprobs: Array | None = None  # [T] float32
    teacher_logprobs: Array | None = None  # [T] float32
    reference_kl: Array | None = None  # [T] float32
    step_ends: Array | None = None  # [S] int32, last token of each reasoning step, non-decreasing
    step_rewards: Array | None = None  # [S] float64
    watched: Mapping[str, float] = field(default_factory=dict)
    scorer_version: str = ""  # equal for equal rewards, reward models and objective

    def __post_init__(self) -> None:
        if not np.isfinite(self.reward):
            raise RecordError(
                f"rollout {self.rollout.rollout_id}: reward {self.reward} is not finite"
            )
        for name in ("ref_logprobs", "exact_logprobs", "teacher_logprobs", "reference_kl"):
            if getattr(self, name) is not None:
                self._check_logprobs(name)
        if self.exact_logprobs is not None and not np.isfinite(self.exact_logprobs).all():
            raise RecordError(
                f"rollout {self.rollout.rollout_id}: exact_logprobs must be finite for every token"
            )
        if self.step_ends is not None or self.step_rewards is not None:
            self._check_steps()

    @property
    def outcome_reward(self) -> float:
        """Part of the reward that belongs to the whole response: all but the step rewards."""
        steps = 0.0 if self.step_rewards is None else float(self.step_rewards.sum())
        return self.reward - steps

    def _check_steps(self) -> None:
        _check_array(self, "step_ends", np.int32)
        _check_array(self, "step_rewards", np.float64)
        ends, rewards = np.asarray(self.step_ends), np.asarray(self.step_rewards)
        num_tokens = len(self.rollout.response_ids)
        inside = len(ends) == 0 or (ends[0] >= 0 and ends[-1] < num_tokens)
        if len(rewards) != len(ends) or not inside or (np.diff(ends) < 0).any():
            raise RecordError(
                f"rollout {self.rollout.rollout_id}: {len(rewards)} step rewards with ends "
                f"{ends.tolist()} in {num_tokens} response tokens; expected one end per reward, "
                "non-decreasing and inside the response"
            )
        if not np.isfinite(rewards).all():
            raise RecordError(f"rollout {self.rollout.rollout_id}: step_rewards must be finite")

    def _check_logprobs(self, name: str) -> None:
        _check_array(self, name, np.float32)
        num_values, num_tokens = len(getattr(self, name)), len(self.rollout.response_ids)
        if num_values != num_tokens:
            raise RecordError(
                f"rollout {self.rollout.rollout_id}: {name} has {num_values} entries for "
                f"{num_tokens} response tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperienceGroup:
    """A scored group, as the learner trains on it.

    `greedy_reward` is the reward of the greedy response to the prompt, None if none was asked for.
    `uses` counts the earlier steps that trained the group. `weight` is the factor on the losses of
    its tokens in the current step (`buffer.replay_pool`).
    """

    ticket: Ticket
    prompt: Prompt
    scored: tuple[ScoredRollout, ...]
    greedy_reward: float | None = None
    uses: int = 0
    weight: float = 1.0

    @property
    def group_id(self) -> str:
        return self.ticket.group_id

    def summary(self) -> GroupSummary:
        rollouts = [s.rollout for s in self.scored]
        return GroupSummary(
            group_id=self.group_id,
            oldest_version=min(r.oldest_version for r in rollouts),
            num_rollouts=len(rollouts),
            num_tokens=sum(len(r.response_ids) for r in rollouts),
            rewards=tuple(s.reward for s in self.scored),
            step_rewards=tuple(
                r
                for s in self.scored
                if s.step_rewards is not None
                for r in s.step_rewards.tolist()
            ),
            parts=_means([{**s.reward_parts, **s.watched} for s in self.scored]),
            longest_tokens=max(len(r.response_ids) for r in rollouts),
            num_stopped=sum(r.finish_reason == FinishReason.STOP for r in rollouts),
            newest_version=max(int(r.versions.max()) for r in rollouts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """Numbers of a group that the control plane uses in place of its arrays."""

    group_id: str
    oldest_version: int
    num_rollouts: int
    num_tokens: int
    rewards: tuple[float, ...]
    step_rewards: tuple[float, ...] = ()  # one per reasoning step, over all rollouts
    parts: Mapping[str, float] = field(default_factory=dict)
    """Mean over the rollouts of each entry of `reward_parts` and `watched`."""
    longest_tokens: int = 0  # tokens of the longest response
    num_stopped: int = 0  # responses that the model ended itself
    newest_version: int | None = None  # of any token; None in a record that does not have it


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """One published set of weights. `digest` covers every tensor's name, shape, dtype and bytes."""

    version: int
    path: str
    digest: str
    num_tensors: int
    num_bytes: int  # of the tensors
    stored_bytes: int = 0  # of the files written for it: fewer than num_bytes for a delta


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each entry over the mappings that have it."""
    by_name: dict[str, list[float]] = {}
    for mapping in values:
        for name, value in mapping.items():
            by_name.setdefault(name, []).append(value)
    return {name: float(np.mean(numbers)) for name, numbers in by_name.items()}


def _check_tokens(record: Rollout | PartialResponse, names: tuple[str, ...]) -> None:
    """Raise `RecordError` unless each array has one entry per token and logprobs are finite."""
    _check_array(record, "response_ids", np.int32)
    num_tokens = len(record.response_ids)
    for name in names:
        _check_array(record, name, _PER_TOKEN[name])
        if len(getattr(record, name)) != num_tokens:
            raise RecordError(
                f"rollout {record.rollout_id}: {name} has {len(getattr(record, name))} entries, "
                f"response_ids has {num_tokens}; they must be equal"
            )
    if not np.isfinite(record.sampled_logprobs).all():
        raise RecordError(f"rollout {record.rollout_id}: sampled_logprobs must be finite")


def _check_array(record: Any, name: str, dtype: Any) -> None:
    array = getattr(record, name)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        found = (
            f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array)
        )
        raise RecordError(
            f"{type(record).__name__}.{name} must be {np.dtype(dtype)}[n], found {found}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """Counters and state of the learner, equal on every rank."""

    version: int
    num_bytes: int  # of the tensors of all ranks
    skips: dict[str, tuple[int, int]]  # `Updater.skips` by model
    algorithm: dict[str, float]  # `Algorithm.state()`


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """State of the buffer that a resumed run needs, saved between two steps.

    `open` are the tickets that are admitted, not taken and not discarded, in order. Tickets of
    finished groups are in `open` and not counted in `finished`, since the resumed run finishes these
    groups again. `used` are the taken groups that may be taken again (replay).
    """

    learner_version: int
    admitted: int
    finished: int
    taken: int
    reweighted: int
    discarded: dict[str, int]
    open: tuple[Ticket, ...]
    replayed: int = 0
    used: tuple[TrainedGroup, ...] = ()

    @property
    def replayable(self) -> tuple[int, ...]:
        """Ticket numbers of `used`."""
        return tuple(group.ticket.number for group in self.used)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedGroup:
    """A trained group as a checkpoint keeps it. `steps` are the steps that trained it, in order."""

    ticket: Ticket
    summary: GroupSummary  # without the fields that only the metrics of its first step need
    steps: tuple[int, ...]

    @property
    def spread(self) -> float:
        """Mean absolute deviation of the rewards from their mean."""
        rewards = np.asarray(self.summary.rewards)
        return float(np.abs(rewards - rewards.mean()).mean())

    def taken(self, weight: float) -> TrainingGroup:
        uses = len(self.steps)
        handle = StoredGroup(self.ticket.number, uses=uses, weight=weight)
        return TrainingGroup(
            ticket=self.ticket, handle=handle, summary=self.summary, uses=uses, weight=weight
        )


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """Handle of a group in the store. `uses` and `weight` are those of `ExperienceGroup`."""

    number: int
    uses: int = 0
    weight: float = 1.0


Handle = Any
"""Reference to an `ExperienceGroup` outside the control plane, such as `StoredGroup`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """One group that the buffer gives to the learner for a step."""

    ticket: Ticket
    handle: Handle  # the ExperienceGroup
    summary: GroupSummary
    uses: int = 0  # earlier steps that trained it; at least 1 for a replay (`buffer.replay_pool`)
    weight: float = 1.0  # factor on the losses of a replayed group


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSample:
    """Values that the learner computed per token of one rollout; NaN at tokens not trained."""

    learner_logprobs: np.ndarray  # [T] float32
    correction_weights: np.ndarray | None  # [T] float32
    trained: np.ndarray  # [T] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Metrics of one step by name. Names have the form `area/quantity_unit`."""

    step: int  # learner version after the step
    metrics: Mapping[str, float]
