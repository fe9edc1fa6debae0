"""S34: the lengths that are trained are the lengths that are generated.

Response lengths are log-normal, and a group takes as long as its response. A system that bounds
staleness by discarding trains short answers more often than it samples them; one that bounds it at
admission trains every group, however slow.
"""

import statistics

import pytest

from rlhf_cluster.buffer.staleness import AdmissionGate
from tests.support.simulation.simulated_run import (
    SimulatedRun,
    long_tailed,
)

GATE = {"max_staleness": 2, "pipeline_depth": 2, "groups_per_step": 4, "num_steps": 150}


def run(**changes) -> SimulatedRun:
    return SimulatedRun(AdmissionGate(**(GATE | changes)), 3, duration=long_tailed).run()


def over_generated(run: SimulatedRun) -> float:
    """Mean length trained over mean length of all that was sampled."""
    trained = statistics.fmean(group.duration for group in run.trained)
    return trained / statistics.fmean(run.generated.values())


@pytest.mark.parametrize("look_ahead", [1, 5, 9])
@pytest.mark.parametrize("on_stale", ["wait", "reweight"])
def test_s34_trained_lengths_are_the_generated_ones_and_the_slowest_is_trained(
    look_ahead, on_stale
):
    limit = 4 if on_stale == "reweight" else None
    found = run(look_ahead=look_ahead, on_stale=on_stale, stale_limit=limit)
    assert len(found.generated) >= 600
    assert over_generated(found) == pytest.approx(1.0, abs=0.02)
    slowest = max(found.generated, key=lambda number: found.generated[number])
    assert slowest in {group.number for group in found.trained}


@pytest.mark.parametrize("look_ahead", [1, 5, 9])
def test_s34_the_lengths_are_right_all_through_the_run_not_only_at_its_end(look_ahead):
    """A run that is stopped half way: what it has not trained yet is what the window allows."""
    found = run(look_ahead=look_ahead)
    half = found.trained[: len(found.trained) // 2]
    numbers = {group.number for group in half}
    skipped = set(range(max(numbers))) - numbers
    assert len(skipped) < look_ahead


def dropping(look_ahead: int) -> float:
    """Length bias of on_stale = "drop" with slow publishes, over many runs."""
    gate = AdmissionGate(**(GATE | {"on_stale": "drop", "look_ahead": look_ahead, "num_steps": 60}))
    runs = [SimulatedRun(gate, seed, publish=lambda rng: 4.0).run() for seed in range(30)]
    assert min(found.buffer.stats().discarded["stale"] for found in runs) > 50
    trained = [group.duration for found in runs for group in found.trained]
    generated = [length for found in runs for length in found.generated.values()]
    return statistics.fmean(trained) / statistics.fmean(generated)


def test_s34_discards_for_age_hit_slow_groups_only_if_those_can_be_overtaken():
    """In strict order the learner waits for a slow group and gets no newer meanwhile, so its age
    does not depend on its length. With a window the learner goes on without it: the configuration
    refuses `drop` with look_ahead over 1."""
    assert dropping(look_ahead=1) == pytest.approx(1.0, abs=0.02)
    assert dropping(look_ahead=5) < 0.85
