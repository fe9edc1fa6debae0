"""The bottleneck advisor: its advice is followed in simulated runs, and the gain measured."""

import math
from dataclasses import replace

import pytest

from rlhf_cluster.observe.occupancy import (
    BusyTime,
    Occupancy,
)
from rlhf_cluster.run.bottleneck_advisor import (
    MIN_STEPS,
    ROOM,
    advise,
)
from tests.support.simulation.simulated_services import (
    GROUPS,
    SimulatedServices,
)

TOLERANCE = 0.15
GENERATION = {"generate_s": 4.0 / GROUPS, "score_s": 0.2 / GROUPS, "train_s": 1.0}
SCORING = {"generate_s": 0.5 / GROUPS, "score_s": 6.0 / GROUPS, "train_s": 1.0}
LEARNER = {"generate_s": 1.0 / GROUPS, "score_s": 0.3 / GROUPS, "train_s": 2.0}
SYNCHRONOUS = {"max_staleness": 0, "depth": 0}
PROXIES = {"proxies": 1, "proxy_s": 6.0 / GROUPS}


def record(step: int, step_s=1.0, wait_s=0.0, idle_s=0.0, busy_s=1.0, scoring_s=0.1, workers=1):
    return {
        "step": step,
        "time/step_s": step_s,
        "time/learner_wait_s": wait_s,
        "time/generation_wait_s": idle_s,
        "time/generation_busy_s": busy_s,
        "time/scoring_busy_s": scoring_s,
        "pool/size/generation": float(workers),
        "pool/size/scoring": 1.0,
    }


CASES = [
    *(("generation", {**GENERATION, "generation": n}) for n in (1, 3)),
    ("generation", {**GENERATION, **SYNCHRONOUS}),
    ("generation", {**GENERATION, **SYNCHRONOUS, "generation": 2}),
    ("generation", {**GENERATION, "depth": 1, "max_staleness": 1, "generation": 2}),
    *(("scoring", {**SCORING, "scoring": n}) for n in (1, 2)),
    *(("proxies", {**SCORING, "score_s": 0.5 / GROUPS, **PROXIES, "proxies": n}) for n in (1, 2)),
    ("generation", {**GENERATION, "score_s": 1.0 / GROUPS, **PROXIES, "proxy_s": 1.0 / GROUPS}),
    ("proxies", {**SCORING, "score_s": 1.0 / GROUPS, **PROXIES, **SYNCHRONOUS}),
    ("learner", LEARNER),
    ("learner", {**LEARNER, "generation": 3}),
]


@pytest.mark.parametrize(("bound", "numbers"), CASES)
def test_following_the_advice_gives_what_it_foretold(bound, numbers):
    before = SimulatedServices(**numbers).run()
    advice = advise(before.records)
    assert advice is not None
    assert advice.bound == bound
    for station in advice.gains:
        now = replace(before, records=[])
        change = {"train_s": now.train_s / 2}
        if station != "learner":
            change = {station: getattr(now, station) + 1}
        gain = before.step_s / replace(now, **change).run().step_s
        assert advice.gains[station] == pytest.approx(gain, rel=TOLERANCE), station


def test_a_pool_with_little_to_do_gains_nothing():
    advice = advise(SimulatedServices(**LEARNER, generation=3).run().records)
    assert advice is not None
    assert advice.gains["generation"] < 1.05
    assert advice.gains["scoring"] < 1.05


def test_what_it_says_of_generation():
    records = [record(k, wait_s=0.38, workers=3) for k in range(20)]
    advice = advise(records)
    assert advice is not None
    assert advice.text == (
        "generation-bound: learner waits 38 % of the time; one more generation worker (3 -> 4) "
        "gives about 1.3x (1.3x to 1.3x over the last steps)"
    )
    assert advice.metrics() == {
        "advisor/gain/generation": pytest.approx(4 / 3),
        "advisor/gain/scoring": 1.0,
        "advisor/gain/learner": 1.0,
    }


def test_the_range_is_that_of_the_parts_of_the_window():
    waits = [0.1] * 4 + [0.3] * 4 + [0.5] * 4 + [0.7] * 4
    advice = advise([record(k, wait_s=wait) for k, wait in enumerate(waits)])
    assert advice is not None
    assert advice.ranges["generation"] == (pytest.approx(1 / 0.9), pytest.approx(2.0))
    assert "(1.1x to 2.0x over the last steps)" in advice.text


