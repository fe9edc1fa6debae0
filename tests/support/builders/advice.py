"""Advice from made-up steps, and the settings of an autoscaler that acts on it."""

from rlhf_cluster.config.pools import (
    Autoscale,
    PoolScale,
)
from rlhf_cluster.run.bottleneck_advisor import advise

COOLDOWN_S = 100.0
BOTH = Autoscale(
    generation=PoolScale(maximum=4, cooldown_s=COOLDOWN_S),
    scoring=PoolScale(maximum=4, cooldown_s=COOLDOWN_S),
)


def advice(
    generation_s=1.0, scoring_s=0.1, learner_s=0.1, sizes=(1, 1), steps=32, noise=None, full=1.0
):
    """From steps that last as long as the slowest station, the others overlapping. At the end of the
    share `full` of the groups requests waited."""
    records = []
    for step in range(steps):
        demand = [generation_s, scoring_s, learner_s]
        if noise is not None:
            demand = [d * noise.uniform(0.7, 1.3) for d in demand]
        step_s = max(demand)
        records.append(
            {
                "step": step,
                "time/step_s": step_s,
                "time/learner_wait_s": step_s - demand[2],
                "time/generation_wait_s": step_s - demand[0],
                "time/generation_busy_s": demand[0],
                "time/scoring_busy_s": demand[1],
                "pool/size/generation": float(sizes[0]),
                "pool/size/scoring": float(sizes[1]),
                "generation/segments_total": float(step),
                "generation/segments_queued_total": full * step,
            }
        )
    found = advise(records)
    assert found is not None
    return found


def sized(generation=1, scoring=1):
    return {"generation": generation, "scoring": scoring}
