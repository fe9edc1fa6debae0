"""A file system of two megabytes that fills up, and one that turns read-only, under each store."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cluster.buffer.group_recovery import Recovery
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import (
    CheckpointError,
    RlhfError,
    RunError,
    StorageError,
    StoreError,
    WeightError,
)
from rlhf_cluster.observe.record.run_log import RunLog
from rlhf_cluster.observe.record.samples import write_samples
from rlhf_cluster.records import ExperienceGroup, Ticket
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, read_metrics
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import LocalPart
from rlhf_cluster.weights.read_version import verify
from tests.support.builders.checkpoint_files import make_state, write_whole
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import make_group, make_prompt

FULL = "No space left on device|are free"
READ_ONLY = "Read-only file system"
SHARD_ELEMENTS = 100_000


class Disk:
    """A mounted file system. `fill` leaves less than a block of it, `free` takes that back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filler = root / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass

    def free(self) -> None:
        self._filler.unlink()

    def make_read_only(self) -> None:
        mount("-o", "remount,ro", str(self.root))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    root = tmp_path / "disk"
    root.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(root))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', None) or error}")
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def group(number: int) -> ExperienceGroup:
    return make_group(Ticket(number=number, version=0), make_prompt(number), [1.0, 0.0], 0)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def refused(kind: type[RlhfError], why: str, call: Callable[[], Any]) -> str:
    with pytest.raises(kind, match=why) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_group_that_finds_no_room_is_named_and_leaves_nothing(disk: Disk) -> None:
    groups = ExperienceStore(disk.root / "experience")
    groups.write(group(1))
    before = files(groups.root)
    disk.fill()
    text = refused(StoreError, FULL, lambda: groups.write(group(2)))
    assert "g00000002.arrow" in text
    assert "Free space" in text
    assert files(groups.root) == before
    assert groups.read(1).group_id == "g00000001"
    disk.free()
    groups.write(group(2))
    disk.make_read_only()
    refused(StoreError, READ_ONLY, lambda: groups.write(group(3)))
    again = Recovery(
        groups,
        disk.root / "checkpoints",
        every=1,
        span=1,
        look_ahead=1,
        keep_steps=1,
        step=5,
        tell=print,
    )
    refused(StoreError, READ_ONLY, again.rewind)
    assert ExperienceStore(groups.root).numbers() == [1, 2]


def publish(root: Path, version: int) -> None:
    tensor = torch.full((SHARD_ELEMENTS,), float(version))
    part = LocalPart(name="a", shape=(SHARD_ELEMENTS,), offset=0, tensor=tensor)
    store.commit(root, version, [store.write_shard(root, version, 0, [part])], keep=2)


def test_a_version_that_finds_no_room_leaves_the_last_one_and_the_next_works(disk: Disk) -> None:
    weights = disk.root / "weights"
    publish(weights, 1)
    disk.fill()
    text = refused(WeightError, FULL, lambda: publish(weights, 2))
    assert str(weights) in text
    latest = store.latest(weights)
    assert latest is not None
    assert latest.version == 1
    verify(latest.path)
    disk.free()
    publish(weights, 3)
    disk.make_read_only()
    refused(WeightError, READ_ONLY, lambda: publish(weights, 4))
    latest = store.latest(weights)
    assert latest is not None
    assert latest.version == 3
    verify(latest.path)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(disk: Disk) -> None:
    root = disk.root / "checkpoints"
    write_whole(root, 2)
    why = r"needs \d+ bytes and \d+ are free"
    refused(StorageError, why, lambda: checkpoint_folder.begin(root, 4, 1 << 21))
    partial = checkpoint_folder.begin(root, 4, 8)
    (partial / "learner").mkdir()
    disk.fill()
    text = refused(
        CheckpointError, FULL, lambda: checkpoint_folder.complete(partial, make_state(4))
    )
    assert "step-000004" in text
    found = checkpoint_folder.newest(root, also=checkpoint_folder.verify_tensors)
    assert found.checkpoint is not None
    assert (found.checkpoint.state.step, found.damaged) == (2, [])
    disk.free()
    write_whole(root, 6)
    disk.make_read_only()
    refused(StorageError, READ_ONLY, lambda: checkpoint_folder.begin(root, 8, 8))
    found = checkpoint_folder.newest(root, also=checkpoint_folder.verify_tensors)
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 6


def test_the_record_of_a_run_is_whole_or_ends_it_and_its_status_hides_nothing(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(run={"root": str(disk.root)})
    with RunDir.create(disk.root / "tiny", config) as run, RunLog(run) as log:
        log.append(1, 1.0, {"reward/mean": 0.5})
        log.flush()
        run.write_status(Snapshot(run="tiny", state="running", step=1, num_steps=9, time_s=1.0))
        disk.fill()

        def write_on() -> None:
            for _ in range(1000):  # until the file's own last block is full
                log.append(2, 2.0, {"reward/mean": 0.5})
            log.flush()  # lines are written in the background: all of them are tried by now

        def sample() -> None:
            write_samples(run.samples, 2, [group(1)], 1, lambda ids: "", limit=4)

        assert "metrics.jsonl" in refused(RunError, FULL, write_on)
        text = refused(StoreError, FULL, sample)
        assert "observe.samples_per_step = 0" in text
        assert files(run.samples) == []
        for _ in range(3):
            run.write_status(Snapshot(run="tiny", state="failed", step=2, num_steps=9, time_s=2.0))
        told = [r for r in caplog.records if "status.json" in r.getMessage()]
        assert len(told) == 1, "told once, not at each look"
        found = run.read_status()
        assert found is not None
        assert found.step == 1
    disk.free()
    steps = [record["step"] for record in read_metrics(run.metrics)]
    assert steps == [1, 2], "what was torn is left out"
    disk.make_read_only()
    text = refused(RunError, READ_ONLY, lambda: RunDir.create(disk.root / "other", config))
    assert "run.root" in text
