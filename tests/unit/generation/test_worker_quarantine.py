"""The rules by which a worker that still answers is drained."""

from __future__ import annotations

import random
from statistics import median

import pytest
from pydantic import ValidationError

from rlhf_cluster.generation.worker_quarantine import (
    MIN_LOSS_S,
    Watch,
)
from rlhf_cluster.sections.rl_run import Quarantine

A, B, C = "generation-0", "generation-1", "generation-2"


def watch(**settings: float) -> Watch:
    rules = {"max_faults": 3, "window_s": 100.0, "straggler_factor": 4.0, "straggler_groups": 4}
    return Watch(Quarantine.model_validate(rules | settings))


def fault(rules: Watch, worker: str, group: str, now_s: float, others: list[str]) -> str | None:
    rules.present([worker, *others])
    return rules.fault(worker, group, now_s)


def served(rules: Watch, worker: str, seconds: float, tokens: int, others: list[str]) -> str | None:
    rules.present([worker, *others])
    return rules.served(worker, seconds, tokens)


def test_a_worker_on_which_enough_groups_failed_is_named_with_the_numbers():
    rules = watch()
    assert fault(rules, A, "g1", 1.0, [B]) is None
    assert fault(rules, A, "g2", 2.0, [B]) is None
    reason = fault(rules, A, "g3", 3.0, [B])
    assert reason is not None
    assert "3 groups failed on it within 100 s" in reason
    assert "max_faults = 3" in reason


def test_a_group_that_fails_again_and_again_counts_once_a_worker():
    rules = watch()
    for now_s in range(20):
        assert fault(rules, A, "g1", float(now_s), [B]) is None
        assert fault(rules, B, "g1", float(now_s), [A]) is None


def test_faults_before_the_window_do_not_count():
    rules = watch()
    fault(rules, A, "g1", 0.0, [B])
    fault(rules, A, "g2", 60.0, [B])
    assert fault(rules, A, "g3", 100.0, [B]) is None, "g1 was 100 s ago"
    assert fault(rules, A, "g4", 101.0, [B]) is not None


def test_what_fails_everywhere_accuses_no_worker():
    rules = watch()
    found = []
    for number in range(10):
        for worker, other in ((A, B), (B, A)):
            found.append(fault(rules, worker, f"g{number}", float(number), [other]))
    assert found == [None] * 20
    assert fault(watch(), A, "g0", 0.0, []) is None


def test_a_single_worker_is_judged_by_itself():
    rules = watch()
    fault(rules, A, "g1", 0.0, [])
    fault(rules, A, "g2", 0.0, [])
    assert fault(rules, A, "g3", 0.0, []) is not None


def test_a_worker_that_is_gone_is_forgotten():
    rules = watch()
    for group in ("g1", "g2"):
        fault(rules, A, group, 0.0, [B])
    rules.forget(A)
    assert fault(rules, A, "g3", 0.0, [B]) is None


def serve(rules: Watch, worker: str, seconds: list[float], others: list[str]) -> list[str | None]:
    """Groups of 100 tokens, one after the other."""
    return [served(rules, worker, s, 100, others) for s in seconds]


def test_a_straggler_is_named_with_both_speeds():
    rules = watch()
    serve(rules, A, [10.0] * 4, [B])
    *before, last = serve(rules, B, [50.0, 60.0, 1.0, 70.0], [A])
    assert before == [None] * 3, "it has not shown yet what it can do"
    assert last is not None
    assert "550 ms a token over its last 4 groups, and the others 100 ms" in last
    assert "straggler_factor = 4" in last


def test_a_single_long_group_is_no_straggler():
    rules = watch()
    serve(rules, A, [10.0] * 4, [B])
    assert serve(rules, B, [10.0, 10.0, 1000.0, 10.0, 10.0], [A]) == [None] * 5


def test_time_is_counted_by_the_token():
    rules = watch()
    serve(rules, A, [10.0] * 4, [B])
    assert [served(rules, B, 100.0, 1000, [A]) for _ in range(6)] == [None] * 6


def test_the_others_are_those_that_are_there_and_have_shown_what_they_can_do():
    rules = watch()
    serve(rules, A, [10.0] * 3, [B, C])
    assert serve(rules, B, [100.0] * 6, [A, C]) == [None] * 6, "A has served three groups only"
    serve(rules, A, [10.0], [B, C])
    assert serve(rules, B, [100.0], [C]) == [None], "A is gone"
    assert serve(rules, B, [100.0], [A, C])[0] is not None


def test_milliseconds_are_no_reason():
    rules = watch()
    serve(rules, A, [0.001] * 4, [B])
    assert serve(rules, B, [0.1] * 6, [A]) == [None] * 6
    assert serve(rules, B, [0.001 + 1.1 * MIN_LOSS_S] * 6, [A])[-1] is not None


@pytest.mark.parametrize("off", [{"max_faults": 0}, {"straggler_factor": 0}])
def test_a_rule_that_is_off_says_nothing(off):
    rules = watch(**off)
    serve(rules, A, [10.0] * 4, [B])
    slow = serve(rules, B, [100.0] * 6, [A])
    faults = [fault(rules, A, f"g{n}", 0.0, [B]) for n in range(6)]
    assert any(slow) == ("max_faults" in off)
    assert any(faults) == ("straggler_factor" in off)


def test_a_factor_that_would_drain_everyone_is_refused():
    with pytest.raises(ValidationError, match=r"straggler_factor = 1 .* greater than 1, or 0"):
        Quarantine(straggler_factor=1.0)


def test_stragglers_are_those_of_the_definition_while_workers_come_and_go():
    """Against the definition, computed anew from the whole history each time."""
    count, factor, rng = 3, 2.0, random.Random(5)
    rules = watch(straggler_factor=factor, straggler_groups=count)
    names = [f"generation-{i}" for i in range(6)]
    history: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    live, found = list(names), []
    rules.present(live)
    for _ in range(3000):
        if rng.random() < 0.02:
            live = rng.sample(names, rng.randint(2, 6))
            rules.present(live)
        if rng.random() < 0.01:
            gone = rng.choice(names)
            rules.forget(gone)
            history[gone] = []
        name = rng.choice(live)
        slow = 4 if rng.random() < 0.3 else 1
        call = (slow * rng.choice([3.0, 4.0, 5.0]), rng.choice([1, 2]))
        history[name] = [*history[name], call][-count:]
        told = rules.served(name, *call)
        mine = [s / n for s, n in history[name]]
        full = [h for other, h in history.items() if other in live and len(h) == count]
        others = [s / n for h in full if h is not history[name] for s, n in h]
        expected = False
        if len(mine) == count and others:
            loss_s = (median(mine) - median(others)) * median(n for _, n in history[name])
            expected = median(mine) > factor * median(others) and loss_s >= MIN_LOSS_S
        assert (told is not None) == expected
        found.append(expected)
    assert 0.01 < sum(found) / len(found) < 0.9
