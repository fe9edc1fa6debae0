"""Damage anywhere in a checkpoint: it is named, and the run goes on from the one before."""

from __future__ import annotations

import errno
import json
import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.errors import (
    CheckpointError,
    CoreLost,
    RunError,
    StalledError,
    StorageError,
    WeightError,
)
from rlhf_cluster.run.checkpoint import (
    checkpoint_folder,
    resume,
)
from rlhf_cluster.run.checkpoint.checkpoint_folder import (
    Found,
    verify_tensors,
)
from rlhf_cluster.run.checkpoint.resume import whole
from rlhf_cluster.run.restarts import find_restart_checkpoint
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.durable_files import (
    PAUSES,
    find_storage_cause,
    run_with_retries,
)
from rlhf_cluster.weights import (
    read_version,
    store,
)
from rlhf_cluster.weights.transports.shared_files import FileSource
from rlhf_cluster.weights.transports.transport import (
    Blob,
    Deadline,
)
from tests.support.builders.checkpoint_files import write_whole
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import (
    publish,
    small_model,
    stepped,
)

SAMPLES_A_FILE = 16


def newest_whole(root: Path) -> Found:
    return checkpoint_folder.newest(root, also=verify_tensors)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    write_whole(tmp_path, 2)
    return tmp_path, write_whole(tmp_path, 4)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def test_every_file_of_a_checkpoint_is_tried(two):
    names = {path.name.split("-")[0] for path in files_of(two[1])}
    assert names >= {"complete.json", "run.json", "manifest.json", "shard", "latest"}
    assert newest_whole(two[0]).checkpoint.folder == two[1]
    assert newest_whole(two[0]).damaged == []


