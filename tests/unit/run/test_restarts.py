"""What a run does after the loss of a learner rank or of the buffer."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import (
    CheckpointError,
    ConfigError,
    CoreLost,
    DivergenceError,
    PlacementError,
    RlhfError,
    RunError,
    StalenessError,
    StalledError,
    WeightError,
    WorkerError,
)
from rlhf_cluster.observe.record.run_log import RunLog
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.restarts import (
    MAX_PAUSE_S,
    Restarts,
    RestartWindow,
    RoomAgain,
    find_restart_checkpoint,
    with_recovery,
)
from rlhf_cluster.run.run_directory import MARKER, RunDir
from rlhf_cluster.run.run_record import read_metrics
from rlhf_cluster.weights.sync import WeightSync
from tests.support.builders.checkpoint_files import write_whole
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import FakeGeneration, FakeLearner

LOST = CoreLost("learner-1.train_step: the process died")


class Run:
    """An attempt after the other, each with the end that `ends` says; what happened is in `told`."""

    def __init__(self, ends: Sequence[RlhfError | str], limit: int = 3) -> None:
        self.ends = list(ends)
        self.now = 0.0
        self.restarts = Restarts(
            limit=limit, needs="8 CPU, 4 GPU", window=RestartWindow(clock=lambda: self.now)
        )
        self.told: list[str | float] = []

    async def attempt(self) -> str:
        self.told.append("attempt")
        end = self.ends.pop(0)
        if isinstance(end, RlhfError):
            raise end
        return end

    async def recover(self, lost: RlhfError) -> None:
        self.told.append(f"recover from {lost}")

    async def sleep(self, seconds: float) -> None:
        self.told.append(seconds)
        self.now += seconds

    async def run(self) -> str:
        return await with_recovery(
            self.attempt, self.recover, self.restarts, self.told.append, self.sleep
        )


async def test_a_loss_is_recovered_from_before_the_next_attempt():
    other = CoreLost("buffer.stats: no answer within 65 s")
    run = Run([LOST, other, "done"])
    assert await run.run() == "done"
    assert run.told == [
        "attempt",
        f"recover from {LOST}",
        1.0,
        "attempt",
        f"recover from {other}",
        2.0,
        "attempt",
    ]
    assert run.restarts.used == 2


async def test_a_crash_loop_ends_with_the_first_cause_and_the_last():
    causes = [CoreLost(f"loss {n}") for n in range(4)]
    run = Run([*causes, "never"])
    with pytest.raises(CoreLost) as caught:
        await run.run()
    assert "lost 4 times within 3600 s, over learner.max_restarts = 3" in str(caught.value)
    assert "First cause: loss 0. Last: loss 3" in str(caught.value)
    assert run.told.count("attempt") == 4
    assert "recover from loss 3" not in run.told


async def test_losses_far_apart_use_up_no_budget():
    now = [0.0]
    window = RestartWindow(100.0, lambda: now[0])
    restarts = Restarts(limit=1, window=window)
    for _ in range(5):
        assert restarts.spend(LOST) == 1.0, "no pause grows from a loss that long ago"
        now[0] += 101.0
    assert (restarts.used, window.until_one_leaves_s) == (5, 0.0)
    restarts.spend(CoreLost("learner-0: a new cause"))
    assert window.until_one_leaves_s == 100.0
    with pytest.raises(
        CoreLost, match="lost 2 times within 100 s, .* First cause: learner-0: a new"
    ):
        restarts.spend(LOST)


async def test_without_restarts_the_first_loss_ends_the_run():
    run = Run([LOST, "never"], limit=0)
    with pytest.raises(CoreLost, match=r"max_restarts = 0. First cause: learner-1"):
        await run.run()
    assert run.told == ["attempt"]


@pytest.mark.parametrize(
    "kind",
    [ConfigError, DivergenceError, StalenessError, StalledError, WeightError, WorkerError],
)
@pytest.mark.parametrize("after", [[], [LOST]], ids=["at first", "after a loss"])
async def test_what_would_come_again_ends_the_run_at_once(kind: type[RlhfError], after: list):
    error = kind("again")
    run = Run([*after, error, "never"])
    with pytest.raises(kind) as caught:
        await run.run()
    assert caught.value is error
    assert run.told.count("attempt") == len(after) + 1


async def test_no_room_is_waited_for_only_where_a_loss_may_still_hold_it():
    no_room = PlacementError("no room for learner-0")
    with pytest.raises(PlacementError):
        await Run([no_room, "never"]).run()
    run = Run([LOST, no_room, "done"])
    assert await run.run() == "done"


async def test_n09_room_that_is_missing_after_a_loss_costs_no_restart_and_no_read_of_the_checkpoint():
    """A node that stays away for an hour: a try every minute, and the budget is as it was."""
    no_room = PlacementError("no room for learner-0")
    run = Run([LOST, *[no_room] * 60, LOST, no_room, "done"], limit=2)
    assert await run.run() == "done"
    assert run.restarts.used == 2
    assert run.told.count(f"recover from {LOST}") == 2
    assert not any("recover from no room" in str(told) for told in run.told)
    assert run.told.count(f"waits for room for the learner: {no_room}") == 61
    pauses = [told for told in run.told if isinstance(told, float)]
    assert pauses[:8] == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, MAX_PAUSE_S]
    assert max(pauses) == MAX_PAUSE_S
    assert pauses[-1] == 1.0, "the wait for room begins anew after the second loss"


NO_ROOM = PlacementError("no resources for learner-0 (1 CPU). Free in the cluster now: nothing")


async def test_room_that_never_comes_is_waited_for_up_to_a_limit():
    run = Run([LOST, *[NO_ROOM] * 99])
    run.restarts.recovery_timeout_s = 100.0
    with pytest.raises(PlacementError) as caught:
        await run.run()
    text = str(caught.value)
    assert "the learner cannot be placed after a wait of 100 s" in text
    assert "cluster.recovery_timeout_s = 100" in text
    assert "needs 8 CPU, 4 GPU" in text
    assert str(NO_ROOM) in text
    assert caught.value.__cause__ is NO_ROOM
    assert run.told.count("attempt") == 9, "the last try is at the limit"
    assert run.told[-2:] == [37.0, "attempt"], "the last pause ends at the limit"
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize("end", [LOST, RoomAgain("there is room for all ranks again")])
async def test_a_wait_that_ends_leaves_the_next_one_its_whole_time(end: RlhfError):
    waits = [NO_ROOM] * 7  # 63 s
    run = Run([LOST, *waits, end, *waits, "done"])
    run.restarts.recovery_timeout_s = 100.0
    assert await run.run() == "done"


async def test_a_slow_try_counts_as_waiting():
    """A placement that takes its own 600 s to be refused, of a limit of 1000 s."""
    run = Run([LOST, *[NO_ROOM] * 99])
    run.restarts.recovery_timeout_s = 1000.0

    async def attempt() -> str:
        run.now += 600.0 if run.restarts.used else 0.0
        return await run.attempt()

    with pytest.raises(PlacementError, match="after a wait of 1203 s"):
        await with_recovery(attempt, run.recover, run.restarts, run.told.append, run.sleep)
    assert run.told.count("attempt") == 4


async def test_a_wait_for_room_can_be_stopped():
    run, waits = Run([LOST, NO_ROOM]), asyncio.Event()

    async def sleep(_: float) -> None:
        if not run.ends:
            waits.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(
        with_recovery(run.attempt, run.recover, run.restarts, run.told.append, sleep)
    )
    async with asyncio.timeout(60):
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_going_back_to_all_ranks_costs_neither_a_restart_nor_a_pause():
    room = RoomAgain("there is room for all 2 learner ranks again")
    run = Run([LOST, room, room, "done"], limit=1)
    assert await run.run() == "done"
    assert run.restarts.used == 1
    assert run.told.count(f"recover from {room}") == 2
    assert [told for told in run.told if isinstance(told, float)] == [1.0]


async def test_a_recovery_that_fails_ends_the_run():
    run = Run([LOST, "never"])

    async def fail(lost: RlhfError) -> None:
        raise CheckpointError("none") from lost

    with pytest.raises(CheckpointError):
        await with_recovery(run.attempt, fail, run.restarts, run.told.append, run.sleep)
    assert run.told == ["attempt"]


def test_pauses_double_up_to_a_limit():
    restarts = Restarts(limit=20)
    pauses = [restarts.spend(LOST) for _ in range(10)]
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert max(pauses) == pauses[-1] == MAX_PAUSE_S


def test_a_loss_crosses_processes():
    copy = pickle.loads(pickle.dumps(LOST))
    assert type(copy) is CoreLost
    assert str(copy) == str(LOST)


def settings(root: Path, every: int = 2) -> RunConfig:
    return tiny_config(run={"root": str(root)}, checkpoint={"every": every})


@pytest.fixture
def run(tmp_path: Path):
    """A run of 3 steps with all that it has written, and no checkpoint."""
    with RunDir.create(tmp_path / "tiny", settings(tmp_path)) as run:
        lines = [{"step": s, "time_s": 0.0, "reward/mean": 0.1 * s} for s in (0, 1, 2, 3)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for step in (1, 2, 3):
            (run.samples / f"step-{step:06d}.parquet").touch()
        (run.path / "skipped").mkdir()
        (run.path / "skipped" / "00000000.json").write_text('{"version": 0}')
        yield run


def test_the_newest_whole_checkpoint_is_gone_on_from(run, tmp_path):
    for step in (1, 2, 3):
        write_whole(run.checkpoints, step)
    shard = next((run.checkpoints / "step-000003").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    # the reference that these checkpoints name
    shutil.copytree(run.checkpoints / "step-000001" / "learner", run.reference)
    (run.reference / "v000001").rename(run.reference / "v000000")
    manifest = run.reference / "v000000" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 0'))
    found = find_restart_checkpoint(run, settings(tmp_path), LOST)
    assert found is not None
    assert found.state.step == 2


def test_who_lost_its_directory_fetches_nothing_into_it_and_goes_nowhere(run, tmp_path):
    marker = run.path / MARKER
    other = {**json.loads(marker.read_text()), "host": "other"}
    marker.write_text(json.dumps(other))
    with pytest.raises(RunError, match="was taken by process .* on other"):
        find_restart_checkpoint(run, settings(tmp_path), LOST)


def test_a_run_without_a_checkpoint_yet_begins_anew_and_nothing_of_it_stays(run, tmp_path):
    assert find_restart_checkpoint(run, settings(tmp_path), LOST) is None
    with RunLog(run) as log:
        resume.rewind_weights(run, None)
        resume.cut_back(run, None)
        log.cut(lambda: None)
        assert read_metrics(run.metrics) == []
        assert not list(run.samples.iterdir())
        assert not list((run.path / "skipped").iterdir())
        log.append(0, 1.0, {"evaluation/reward_mean": 0.5})
        log.append(1, 2.0, {"reward/mean": 0.5})
    assert [record["step"] for record in read_metrics(run.metrics)] == [0, 1]


def test_a_run_that_writes_no_checkpoints_is_not_begun_anew_after_a_step(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"train_step: .*3 steps .*checkpoint.every = 0"):
        find_restart_checkpoint(run, settings(tmp_path, every=0), LOST)
    run.metrics.unlink()
    assert find_restart_checkpoint(run, settings(tmp_path, every=0), LOST) is None


def test_a_run_whose_checkpoints_are_damaged_is_not_begun_anew(run, tmp_path):
    folder = write_whole(run.checkpoints, 2)
    (folder / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run.json"):
        find_restart_checkpoint(run, settings(tmp_path), LOST)


class LostLearner(FakeLearner):
    """Its `publish` waits for `end`, then fails: the process is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.end = asyncio.Event(), asyncio.Event()

    async def publish(self):
        self.asked.set()
        await self.end.wait()
        raise LOST


