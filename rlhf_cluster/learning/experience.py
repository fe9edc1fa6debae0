"""Experience groups -> sequences to train on (numpy), and the staleness gate of the learner.

Promises: the gate looks at every trained token at the moment of training and raises; nothing stale
is dropped or trained without a word. `num_tokens` counts exactly the trained tokens of the batch,
also those of rollouts that are left out of the computation because their loss is zero: leaving
them out saves their passes and changes neither the gradient nor its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.learning.packing import TokenSequence
from rlhf_cluster.records import ExperienceGroup, Rollout, ScoredRollout


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """What one optimizer step computes with."""

    sequences: list[TokenSequence]
    streams: tuple[str, ...]
    temperature: float
    num_tokens: int  # trained tokens of all rollouts: the denominator of the loss
    num_computed_tokens: int  # those of `sequences`
    num_rollouts: int
    num_dropped: int  # rollouts without a loss, left out of the passes


def check_staleness(
    groups: Sequence[ExperienceGroup], version: int, max_staleness: int
) -> dict[str, float]:
    """Staleness of the trained tokens: learner `version` minus the version that sampled each.

    Returns:
        `staleness/mean` (over tokens) and `staleness/max`.

    Raises:
        StalenessError: a trained token is staler than `max_staleness`, or newer than the learner.
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
    drop_zero_advantages: bool,
) -> TrainingBatch:
    """Turn groups and their advantages into sequences with the streams that losses need.

    Streams: `sampled_logprobs`, `advantages`, and `ref_logprobs` when every rollout has them.
    Rollouts without a trained token are left out always; those whose advantages are all zero only
    with `drop_zero_advantages`, which is right when the advantage multiplies the whole loss.

    Raises:
        RecordError: no trained token at all, advantages that do not fit, mixed temperatures, or
            reference log-probabilities for some rollouts only.
    """
    scored = [s for group in groups for s in group.scored]
    flat_advantages = [a for group in advantages for a in group]
    rollouts = [s.rollout for s in scored]
    num_tokens = sum(int(r.response_mask.sum()) for r in rollouts)
    if num_tokens == 0:
        raise RecordError(f"a batch of {len(groups)} groups has no trained token")
    has_reference = _has_reference(scored)
    sequences = []
    for item, values in zip(scored, flat_advantages, strict=True):
        mask = item.rollout.response_mask
        if values.shape != mask.shape:
            raise RecordError(
                f"rollout {item.rollout.rollout_id}: advantages {list(values.shape)} for "
                f"{len(mask)} response tokens"
            )
        if mask.any() and (values[mask].any() or not drop_zero_advantages):
            sequences.append(_sequence(item, values, has_reference))
    names = ("sampled_logprobs", "advantages", *(("ref_logprobs",) if has_reference else ()))
    return TrainingBatch(
        sequences=sequences,
        streams=names,
        temperature=_temperature(rollouts),
        num_tokens=num_tokens,
        num_computed_tokens=sum(int(np.sum(s.target_mask)) for s in sequences),
        num_rollouts=len(rollouts),
        num_dropped=len(rollouts) - len(sequences),
    )


def _sequence(item: ScoredRollout, advantages: np.ndarray, has_reference: bool) -> TokenSequence:
    rollout = item.rollout
    streams = {"sampled_logprobs": rollout.sampled_logprobs, "advantages": advantages}
    if has_reference and item.ref_logprobs is not None:
        streams["ref_logprobs"] = item.ref_logprobs
    return TokenSequence(
        prompt_ids=rollout.prompt_ids,
        target_ids=rollout.response_ids,
        target_mask=rollout.response_mask,
        streams=streams,
    )


def _has_reference(scored: Sequence[ScoredRollout]) -> bool:
    missing = [s.rollout.rollout_id for s in scored if s.ref_logprobs is None]
    if missing and len(missing) < len(scored):
        raise RecordError(
            f"rollout {missing[0]} has no ref_logprobs, others of the batch have; all or none"
        )
    return not missing


def _temperature(rollouts: Sequence[Rollout]) -> float:
    found = sorted({r.temperature for r in rollouts})
    if len(found) != 1 or found[0] <= 0:
        raise RecordError(
            f"temperatures {found} in one batch; training needs a single one, over 0 (greedy "
            "answers are for evaluation)"
        )
    return found[0]
