"""Power cuts at every file operation: what was promised by then is there and whole."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from actors.services.rank_actors import RankActor, build_learner_rank
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import StoreError, WeightError
from rlhf_cluster.learner.rank_checkpoint import StateCopies
from rlhf_cluster.records import Ticket
from rlhf_cluster.run.checkpoint import (
    checkpoint_folder,
    resume,
)
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.scoring.moving_reference import ReferenceKeeper
from rlhf_cluster.sections.values import ReferenceUpdate
from rlhf_cluster.util.durable_files import read_json, write_all
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import LocalPart
from tests.support.builders.checkpoint_files import make_state
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import (
    Base,
    assert_same,
    publish,
    shard_bases,
    small_model,
    split_evenly,
    stepped,
)
from tests.support.builders.stored_groups import recovery
from tests.support.builders.stored_groups import write as write_group
from tests.support.fakes.services import make_prompt
from tests.support.processes.dying_process import in_a_child
from tests.support.simulation.power_cut import (
    LOST,
    NAMES,
    Recorder,
    recorded,
    survives,
)


class Rank:
    """A learner rank that holds a few weights; it saves them as each does."""

    def __init__(self) -> None:
        self._copies = StateCopies(0)

    def copy(self, step: int) -> None:
        model = torch.nn.Linear(4, 3)
        shards = [
            LocalPart(name=name, shape=tuple(p.shape), offset=0, tensor=p.detach().reshape(-1))
            for name, p in model.named_parameters()
        ]
        held = SimpleNamespace(module=model, shards=lambda: shards, moments=list)
        updater: Any = SimpleNamespace(model=held, skips=(0, 0))
        algorithm: Any = SimpleNamespace(state=dict)
        self._copies.copy({"policy": updater}, algorithm, step)

    def write_state(self, root: str) -> Any:
        return self._copies.write(root)


def checkpoint(root: Path, rank: Rank, step: int) -> None:
    """As the driver and the actor of a rank write one."""
    actor = RankActor(tiny_config(), "", 0, build_learner_rank)
    actor._rank = rank
    rank.copy(step)
    partial = checkpoint_folder.begin(root, step, 100)
    learner = str(partial / checkpoint_folder.LEARNER)
    report = actor.write_state(learner, 60.0)
    actor.commit_state(learner, step, [report], 60.0)
    checkpoint_folder.complete(partial, make_state(step))


def last(promised: tuple[object, ...]) -> Any:
    return promised[-1] if promised else -1


def test_d12_a_power_cut_costs_no_checkpoint_that_was_complete_nor_the_reference_that_it_needs(
    tmp_path,
):
    """The second of the references is unused: retention must not take the first, which is pinned."""
    update: ReferenceUpdate = TypeAdapter(ReferenceUpdate).validate_python(
        {"type": "periodic", "every": 1}
    )
    live = [publish(tmp_path / "weights", v, small_model(seed=v)) for v in range(4)]
    run = RunDir(tmp_path / "run", tmp_path / "weights")
    run.path.mkdir()
    rank = Rank()
    with recorded(run.path) as recorder:
        keeper = ReferenceKeeper(run.reference, update)
        keeper.follow(live[0])
        store.pin(run.reference, 0)
        for step in (2, 4, 6):
            checkpoint(run.checkpoints, rank, step)
            recorder.promise(step)
            checkpoint_folder.retain(run.checkpoints, 2)
            keeper.follow(live[step // 2])

    def check(root: Path, promised: tuple[object, ...]) -> None:
        found = resume.whole(RunDir(root, root / "weights"))
        assert found.damaged == []
        step = -1 if found.checkpoint is None else found.checkpoint.state.step
        assert step >= last(promised)
        assert (root / "reference" / "v000000.pin").exists() or not promised

    assert survives(recorder, tmp_path / "cuts", check) > 200


def commit(root: Path, version: int, tensors: Any, base: Base | None = None, keep: int = 2) -> None:
    bases = shard_bases(base, 2)
    reports = [
        store.write_shard(root, version, rank, parts, base=bases[rank], fsync=True)
        for rank, parts in enumerate(split_evenly(tensors, 2))
    ]
    store.commit(root, version, reports, keep, fsync=True)


def versions() -> dict[int, dict[str, torch.Tensor]]:
    """Version 2 is stored as its difference from 1, 3 in full, 5 as that from 3."""
    first, third = small_model(), small_model(seed=3)
    return {1: first, 2: stepped(first, 1), 3: third, 5: stepped(third, 2)}


def test_a_power_cut_leaves_a_whole_latest_version_no_older_than_the_last_synced_one(tmp_path):
    root, tensors = tmp_path / "run" / "weights", versions()
    (tmp_path / "run").mkdir()
    with recorded(tmp_path / "run") as recorder:
        for version, base in ((1, None), (2, 1), (3, None), (5, 3)):
            commit(root, version, tensors[version], base and (base, tensors[base]))
            recorder.promise(version)

    def check(found: Path, promised: tuple[object, ...]) -> None:
        version = store.latest(found / "weights")
        assert (-1 if version is None else version.version) >= last(promised)
        if version is not None:
            assert_same(dict(store.read(version.path)), tensors[version.version])

    assert survives(recorder, tmp_path / "cuts", check) > 150


def test_a_power_cut_while_versions_are_not_synced_is_recognised_and_costs_no_resume(tmp_path):
    """What is read is what was written, or refused; and a run that goes on begins with its own."""
    root, tensors = tmp_path / "run" / "weights", versions()
    (tmp_path / "run").mkdir()
    with recorded(tmp_path / "run") as recorder:
        publish(root, 1, tensors[1], keep=2)
        publish(root, 2, tensors[2], base=(1, tensors[1]), keep=2)
        publish(root, 3, tensors[3], keep=2)
        publish(root, 5, tensors[5], base=(3, tensors[3]), keep=2)
        store.rewind(root, 3)

    refused = 0

    def check(found: Path, promised: tuple[object, ...]) -> None:
        nonlocal refused
        weights = found / "weights"
        try:
            version = store.latest(weights)
            if version is not None:
                assert_same(dict(store.read(version.path)), tensors[version.version])
        except WeightError:
            refused += 1
        rewound = store.rewind(weights, 4)
        assert rewound is None or rewound.version <= 4
        commit(weights, 5, tensors[5])
        assert store.latest(weights).version == 5

    survives(recorder, tmp_path / "cuts", check)
    assert refused > 20, "no cut tore anything"


def test_a_power_cut_costs_no_group_that_was_finished_nor_the_note_of_an_attempt(tmp_path):
    (tmp_path / "run").mkdir()

    def opened(root: Path) -> ExperienceStore:
        return ExperienceStore(root / "experience", fsync="group")

    def attempt(root: Path) -> Any:
        found = recovery(root, step=4, store=opened(root))
        found.rewind()
        return found

    with recorded(tmp_path / "run") as recorder:
        for number in (7, 8):
            write_group(opened(tmp_path / "run"), number, version=3)
            recorder.promise(number)
        for number in (9, 10):
            later = attempt(tmp_path / "run")
            write_group(opened(tmp_path / "run"), number, version=3, attempt=later.attempt)
            recorder.promise(number)
        attempt(tmp_path / "run")

    def check(root: Path, promised: tuple[object, ...]) -> None:
        for number, of in opened(root).files():
            with suppress(StoreError):  # or what it holds is what was written
                read = ExperienceStore(root / "experience", attempt=of).read(number)
                assert read.ticket.number == number
        for again in range(2):
            resumed = attempt(root)
            for number in promised:
                assert isinstance(number, int)
                ticket = Ticket(number=number, version=2, attempt=resumed.attempt)
                assert resumed.recover(ticket, make_prompt(number)), (number, again)

    assert survives(recorder, tmp_path / "cuts", check) > 100


def test_a_power_cut_leaves_the_configuration_and_the_owner_of_a_run_that_began(tmp_path):
    config = tiny_config(run={"root": str(tmp_path / "disk" / "runs")})
    (tmp_path / "disk").mkdir()
    with recorded(tmp_path / "disk") as recorder:
        RunDir.create(config.run_dir, config).close()
        recorder.promise("the run")
        again = RunDir.reclaim(config.run_dir, config)
        again.go_on(config)
        again.close()

    def check(disk: Path, promised: tuple[object, ...]) -> None:
        run = disk / "runs" / "tiny"
        if promised:
            assert RunDir.has_run(run)
            assert read_json(run / "resolved.json") is not None
            assert read_json(run / "environment.json") is not None

    survives(recorder, tmp_path / "cuts", check)


# The recorder itself


@pytest.mark.parametrize("broken", ["", "file", "folder"])
def test_the_recorder_finds_a_file_or_a_folder_that_is_not_synced(tmp_path, broken):
    root = tmp_path / "disk"
    root.mkdir()
    (root / "note").write_bytes(b"old")

    def work(recorder: Recorder) -> None:
        if not broken:
            write_all(root / "note", b"new", fsync=True)
        else:
            partial = root / "partial"
            with partial.open("wb") as file:
                file.write(b"new")
                file.flush()
                if broken != "file":
                    os.fsync(file.fileno())
            partial.replace(root / "note")
            if broken != "folder":
                write_all(root / "other", b"", fsync=True)
        recorder.promise("new")

    with recorded(root) as recorder:
        work(recorder)
    seen: set[bytes] = set()

    def check(found: Path, promised: tuple[object, ...]) -> None:
        seen.add((found / "note").read_bytes())
        if promised:
            assert (found / "note").read_bytes() == b"new"

    if not broken:
        survives(recorder, tmp_path / "cuts", check)
        assert seen == {b"old", b"new"}
        return
    model = NAMES if broken == "file" else LOST
    with pytest.raises(AssertionError) as caught:
        survives(recorder, tmp_path / "cuts", check)
    assert f"model {model}" in caught.value.__notes__[0] or broken == "file"


def test_the_commit_lock_is_held_until_the_last_name_has_changed(tmp_path):
    """Every rename and removal of a commit, and of a rewind, is under the lock."""
    root = tmp_path / "weights"
    for version in (1, 2):
        publish(root, version, small_model(seed=version), keep=2)
    reports = [
        store.write_shard(root, 3, rank, parts)
        for rank, parts in enumerate(split_evenly(small_model(), 2))
    ]
    seen = tmp_path / "seen"
    seen.write_text("")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in {"os.rename", "os.remove", "os.rmdir"}:
            return
        other = os.open(root / ".commit.lock", os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fd = os.open(seen, os.O_WRONLY | os.O_APPEND)
            os.write(fd, b"x")
            os.close(fd)
        else:
            os._exit(3)
        finally:
            os.close(other)

    def work() -> None:
        store.commit(root, 3, reports, keep=2, clock=time.time)
        store.rewind(root, 2)

    assert in_a_child(work, hook) == 0, "a name changed while the lock was free"
    assert len(seen.read_text()) > 8
    assert store.latest(root).version == 2
