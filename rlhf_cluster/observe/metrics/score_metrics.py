"""Parts of the reward, what is watched beside it, and a scorer's totals, as metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_cluster.records import GroupSummary

_TOTALS = {
    "cache_hits": "scoring/cache_hits_total",
    "cache_misses": "scoring/cache_misses_total",
    "watched_errors": "scoring/watched_errors_total",
}


def scoring_totals(stats: Mapping[str, float]) -> dict[str, float]:
    """Those of a scorer's totals (`Scorer.stats`) that are counters, by the counter's name."""
    found = {}
    for key, total in stats.items():
        kind, slash, reward = key.partition("/")
        if kind in _TOTALS:
            found[_TOTALS[kind] + slash + reward] = total
    return found


def part_means(summaries: Sequence[GroupSummary], metric: str) -> dict[str, float]:
    """`<metric>/<part>`: the mean over the rollouts of the groups that have the part."""
    sums: dict[str, tuple[float, int]] = {}
    for summary in summaries:
        for name, mean in summary.parts.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * summary.num_rollouts, count + summary.num_rollouts)
    return {f"{metric}/{name}": total / count for name, (total, count) in sums.items()}
