"""Importance weights between the policy that sampled a token and the one that trains it.

Promises: everything is computed from log-ratios clamped to [-20, 20], so weights and their squares
are finite for any finite log-probabilities; weights carry no gradient; reported ratios are those
BEFORE truncation, so the report shows how far apart the policies are and not the cap.

Shapes: N trained tokens (masked ones are gone before they come here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0

BAND = (0.5, 5.0)
"""Ratios outside are counted as outside the band (the token band of IcePop)."""


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


def truncated_weight(logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """w = min(pi / mu, cap) a token, without gradient. [N], [N] -> [N].

    Token-level truncated importance sampling (Ionides 2008; Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training").
    """
    return log_ratio(logprobs, sampled_logprobs).detach().exp().clamp(max=cap)


def metric_sums(logprobs: Tensor, sampled_logprobs: Tensor, cap: float | None) -> Sums:
    """What tells how far the policies are apart, as sums over tokens. `cap` None: nothing capped.

    Besides the reported names, `importance/ratio_squared` is there for `effective_sample_size`.
    """
    logs = log_ratio(logprobs, sampled_logprobs).detach()
    ratio = logs.exp().double()
    count = ratio.new_tensor(ratio.numel())
    capped = ratio > cap if cap is not None else ratio.new_zeros(ratio.shape)
    outside = (ratio < BAND[0]) | (ratio > BAND[1])
    largest = ratio.max() if ratio.numel() else ratio.new_tensor(0.0)
    sums = {
        "importance/ratio_mean": ratio.sum(),
        "importance/ratio_squared": ratio.square().sum(),
        "importance/ratio_max": largest,
        "importance/capped_fraction": capped.sum(),
        "importance/outside_band_fraction": outside.sum(),
        "importance/logprob_diff_mean": (logprobs.detach() - sampled_logprobs).abs().sum(),
    }
    return {name: (total, count) for name, total in sums.items()}


def effective_sample_size(means: Mapping[str, float]) -> dict[str, float]:
    """Replace the mean squared ratio by the effective sample size, (sum w)^2 / (N sum w^2).

    A share in (0, 1]: 1 when all tokens weigh the same, 1/N when one outweighs all others.
    """
    found = dict(means)
    squared = found.pop("importance/ratio_squared", None)
    if squared:
        found["importance/effective_sample_size"] = found["importance/ratio_mean"] ** 2 / squared
    return found
