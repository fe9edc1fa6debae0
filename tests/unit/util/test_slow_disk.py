"""A disk that takes very long, under each store. Writes block on events; nothing here sleeps."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import RunError, StalledError, StoreError
from rlhf_cluster.observe.record.run_log import RunLog, StatusFile
from rlhf_cluster.records import ExperienceGroup, LearnerState, Ticket
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, read_metrics
from rlhf_cluster.util.slow_disk import (
    MAX_QUEUED_WRITES,
    BackgroundWriter,
    DiskDeadline,
    run_in_thread,
)
from tests.support.builders.checkpoint_files import make_state
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import make_group, make_prompt

NEVER_S = 300.0  # a deadline that no test comes to


class Disk:
    """Its writes wait until `answer`. `told` are the warnings; with `mend` the first one mends it."""

    def __init__(self, mend: bool = False) -> None:
        self.answers = threading.Event()
        self.begun = threading.Event()
        self.told: list[str] = []
        self._mend = mend

    def tell(self, text: str) -> None:
        self.told.append(text)
        if self._mend:
            self.answers.set()

    def patience(self, limit_s: float, told_fraction: float = 0.5) -> DiskDeadline:
        return DiskDeadline(
            limit_s=limit_s, setting="a.timeout_s", told_fraction=told_fraction, tell=self.tell
        )

    def wait(self) -> None:
        self.begun.set()
        assert self.answers.wait(NEVER_S)

    def write(self, fd: int, data: memoryview) -> int:
        self.wait()
        return os.write(fd, data)


@pytest.fixture
def disk() -> Iterator[Disk]:
    found = Disk()
    yield found
    found.answers.set()


def group(number: int) -> ExperienceGroup:
    return make_group(Ticket(number=number, version=0), make_prompt(number), [1.0, 0.0], 0)


def test_a_write_that_is_slow_is_told_of_and_comes_to_its_end():
    disk = Disk(mend=True)
    patience = disk.patience(NEVER_S, told_fraction=1e-5)
    assert patience.wait("/disk/a, 7 bytes,", lambda: disk.wait() or 7) == 7
    assert disk.told == [
        "slow disk: /disk/a, 7 bytes, is not written after 0.003 s, and has a.timeout_s = 300 s",
        "slow disk: /disk/a, 7 bytes, was written after all",
    ]


def test_a_write_in_time_is_not_told_of_and_its_error_is_its_own(disk: Disk):
    patience = disk.patience(NEVER_S)
    assert patience.wait("x", lambda: 3) == 3
    with pytest.raises(OSError, match="No space"):
        patience.wait("x", lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    assert disk.told == []


def test_a_group_that_a_disk_does_not_take_in_time_is_named_with_the_cure(
    tmp_path: Path, disk: Disk
):
    store = ExperienceStore(tmp_path, write_file=disk.write, patience=disk.patience(0.02))
    with pytest.raises(StoreError) as caught:
        store.write(group(2))
    text = str(caught.value)
    assert f"{tmp_path}/g00000002.arrow" in text
    assert "not written within a.timeout_s = 0.02 s" in text
    assert "raise buffer.write_timeout_s, and rerun the command" in text
    assert len(disk.told) == 1
    assert "g00000002.arrow" in disk.told[0]
    assert store.numbers() == [], "it does not count as finished"


def test_a_group_whose_write_was_given_up_is_whole_or_not_there(tmp_path: Path, disk: Disk):
    done = threading.Event()
    store = ExperienceStore(tmp_path, write_file=disk.write, patience=disk.patience(0.02))
    replace = store._replace

    def replaced(path: Path, image: bytes) -> None:
        replace(path, image)
        done.set()

    store._replace = replaced  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        store.write(group(2))
    disk.answers.set()
    assert done.wait(NEVER_S)
    assert store.read(2).group_id == "g00000002"


def test_a_slow_disk_that_takes_a_group_loses_nothing(tmp_path: Path):
    disk = Disk(mend=True)
    patience = disk.patience(NEVER_S, told_fraction=1e-5)
    store = ExperienceStore(tmp_path, write_file=disk.write, patience=patience)
    store.write(group(3))
    assert store.read(3).group_id == "g00000003"
    assert len(disk.told) == 2


async def test_nobody_waits_for_a_call_that_was_given_up(disk: Disk):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run_in_thread(disk.wait)
    assert await run_in_thread(lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(ValueError, match="no"):
        await run_in_thread(_raise, ValueError("no"))


def _raise(error: Exception) -> None:
    raise error


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def behind(disk: Disk, clock: Callable[[], float], limit_s: float = 60.0) -> BackgroundWriter:
    return BackgroundWriter("/disk/lines", disk.patience(limit_s), clock, grace_s=0.0)


def test_what_waits_for_a_slow_disk_is_written_in_order(disk: Disk):
    clock, written = Clock(), list[int]()
    lines = behind(disk, clock)
    lines.put(disk.wait)
    for number in range(50):
        lines.put(lambda n=number: written.append(n))
    assert (written, disk.told) == ([], [])
    clock.now = 30.0
    lines.put(lambda: written.append(50))
    lines.put(lambda: written.append(51))
    assert disk.told == [
        "slow disk: /disk/lines is not written after 30 s, and has a.timeout_s = 60 s"
    ]
    disk.answers.set()
    lines.flush()
    assert written == list(range(52))
    lines.put(lambda: written.append(52))
    lines.flush()
    assert written[-1] == 52


def test_no_write_waits_past_its_deadline(disk: Disk):
    clock = Clock()
    lines = behind(disk, clock)
    lines.put(disk.wait)
    clock.now = 60.0
    with pytest.raises(
        StalledError, match=r"/disk/lines was not written within a\.timeout_s = 60 s"
    ):
        lines.put(lambda: None)
    hasty = BackgroundWriter("/disk/lines", disk.patience(0.02), clock, grace_s=0.0)
    hasty.put(disk.wait)
    with pytest.raises(StalledError, match="not written within"):
        hasty.flush()


def test_what_waits_is_bounded(disk: Disk):
    lines = behind(disk, Clock())
    lines.put(disk.wait)
    for _ in range(MAX_QUEUED_WRITES - 1):
        lines.put(lambda: None)
    with pytest.raises(StalledError):
        lines.put(lambda: None)


def test_of_a_view_only_the_latest_waits(disk: Disk):
    shown: list[int] = []
    view = behind(disk, Clock())
    view.put(disk.wait, latest=True)
    assert disk.begun.wait(NEVER_S)
    for number in range(5):
        view.put(lambda n=number: shown.append(n), latest=True)
    disk.answers.set()
    view.flush()
    assert shown == [4]


def test_a_failed_write_is_raised_where_it_is_waited_for_or_by_the_next(disk: Disk):
    patient = BackgroundWriter("x", disk.patience(NEVER_S), grace_s=NEVER_S)
    with pytest.raises(ValueError, match="full"):
        patient.put(lambda: _raise(ValueError("full")))
    patient.put(lambda: None)
    late = behind(disk, Clock())
    late.put(disk.wait)
    late.put(lambda: _raise(ValueError("full")))
    disk.answers.set()
    with pytest.raises(ValueError, match="full"):
        late.flush()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with RunDir.create(tmp_path / "tiny", tiny_config(run={"root": str(tmp_path)})) as found:
        yield found


def test_the_record_of_a_slow_disk_has_every_line_in_order(run: RunDir, disk: Disk):
    log = RunLog(run, None, disk.patience(NEVER_S), disk.write)
    for step in range(1, 21):
        log.append(step, 1.0, {"reward/mean": 0.5})
    assert read_metrics(run.metrics) == []
    disk.answers.set()
    log.flush()
    assert [r["step"] for r in read_metrics(run.metrics)] == list(range(1, 21))
    log.close()


def test_a_record_that_the_disk_does_not_take_ends_the_run_with_the_cure(
    run: RunDir, disk: Disk, caplog: pytest.LogCaptureFixture
):
    log = RunLog(run, None, disk.patience(0.02), disk.write)

    def write() -> None:
        log.append(1, 1.0, {"reward/mean": 0.5})  # on a busy machine it may be late already
        log.flush()

    with pytest.raises(RunError) as caught:
        write()
    text = str(caught.value)
    assert f"a line of {run.metrics} was not written within a.timeout_s = 0.02 s" in text
    assert "give the same command again" in text
    log.close()
    assert "the record is not whole" in caplog.text, "closing hides no other error"


def test_a_status_on_a_slow_disk_holds_nobody_up_and_shows_the_latest(
    run: RunDir, disk: Disk, caplog: pytest.LogCaptureFixture
):
    clock = Clock()
    status = StatusFile(run, disk.patience(60.0))
    status._behind.clock = clock
    status._behind.put(disk.wait, latest=True)
    assert disk.begun.wait(NEVER_S)
    for step in range(3):
        status.show(Snapshot(run="tiny", state="running", step=step, num_steps=9, time_s=1.0))
    assert run.read_status() is None
    clock.now = 60.0
    for step in range(3, 6):
        status.show(Snapshot(run="tiny", state="running", step=step, num_steps=9, time_s=1.0))
    late = [r for r in caplog.records if "shows an earlier time" in r.getMessage()]
    assert len(late) == 1, "told once in a row"
    disk.answers.set()
    status.close()
    status.show(Snapshot(run="tiny", state="finished", step=9, num_steps=9, time_s=1.0))
    status.close()
    found = run.read_status()
    assert found is not None
    assert found.step == 9


class HangingLearner:
    """Writes its state when the disk answers."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    async def copy_state(self) -> LearnerState:
        return make_state(1).learner

    async def write_state(self, folder: Path) -> None:
        await run_in_thread(self._disk.wait)


