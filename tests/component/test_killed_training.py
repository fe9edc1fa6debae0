"""A run killed at any event ends as if nothing had been: a real learner, real checkpoints, no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.sections.rl_run import Replay
from tests.support.simulation.training_run import TrainingAttempt

STEPS, GROUPS, EVERY = 3, 2, 2
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": STEPS, "groups_per_step": GROUPS},
    "algorithm": {"type": "grpo", "group_size": 2},
    "learner": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
}


class Killed:
    """Runs in folders of their own, on a learner of their own, killed at any events."""

    def __init__(
        self, start_learner: Any, max_staleness: int, replay: Replay | None = None
    ) -> None:
        self._start_learner, self._max_staleness = start_learner, max_staleness
        self._replay = replay
        with tempfile.TemporaryDirectory() as folder:
            straight = self.attempt(Path(folder), None)
            assert straight.run()
            self.events = straight.fuse.events
            self.expected = (straight.trained(), prompts(straight))

    def attempt(self, root: Path, kill_at: int | None) -> TrainingAttempt:
        bound = self._max_staleness
        staleness = {"max_staleness": bound, "pipeline_depth": bound}
        return TrainingAttempt(
            root=root,
            gate=AdmissionGate(
                max_staleness=bound,
                pipeline_depth=bound,
                groups_per_step=GROUPS,
                num_steps=STEPS,
            ),
            every=EVERY,
            discarded=lambda number: number % 5 == 3,
            kill_at=kill_at,
            start_learner=lambda: self._start_learner(**SECTIONS, staleness=staleness),
            on_policy=bound == 0,
            replay=self._replay,
        )

    def check(self, kills: Sequence[int]) -> int:
        """Killed at each of `kills` in turn, then not: what it ends with is what the run without a
        kill does. The step from which it went on at last."""
        with tempfile.TemporaryDirectory() as folder:
            for kill_at in kills:
                self.attempt(Path(folder), kill_at).run()
            last = self.attempt(Path(folder), None)
            assert last.run()
            found, (expected, trained) = last.trained(), self.expected
        assert prompts(last) == trained, kills
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=f"{kills}: {name}")
        return last.state.step if last.state else 0


def prompts(run: TrainingAttempt) -> list[tuple[int, str]]:
    """The multiset of what was trained: tickets and prompts."""
    return sorted((number, prompt) for _, number, prompt, _ in run.learner.ledger)


def test_s31_killed_at_any_event_a_run_ends_with_the_weights_and_moments_of_an_uninterrupted_one(
    start_learner: Any,
) -> None:
    """A synchronous run, in which every sample follows from the weights that are live."""
    runs = Killed(start_learner, 0)
    trained, ledger = runs.expected
    assert len(ledger) == STEPS * GROUPS
    assert {float(v[0]) for n, v in trained.items() if "/step/" in n} == {float(STEPS)}
    assert all(np.any(v) for n, v in trained.items() if "/exp_avg_sq/" in n)
    resumed_from = {runs.check([kill_at]) for kill_at in range(1, runs.events + 1)}
    assert resumed_from >= {0, 2}, "attempts went on from the beginning and from a checkpoint"


def test_s31_killed_again_and_again_at_chosen_events_it_ends_the_same(start_learner: Any) -> None:
    """An asynchronous run, whose samples follow from their tickets."""
    runs = Killed(start_learner, 2)

    @settings(max_examples=8, suppress_health_check=list(HealthCheck))
    @given(kills=st.lists(st.integers(1, runs.events), min_size=2, max_size=4))
    def killed_at(kills: list[int]) -> None:
        runs.check(kills)

    killed_at()


def test_a_run_that_replays_by_priority_ends_the_same_when_it_is_killed(start_learner: Any) -> None:
    """With its importance weights. No group gets too old within the run, so that what is replayed
    follows from tickets and rewards."""
    runs = Killed(start_learner, STEPS, Replay(priority="reward_spread"))
    _, ledger = runs.expected
    assert len(ledger) > len(set(ledger)) == STEPS * GROUPS
    kills = range(runs.events // 2, runs.events, max(1, runs.events // 8))
    assert 2 in {runs.check([kill_at]) for kill_at in kills}, "one went on from the checkpoint"
