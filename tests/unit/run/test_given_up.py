"""What an attempt gave up never appears: checkpoints and references; what fails costs itself alone."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_cluster.errors import FencedError, RunError, StalledError, StorageError, WeightError
from rlhf_cluster.records import LearnerState, WeightVersion
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.run_directory import MARKER, RunDir
from rlhf_cluster.scoring.moving_reference import ReferenceKeeper
from rlhf_cluster.sections.values import PeriodicReference
from rlhf_cluster.util.slow_disk import (
    check_not_abandoned,
    run_in_thread,
    run_within,
)
from rlhf_cluster.weights import store
from rlhf_cluster.weights.writer_fence import Writer, publishing
from tests.support.builders.checkpoint_files import make_state
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import publish, small_model

NEVER_S = 30.0  # a deadline that no test comes to


class Disk:
    """Holds whoever comes to `pass_by` until `answers`; `ended` when the last of them is through."""

    def __init__(self) -> None:
        self.begun, self.answers, self.ended = (threading.Event() for _ in range(3))
        self.raised: list[BaseException] = []

    def hold(self) -> None:
        self.begun.set()
        assert self.answers.wait(NEVER_S)

    @contextmanager
    def before(self, fence: checkpoint_folder.Fence) -> Iterator[None]:
        """`fence`, to which nobody comes before the disk answers."""
        self.hold()
        try:
            with fence():
                yield
        except BaseException as error:
            self.raised.append(error)
            raise
        finally:
            self.ended.set()


class Learner:
    async def copy_state(self) -> LearnerState:
        return make_state(1).learner

    async def write_state(self, folder: Path) -> None:
        await run_in_thread(folder.mkdir)


def saving(root: Path, fence: checkpoint_folder.Fence, timeout_s: float = NEVER_S) -> Checkpoints:
    async def cut(step: int, learner: LearnerState) -> RunState:
        return make_state(step)

    return Checkpoints(
        root=root / "checkpoints",
        every=1,
        keep=2,
        num_steps=99,
        learner=Learner(),  # type: ignore[arg-type]
        cut=cut,
        tell=lambda text: None,
        clock=lambda: 0.0,
        timeout_s=timeout_s,
        fence=fence,
    )


def fence_of(root: Path, writer: Writer) -> checkpoint_folder.Fence:
    return functools.partial(publishing, root / "weights", writer)


async def until(event: threading.Event) -> None:
    assert await run_in_thread(event.wait, NEVER_S)


async def saved(checkpoints: Checkpoints, step: int) -> None:
    await checkpoints.after_step(step)
    await checkpoints.drain()


async def test_n04_a_checkpoint_of_an_attempt_that_was_given_up_appears_never(tmp_path):
    """Its thread comes to the rename when the next attempt has begun; only the number on disk tells."""
    disk, root = Disk(), tmp_path / "checkpoints"
    first = fence_of(tmp_path, store.begin_attempt(tmp_path / "weights"))
    await saved(saving(tmp_path, first), 25)
    checkpoints = saving(tmp_path, lambda: disk.before(first))
    await checkpoints.after_step(50)
    await until(disk.begun)
    second = fence_of(tmp_path, store.begin_attempt(tmp_path / "weights"))
    disk.answers.set()
    await checkpoints.drain()
    assert [type(error) for error in disk.raised] == [FencedError]
    assert checkpoint_folder.steps(root) == [25]
    assert (checkpoints.stats.last, checkpoints.stats.failed) == (-1, 1)
    checkpoint_folder.set_aside_after(root, 25)
    assert [path.name for path in root.iterdir()] == ["step-000025"], "what was begun is gone"
    again = saving(tmp_path, second)
    await saved(again, 30)
    assert checkpoint_folder.steps(root) == [25, 30]


async def test_n04_a_checkpoint_past_its_deadline_appears_never_within_the_same_attempt(tmp_path):
    disk = Disk()
    own = fence_of(tmp_path, store.begin_attempt(tmp_path / "weights"))
    late = saving(tmp_path, lambda: disk.before(own), timeout_s=0.2)
    await saved(late, 50)
    assert late.stats.failed == 1
    disk.answers.set()
    await until(disk.ended)
    assert [type(error) for error in disk.raised] == [StalledError]
    assert checkpoint_folder.steps(tmp_path / "checkpoints") == []
    await saved(saving(tmp_path, own), 55)
    assert checkpoint_folder.steps(tmp_path / "checkpoints") == [55]


async def test_n04_a_begin_that_was_given_up_removes_nothing_of_the_next_try(tmp_path):
    begun, answers, ended = (threading.Event() for _ in range(3))
    root = tmp_path / "checkpoints"

    def late() -> None:
        begun.set()
        assert answers.wait(NEVER_S)
        try:
            checkpoint_folder.begin(root, 50, 8)
        finally:
            ended.set()

    call = asyncio.create_task(run_in_thread(late))
    await until(begun)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    partial = checkpoint_folder.begin(root, 55, 8)
    answers.set()
    await until(ended)
    assert partial.is_dir()


def keeper(root: Path, version: int, every: int = 2) -> tuple[ReferenceKeeper, WeightVersion]:
    update = PeriodicReference(type="periodic", every=every)
    one = ReferenceKeeper(root / "reference", update, fence=root / "weights")
    return one, publish(root / "policy", version, small_model(seed=version))


def test_n05_a_reference_of_an_attempt_that_was_given_up_appears_never(tmp_path):
    first = store.begin_attempt(tmp_path / "weights")
    one, second_version = keeper(tmp_path, 2)
    assert one.follow(second_version, first).version == 2
    _, fourth = keeper(tmp_path, 4)
    second = store.begin_attempt(tmp_path / "weights")
    store.rewind(tmp_path / "reference", 2)
    with pytest.raises(FencedError, match="attempt 2 publishes here, and this is attempt 1"):
        one.follow(fourth, first)
    found = store.latest(tmp_path / "reference")
    assert found is not None
    assert found.version == 2
    assert one.follow(fourth, second).version == 4
    assert not list((tmp_path / "reference").glob("*.partial")), "what was begun is gone"


def test_n05_a_reference_past_its_deadline_appears_never(tmp_path):
    """What was given up comes to its turn when the storage answers; the next call waits for it."""
    writer = store.begin_attempt(tmp_path / "weights")
    one, version = keeper(tmp_path, 0)
    ended = threading.Event()
    raised: list[BaseException] = []

    def follow() -> None:
        try:
            one.follow(version, writer)
        except BaseException as error:
            raised.append(error)
            raise
        finally:
            ended.set()

    with publishing(tmp_path / "weights", writer), pytest.raises(StalledError):
        run_within(0.2, "the reference", follow)
    assert ended.wait(NEVER_S)
    assert [type(error) for error in raised] == [StalledError]
    assert store.latest(tmp_path / "reference") is None
    assert one.follow(version, writer).version == 0


def test_what_is_wanted_is_told_from_what_was_given_up():
    check_not_abandoned("in no call at all")
    assert run_within(NEVER_S, "a call", lambda: check_not_abandoned("x")) is None
    begun, answers, ended = (threading.Event() for _ in range(3))
    raised: list[BaseException] = []

    def outer() -> None:
        begun.set()
        assert answers.wait(NEVER_S)
        try:
            check_not_abandoned("version 7")
        except StalledError as error:
            raised.append(error)
        finally:
            ended.set()

    with pytest.raises(StalledError):
        run_within(0.05, "a call", outer)
    answers.set()
    assert ended.wait(NEVER_S)
    assert "version 7: abandoned after its deadline" in str(raised[0])


class FailingMarker:
    """A run's marker that answers with EIO `times` times, and then as it is."""

    def __init__(self, run: RunDir, times: int) -> None:
        self.run, self.times = run, times
        self.slept: list[float] = []
        self._marker = run.path / MARKER
        self._text = self._marker.read_bytes()
        self._break()

    def _break(self) -> None:
        """A folder in its place: to read it is an error of the file system, and none of its content."""
        self._marker.unlink()
        self._marker.symlink_to("/proc/self/mem")  # EIO when it is read

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) == self.times:
            self._marker.unlink()
            self._marker.write_bytes(self._text)

    def check(self) -> None:
        self.run.check_claim(self.sleep)