async def test_a_checkpoint_on_a_slow_disk_is_told_of_and_costs_itself(tmp_path: Path, disk: Disk):
    told: list[str] = []

    async def cut(step: int, learner: LearnerState) -> RunState:
        return make_state(step)

    checkpoints = Checkpoints(
        root=tmp_path / "checkpoints",
        every=1,
        keep=1,
        num_steps=9,
        learner=HangingLearner(disk),  # type: ignore[arg-type]
        cut=cut,
        tell=told.append,
        clock=lambda: 0.0,
        timeout_s=0.2,
        told_fraction=0.1,
    )
    await checkpoints.after_step(1)
    await checkpoints.drain()
    assert checkpoints.stats.failed == 1
    slow, failed = told
    assert slow.startswith(f"slow disk: the checkpoint of step 1 in {tmp_path}/checkpoints")
    assert "within checkpoint.timeout_s = 0.2 s: the disk is slow" in failed
    assert str(tmp_path / "checkpoints") in failed
    assert "raise checkpoint.timeout_s" in failed


async def test_a_look_at_a_disk_that_does_not_answer_has_a_deadline(disk: Disk):
    with pytest.raises(StalledError, match=r"the groups in /x was not written within a\.timeout_s"):
        await disk.patience(0.02).aside("the groups in /x", disk.wait)
    assert len(disk.told) == 1
    assert await disk.patience(NEVER_S).aside("x", lambda a: a + 1, 2) == 3
    with pytest.raises(TimeoutError, match="its own"):
        await disk.patience(NEVER_S).aside("x", _raise, TimeoutError("its own"))
