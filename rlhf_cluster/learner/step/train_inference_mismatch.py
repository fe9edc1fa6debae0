"""Metrics of the two reasons why a ratio is not 1: engine mismatch and staleness.

The scoring pool's exact log-probabilities separate them.

With mu the engine's probability of a token at sampling, e the exact one (same weights, learner
numerics; see `scoring.exact_logprobs`) and p the proximal policy's (the learner at the start of the
step):

    engine mismatch    |log mu - log e|      the same weights, in the engine and in the learner
    staleness effect   |log p  - log e|      the same numerics, with later weights

    |log p - log mu|  <=  engine mismatch + staleness effect

The engine mismatch is a property of engine, types and quantisation. It does not grow with staleness,
unless an update keeps KV caches. The staleness effect is 0 at staleness 0 if weights are published in
the type in which the learner computes. If an algorithm runs no pass of the proximal policy and a batch
has several optimizer steps, p is the policy of the pass.

Mean and maximum are exact. The 95th percentile is computed from the histogram of
`algorithms.off_policy_distance`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.off_policy_distance import (
    NUM_BINS,
    histogram,
    quantile,
)

EFFECTS = ("engine_mismatch", "staleness_effect")


def effect_sums(sampled: Tensor, proximal: Tensor, exact: Tensor) -> Sums:
    """Compute sums over the tokens of a micro-batch. Arguments: [N] log-probabilities; N may be 0."""
    exact = exact.detach()
    return {
        **_sums("engine_mismatch", (sampled.detach() - exact).abs().double()),
        **_sums("staleness_effect", (proximal.detach() - exact).abs().double()),
    }


def derive_effects(means: Mapping[str, float]) -> dict[str, float]:
    """Compute the metrics that are not means over tokens from the reduced sums."""
    return {
        f"importance/{name}_p95": quantile(
            [means[f"_{name}_bin/{i}"] for i in range(NUM_BINS)], 0.95
        )
        for name in EFFECTS
        if f"importance/{name}_mean" in means
    }


def _sums(name: str, sizes: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    count = sizes.new_tensor(sizes.numel())
    largest = sizes.max() if sizes.numel() else sizes.new_tensor(0.0)
    return {
        f"importance/{name}_mean": (sizes.sum(), count),
        f"importance/{name}_max": (largest, count),
        f"_{name}_bin": (histogram(sizes), count),
    }
