"""Conversion of experience groups to training sequences (numpy), and the learner's staleness gate.

Promises:
- the gate checks every trained token at the moment of training, and raises. No stale token is silently
  dropped or trained;
- `num_tokens` counts exactly the trained tokens of each rollout, including rollouts that are skipped
  because their loss is zero. Skipping saves their passes, and changes neither the gradient nor its
  scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.records import ExperienceGroup, Rollout, ScoredRollout

SCORES = ("ref_logprobs", "exact_logprobs", "teacher_logprobs", "reference_kl")
"""Fields that the scoring pool, or the learner at the start of the step, may have added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Data of one step: R rollouts, some of which are skipped by the passes."""

    sequences: list[TokenSequence | None]  # [R], None for a skipped rollout
    num_tokens: list[int]  # [R], trained tokens
    rollout_ids: list[str]  # [R]
    group_sizes: list[int]  # rollouts of each group; they add up to R
    weights: list[float]  # [R], factors of the losses of their tokens
    streams: tuple[str, ...]
    temperature: float

    @property
    def num_left_out(self) -> int:
        return sum(s is None for s in self.sequences)


def check_staleness(
    groups: Sequence[ExperienceGroup], version: int, max_staleness: int
) -> dict[str, float]:
    """Check the staleness of trained tokens: learner `version` minus the version that sampled each.

    Returns:
        `staleness/mean` (over tokens) and `staleness/max`.

    Raises:
        StalenessError: a trained token exceeds `max_staleness`, or is newer than the learner.
    """
    found = []
    for group in groups:
        for scored in group.scored:
            rollout = scored.rollout
            staleness = version - rollout.versions[rollout.response_mask].astype(np.int64)
            if len(staleness) == 0:
                continue
            if staleness.max() > max_staleness or staleness.min() < 0:
                worst = staleness.max() if staleness.max() > max_staleness else staleness.min()
                raise StalenessError(
                    f"group {group.group_id}, rollout {rollout.rollout_id}: a token sampled with "
                    f"version {version - worst} reached the learner at version {version}, "
                    f"staleness {worst}; allowed is 0 to max_staleness = {max_staleness}. The "
                    "admission gate let it through: this is a defect, not a setting"
                )
            found.append(staleness)
    if not found:
        return {}
    tokens = np.concatenate(found)
    return {"staleness/mean": float(tokens.mean()), "staleness/max": float(tokens.max())}


def training_batch(
    groups: Sequence[ExperienceGroup],
    advantages: Sequence[Sequence[np.ndarray]],
    version: int,
    drop_zero_advantages: bool,
) -> TrainingBatch:
    """Turn groups and their advantages into sequences with the streams that losses need.

    Streams: `sampled_logprobs`, `advantages`, `staleness` (against the learner's `version`), and
    those of `SCORES` that every rollout has. Rollouts without a trained token are always skipped.
    Rollouts whose advantages are all zero are skipped only with `drop_zero_advantages`, which is
    correct if the advantage is a factor of the complete loss.

    Raises:
        RecordError: there is no trained token, advantages do not match the tokens, temperatures
            differ, or only some rollouts have one of `SCORES`.
    """
    scored = [s for group in groups for s in group.scored]
    flat_advantages = [a for group in advantages for a in group]
    rollouts = [s.rollout for s in scored]
    num_tokens = [int(r.response_mask.sum()) for r in rollouts]
    if not any(num_tokens):
        raise RecordError(f"a batch of {len(groups)} groups has no trained token")
    scores = [name for name in SCORES if _has(scored, name)]
    sequences = []
    for item, values in zip(scored, flat_advantages, strict=True):
        mask = item.rollout.response_mask
        if values.shape != mask.shape:
            raise RecordError(
                f"rollout {item.rollout.rollout_id}: advantages {list(values.shape)} for "
                f"{len(mask)} response tokens"
            )
        counts = mask.any() and (values[mask].any() or not drop_zero_advantages)
        sequences.append(_sequence(item, values, version, scores) if counts else None)
    names = ("sampled_logprobs", "advantages", "staleness")
    return TrainingBatch(
        sequences=sequences,
        num_tokens=num_tokens,
        rollout_ids=[r.rollout_id for r in rollouts],
        group_sizes=[len(group.scored) for group in groups],
        weights=[group.weight for group in groups for _ in group.scored],
        streams=(*names, *scores),
        temperature=temperature_of(rollouts),
    )


def _sequence(
    item: ScoredRollout, advantages: np.ndarray, version: int, scores: Sequence[str]
) -> TokenSequence:
    rollout = item.rollout
    streams = {
        "sampled_logprobs": rollout.sampled_logprobs,
        "advantages": advantages,
        "staleness": (version - rollout.versions).astype(np.float32),
    }
    streams |= {name: getattr(item, name) for name in scores}
    return TokenSequence(
        prompt_ids=rollout.prompt_ids,
        target_ids=rollout.response_ids,
        target_mask=rollout.response_mask,
        streams=streams,
    )


def _has(scored: Sequence[ScoredRollout], name: str) -> bool:
    missing = [s.rollout.rollout_id for s in scored if getattr(s, name) is None]
    if missing and len(missing) < len(scored):
        raise RecordError(
            f"rollout {missing[0]} has no {name}, others of the batch have; all or none"
        )
    return not missing


def temperature_of(rollouts: Sequence[Rollout]) -> float:
    """Return the temperature of all rollouts.

    Raises: `RecordError` if they have different ones, or it is not greater than 0.
    """
    found = sorted({r.temperature for r in rollouts})
    if len(found) != 1 or found[0] <= 0:
        raise RecordError(
            f"temperatures {found} in one batch; training needs a single one, greater than 0 (greedy "
            "answers are for evaluation)"
        )
    return found[0]
