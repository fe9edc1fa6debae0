"""The learning rate by optimizer step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.learner.step.optimizer_step import Schedule


def test_warm_up_is_linear_and_does_not_start_at_zero() -> None:
    schedule = Schedule(peak=1.0, warmup_steps=4)
    assert [schedule.lr_at(s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_reaches_the_minimum_one_past_the_last_step() -> None:
    schedule = Schedule(peak=1.0, kind="linear", warmup_steps=2, total_steps=6, minimum=0.2)
    rates = [schedule.lr_at(s) for s in range(8)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_decay_passes_the_middle_halfway() -> None:
    schedule = Schedule(peak=1.0, kind="cosine", total_steps=8, minimum=0.5)
    assert schedule.lr_at(0) == 1.0
    assert schedule.lr_at(4) == pytest.approx(0.75)
    assert schedule.lr_at(2) == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))
    assert schedule.lr_at(8) == pytest.approx(0.5)


def test_wsd_is_constant_until_the_last_steps_and_then_falls_in_a_line() -> None:
    schedule = Schedule(
        peak=1.0, kind="wsd", warmup_steps=2, total_steps=10, decay_steps=4, minimum=0.2
    )
    rates = [schedule.lr_at(s) for s in range(12)]
    # 4 steps left: all of the distance of 0.8, then a quarter of it less a step
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_wsd_without_decay_steps_is_constant_to_the_end() -> None:
    schedule = Schedule(peak=1.0, kind="wsd", total_steps=3)
    assert [schedule.lr_at(s) for s in range(3)] == [1.0, 1.0, 1.0]


@given(
    warmup=st.integers(0, 20),
    stable=st.integers(0, 50),
    decay=st.integers(1, 50),
    step=st.integers(0, 200),
)
def test_wsd_never_rises_after_the_warm_up_and_stays_within_its_bounds(
    warmup: int, stable: int, decay: int, step: int
) -> None:
    schedule = Schedule(
        peak=3.0,
        kind="wsd",
        warmup_steps=warmup,
        total_steps=warmup + stable + decay,
        decay_steps=decay,
        minimum=1.0,
    )
    rate, following = schedule.lr_at(step), schedule.lr_at(step + 1)
    if step >= warmup:
        assert 1.0 <= following <= rate <= 3.0
        assert (rate == 3.0) == (step <= warmup + stable)
    assert rate - following <= 2.0 / decay + 1e-12


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_s37_every_optimizer_step_of_the_run_has_a_rate_over_zero(kind: str) -> None:
    schedule = Schedule(peak=1e-3, kind=kind, warmup_steps=10, total_steps=400, decay_steps=40)  # type: ignore[arg-type]
    assert all(schedule.lr_at(s) > 0 for s in range(400))
    assert schedule.lr_at(400) == pytest.approx(0, abs=1e-12)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step = -1"):
        Schedule(peak=1.0).lr_at(-1)
