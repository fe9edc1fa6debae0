"""The records that travel between the services.

    Prompt -> Rollout -> RolloutGroup -> ScoredRollout -> ExperienceGroup

A group that is generated in segments is a PartialGroup until the last of them.

Promises: frozen; arrays are numpy, one dimension, and every per-token array of a rollout has
exactly one entry a response token (checked when built, `RecordError` otherwise). Token ids are
those the engine sampled, never decoded and encoded again. Every record has an id, so a trained
token can be traced to its prompt, its worker and the weights that sampled it.

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
    """Why sampling ended."""

    STOP = "stop"  # the model ended its answer; the end token is part of the response
    LENGTH = "length"  # cut at max_response_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, tokenized once.

    `source` is the prompt as the data set gave it (text, or chat messages); rewards receive it.
    `columns` are the data set's other columns, handed to rewards by name.
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
    """Permission to start one group. `number` is its place in admission order.

    `version` is the oldest weight version that any generation worker could have sampled with
    when the ticket was admitted. `attempt` counts the starts of the run, and its returns to a
    checkpoint: versions of one attempt are one timeline (`buffer.group_recovery`).
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
    """How a group is sampled. `temperature = 0` is greedy (evaluation only).

    `greedy_baseline` asks for one greedy response beside the samples, as `RolloutGroup.greedy`.
    """

    num_samples: int
    temperature: float
    max_tokens: int
    greedy_baseline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response, exactly as the engine produced it.

    `sampled_logprobs` are natural logarithms of the probability the engine sampled each token
    with: temperature applied, no truncation of the vocabulary (top-p and top-k are refused by
    the configuration).
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
    worker: str  # all that sampled it, in order, between commas
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
    """All rollouts of one prompt under one ticket.

    `greedy` is there for its reward only: it is no rollout of the group and never trained.
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
    """One response so far, as the engine produced it. It goes on while it has no `finish_reason`."""

    rollout_id: str
    response_ids: Array  # [T] int32
    sampled_logprobs: Array  # [T] float32
    versions: Array  # [T] int32
    temperature: float
    workers: tuple[str, ...] = ()  # that sampled it, in order
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        _check_tokens(self, ("sampled_logprobs", "versions"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialGroup:
    """A group between two segments: its samples in order, then the greedy response if asked for."""

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
    """A rollout with what the scoring pool says of it.

    `reward` is what `scoring.objective` makes of `reward_parts`, by default their weighted sum; a
    part that scores reasoning steps is the sum of its steps' scores. `step_rewards` are the weighted
    sums of such parts step by step, so `reward` is `outcome_reward` and all of them together. No
    algorithm reads `watched`: scores that are shown only, and what is told of the parts (see
    `scoring.score_parts`). Log-probabilities are at the rollout's temperature:
    `ref_logprobs` the reference policy's, `teacher_logprobs` the teacher's, `exact_logprobs` those of
    the version that sampled each token, as the learner computes. `reference_kl` is the learner's own:
    the KL of its policy to the reference, over the whole vocabulary, at the start of the step. Absent
    when not configured.
    """

    rollout: Rollout
    reward: float
    reward_parts: Mapping[str, float]
    ref_logprobs: Array | None  # [T] float32
    scorer: str
    exact_logprobs: Array | None = None  # [T] float32
    teacher_logprobs: Array | None = None  # [T] float32
    reference_kl: Array | None = None  # [T] float32
    step_ends: Array | None = None  # [S] int32, last token of each reasoning step, never falling
    step_rewards: Array | None = None  # [S] float64
    watched: Mapping[str, float] = field(default_factory=dict)
    scorer_version: str = ""  # equal where rewards, their models and the objective are

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
        """What of the reward belongs to the response as a whole: all but its steps'."""
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
                f"{ends.tolist()} in {num_tokens} response tokens; needed is one end a reward, never "
                "falling, inside the response"
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
    """A scored group: what the learner trains on.

    `greedy_reward` is the reward of the greedy response to the prompt, where one was asked for. `uses`
    and `weight` are of the step that has it: how many trained it before, and what the losses of its
    tokens are multiplied by (`buffer.replay_pool`).
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
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """The little that the control plane sees of a group."""

    group_id: str
    oldest_version: int
    num_rollouts: int
    num_tokens: int
    rewards: tuple[float, ...]
    step_rewards: tuple[float, ...] = ()  # of all reasoning steps of all rollouts
    parts: Mapping[str, float] = field(default_factory=dict)
    """Means over the rollouts, of parts of the reward and of what is watched."""
    longest_tokens: int = 0  # of one response
    num_stopped: int = 0  # responses that the model ended itself


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """One published set of weights. `digest` covers every tensor's name, shape, dtype and bytes."""

    version: int
    path: str
    digest: str
    num_tensors: int
    num_bytes: int  # of the tensors
    stored_bytes: int = 0  # of the files written for it: fewer when only changes are stored


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, over those that have it."""
    found: dict[str, list[float]] = {}
    for own in values:
        for name, value in own.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(all_of_it)) for name, all_of_it in found.items()}


def _check_tokens(record: Rollout | PartialResponse, names: tuple[str, ...]) -> None:
    """One entry a response token in every array of `names`, and finite log-probabilities."""
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
    """The numbers of the learner, the same on every rank."""

    version: int
    num_bytes: int  # of the tensors of all ranks
    skips: dict[str, tuple[int, int]]  # by model: `Updater.skips`
    algorithm: dict[str, float]  # `Algorithm.state()`


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferState:
    """What a resumed run needs of the buffer, taken between two steps.

    `open` are the tickets that are admitted, not taken and not discarded, in order. Groups that
    were finished are among them, and not among `finished`: they finish once more. `used` are those
    taken that may be taken again.
    """

    learner_version: int
    admitted: int
    finished: int
    taken: int
    reweighted: int
    discarded: dict[str, int]
    open: tuple[Ticket, ...]
    replayed: int = 0
    used: tuple[Used, ...] = ()

    @property
    def replayable(self) -> tuple[int, ...]:
        """The numbers of `used`."""
        return tuple(each.ticket.number for each in self.used)


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """A group that `steps` trained, in order. What a checkpoint keeps of it."""

    ticket: Ticket
    summary: GroupSummary  # without what only metrics of its first step need
    steps: tuple[int, ...]

    @property
    def spread(self) -> float:
        """Mean absolute deviation of the rewards from their mean."""
        rewards = np.asarray(self.summary.rewards)
        return float(np.abs(rewards - rewards.mean()).mean())

    def taken(self, weight: float) -> Taken:
        uses = len(self.steps)
        handle = StoredGroup(self.ticket.number, uses=uses, weight=weight)
        return Taken(
            ticket=self.ticket, handle=handle, summary=self.summary, uses=uses, weight=weight
        )


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """The handle of a group that is read from the store; for `uses` and `weight` see
    `records.ExperienceGroup`."""

    number: int
    uses: int = 0
    weight: float = 1.0


Handle = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """One group that the buffer hands to the learner."""

    ticket: Ticket
    handle: Handle  # of an ExperienceGroup
    summary: GroupSummary
    uses: int = 0  # steps that trained it before; over 0 it is replayed (`buffer.replay_pool`)
    weight: float = 1.0  # of its losses, where it is replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSample:
    """What the learner computed for the tokens of one rollout; NaN at tokens that are not trained."""

    learner_logprobs: np.ndarray  # [T] float32
    correction_weights: np.ndarray | None  # [T] float32
    trained: np.ndarray  # [T] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step says of itself. Metric names are `area/quantity_unit`."""

    step: int  # learner version after the step
    metrics: Mapping[str, float]
