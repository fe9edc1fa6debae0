"""The controller of the pipeline depth: `rlhf_cluster.buffer.adaptive_depth`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.buffer.adaptive_depth import (
    DepthController,
    depth_controller,
)
from rlhf_cluster.sections.rl_run import (
    AdaptiveDepth,
    Staleness,
)

THRESHOLDS = AdaptiveDepth(ess_low=0.5, ess_high=0.8, wait_share=0.1, steps=3)


def controller(depth: int = 2, max_staleness: int = 4) -> DepthController:
    found = DepthController(depth=depth, max_staleness=max_staleness, thresholds=THRESHOLDS)
    for _ in range(depth):  # trained on groups of before
        assert found.step(0.01, 0.99) is None
    return found


@pytest.mark.parametrize(
    ("ess", "wait", "depth", "reason"),
    [
        (0.3, 0.0, 1, "effective sample size 0.30 is under 0.5"),
        (0.3, 0.9, 1, "effective sample size 0.30 is under 0.5"),
        (0.6, 0.0, 1, "effective sample size 0.60 is under 0.8 and the learner waited 0 %"),
        (0.6, 0.9, 2, None),
        (0.9, 0.0, 2, None),
        (0.9, 0.4, 3, "the learner waited 40 % of the time and effective sample size 0.90 is not"),
    ],
)
def test_each_zone_decides_as_its_table_says(ess, wait, depth, reason):
    found = controller()
    assert found.step(ess, wait) is None
    assert found.step(ess, wait) is None
    change = found.step(ess, wait)
    assert found.depth == depth
    assert (change is None) == (reason is None)
    if change is not None:
        assert (change.before, change.depth) == (2, depth)
        assert change.reason.startswith(reason)


def test_the_mean_of_the_steps_decides_not_one_of_them():
    """Means over 3 steps: 0.6 each, and the learner waits, so the depth stays."""
    found = controller()
    for ess in (0.1, 0.9, 0.8):
        assert found.step(ess, 0.5) is None
    assert found.step(0.9, 0.5).depth == 3, "(0.9 + 0.8 + 0.9) / 3 = 0.867"


def test_steps_on_groups_of_the_depth_before_do_not_count():
    found = controller(depth=2)
    changes = [found.step(0.3, 0.0) for _ in range(3)]
    assert changes[-1].depth == 1
    assert [found.step(0.01, 0.0) for _ in range(2)] == [None, None], "max(2, 1) steps left out"
    for _ in range(3):
        assert found.step(0.9, 0.0) is None
    assert found.depth == 1


def test_the_depth_stays_within_zero_and_the_bound():
    low, high = controller(depth=0), controller(depth=4)
    for _ in range(20):
        assert low.step(0.1, 0.9) is None
        assert high.step(1.0, 0.9) is None
    assert (low.depth, high.depth) == (0, 4)


def test_a_step_without_trained_tokens_says_nothing():
    found = controller()
    for _ in range(10):
        assert found.step(None, 0.9) is None


@given(
    ess=st.floats(0.01, 1.0),
    wait=st.floats(0.0, 1.0),
    depth=st.integers(0, 5),
)
def test_under_constant_measurements_it_moves_one_way_and_then_stands(ess, wait, depth):
    found = DepthController(depth=depth, max_staleness=5, thresholds=THRESHOLDS)
    changes = [change for _ in range(80) if (change := found.step(ess, wait))]
    assert len({change.depth > change.before for change in changes}) <= 1
    assert all(abs(change.depth - change.before) == 1 for change in changes)
    assert all(0 <= change.depth <= 5 and change.reason for change in changes)
    assert [found.step(ess, wait) for _ in range(10)] == [None] * 10, "80 steps are enough"


def test_without_its_section_the_depth_is_fixed():
    assert depth_controller(Staleness()) is None
    made = depth_controller(Staleness(max_staleness=3, pipeline_depth=2, adaptive=THRESHOLDS))
    assert (made.depth, made.max_staleness) == (2, 3)
