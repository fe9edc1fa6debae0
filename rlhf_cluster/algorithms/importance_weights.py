"""Off-policy correction: the weight of a token whose sampler is not the policy that is trained.

What the rules are, and which may be combined, is in `off_policy_correction`. The weight of a token
is the product of the weights that the rules give it.

Promises: everything is computed in log space from log-ratios clamped to [-20, 20], sums of them too,
so weights and their squares are finite for any finite log-probabilities and any length; weights
carry no gradient; a rollout's weight depends on its own tokens only, so micro-batches that keep
rollouts whole change nothing.

Shapes: N trained tokens (masked ones are gone before they come here), R rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.off_policy_correction import (
    Level,
    Rule,
    TokenTis,
)
from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What the rules make of the tokens. No gradient."""

    weights: Tensor  # [N]
    capped: Tensor  # [N] bool, the weight is not 0, and its ratio was moved to a bound
    masked: Tensor  # [N] bool, the weight is 0
    outside: Mapping[str, Tensor]  # by the rule's name, [N] bool, the ratio is off its band


def log_ratio(logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """log(pi / mu) a token, clamped to [-20, 20]. [N], [N] -> [N].

    Raises:
        RecordError: shapes that differ; they would broadcast to a matrix without a word.
    """
    if logprobs.shape != sampled_logprobs.shape or logprobs.ndim != 1:
        raise RecordError(
            f"log-probabilities of shapes {list(logprobs.shape)} and "
            f"{list(sampled_logprobs.shape)}; both must be [N]"
        )
    return (logprobs - sampled_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_sums(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums over the tokens of each sequence. [N], [N] int64 -> [num_sequences]; keeps gradients."""
    return values.new_zeros(num_sequences).index_add(0, sequence, values)


def sequence_means(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Means over the tokens of each sequence, 0 where there is none. Shapes as `sequence_sums`."""
    counts = sequence_sums(values.new_ones(values.shape), sequence, num_sequences)
    return sequence_sums(values, sequence, num_sequences) / counts.clamp(min=1)


def weigh(
    rules: Sequence[Rule],
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    sequence: Tensor,
    num_sequences: int,
) -> Weighed:
    """Apply all rules to all tokens of a micro-batch; without one each token weighs 1.

    Args:
        rules: see `off_policy_correction`.
        logprobs: [N] of the policy that the weights lead to.
        sampled_logprobs: [N] of the sampler.
        sequence: [N] int64 in [0, num_sequences), whose rollout a token is of.
        num_sequences: rollouts in the micro-batch.

    Raises:
        RecordError: shapes that differ.
    """
    logs = log_ratio(logprobs.detach(), sampled_logprobs.detach())
    weights = logs.new_ones(logs.shape)
    capped = masked = logs.new_zeros(logs.shape).bool()
    found = {}
    for rule in rules:
        ratio = _level_logs(rule.level, logs, sequence, num_sequences).exp()
        outside = found[rule.name] = (ratio < rule.low) | (ratio > rule.high)
        if rule.action == "truncate":
            weights, capped = weights * ratio.clamp(rule.low, rule.high), capped | outside
        else:
            weights, masked = weights * ratio if rule.keep_ratio else weights, masked | outside
    return Weighed(
        weights=weights.masked_fill(masked, 0.0),
        capped=capped & ~masked,
        masked=masked,
        outside=found,
    )


def _level_logs(level: Level, logs: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    if level == "token":
        return logs
    over = sequence_sums if level == "sequence" else sequence_means
    whole = over(logs.double(), sequence, num_sequences)
    return whole.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[sequence].to(logs.dtype)


def token_cap(rules: Sequence[Rule]) -> float | None:
    """Bound of the TOKEN weight of terms that are sums over tokens, such as the KL.

    A sequence's ratio on a single token's KL would weigh it by what other tokens did, so those
    terms take the token's own ratio whatever the rules' levels; without a rule they take none.
    """
    if not rules:
        return None
    return min((r.high for r in rules if r.level == "token"), default=TokenTis().cap)


def interpolated_proximal(
    learner_logprobs: Tensor, sampled_logprobs: Tensor, staleness: Tensor
) -> Tensor:
    """The proximal policy between sampler and learner, without a pass of its own. [N] -> [N].

        log prox = alpha log mu + (1 - alpha) sg(log pi),   alpha = 1 / max(staleness, 1)

    The staler a token, the nearer the trust region's centre is to the learner: at staleness d the
    proximal policy stands one of d steps' distance from it. Li et al. 2025, arXiv 2512.06547
    (A-3PO), which has alpha = 0 at staleness 0: the centre would then move with the learner, and no
    later optimizer step of the batch would be clipped. The sampler of such a token is the policy at the
    start of the step, which is the centre that it has here.
    """
    learner = learner_logprobs.detach()
    alpha = (1 / staleness.clamp(min=1)).to(learner.dtype)
    return alpha * sampled_logprobs + (1 - alpha) * learner
