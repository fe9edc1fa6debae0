"""The rules by which a worker that still answers is drained."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlhf_cluster.config.quarantine import Quarantine
from rlhf_cluster.quarantine import MIN_LOSS_S, Watch

A, B, C = "generation-0", "generation-1", "generation-2"


def watch(**settings: float) -> Watch:
    rules = {"max_faults": 3, "window_s": 100.0, "straggler_factor": 4.0, "straggler_groups": 4}
    return Watch(Quarantine.model_validate(rules | settings))


def test_a_worker_on_which_enough_groups_failed_is_named_with_the_numbers():
    rules = watch()
    assert rules.fault(A, "g1", 1.0, [B]) is None
    assert rules.fault(A, "g2", 2.0, [B]) is None
    reason = rules.fault(A, "g3", 3.0, [B])
    assert reason is not None
    assert "3 groups failed on it within 100 s" in reason
    assert "max_faults = 3" in reason


def test_a_group_that_fails_again_and_again_counts_once_a_worker():
    rules = watch()
    for now_s in range(20):
        assert rules.fault(A, "g1", float(now_s), [B]) is None
        assert rules.fault(B, "g1", float(now_s), [A]) is None


def test_faults_before_the_window_do_not_count():
    rules = watch()
    rules.fault(A, "g1", 0.0, [B])
    rules.fault(A, "g2", 60.0, [B])
    assert rules.fault(A, "g3", 100.0, [B]) is None, "g1 was 100 s ago"
    assert rules.fault(A, "g4", 101.0, [B]) is not None


def test_what_fails_everywhere_accuses_no_worker():
    rules = watch()
    found = []
    for number in range(10):
        for worker, other in ((A, B), (B, A)):
            found.append(rules.fault(worker, f"g{number}", float(number), [other]))
    assert found == [None] * 20
    assert watch().fault(A, "g0", 0.0, []) is None


def test_a_single_worker_is_judged_by_itself():
    rules = watch()
    rules.fault(A, "g1", 0.0, [])
    rules.fault(A, "g2", 0.0, [])
    assert rules.fault(A, "g3", 0.0, []) is not None


def test_a_worker_that_is_gone_is_forgotten():
    rules = watch()
    for group in ("g1", "g2"):
        rules.fault(A, group, 0.0, [B])
    rules.forget(A)
    assert rules.fault(A, "g3", 0.0, [B]) is None


def serve(rules: Watch, worker: str, seconds: list[float], others: list[str]) -> list[str | None]:
    """Groups of 100 tokens, one after the other."""
    return [rules.served(worker, s, 100, others) for s in seconds]


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
    assert [rules.served(B, 100.0, 1000, [A]) for _ in range(6)] == [None] * 6


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
    faults = [rules.fault(A, f"g{n}", 0.0, [B]) for n in range(6)]
    assert any(slow) == ("max_faults" in off)
    assert any(faults) == ("straggler_factor" in off)


def test_a_factor_that_would_drain_everyone_is_refused():
    with pytest.raises(ValidationError, match=r"straggler_factor = 1 .* over 1, or 0"):
        Quarantine(straggler_factor=1.0)