def sync_of(learner: FakeLearner, generation: FakeGeneration) -> WeightSync:
    class Buffer:
        async def set_live_version(self, version: int) -> None:
            raise CoreLost("buffer.set_live_version: the process died")

    return WeightSync(learner, generation, Buffer(), 1, lambda: 0.0)  # type: ignore[arg-type]


async def test_a_publish_under_way_ends_with_its_learner_and_is_not_raised_later():
    learner = LostLearner()
    sync = sync_of(learner, FakeGeneration())
    await sync.after_step(1)
    await learner.asked.wait()
    learner.end.set()
    await sync.abandon(60)
    assert len(asyncio.all_tasks()) == 1, "it has ended"
    await sync.drain(60)
    assert sync.stats.live == -1


async def test_a_pull_under_way_is_waited_for():
    generation = FakeGeneration(pull_delay_s=0.01)
    sync = sync_of(FakeLearner(), generation)
    await sync.after_step(0)
    await sync.abandon(60)
    assert generation.pulled == [0], "no later pull can meet it"
    assert sync.stats.live == -1


async def test_a_publish_that_does_not_end_is_named():
    learner = LostLearner()
    sync = sync_of(learner, FakeGeneration())
    await sync.after_step(1)
    await learner.asked.wait()
    with pytest.raises(StalledError, match="version 1, whose learner is dead, still ran"):
        await sync.abandon(0.01)
