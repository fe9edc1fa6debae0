"""Distance of the current policy from the sampler, as sums over tokens that add and divide once.

`distance_sums` is called once per micro-batch, `derive_distance` once per step on the reduced means.
The ratios pi / mu are those BEFORE any rule is applied, so the report shows the distance and not the
cap. What a rule did is reported as shares of tokens (`shares_by_staleness`).

    effective sample size   (sum w)^2 / (n sum w^2), a share in (0, 1]         Kish 1965
    chi-squared             mean(w^2) - 1, an estimate of chi^2(pi || mu)
    p50, p95 of |log w|     from a histogram with 8 bins per decade: exact to within a bin, a factor
                            of 1.33; below 1e-4 to within 1e-4

Each is reported for all tokens, and as NAME_by_staleness/S for those of staleness S, 0 to 4 and 5+.

`effect_sums` and `derive_effects` separate two reasons for the distance, with e the exact probability
of a token (`scoring.exact_logprobs`: the weights of the sampler, the numerics of the learner) and p
that of the proximal policy:

    engine mismatch    |log mu - log e|      the same weights, in the engine and in the learner
    staleness effect   |log p  - log e|      the same numerics, with later weights

The engine mismatch is a property of engine, types and quantisation. It does not grow with staleness,
unless an update keeps KV caches. The staleness effect is 0 at staleness 0 if weights are published in
the type in which the learner computes. If an algorithm runs no pass of the proximal policy and a batch
has several optimizer steps, p is the policy of the pass.

Names that start with `_` are sums for `derive_distance`, which removes them. Every micro-batch gives
the same names, with count 0 where it has no such token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.importance_weights import MAX_LOG_RATIO, log_ratio

if TYPE_CHECKING:
    from torch import Tensor

BAND = (0.5, 5.0)
"""Band of ratios that is reported (the token band of IcePop)."""

STALENESS_LABELS = ("0", "1", "2", "3", "4", "5+")

EFFECTS = ("engine_mismatch", "staleness_effect")

SMALLEST = 1e-4
BINS_PER_DECADE = 8
NUM_BINS = 1 + math.ceil(BINS_PER_DECADE * math.log10(MAX_LOG_RATIO / SMALLEST))
"""Bin 0 is [0, 1e-4); bin i > 0 is [1e-4 10^((i - 1) / 8), 1e-4 10^(i / 8))."""


def distance_sums(logprobs: Tensor, sampled_logprobs: Tensor, staleness: Tensor) -> Sums:
    """Return sums over the tokens of a micro-batch. Each argument [N]."""
    logs = log_ratio(logprobs.detach(), sampled_logprobs.detach()).double()
    ratio, sizes = logs.exp(), logs.abs()
    per_token = {
        "ratio_mean": ratio,
        "_ratio_squared": ratio.square(),
        "outside_band_fraction": ((ratio < BAND[0]) | (ratio > BAND[1])).double(),
        "logprob_diff_mean": (logprobs.detach() - sampled_logprobs).abs().double(),
    }
    count = ratio.new_tensor(ratio.numel())
    bucket = _to_bucket(staleness)
    counts = _sum_by_bucket(ratio.new_ones(ratio.shape), bucket)
    bins = histogram(sizes, bucket)
    return {
        **{_name_total(name): (values.sum(), count) for name, values in per_token.items()},
        **{
            _name_by_staleness(name): (_sum_by_bucket(v, bucket), counts)
            for name, v in per_token.items()
        },
        "importance/ratio_max": (_largest(ratio), count),
        "importance/log_ratio_max": (_largest(sizes), count),
        "_log_ratio_by_staleness_max": (
            counts.new_zeros(counts.shape).scatter_reduce(0, bucket, sizes, "amax"),
            counts,
        ),
        "_bin": (bins.sum(0), count),
        "_bin_by_staleness": (bins.flatten(), counts.repeat_interleave(NUM_BINS)),
    }


def shares_by_staleness(shares: Mapping[str, Tensor], staleness: Tensor) -> Sums:
    """Return sums for the share of tokens, per staleness, where each of `shares` [N] bool is True.

    `derive_distance` turns them into metrics importance/NAME_by_staleness.
    """
    bucket = _to_bucket(staleness)
    counts = _sum_by_bucket(staleness.new_ones(staleness.shape).double(), bucket)
    return {
        _name_by_staleness(name): (_sum_by_bucket(share.double(), bucket), counts)
        for name, share in shares.items()
    }


def derive_distance(means: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics to report, given the reduced means; others pass through."""
    metrics = {name: value for name, value in means.items() if not name.startswith("_")}
    if "_ratio_squared" in means:
        shares = [means[f"_bin/{i}"] for i in range(NUM_BINS)]
        derived = _derive(means["importance/ratio_mean"], means["_ratio_squared"], shares)
        metrics |= {f"importance/{name}": value for name, value in derived.items()}
    for index, label in enumerate(STALENESS_LABELS):
        derived = _derive_bucket(means, index)
        metrics |= {f"importance/{n}_by_staleness/{label}": v for n, v in derived.items()}
    return metrics


