"""The records that travel between the services.

    Prompt -> Rollout -> RolloutGroup -> ScoredRollout -> ExperienceGroup

Promises: frozen; arrays are numpy, one dimension, and every per-token array of a rollout has
exactly one entry a response token (checked when built, `RecordError` otherwise). Token ids are
those the engine sampled, never decoded and encoded again. Every record has an id, so a trained
token can be traced to its prompt, its worker and the weights that sampled it.

Shapes: P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    when the ticket was admitted.
    """

    number: int
    version: int
    purpose: Literal["train", "evaluate"] = "train"

    @property
    def group_id(self) -> str:
        return f"{'g' if self.purpose == 'train' else 'e'}{self.number:08d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a group is sampled. `temperature = 0` is greedy (evaluation only)."""

    num_samples: int
    temperature: float
    max_tokens: int


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
    worker: str
    started_s: float  # unix time
    finished_s: float

    def __post_init__(self) -> None:
        _check_array(self, "prompt_ids", np.int32)
        _check_array(self, "response_ids", np.int32)
        num_tokens = len(self.response_ids)
        for name, dtype in _PER_TOKEN.items():
            _check_array(self, name, dtype)
            if len(getattr(self, name)) != num_tokens:
                raise RecordError(
                    f"rollout {self.rollout_id}: {name} has {len(getattr(self, name))} entries, "
                    f"response_ids has {num_tokens}; they must be equal"
                )
        if num_tokens == 0:
            raise RecordError(f"rollout {self.rollout_id} has no response tokens")
        if not np.isfinite(self.sampled_logprobs).all():
            raise RecordError(f"rollout {self.rollout_id}: sampled_logprobs must be finite")

    @property
    def oldest_version(self) -> int:
        return int(self.versions.min())


_PER_TOKEN = {"sampled_logprobs": np.float32, "versions": np.int32, "response_mask": np.bool_}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All rollouts of one prompt under one ticket."""

    ticket: Ticket
    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def group_id(self) -> str:
        return self.ticket.group_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with what the scoring pool says of it.

    `reward` is the weighted sum of `reward_parts`. `ref_logprobs` are the frozen reference
    model's log-probabilities at the rollout's temperature, absent when no reference is configured.
    """

    rollout: Rollout
    reward: float
    reward_parts: Mapping[str, float]
    ref_logprobs: Array | None  # [T] float32
    scorer: str

    def __post_init__(self) -> None:
        if not np.isfinite(self.reward):
            raise RecordError(
                f"rollout {self.rollout.rollout_id}: reward {self.reward} is not finite"
            )
        if self.ref_logprobs is not None:
            _check_array(self, "ref_logprobs", np.float32)
            if len(self.ref_logprobs) != len(self.rollout.response_ids):
                raise RecordError(
                    f"rollout {self.rollout.rollout_id}: ref_logprobs has {len(self.ref_logprobs)} "
                    f"entries for {len(self.rollout.response_ids)} response tokens"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperienceGroup:
    """A scored group: what the learner trains on."""

    ticket: Ticket
    prompt: Prompt
    scored: tuple[ScoredRollout, ...]

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
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """The little that the control plane sees of a group."""

    group_id: str
    oldest_version: int
    num_rollouts: int
    num_tokens: int
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVersion:
    """One published set of weights. `digest` covers every tensor's name, shape, dtype and bytes."""

    version: int
    path: str
    digest: str
    num_tensors: int
    num_bytes: int


def _check_array(record: Any, name: str, dtype: Any) -> None:
    array = getattr(record, name)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != dtype:
        found = (
            f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array)
        )
        raise RecordError(
            f"{type(record).__name__}.{name} must be {np.dtype(dtype)}[n], found {found}"
        )
