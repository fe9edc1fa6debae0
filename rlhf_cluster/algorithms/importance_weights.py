"""Log-ratios of policies, per token and per rollout, which off-policy correction is made of.

`policy_gradient.weigh` turns them into weights by the rules of `off_policy_correction`.

Promises: log-ratios are clamped to [-20, 20], sums of them too, so that ratios and their squares are
finite for any finite log-probabilities and any length.

Shapes: N trained tokens (masked ones are removed before), R rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.off_policy_correction import Level, Rule, TokenTis
from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0


def log_ratio(logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """Return log(pi / mu) of each token, clamped to [-20, 20]. [N], [N] -> [N].

    Raises:
        RecordError: shapes that differ; they would silently broadcast to a matrix.
    """
    if logprobs.shape != sampled_logprobs.shape or logprobs.ndim != 1:
        raise RecordError(
            f"log-probabilities of shapes {list(logprobs.shape)} and "
            f"{list(sampled_logprobs.shape)}; both must be [N]"
        )
    return (logprobs - sampled_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_sums(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sum over the tokens of each sequence. [N], [N] int64 -> [num_sequences]; keeps gradients."""
    return values.new_zeros(num_sequences).index_add(0, sequence, values)


def sequence_means(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Average over the tokens of each sequence, 0 for an empty one. Shapes as `sequence_sums`."""
    counts = sequence_sums(values.new_ones(values.shape), sequence, num_sequences)
    return sequence_sums(values, sequence, num_sequences) / counts.clamp(min=1)


def level_log_ratios(level: Level, logs: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Return each token's log-ratio at a rule's level: its own, or its rollout's sum or mean. [N]."""
    if level == "token":
        return logs
    over = sequence_sums if level == "sequence" else sequence_means
    # float64: a sum over thousands of tokens
    rollouts = over(logs.double(), sequence, num_sequences)
    return rollouts.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[sequence].to(logs.dtype)


def token_cap(rules: Sequence[Rule]) -> float | None:
    """Return the bound of the TOKEN weight of terms that are sums over tokens, such as the KL.

    A sequence's ratio on a single token's KL would weigh it by what other tokens did, so those
    terms take the token's own ratio whatever the rules' levels; without rules, None: no weight.
    """
    if not rules:
        return None
    return min((r.high for r in rules if r.level == "token"), default=TokenTis().cap)


def interpolated_proximal(
    learner_logprobs: Tensor, sampled_logprobs: Tensor, staleness: Tensor
) -> Tensor:
    """Interpolate the proximal policy between sampler and learner, without a forward pass. [N].

        log prox = alpha log mu + (1 - alpha) sg(log pi),   alpha = 1 / max(staleness, 1)

    The staler a token, the nearer the trust region's centre is to the learner: at staleness d the
    proximal policy is at a d-th of the distance from the learner to the sampler. Li et al. 2025,
    arXiv 2512.06547 (A-3PO), has alpha = 0 at staleness 0: the centre would then move with the
    learner, and no later optimizer step of the batch would be clipped. The sampler of such a token is
    the policy at the start of the step, which is its centre here.
    """
    learner = learner_logprobs.detach()
    alpha = (1 / staleness.clamp(min=1)).to(learner.dtype)
    return alpha * sampled_logprobs + (1 - alpha) * learner
