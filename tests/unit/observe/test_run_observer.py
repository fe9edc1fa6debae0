"""What the driver's records tell on the screen: the time left, and the reward of held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from actors.drivers.rl_observer import RunObserver
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.evaluation.evaluate import Evaluation
from rlhf_cluster.records import StepReport
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot
from rlhf_cluster.weights.sync import SyncStats
from tests.support.builders.run_configs import tiny_config
from tests.unit.observe.test_score_sums import taken
from tests.unit.scoring.test_served_rewards import step_times


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def observing(
    tmp_path, clock: Clock, steps: int
) -> Iterator[tuple[RunObserver, Sequence[Snapshot]]]:
    config = tiny_config(run={"root": str(tmp_path), "steps": steps}, evaluation={"num_prompts": 1})
    shown: list[Snapshot] = []
    with RunDir.create(config.run_dir, config) as rundir:
        observer = RunObserver(config, rundir, (), SyncStats, shown.append, 0.0, clock)
        try:
            yield observer, shown
        finally:
            observer.close()


def test_the_time_left_follows_the_pace_of_the_last_steps(tmp_path):
    clock = Clock()
    with observing(tmp_path, clock, steps=30) as (observer, shown):
        left = []
        for step in range(1, 26):
            clock.now_s += 50.0 if step < 10 else 2.0
            observer.step(StepReport(step=step, metrics={}), [taken(step, step - 1)], step_times())
            left.append(shown[-1].left_s)
    assert left[0] == pytest.approx(29 * step_times().step_s), "of one step, its own time"
    assert left[1] == pytest.approx(28 * 50.0)
    assert left[24] == pytest.approx(5 * 2.0), "slow steps of long ago do not count"


async def test_the_time_left_starts_again_where_a_restart_went_back(tmp_path):
    clock = Clock()
    with observing(tmp_path, clock, steps=30) as (observer, shown):
        for step, now_s in ((1, 10.0), (2, 20.0), (1, 500.0), (2, 503.0)):
            clock.now_s = now_s
            if now_s == 500.0:
                await observer.cut_back(None)
            observer.step(StepReport(step=step, metrics={}), [taken(step, step - 1)], step_times())
    assert shown[-1].left_s == pytest.approx(28 * 3.0)


def test_an_evaluation_without_an_answer_leaves_the_held_out_reward_unknown(tmp_path):
    with observing(tmp_path, Clock(), steps=2) as (observer, shown):
        observer.record_point(
            "held_out", 0, Evaluation(answers=(taken(0, 0, 1).summary,), failures=())
        )
        assert shown[-1].reward_held_out == 1.0
        observer.record_point(
            "held_out", 2, Evaluation(answers=(), failures=(WorkerError("refused"),))
        )
        assert shown[-1].reward_held_out == 1.0, "that of the last one that gave an answer"