def effect_sums(sampled: Tensor, proximal: Tensor, exact: Tensor) -> Sums:
    """Return sums over the tokens of a micro-batch. Each argument [N] log-probabilities; N may be 0."""
    exact = exact.detach()
    return {
        **_effect("engine_mismatch", (sampled.detach() - exact).abs().double()),
        **_effect("staleness_effect", (proximal.detach() - exact).abs().double()),
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


def _derive_bucket(means: Mapping[str, float], index: int) -> dict[str, float]:
    """Return the metrics of the tokens in one bucket, by names without `_by_staleness`."""
    ending = f"_by_staleness/{index}"
    metrics = {
        name.removeprefix("_").removesuffix(ending): value
        for name, value in means.items()
        if name.endswith(ending) and not name.startswith("_bin")
    }
    squared = metrics.pop("ratio_squared", None)
    if squared is not None:
        first = index * NUM_BINS
        shares = [means[f"_bin_by_staleness/{first + i}"] for i in range(NUM_BINS)]
        metrics |= _derive(metrics["ratio_mean"], squared, shares)
        metrics["log_ratio_max"] = means[f"_log_ratio_by_staleness_max/{index}"]
    return metrics


def _derive(ratio: float, ratio_squared: float, shares: list[float]) -> dict[str, float]:
    return {
        "effective_sample_size": ratio**2 / ratio_squared,
        "chi_squared": ratio_squared - 1,
        "log_ratio_p50": quantile(shares, 0.5),
        "log_ratio_p95": quantile(shares, 0.95),
    }


def quantile(shares: list[float], q: float) -> float:
    """Return the quantile `q` of |log ratio|, given the share of tokens in each bin."""
    below = 0.0
    for index, share in enumerate(shares):
        # shares that add up to exactly q may fall short of it by rounding
        if share > 0 and below + share >= q - 1e-9:
            part = min(1.0, (q - below) / share)
            if index == 0:
                return SMALLEST * part
            return SMALLEST * 10 ** ((index - 1 + part) / BINS_PER_DECADE)
        below += share
    return MAX_LOG_RATIO


def histogram(sizes: Tensor, bucket: Tensor | None = None) -> Tensor:
    """Count |log ratio| [N] per bin: [NUM_BINS].

    With `bucket` [N] int64, one histogram per staleness label: [labels, NUM_BINS].
    """
    decades = (sizes.clamp(min=SMALLEST / 10) / SMALLEST).log10()
    bins = (decades * BINS_PER_DECADE).floor().long() + 1
    bins = bins.clamp(0, NUM_BINS - 1)
    ones = sizes.new_ones(sizes.shape)
    if bucket is None:
        return sizes.new_zeros(NUM_BINS).index_add(0, bins, ones)
    flat = sizes.new_zeros(len(STALENESS_LABELS) * NUM_BINS)
    return flat.index_add(0, bucket * NUM_BINS + bins, ones).view(-1, NUM_BINS)


def _effect(name: str, sizes: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    count = sizes.new_tensor(sizes.numel())
    return {
        f"importance/{name}_mean": (sizes.sum(), count),
        f"importance/{name}_max": (_largest(sizes), count),
        f"_{name}_bin": (histogram(sizes), count),
    }


def _to_bucket(staleness: Tensor) -> Tensor:
    return staleness.detach().long().clamp(0, len(STALENESS_LABELS) - 1)


def _sum_by_bucket(values: Tensor, bucket: Tensor) -> Tensor:
    return values.new_zeros(len(STALENESS_LABELS)).index_add(0, bucket, values)


def _largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_tensor(0.0)


def _name_total(name: str) -> str:
    return name if name.startswith("_") else f"importance/{name}"


def _name_by_staleness(name: str) -> str:
    return f"_{name.removeprefix('_')}_by_staleness"
