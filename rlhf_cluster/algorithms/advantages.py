"""Advantages from rewards, grouped by id and never by position (numpy).

One value per rollout, given its reward and those of its group (n members, mean m, deviation s with
Bessel's correction):

    group       A_i = (r_i - m) / (s + 1e-4)        or r_i - m
    leave one out    A_i = r_i - mean of the others = (r_i - m) n / (n - 1)
    decoupled   A_i = sum_k w_k (r_ik - m_k) / (s_k + 1e-4)      every reward k on its own scale

One value per token, given rewards at tokens:

    process     A_t = sum of the normalised rewards of the steps that end at t or later
    GAE         A_t = sum_l (discount trace)^l (r_{t+l} + discount V_{t+l+1} - V_{t+l})
    whitened    (A_t - mean) / s over the trained tokens of ALL rollouts of the step

Promises: a group of one, and a group whose rewards are equal up to rounding, get exactly 0. They
say nothing about which response was better, and dividing would scale rounding noise up to size one.
Groups may differ in size, and their members may be in any order. Inserting tokens that are not
trained anywhere, with any value, changes no other token's advantage.

Shapes: N rollouts, T tokens of one rollout, S steps of one rollout.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ScoredRollout

STD_FLOOR = 1e-4
"""Added to the standard deviation, as in the published implementations of GRPO."""

EQUAL_WITHIN = 1e-6
"""Spread, relative to the largest reward (or 1), up to which rewards are treated as equal."""


def group_advantages(
    rewards: Sequence[float], group_ids: Sequence[Hashable], normalize_std: bool
) -> np.ndarray:
    """Centre each reward in its group, and divide by the group's standard deviation if asked.

    The standard deviation has Bessel's correction. Shao et al. 2024, arXiv 2402.03300, eq. 3.

    Args:
        rewards: [N], finite.
        group_ids: [N].
        normalize_std: divide by the standard deviation.

    Returns:
        [N] float32.

    Raises:
        RecordError: lengths that differ, or rewards that are not finite.
    """
    values = _check_rewards(rewards, group_ids)
    advantages = np.zeros(len(values))
    for members in _unequal_groups(values, group_ids):
        group = values[members]
        centred = group - group.mean()
        advantages[members] = (
            centred / (group.std(ddof=1) + STD_FLOOR) if normalize_std else centred
        )
    return advantages.astype(np.float32)


def leave_one_out_advantages(rewards: Sequence[float], group_ids: Sequence[Hashable]) -> np.ndarray:
    """Subtract from each reward the mean of the OTHER members of its group: an unbiased baseline.

    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
    arXiv 2402.14740 (RLOO).

    Args:
        rewards: [N], finite.
        group_ids: [N].

    Returns:
        [N] float32.

    Raises:
        RecordError: lengths that differ, or rewards that are not finite.
    """
    values = _check_rewards(rewards, group_ids)
    advantages = np.zeros(len(values))
    for members in _unequal_groups(values, group_ids):
        group, size = values[members], len(members)
        advantages[members] = (group - group.mean()) * size / (size - 1)
    return advantages.astype(np.float32)


def decoupled_advantages(
    parts: Sequence[Mapping[str, float]],
    weights: Mapping[str, float],
    group_ids: Sequence[Hashable],
    normalize_std: bool,
) -> np.ndarray:
    """Compute the group advantages of every reward separately, and return their weighted sum.

    If the sum of rewards were normalised instead, sums of (0, 1) and of (0, 2) would give the same
    advantages, whether one reward or both differ between the rollouts, and the reward with the larger
    scale would dominate. Normalised separately, each has the influence of its weight. Liu et al.
    2026, arXiv 2601.05242 (GDPO), where the sums are then divided by their standard deviation over
    the step.

    Args:
        parts: [N], each rollout's rewards by name (`ScoredRollout.reward_parts`).
        weights: weight by name, for exactly the names in every rollout's parts.
        group_ids: [N].
        normalize_std: divide every reward by its standard deviation in the group.

    Returns:
        [N] float32.

    Raises:
        RecordError: lengths or names that differ, or rewards that are not finite.
    """
    for rewards in parts:
        if set(rewards) != set(weights):
            raise RecordError(
                f"a rollout has the rewards {sorted(rewards)}, weights are given for {sorted(weights)};"
                " every rollout needs exactly these"
            )
    total = np.zeros(len(group_ids))
    for name, weight in weights.items():
        total += weight * group_advantages([p[name] for p in parts], group_ids, normalize_std)
    return total.astype(np.float32)


def process_advantages(
    step_rewards: Sequence[np.ndarray],
    step_ends: Sequence[np.ndarray],
    num_tokens: Sequence[int],
    group_ids: Sequence[Hashable],
    normalize_std: bool,
) -> list[np.ndarray]:
    """Compute advantages from rewards of single reasoning steps (process supervision).

    The rewards of ALL steps of a group are centred and scaled together; a token's advantage is the
    sum over the steps that end at it or after it. Tokens after the last step have 0. Shao et al.
    2024, arXiv 2402.03300, section 4.1.3.

    Args:
        step_rewards: [S] for each rollout, finite; S may be 0 and differ.
        step_ends: [S] for each rollout, the index of each step's last token, non-decreasing.
        num_tokens: T of each rollout.
        group_ids: [N].
        normalize_std: divide by the standard deviation of the group's step rewards.

    Returns:
        [T] float32 for each rollout.

    Raises:
        RecordError: lengths that differ, ends outside the response or decreasing, rewards that are
            not finite.
    """
    rows = list(zip(step_rewards, step_ends, num_tokens, group_ids, strict=True))
    for rewards, ends, length, _ in rows:
        inside = len(ends) == 0 or (ends[0] >= 0 and ends[-1] < length)
        if len(rewards) != len(ends) or not inside or (np.diff(ends) < 0).any():
            raise RecordError(
                f"{len(rewards)} step rewards with ends {np.asarray(ends).tolist()} in a response "
                f"of {length} tokens; needed is one end per reward, non-decreasing, inside the response"
            )
    flat = [float(r) for rewards, *_ in rows for r in rewards]
    owners = [owner for rewards, _, _, owner in rows for _ in rewards]
    scaled = group_advantages(flat, owners, normalize_std).astype(np.float64)
    advantages, begin = [], 0
    for rewards, ends, length, _ in rows:
        values = scaled[begin : begin + len(rewards)]
        begin += len(rewards)
        per_token = np.zeros(length)
        np.add.at(per_token, np.asarray(ends, dtype=np.int64), values)
        advantages.append(per_token[::-1].cumsum()[::-1].astype(np.float32))
    return advantages


def terminal_rewards(reward: float, mask: np.ndarray) -> np.ndarray:
    """Return [T] float64: the reward at the last trained token, else 0; all 0 if none is trained."""
    rewards = np.zeros(len(mask))
    trained = np.flatnonzero(mask)
    if len(trained):
        rewards[trained[-1]] = reward
    return rewards


def step_rewards(scored: ScoredRollout) -> np.ndarray:
    """Return [T] float64: rewards of reasoning steps at the trained tokens that they are credited to.

    Each is at the last trained token at or before the step's end, so the sum from a trained token
    onward is that of the steps that end at it or later. A step before all trained tokens is skipped:
    no trained token led to it. All 0 for a rollout without step rewards.
    """
    rewards = np.zeros(len(scored.rollout.response_mask))
    if scored.step_ends is None or scored.step_rewards is None:
        return rewards
    trained = np.flatnonzero(scored.rollout.response_mask)
    places = np.searchsorted(trained, scored.step_ends, side="right") - 1
    np.add.at(rewards, trained[places[places >= 0]], scored.step_rewards[places >= 0])
    return rewards


def gae(
    rewards: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    discount: float,
    trace: float,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Estimate generalised advantages over the trained tokens (Schulman et al. 2015, 1506.02438).

        delta_t = r_t + discount V_next - V_t        V_next = 0 after the last trained token
        A_t = delta_t + discount trace A_next        returns_t = A_t + V_t

    where "next" is the next TRAINED token. V_t is the value before token t is sampled.

    Args:
        rewards: [T] of each rollout, 0 at tokens that are not trained.
        values: [T] of each rollout; at tokens that are not trained anything, NaN included.
        masks: [T] bool of each rollout, True = trained.
        discount: gamma, in [0, 1].
        trace: lambda, in [0, 1].

    Returns:
        (advantages, returns), each [T] float32 of each rollout, 0 at tokens that are not trained.

    Raises:
        RecordError: shapes that differ, a reward at a token that is not trained, or a trained token
            whose reward or value is not finite.
    """
    rows = list(zip(rewards, values, masks, strict=True))
    for rollout_rewards, rollout_values, mask in rows:
        _check_tokens(rollout_rewards, rollout_values, mask)
    lengths = [int(mask.sum()) for _, _, mask in rows]
    # right-aligned: the last trained tokens of all rollouts share a column, padding precedes them
    table_r, table_v = np.zeros((2, len(rows), max(lengths, default=0)))
    for row, (rollout_rewards, rollout_values, mask) in enumerate(rows):
        begin = table_r.shape[1] - lengths[row]
        table_r[row, begin:] = rollout_rewards[mask]
        table_v[row, begin:] = rollout_values[mask]
    table_a = np.zeros_like(table_r)
    next_value, next_advantage = np.zeros((2, len(rows)))
    for column in reversed(range(table_r.shape[1])):
        delta = table_r[:, column] + discount * next_value - table_v[:, column]
        next_advantage = delta + discount * trace * next_advantage
        next_value = table_v[:, column]
        table_a[:, column] = next_advantage
    advantages, returns = [], []
    for row, (_, _, mask) in enumerate(rows):
        begin = table_r.shape[1] - lengths[row]
        advantages.append(_scatter(table_a[row, begin:], mask))
        returns.append(_scatter(table_a[row, begin:] + table_v[row, begin:], mask))
    return advantages, returns