def test_n10_a_passing_error_of_the_marker_is_tried_again(tmp_path):
    with RunDir.create(tmp_path / "x", tiny_config(run={"root": str(tmp_path)})) as run:
        marker = FailingMarker(run, 2)
        marker.check()
        assert marker.slept == [0.5, 1.0]


async def test_n10_a_marker_that_cannot_be_read_costs_the_checkpoint_and_not_the_run(tmp_path):
    writer = store.begin_attempt(tmp_path / "weights")
    with RunDir.create(tmp_path / "x", tiny_config(run={"root": str(tmp_path)})) as run:
        marker = FailingMarker(run, 99)
        with pytest.raises(StorageError, match=r"run\.lock.*Input/output error"):
            marker.check()
        checkpoints = saving(tmp_path, fence_of(tmp_path, writer))
        checkpoints.check_owner = marker.check
        await saved(checkpoints, 5)
        assert (checkpoints.stats.last, checkpoints.stats.failed) == (-1, 1)
        checkpoints.check_owner = lambda: None
        await saved(checkpoints, 6)
        assert checkpoints.stats.last == 6


async def test_who_lost_its_directory_leaves_the_checkpoint_that_another_is_writing(tmp_path):
    """A driver that was cut off goes on until it meets who took over, with its next checkpoint too."""

    def taken() -> None:
        raise RunError("was taken by process 7 on other")

    root = tmp_path / "checkpoints"
    writing = checkpoint_folder.begin(root, 5, 0)
    checkpoints = saving(tmp_path, fence_of(tmp_path, store.begin_attempt(tmp_path / "weights")))
    checkpoints.check_owner = taken
    await saved(checkpoints, 4)
    assert checkpoints.stats.failed == 1
    assert list(root.iterdir()) == [writing]


def test_n10_a_pin_that_cannot_be_written_or_listed_is_an_error_of_the_store(tmp_path):
    publish(tmp_path, 3, small_model(seed=3))
    store.pin(tmp_path, 3)
    assert store.pinned(tmp_path) == [3]
    store.unpin(tmp_path, 3)
    (tmp_path / "v000003.pin").symlink_to("/dev/null/x")  # ENOTDIR for whoever touches it
    with pytest.raises(WeightError, match="v000003: cannot be pinned"):
        store.pin(tmp_path, 3)
    (tmp_path / "v000003.pin").unlink()
    (tmp_path / "v000003.pin").mkdir()
    with pytest.raises(WeightError, match="v000003: cannot be unpinned"):
        store.unpin(tmp_path, 3)


def test_n09_the_lock_of_a_store_is_waited_for_longer_than_an_nfs_lease():
    lease_s, margin_s = 90.0, 20.0
    for call in (store.commit, store.begin_attempt, store.rewind):
        waits_s = inspect.signature(call).parameters["lock_timeout_s"].default
        assert waits_s >= lease_s + margin_s
