"""The second copy of checkpoints: beside the steps, whole or not there, and the way back from it."""

from __future__ import annotations

import errno
import functools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from actors.drivers.driver import claim
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import (
    CheckpointError,
    ConfigError,
    CoreLost,
    RunError,
    StalledError,
    StorageError,
    WeightError,
)
from rlhf_cluster.run.checkpoint import checkpoint_folder, resume
from rlhf_cluster.run.checkpoint.checkpoint_folder import verify_tensors
from rlhf_cluster.run.checkpoint.remote_copies import MARKER, Copies, CopyFolder, fetch_newest
from rlhf_cluster.run.restarts import find_restart_checkpoint
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import read_metrics
from rlhf_cluster.util.durable_files import PAUSES, write_json
from rlhf_cluster.util.provenance import remove_secrets
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.builders.checkpoint_files import write_whole
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import publish, small_model
from tests.support.simulation.resumable_run import Attempt

URL = "memory://copies"


@pytest.fixture(autouse=True)
def memory() -> Any:
    """The memory storage of this process, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def config(root: Path, url: str = URL, **sections: Any) -> RunConfig:
    run = {"root": str(root), "steps": 8}
    return tiny_config(run=run, checkpoint={"copy_to": url}, **sections)


def directory(settings: RunConfig) -> RunDir:
    """The directory of a run as it begins."""
    run = RunDir(settings.run_dir, settings.weights_dir)
    run.path.mkdir(parents=True)
    write_json(run.resolved, resume.describe(settings))
    return run


def make_run(root: Path, *steps: int, url: str = URL) -> RunDir:
    """What a run of 6 steps left, with checkpoints of `steps`."""
    run = directory(config(root, url))
    lines = [{"step": s, "time_s": 0.0, "reward/mean": 0.1} for s in range(7)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    publish(run.reference, 0, small_model())
    for step in steps:
        write_whole(run.checkpoints, step)
    return run


def copies(run: RunDir, url: str = URL, timeout_s: float = 60.0) -> tuple[Copies, list[str]]:
    told: list[str] = []
    copy = CopyFolder(url, "tiny")
    return Copies(run=run, copy=copy, timeout_s=timeout_s, tell=told.append), told


async def copied(run: RunDir, *steps: int, url: str = URL) -> Copies:
    made, told = copies(run, url)
    made.follow(steps or checkpoint_folder.steps(run.checkpoints))
    await made.drain()
    assert told == []
    return made


def elsewhere(tmp_path: Path, url: str = URL) -> tuple[RunDir, RunConfig]:
    """The directory of the same run on a machine where it never was."""
    settings = config(tmp_path / "elsewhere", url)
    return directory(settings), settings


def damage(memory: Any, part: str) -> str:
    """Flip a bit in the one stored file whose path contains `part`."""
    [name] = [name for name in memory.store if part in name]
    data = bytearray(memory.cat_file(name))
    data[len(data) // 2] ^= 1
    memory.pipe_file(name, bytes(data))
    return name


@pytest.mark.parametrize("storage", ["memory", "file"])
async def test_a_run_goes_on_where_it_never_was_from_a_copy(tmp_path, storage):
    url = URL if storage == "memory" else f"file://{tmp_path}/copies"
    run = make_run(tmp_path, 2, 4, url=url)
    made = await copied(run, url=url)
    assert (made.stats.last, made.stats.failed) == (4, 0)
    new, settings = elsewhere(tmp_path, url)
    found = resume.whole_copy(new, settings, overwrite=False)
    assert found.checkpoint.state == checkpoint_folder.check(run.checkpoints / "step-000004").state
    verify_tensors(found.checkpoint)
    assert store.latest(new.reference).version == 0
    assert (new.reference / "v000000.pin").exists()
    outcome = resume.look(new, settings, False, found)
    assert any(f"step 4 was fetched from {url}/tiny" in note for note in outcome.notes)
    resume.cut_back(new, found.checkpoint)
    assert [r["step"] for r in read_metrics(new.metrics)] == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in new.checkpoints.iterdir()) == ["step-000004"]


async def test_a_changed_configuration_is_seen_as_if_the_run_had_been_here(tmp_path):
    await copied(make_run(tmp_path, 2))
    new, _ = elsewhere(tmp_path)
    changed = config(tmp_path / "elsewhere", learner={"learning_rate": 2e-3})
    found = resume.whole_copy(new, changed, overwrite=False)
    with pytest.raises(RunError, match=r"learner.learning_rate = 0.002, was 0.001"):
        resume.look(new, changed, False, found)


@pytest.mark.parametrize(
    "part", ["checkpoint/learner/v000004/shard-00000", "checkpoint/run.json", MARKER]
)
async def test_a_damaged_copy_is_named_and_the_one_before_is_fetched(tmp_path, memory, part):
    await copied(make_run(tmp_path, 2, 4))
    damage(memory, f"/step-000004/{part}")
    new, settings = elsewhere(tmp_path)
    found = resume.whole_copy(new, settings, overwrite=False)
    assert found.checkpoint.state.step == 2
    assert "memory://copies/tiny" in found.damaged[0]
    assert sorted(p.name for p in new.checkpoints.iterdir()) == ["step-000002"]


async def test_when_no_copy_is_whole_the_run_is_refused_naming_each(tmp_path, memory):
    await copied(make_run(tmp_path, 2, 4))
    damage(memory, "/step-000002/reference/v000000/shard-00000")
    memory.rm_file(f"/copies/tiny/step-000004/{MARKER}")
    new, settings = elsewhere(tmp_path)
    with pytest.raises(RunError, match=r"step 4 is not complete; .*v000000/shard-00000") as refused:
        resume.whole_copy(new, settings, overwrite=False)
    assert "--overwrite" in str(refused.value)


async def test_a_directory_whose_checkpoints_are_damaged_goes_on_from_the_copy(tmp_path):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    for shard in run.checkpoints.glob("step-*/learner/*/shard-00000*"):
        shard.write_bytes(shard.read_bytes()[:-1])
    settings = config(tmp_path)
    assert resume.look(run, settings, False).notes == [], "a quick look does not refuse it"
    found = resume.whole_or_copy(run, settings)
    assert found.checkpoint.state.step == 4
    assert len(found.damaged) == 2
    notes = resume.look(run, settings, False, found).notes
    assert "step 4 was fetched from memory://copies/tiny" in notes
    assert [r["step"] for r in read_metrics(run.metrics)] == list(range(7)), "its own record stays"


async def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, memory):
    await copied(make_run(tmp_path, 2))
    name = f"/copies/tiny/step-000002/{MARKER}"
    marker = json.loads(memory.cat_file(name))
    marker["files"]["../../escaped"] = {"bytes": 0, "hash": ""}
    memory.pipe_file(name, json.dumps(marker).encode())
    new, settings = elsewhere(tmp_path)
    with pytest.raises(RunError, match=r"names the file '../../escaped'"):
        resume.whole_copy(new, settings, overwrite=False)
    assert not list(tmp_path.rglob("escaped"))


async def test_copies_follow_what_is_on_disk(tmp_path, memory):
    run = make_run(tmp_path, 2, 4)
    made = await copied(run)
    first = memory.modified("/copies/tiny/step-000004/copied.json")
    write_whole(run.checkpoints, 6)
    checkpoint_folder.retain(run.checkpoints, 2)
    made.follow([4, 6])
    await made.drain()
    assert made.copy.steps() == [4, 6]
    assert memory.modified("/copies/tiny/step-000004/copied.json") == first, "copied once"
    memory.rm_file("/copies/tiny/step-000006/copied.json")
    again = await copied(run)
    assert again.copy.has(checkpoint_folder.check(run.checkpoints / "step-000006")), (
        "completed by a resumed run"
    )


async def test_another_checkpoint_of_the_same_step_replaces_the_copy(tmp_path, memory):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    write_whole(run.checkpoints, 4, num_ranks=1, score=0.5)
    made = await copied(run)
    assert not [n for n in memory.store if "step-000004/checkpoint" in n and "shard-00001" in n]
    new, settings = elsewhere(tmp_path)
    assert resume.whole_copy(new, settings, False).checkpoint.state.score == 0.5
    assert made.copy.steps() == [2, 4]


async def test_overwriting_a_run_removes_its_copies(tmp_path):
    await copied(make_run(tmp_path, 2))
    new, settings = elsewhere(tmp_path)
    assert resume.whole_copy(new, settings, overwrite=True).checkpoint is None
    assert CopyFolder(URL, "tiny").steps() == []


class Broken:
    """The storage, whose `method` calls `fail` first."""

    def __init__(self, fs: Any, method: str, fail: Any) -> None:
        self._fs, self._method, self._fail = fs, method, fail

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if name != self._method:
            return found

        def call(path: str, *arguments: Any, **named: Any) -> Any:
            self._fail(str(path))
            return found(path, *arguments, **named)

        return call


@pytest.mark.parametrize("die_at", [1, 5, 10])
async def test_a_copy_that_breaks_off_anywhere_is_never_taken(tmp_path, memory, die_at):
    run = make_run(tmp_path, 2, 4)
    await copied(run, 2)
    made, told = copies(run)
    calls = 0

    def fail(path: str) -> None:
        nonlocal calls
        if "step-000004" in path:
            calls += 1
            if calls == die_at:
                raise ConnectionError("https://user:pw@storage/x?sig=1 is gone")

    made.copy._fs = Broken(memory, "open", fail)
    made.follow([4])
    await made.drain()
    assert made.stats.failed == 1
    assert told[0].startswith(
        "no copy of the checkpoint of step 4: cannot write step 4 to memory://"
    )
    assert "pw" not in told[0]
    assert "sig" not in told[0]
    new, settings = elsewhere(tmp_path)
    assert resume.whole_copy(new, settings, False).checkpoint.state.step == 2
    made.copy._fs = memory
    made.follow([4])
    await made.drain()
    assert (made.stats.last, made.stats.failed) == (4, 1), "the next time it is copied"
    assert made.copy.steps() == [4]


async def test_a_storage_that_hangs_costs_its_deadline_and_writes_no_marker(tmp_path, memory):
    run = make_run(tmp_path, 2)
    made, told = copies(run, timeout_s=0.2)
    free, ended = threading.Event(), threading.Event()
    pump = made.copy.put

    def put(*arguments: Any) -> None:
        try:
            assert free.wait(60)
            pump(*arguments)
        finally:
            ended.set()

    made.copy.put = put
    made.follow([2])
    await made.drain()
    assert "not copied within checkpoint.timeout_s = 0.2 s" in told[0]
    free.set()
    assert ended.wait(60)
    assert not [name for name in memory.store if MARKER in name]


def test_past_its_deadline_nothing_gets_a_marker(tmp_path, memory):
    (tmp_path / "empty").touch()
    deadline = Deadline("the copy", 60)
    deadline.cancel()
    with pytest.raises(WeightError, match="cancelled, waiting for its marker"):
        CopyFolder(URL, "tiny").put(2, {"empty": tmp_path / "empty"}, deadline)
    assert [name for name in memory.store if "step-000002" in name], "the file itself was written"
    assert not [name for name in memory.store if MARKER in name]


async def test_no_step_waits_for_a_copy_and_the_last_one_is_there_in_the_end(tmp_path):
    gate = AdmissionGate(max_staleness=1, pipeline_depth=1, groups_per_step=2, num_steps=6)
    attempt = Attempt(root=tmp_path / "tiny" / "checkpoints", gate=gate, every=2)
    pipeline = await attempt.build()
    made, told = copies(RunDir(tmp_path / "tiny", tmp_path / "weights"))
    attempt.checkpoints.copies = made
    trained, put = threading.Event(), made.copy.put

    def put_late(*arguments: Any) -> None:
        assert trained.wait(60), "a step waited for the copy"
        put(*arguments)

    made.copy.put = put_late
    assert await pipeline.run() == 6
    trained.set()
    await attempt.checkpoints.copied()
    assert made.stats.last == 6
    assert made.copy.steps() == [4, 6]
    assert made.stats.failed == len(told) <= 1, "at most that of step 2, removed meanwhile"


def test_a_storage_that_does_not_answer_is_not_taken_for_an_empty_one(tmp_path, memory):
    copy = CopyFolder(URL, "tiny")

    def fail(path: str) -> None:
        raise ConnectionError("refused")

    copy._fs = Broken(memory, "ls", fail)
    with pytest.raises(CheckpointError, match=r"cannot list memory://copies/tiny .*refused"):
        copy.steps()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://x", ["unknown protocol 'nosuch'", "fsspec knows"]),
        ("copies", ["not the URL of one storage", "file:///mnt/copies"]),
        ("zip://a::s3://b", ["not the URL of one storage"]),
        ("nosuch://user:hunter2@x/y?sig=3", ["nosuch://(hidden)@x/y?(hidden)"]),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(tmp_path, url, words):
    with pytest.raises(ConfigError) as refused:
        config(tmp_path, url)
    assert all(word in str(refused.value) for word in ["checkpoint.copy_to", *words])
    assert "hunter2" not in str(refused.value)


def test_copies_inside_the_run_directory_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is in the run directory"):
        config(tmp_path, f"file://{tmp_path}/tiny/copies")
    config(tmp_path, f"file://{tmp_path}/copies")


def test_credentials_of_the_url_are_in_no_file_and_no_name(tmp_path):
    url = "memory://user:hunter2@copies/x?signature=abc"
    tree = remove_secrets(config(tmp_path, url).model_dump(mode="json"))
    assert tree["checkpoint"]["copy_to"] == "memory://(hidden)@copies/x?(hidden)"
    assert CopyFolder(url, "tiny").shown == "memory://(hidden)@copies/x?(hidden)/tiny"


# The same command, as the driver gives it


async def test_the_same_command_elsewhere_owns_a_directory_that_goes_on(tmp_path):
    await copied(make_run(tmp_path, 2, 4))
    settings = config(tmp_path / "elsewhere")
    run, outcome = claim(settings, [], overwrite=False, accept_changes=False)
    assert run.is_held()
    assert outcome.checkpoint.state.step == 4
    assert [r["step"] for r in read_metrics(run.metrics)] == [0, 1, 2, 3, 4]
    assert run.read_resolved() == resume.describe(settings)
    run.close()
    run, outcome = claim(settings, [], overwrite=True, accept_changes=False)
    assert outcome.checkpoint is None
    assert CopyFolder(URL, "tiny").steps() == [], "what is overwritten is nowhere any more"
    run.close()


async def test_a_refused_command_elsewhere_leaves_no_directory(tmp_path, memory):
    await copied(make_run(tmp_path, 2))
    damage(memory, "/step-000002/checkpoint/run.json")
    settings = config(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="has copies there and none is whole"):
        claim(settings, [], overwrite=False, accept_changes=False)
    assert not settings.run_dir.exists()


def test_a_run_without_copies_begins_as_ever(tmp_path):
    run, outcome = claim(config(tmp_path), [], overwrite=False, accept_changes=False)
    assert (outcome.checkpoint, outcome.finished, outcome.notes) == (None, False, [])
    run.close()


# Copies of a run whose newest checkpoint is damaged


def tear(run: RunDir, step: int) -> None:
    for shard in (run.checkpoints / f"step-{step:06d}").glob("learner/*/shard-00000*"):
        shard.write_bytes(shard.read_bytes()[:-1])


async def test_d03_a_whole_newer_copy_goes_before_an_older_checkpoint(tmp_path):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    tear(run, 4)
    settings = config(tmp_path)
    found = resume.whole_or_copy(run, settings)
    assert found.checkpoint.state.step == 4
    assert "step 4 was fetched from memory://copies/tiny" in found.origin
    resume.cut_back(run, found.checkpoint)
    made = await copied(run)
    assert made.copy.steps() == [2, 4]
    assert [p.name for p in run.checkpoints.glob("damaged-*")] == ["damaged-0000-step-000004"]


async def test_d03_a_loss_inside_a_run_takes_the_newer_copy_too(tmp_path):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    tear(run, 4)
    assert find_restart_checkpoint(run, config(tmp_path), CoreLost("gone")).state.step == 4


async def test_d03_a_copy_newer_than_the_resumed_step_is_set_aside_with_all_its_files(
    tmp_path, memory
):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    tear(run, 4)
    damage(memory, "/step-000004/checkpoint/run.json")
    files = [n for n in memory.store if "step-000004" in n and MARKER not in n]
    found = resume.whole_or_copy(run, config(tmp_path))
    assert found.checkpoint.state.step == 2
    resume.cut_back(run, found.checkpoint)
    made = await copied(run)
    assert made.copy.steps() == [2, 4]
    assert not made.copy.is_complete(4), "nobody goes on from a timeline that the run left"
    assert all(name in memory.store for name in files)
    for step in (3, 6):
        write_whole(run.checkpoints, step)
        await copied(run)
        assert (4 in made.copy.steps()) is (step == 3), "it goes once a later copy is there"


async def test_d03_storage_that_cannot_be_asked_refuses_a_run_whose_newest_is_damaged(
    tmp_path, memory, monkeypatch
):
    run = make_run(tmp_path, 2, 4)
    await copied(run)

    def fail(path: str) -> None:
        raise ConnectionError("refused")

    def unreachable(settings: RunConfig) -> CopyFolder:
        copy = CopyFolder(URL, "tiny")
        copy._fs = Broken(memory, "ls", fail)
        return copy

    monkeypatch.setattr("rlhf_cluster.run.checkpoint.remote_copies.folder_of", unreachable)
    paused: list[float] = []
    whole = resume.whole_or_copy(run, config(tmp_path), paused.append)
    assert whole.checkpoint.state.step == 4, "what is whole here needs nobody else"
    assert paused == []
    tear(run, 4)
    with pytest.raises(StorageError, match=r"refused.*It is unknown"):
        resume.whole_or_copy(run, config(tmp_path), paused.append)
    assert paused == [*PAUSES]
    assert checkpoint_folder.steps(run.checkpoints) == [2, 4]


@pytest.mark.parametrize("passes", [True, False])
async def test_d03_an_error_while_a_copy_is_read_is_no_damage(tmp_path, memory, passes):
    await copied(make_run(tmp_path, 2, 4))
    new, _ = elsewhere(tmp_path)
    paused: list[float] = []

    def fail(path: str) -> None:
        if "step-000004" in path and not (passes and paused):
            raise ConnectionError("reset by peer")

    copy = CopyFolder(URL, "tiny")
    copy._fs = Broken(memory, "open", fail)
    fetched = functools.partial(fetch_newest, new, copy, 60.0, resume.whole, sleep=paused.append)
    if passes:
        assert fetched().checkpoint.state.step == 4
        return
    with pytest.raises(StorageError, match="reset by peer"):
        fetched()
    assert checkpoint_folder.steps(new.checkpoints) == [], "the one before it is not taken"


async def test_d03_a_damaged_copy_of_a_whole_checkpoint_costs_the_run_nothing(tmp_path, memory):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    damage(memory, "/step-000004/checkpoint/run.json")
    found = resume.whole_or_copy(run, config(tmp_path))
    assert (found.checkpoint.state.step, found.damaged, found.origin) == (4, [], "")


async def test_d03_who_deleted_newer_checkpoints_goes_back_whatever_copies_there_are(tmp_path):
    run = make_run(tmp_path, 2, 4, 6)
    await copied(run)
    shutil.rmtree(run.checkpoints / "step-000006")
    assert resume.whole_or_copy(run, config(tmp_path)).checkpoint.state.step == 4
    tear(run, 4)
    found = resume.whole_or_copy(run, config(tmp_path))
    assert found.checkpoint.state.step == 4
    assert found.origin, "the copy of what is damaged, not of what was deleted"


async def test_d03_a_full_target_keeps_older_copies_and_no_part_of_the_new_one(tmp_path, memory):
    run = make_run(tmp_path, 2, 4)
    await copied(run)
    write_whole(run.checkpoints, 6)
    checkpoint_folder.retain(run.checkpoints, 2)
    room = 6

    def fill(path: str) -> None:
        nonlocal room
        if "step-000006" in path:
            room -= 1
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    made, told = copies(run)
    made.copy._fs = Broken(memory, "open", fill)
    made.follow([4, 6])
    await made.drain()
    assert "No space left on device" in told[0]
    assert made.copy.steps() == [4], "that of step 2 made room: the one of step 4 is whole"
    assert made.copy.is_complete(4)


async def test_d03_a_marker_that_cannot_be_read_does_not_cost_the_copy(tmp_path, memory):
    run = make_run(tmp_path, 2)
    await copied(run)
    before = memory.modified("/copies/tiny/step-000002/copied.json")

    def fail(path: str) -> None:
        raise PermissionError(errno.EACCES, "denied")

    made, told = copies(run)
    made.copy._fs = Broken(memory, "cat_file", fail)
    made.follow([2])
    await made.drain()
    assert "denied" in told[0]
    assert memory.modified("/copies/tiny/step-000002/copied.json") == before


@pytest.mark.parametrize("method", ["ls", "cat_file", "open"])
async def test_d03_a_storage_that_hangs_at_a_resume_is_no_damage_and_has_a_deadline(
    tmp_path, memory, method
):
    await copied(make_run(tmp_path, 2, 4))
    new, _ = elsewhere(tmp_path)
    let_go = threading.Event()

    def hang(path: str) -> None:
        assert let_go.wait(60)

    copy = CopyFolder(URL, "tiny")
    copy._fs = Broken(memory, method, hang)
    try:
        with pytest.raises(StalledError, match=r"copies/tiny was not over after 0.05 s"):
            fetch_newest(new, copy, 0.05, resume.whole)
    finally:
        let_go.set()
    assert checkpoint_folder.steps(new.checkpoints) == []
