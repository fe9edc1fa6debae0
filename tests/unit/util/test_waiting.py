"""Who waits takes longer than what it waits for, over all pairs of a run's configuration."""

import functools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.drivers.training_attempt import publish_deadline_s, save_deadline_s
from actors.services.rank_actors import RayLearner
from actors.services.scoring_client import score_deadline_s
from actors.services.start_services import Launcher, generation_pool, scoring_pools
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import ScoringError
from rlhf_cluster.models.shared_passes import SharedPasses
from rlhf_cluster.util.waiting import call_deadline, callee_deadline, remaining_s, reply_deadline
from rlhf_cluster.weights.sync import MAX_REFUSED, PAUSES_S
from tests.support.builders.run_configs import tiny_config

SHORT = {
    "generation": {"request_timeout_s": 2.0, "pull_timeout_s": 1.0},
    "learner": {"step_timeout_s": 3.0},
    "checkpoint": {"timeout_s": 2.0},
    "run": {"start_timeout_s": 4.0},
    "weights": {"publish_timeout_s": 1.5},
}
MOVING = {"scoring": {"reference": True, "reference_update": {"type": "periodic", "every": 1}}}
CONFIGS = {
    "defaults": tiny_config(),
    "short": tiny_config(**SHORT),
    "moving reference": tiny_config(**MOVING),
    "exact log-probabilities": tiny_config(scoring={"exact_logprobs": True}),
    "mirror": tiny_config(weights={"mirror": "/dev/shm"}),
}
NUM_BYTES = 140_000_000_000
LAUNCHER = functools.partial(Launcher, model_dir="", engine_factory="", engine_environment={})


def pairs(c: RunConfig) -> dict[str, tuple[float, float]]:
    """What waits, and the longest that what it waits for may take."""
    learner, launcher = RayLearner([], c), LAUNCHER(config=c)
    drains = [pool.limits.drain_timeout_s for pool in scoring_pools(launcher)[0]]
    check_s, load_s = reply_deadline(c.cluster.heartbeat_timeout_s), c.run.start_timeout_s
    pull_s = reply_deadline(c.pull_deadline_s(NUM_BYTES))
    publish_s = reply_deadline(c.weights.publish_timeout_s) + reply_deadline(0.0)
    follow_s = load_s + 2 * (reply_deadline(load_s) + check_s) if c.stored_reference else 0.0
    if c.scoring.exact_logprobs:
        follow_s += 2 * (pull_s + check_s)
    one_try_s = (
        reply_deadline(learner.snapshot_deadline_s)
        + publish_s
        + 2 * (pull_s + check_s)
        + MAX_REFUSED * follow_s
        + 2 * sum(PAUSES_S)
    )
    copy_s, write_s = reply_deadline(c.learner.step_timeout_s), c.checkpoint.timeout_s
    return {
        "generation's drain over a group": (
            generation_pool(launcher)[0].limits.drain_timeout_s,
            reply_deadline(c.generation.request_timeout_s),
        ),
        "scoring's drain over a group": (
            min(drains),
            reply_deadline(score_deadline_s(c.scoring, c.buffer)),
        ),
        "a group over its scoring": (
            reply_deadline(score_deadline_s(c.scoring, c.buffer)),
            c.scoring.request_timeout_s + c.buffer.write_timeout_s,
        ),
        "a checkpoint over its ranks": (write_s, reply_deadline(callee_deadline(write_s))),
        "the last checkpoint over two": (save_deadline_s(c), write_s + copy_s + write_s),
        "a snapshot over a step before it": (
            learner.snapshot_deadline_s,
            2 * c.learner.step_timeout_s,
        ),
        "a step over its count": (
            c.learner.step_timeout_s,
            reply_deadline(callee_deadline(c.learner.step_timeout_s) / 2),
        ),
        "a rank's setup over its meeting": (
            reply_deadline(c.run.start_timeout_s),
            reply_deadline(callee_deadline(c.run.start_timeout_s)),
        ),
        "a live version over its tries": (
            publish_deadline_s(c, NUM_BYTES),
            MAX_REFUSED * one_try_s,
        ),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_outer_deadline_is_over_its_inner_ones(name):
    for what, (outer, inner) in pairs(CONFIGS[name]).items():
        assert outer >= inner, f"{what}: {outer:g} s around {inner:g} s"


@given(st.floats(0.0, 1e6))
def test_a_callee_deadline_is_the_longest_whose_reply_is_in_time(outer_s):
    inner_s = callee_deadline(outer_s)
    assert reply_deadline(inner_s) <= max(outer_s, reply_deadline(0.0)) * (1 + 1e-9)
    if inner_s:
        assert reply_deadline(inner_s) == pytest.approx(outer_s)


def test_waits_one_after_the_other_share_the_deadline_of_their_call():
    now = [100.0]
    assert remaining_s(60.0, lambda: now[0]) == 60.0
    with call_deadline(50.0, lambda: now[0]):
        assert remaining_s(60.0, lambda: now[0]) == 50.0
        now[0] += 30.0
        assert remaining_s(60.0, lambda: now[0]) == 20.0
        assert remaining_s(5.0, lambda: now[0]) == 5.0
        now[0] += 30.0
        assert remaining_s(60.0, lambda: now[0]) == 0.0
    assert remaining_s(60.0, lambda: now[0]) == 60.0


def test_a_group_that_waited_for_one_model_has_less_for_the_next():
    """Else a worker whose models are busy would answer after its caller gave it up, and look dead."""
    holds, free = threading.Event(), threading.Event()

    def compute(items):
        holds.set()
        free.wait(30)
        return items

    passes = SharedPasses(
        compute,
        size=lambda item: 1,
        budget=1,
        max_calls=1,
        timeout_s=1000.0,
        late=lambda: ScoringError("busy"),
    )
    other = threading.Thread(target=passes, args=([1],))
    other.start()
    assert holds.wait(30)
    with call_deadline(0.01), pytest.raises(ScoringError, match="busy"):
        passes([2])
    free.set()
    other.join(30)