def whiten(values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Shift and scale to mean 0 and standard deviation 1 over the trained tokens of all rollouts.

    Every rank passes all rollouts of a step, so the statistics are those of the whole step. Equal
    values (up to rounding), and a single value, become 0.

    Args:
        values: [T] of each rollout; anything at tokens that are not trained.
        masks: [T] bool of each rollout, True = trained.

    Returns:
        [T] float32 of each rollout, 0 at tokens that are not trained.

    Raises:
        RecordError: shapes that differ, or a trained token whose value is not finite.
    """
    for rollout_values, mask in zip(values, masks, strict=True):
        _check_tokens(np.zeros(len(mask)), rollout_values, mask)
    picked = [np.asarray(v, dtype=np.float64)[m] for v, m in zip(values, masks, strict=True)]
    tokens = np.concatenate(picked) if picked else np.zeros(0)
    if all_equal(tokens):
        return [np.zeros(len(mask), np.float32) for mask in masks]
    mean, deviation = tokens.mean(), tokens.std()
    return [_scatter((v - mean) / deviation, m) for v, m in zip(picked, masks, strict=True)]


def _check_rewards(rewards: Sequence[float], group_ids: Sequence[Hashable]) -> np.ndarray:
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(group_ids),):
        raise RecordError(f"{values.size} rewards for {len(group_ids)} group ids; must be equal")
    if not np.isfinite(values).all():
        raise RecordError("rewards must be finite; a failed score is never a number")
    return values


def _unequal_groups(values: np.ndarray, group_ids: Sequence[Hashable]) -> Iterator[list[int]]:
    """Return the indices of the members of each group whose rewards differ."""
    members: dict[Hashable, list[int]] = {}
    for index, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(index)
    return (indices for indices in members.values() if not all_equal(values[indices]))


def all_equal(rewards: Sequence[float] | np.ndarray) -> bool:
    """Return whether a group's rewards are equal up to rounding, so that no response was better."""
    values = np.asarray(rewards, dtype=np.float64)
    if values.size < 2:
        return True
    return bool(np.ptp(values) <= EQUAL_WITHIN * max(1.0, float(np.abs(values).max())))


def _check_tokens(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
    if not rewards.shape == values.shape == mask.shape or mask.ndim != 1:
        raise RecordError(
            f"rewards {list(rewards.shape)}, values {list(values.shape)} and mask "
            f"{list(mask.shape)} of a rollout must all be [T]"
        )
    if rewards[~mask].any():
        raise RecordError("a reward is at a token that is not trained; it would be lost")
    if not (np.isfinite(rewards[mask]).all() and np.isfinite(values[mask]).all()):
        raise RecordError("a trained token has a reward or value that is not finite")


def _scatter(trained: np.ndarray, mask: np.ndarray) -> np.ndarray:
    tokens = np.zeros(len(mask), dtype=np.float32)
    tokens[mask] = trained
    return tokens