def test_s32_one_flipped_bit_anywhere_makes_the_checkpoint_before_count(two):
    root, last = two
    chance, tried = random.Random(0), 0
    for path in files_of(last):
        data = path.read_bytes()
        step = max(1, len(data) // SAMPLES_A_FILE)
        for start in range(0, len(data), step):
            place = min(start + chance.randrange(step), len(data) - 1)
            flipped = data[place] ^ (1 << chance.randrange(8))
            path.write_bytes(data[:place] + bytes([flipped]) + data[place + 1 :])
            found = newest_whole(root)
            assert found.checkpoint is not None, (path, place)
            assert found.checkpoint.state.step == 2, (path, place)
            [damaged] = found.damaged
            assert damaged.startswith(str(last)), damaged
            tried += 1
        path.write_bytes(data)
    assert tried > 80
    assert newest_whole(root).checkpoint.folder == last, "mended again"


def test_s32_a_changed_shard_is_named_with_its_tensor(two):
    root, last = two
    shard = max(last.glob("learner/*/shard-00001*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 128
    shard.write_bytes(data)
    assert checkpoint_folder.newest(root).checkpoint.folder == last, (
        "marker and sizes are as they were"
    )
    found = newest_whole(root)
    assert found.checkpoint.state.step == 2
    assert "tensor 'policy/" in found.damaged[0]
    assert str(shard) in found.damaged[0]


@pytest.mark.parametrize("damage", ["cut", "missing", "longer"])
def test_s32_a_torn_shard_makes_the_checkpoint_before_count(two, damage):
    root, last = two
    shard = max(last.glob("learner/*/shard-*.safetensors"))
    if damage == "missing":
        shard.unlink()
    else:
        data = shard.read_bytes()
        shard.write_bytes(data[:-1] if damage == "cut" else data + b"x")
    found = newest_whole(root)
    assert found.checkpoint.state.step == 2
    assert str(shard) in found.damaged[0]


def test_a_run_goes_on_from_the_one_before_or_is_refused_naming_each(tmp_path):
    config = tiny_config(run={"root": str(tmp_path)})
    with RunDir.create(tmp_path / "tiny", config) as run:
        run.metrics.write_text('{"step": 5, "time_s": 0.0}\n')
        publish(run.reference, 0, small_model())
        for step in (2, 4):
            write_whole(run.checkpoints, step)
    for step, left in ((4, 2), (2, None)):
        shard = max((run.checkpoints / f"step-{step:06d}").glob("learner/*/shard-00000*"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        found = whole(run)
        if left is not None:
            outcome = resume.look(run, config, False, found)
            assert outcome.checkpoint.state.step == left
            assert outcome.notes[0].startswith("passed over: ")
            assert shard.name in outcome.notes[0]
    with pytest.raises(RunError, match=r"no checkpoint is whole: .*step-000004.*step-000002"):
        resume.look(run, config, False, found)


def test_a_checkpoint_counts_only_with_the_reference_that_it_needs(tmp_path):
    with RunDir.create(tmp_path / "tiny", tiny_config(run={"root": str(tmp_path)})) as run:
        write_whole(run.checkpoints, 2)
    assert whole(run).checkpoint is None
    assert "v000000" in whole(run).damaged[0]
    publish(run.reference, 0, small_model())
    assert whole(run).checkpoint.state.step == 2
    shard = max((run.reference / "v000000").glob("shard-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert whole(run).checkpoint is None
    assert shard.name in whole(run).damaged[0]


# The reading itself


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_verifying_finds_what_reading_finds_whatever_the_buffer(tmp_path, num_ranks):
    version = publish(tmp_path, 1, small_model(), num_ranks)
    for buffer_bytes in (read_version.CHUNK_BYTES, read_version.BUFFER_BYTES):
        for num_threads in (1, 3, 50):
            read_version.verify(version.path, buffer_bytes, num_threads=num_threads)
    for shard in Path(version.path).glob("*.safetensors"):
        data = shard.read_bytes()
        shard.write_bytes(data[:-2] + bytes([data[-2] ^ 4]) + data[-1:])
        with pytest.raises(WeightError, match="damaged in") as read:
            list(store.read(version.path))
        with pytest.raises(WeightError, match="damaged in") as verified:
            read_version.verify(version.path, read_version.CHUNK_BYTES, num_threads=3)
        words = str(read.value).removesuffix(". Publish the version again")
        assert str(verified.value) == words
        shard.write_bytes(data)


def test_a_version_of_differences_is_verified_with_what_it_builds_on(tmp_path):
    model = small_model()
    publish(tmp_path, 1, model)
    version = publish(tmp_path, 2, stepped(model, 1), base=(1, model))
    read_version.verify(version.path)
    shutil.rmtree(tmp_path / "v000001")
    with pytest.raises(WeightError, match="builds on version 1"):
        read_version.verify(version.path)


def test_of_several_damaged_tensors_the_first_is_named_however_many_threads_read(tmp_path):
    version = publish(tmp_path, 1, small_model(), 2)
    for shard in Path(version.path).glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        size = 8 + int.from_bytes(data[:8], "little")
        data[size:] = bytes(len(data) - size)
        shard.write_bytes(data)
    names = list(json.loads((Path(version.path) / "manifest.json").read_text())["tensors"])
    for num_threads in (1, 2, 7):
        with pytest.raises(WeightError, match=f"tensor '{names[0]}' has hash"):
            read_version.verify(version.path, num_threads=num_threads)


class HangingSource(FileSource):
    """Reads of the tensors hang until `let_go`, in all threads; `waiting` counts those."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.let_go, self.waiting = threading.Event(), threading.Semaphore(0)

    def open(
        self, version: int, names: Sequence[str], deadline: Deadline | None = None
    ) -> list[Blob]:
        blobs = super().open(version, names, deadline)
        for blob in blobs:
            read = blob.read_into

            def hang(target: memoryview, position: int, read: Any = read) -> None:
                if position > 8:  # the header is read when it is opened
                    self.waiting.release()
                    self.let_go.wait(60)
                read(target, position)

            blob.read_into = hang  # type: ignore[method-assign]
        return blobs


def test_a_storage_that_hangs_costs_the_deadline_and_names_what_is_missing(tmp_path):
    version = publish(tmp_path, 1, small_model(), 1)
    source, now = HangingSource(tmp_path), [0.0]

    def clock() -> float:
        if source.waiting.acquire(blocking=False):
            now[0] = 100.0
        return now[0]

    names = list(json.loads((Path(version.path) / "manifest.json").read_text())["tensors"])
    deadline = Deadline("verifying step 1", 0.05, clock)
    try:
        with pytest.raises(StalledError) as caught:
            read_version.verify(version.path, deadline=deadline, num_threads=2, source=source)
    finally:
        source.let_go.set()
    missing = f"waiting for {len(names)} of {len(names)} tensors, {names[0]!r} first"
    assert missing in str(caught.value)


def test_a_checkpoint_that_is_not_read_in_time_is_not_taken_for_a_damaged_one(tmp_path):
    """Or the run would go back further than it has to."""
    with RunDir.create(tmp_path / "tiny", tiny_config(run={"root": str(tmp_path)})) as run:
        for step in (2, 4):
            write_whole(run.checkpoints, step)
        with pytest.raises(StalledError, match=r"verifying .*step-000004 was not over after"):
            resume.whole(run, timeout_s=0.0)


# An error of the storage is no damage


class Disk:
    """A file whose reads fail with EIO until `mend`: Linux gives that for address 0 of a process."""

    def __init__(self, path: Path) -> None:
        self.path, self._data = path, path.read_bytes()
        path.unlink()
        path.symlink_to("/proc/self/mem")
        with pytest.raises(OSError, match="Input/output error"):
            path.read_bytes()

    def mend(self) -> None:
        self.path.unlink()
        self.path.write_bytes(self._data)


FAILING = ["complete.json", "run.json", "learner/v000004/manifest.json"]


@pytest.mark.parametrize("name", FAILING)
def test_d02_an_io_error_that_passes_costs_a_pause_and_no_checkpoint(two, name):
    root, last = two
    disk, paused = Disk(last / name), []

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 2:
            disk.mend()

    found = checkpoint_folder.newest(root, also=verify_tensors, sleep=sleep)
    assert found.checkpoint.folder == last
    assert found.damaged == []
    assert paused == [*PAUSES[:2]]


@pytest.mark.parametrize("name", FAILING)
def test_d02_an_io_error_that_stays_refuses_the_run_and_deletes_nothing(two, name):
    root, last = two
    disk, paused = Disk(last / name), []
    with pytest.raises(StorageError, match=r"Input/output error.*6 tries over 15.5 s") as refused:
        checkpoint_folder.newest(root, also=verify_tensors, sleep=paused.append)
    assert str(last) in str(refused.value)
    assert "a copy at checkpoint.copy_to" in str(refused.value)
    assert paused == [*PAUSES]
    assert checkpoint_folder.steps(root) == [2, 4]
    disk.path.unlink()  # the cure that the error names
    assert newest_whole(root).checkpoint.state.step == 2


def test_d02_an_io_error_in_a_shard_is_told_from_damage_by_its_cause(two):
    root, last = two

    class Failing(FileSource):
        def open(
            self, version: int, names: Sequence[str], deadline: Deadline | None = None
        ) -> list[Blob]:
            blobs = super().open(version, names, deadline)

            def fail(target: memoryview, position: int) -> None:
                try:
                    raise OSError(errno.ESTALE, "Stale file handle")
                except OSError as error:
                    raise WeightError(f"{last}: cannot read the shard file ({error})") from error

            blobs[0].read_into = fail  # type: ignore[method-assign]
            return blobs

    def also(checkpoint: checkpoint_folder.Checkpoint) -> None:
        if checkpoint.state.step == 4:
            read_version.verify(checkpoint.learner, source=Failing(checkpoint.learner.parent))

    with pytest.raises(StorageError, match="Stale file handle"):
        checkpoint_folder.newest(root, also=also, sleep=lambda seconds: None)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ESTALE, "stale"), True),
        (OSError(errno.EIO, "io"), True),
        (PermissionError(errno.EACCES, "no"), True),
        (TimeoutError(errno.ETIMEDOUT, "late"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (FileNotFoundError(errno.ENOENT, "gone"), False),
        (NotADirectoryError(errno.ENOTDIR, "a file"), False),
        (ValueError("no JSON"), False),
        (StalledError("late"), False),  # refused by who waits, without another try
        (CheckpointError("hash"), False),
        (StorageError("of a server"), True),
    ],
)
def test_d02_errors_that_may_pass_are_told_from_damage_and_absence(error, passes):
    assert (find_storage_cause(error) is not None) is passes
    wrapped = WeightError("cannot read")
    wrapped.__cause__ = error
    assert (find_storage_cause(wrapped) is not None) is passes
    tries: list[Exception] = []

    def read() -> None:
        tries.append(error)
        raise wrapped

    with pytest.raises(StorageError if passes else WeightError):
        run_with_retries(read, "it", "", lambda seconds: None, (1.0, 2.0))
    assert len(tries) == (3 if passes else 1)


def test_d02_a_loss_inside_a_run_is_refused_rather_than_set_back_by_an_io_error(tmp_path):
    config = tiny_config(run={"root": str(tmp_path)})
    with RunDir.create(tmp_path / "tiny", config) as run:
        publish(run.reference, 0, small_model())
        for step in (2, 4):
            write_whole(run.checkpoints, step)
        Disk(run.checkpoints / "step-000004" / "run.json")
        with pytest.raises(StorageError, match="step-000004"):
            find_restart_checkpoint(run, config, CoreLost("gone"), sleep=lambda seconds: None)
        assert checkpoint_folder.steps(run.checkpoints) == [2, 4]


def test_d02_what_is_passed_over_is_renamed_and_the_last_two_are_kept(two):
    root, last = two
    for step in (6, 8):
        write_whole(root, step)
    (last / "run.json").write_text("{}")
    checkpoint_folder.set_aside_after(root, 2)
    assert sorted(p.name for p in root.iterdir()) == [
        "damaged-0001-step-000006",
        "damaged-0002-step-000008",
        "step-000002",
    ]
    write_whole(root, 4)
    (root / "step-000004" / "run.json").write_text("{}")
    checkpoint_folder.set_aside_after(root, 2)
    assert sorted(p.name for p in root.iterdir())[:2] == [
        "damaged-0002-step-000008",
        "damaged-0003-step-000004",
    ]
    with pytest.raises(CheckpointError, match="kept aside: damaged-0002-step-000008"):
        checkpoint_folder.begin(root, 6, 100, free_bytes=lambda _: 10)


def test_d02_an_io_error_never_costs_the_best_checkpoint(tmp_path):
    for step, score in {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.2}.items():
        write_whole(tmp_path, step, 1, score)
    disk = Disk(tmp_path / "step-000004" / "run.json")
    with pytest.raises(StorageError, match="step-000004"):
        checkpoint_folder.retain(tmp_path, 1, keep_best=1)
    disk.mend()
    assert [state.step for state in checkpoint_folder.retain(tmp_path, 1, keep_best=1)] == [4, 8]