def test_a_synchronous_run_is_told_that_its_services_take_turns():
    advice = advise([record(k, wait_s=0.5, idle_s=0.5, busy_s=0.5) for k in range(8)])
    assert advice is not None
    assert "take turns: a larger staleness.pipeline_depth" in advice.text
    assert advice.text.endswith("at most 2.0x")


def test_time_in_which_nobody_works_is_told():
    records = [record(k, wait_s=0.6, idle_s=0.8, busy_s=0.2, scoring_s=0.1) for k in range(8)]
    advice = advise(records)
    assert advice is not None
    assert "for 30 % of the time none of them works: weights on their way" in advice.text
    slow_weights = SimulatedServices(**{**GENERATION, **SYNCHRONOUS}, live_s=3.0).run()
    assert "none of them works" in advise(slow_weights.records).text


@pytest.mark.parametrize("queued", [0.0, 0.25, 1.0])
def test_engines_with_room_may_give_nothing(queued):
    """The counters start at 0 again in the middle, where the run went on."""
    records = [
        {
            **record(k, wait_s=0.5),
            "generation/segments_total": 8.0 * (k % 10),
            "generation/segments_queued_total": 8.0 * (k % 10) * queued,
        }
        for k in range(20)
    ]
    advice = advise(records)
    assert advice is not None
    assert advice.load.full == pytest.approx(queued)
    assert advice.gains["generation"] == pytest.approx(2.0)
    assert advice.ranges["generation"] == (pytest.approx(2 / (2 - queued)), pytest.approx(2.0))
    assert ("engines have room" in advice.text) == (queued < ROOM)


def test_engines_of_which_nothing_is_told_count_as_full():
    advice = advise([record(k, wait_s=0.5) for k in range(20)])
    assert advice is not None
    assert advice.load.full == 1.0


def test_a_balanced_run_is_told_so():
    records = [record(k, wait_s=0.01, busy_s=0.99, scoring_s=0.98) for k in range(8)]
    advice = advise(records)
    assert advice is not None
    assert advice.bound is None
    assert advice.text == "balanced: no single worker more gives over 1.05x"


def test_steps_of_another_size_do_not_count():
    old = [record(k, wait_s=0.9, workers=1) for k in range(30)]
    assert advise(old + [record(30 + k, workers=2) for k in range(MIN_STEPS - 1)]) is None
    advice = advise(old + [record(30 + k, wait_s=0.38, workers=2) for k in range(MIN_STEPS)])
    assert advice is not None
    assert advice.load.learner_wait_s == pytest.approx(0.38)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "evaluation/reward_mean": 0.1}] * 20,
        [{"step": k, "time/step_s": None} for k in range(20)],
        [{"step": k, "time/step_s": 0.0} for k in range(20)],
    ],
)
def test_without_steps_there_is_no_advice(records):
    assert advise(records) is None


def test_a_record_without_busy_times_is_judged_by_who_waits():
    old = [
        {k: v for k, v in record(n, wait_s=0.5).items() if not k.endswith("busy_s")}
        for n in range(8)
    ]
    advice = advise(old)
    assert advice is not None
    assert advice.bound == "generation"
    assert "scoring" not in advice.gains


def test_no_gain_is_less_than_one_or_infinite():
    for wait in (0.0, 1.0, 1.5):
        advice = advise([record(k, wait_s=wait, busy_s=0.0, scoring_s=0.0) for k in range(8)])
        assert advice is not None
        assert all(1.0 <= gain < math.inf for gain in advice.gains.values())


def test_a_pool_is_busy_by_the_share_of_its_workers_that_have_a_call():
    now, workers = [0.0], [2]
    pool = Occupancy(lambda: now[0], lambda: workers[0])
    pool.start()
    now[0] = 1.0  # a second with no call
    with pool.call():
        now[0] = 3.0  # two seconds with one call at two workers
        with pool.call(), pool.call():
            now[0] = 7.0  # four seconds with three
    assert pool.take() == BusyTime(idle_s=1.0, busy_s=0.5 * 2 + 4)
    now[0] = 8.0
    assert pool.take() == BusyTime(idle_s=1.0, busy_s=0.0)
    with pool.call():
        now[0], workers[0] = 9.0, 0
        assert pool.take() == BusyTime(idle_s=0.0, busy_s=1.0), "a pool without workers is asked"
