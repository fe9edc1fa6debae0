"""A learner, or a whole run, that was given up and lives on changes nothing any more."""

import json
import pickle
import threading
import time
from pathlib import Path

import pytest

from rlhf_cluster.errors import FencedError, RunError, WeightError
from rlhf_cluster.failures import may_pass
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.run_directory import (
    MARKER,
    RunDir,
)
from rlhf_cluster.weights import (
    store,
    writer_fence,
)
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.sync import WeightSync
from rlhf_cluster.weights.transports.shared_files import (
    FileSink,
    partial_dir,
)
from tests.support.builders.checkpoint_files import make_state
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import (
    assert_same,
    small_model,
    split_evenly,
)
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
)


def write(root: Path, version: int, seed: int, writer: writer_fence.Writer):
    sink = FileSink(root, attempt=writer.attempt)
    parts = split_evenly(small_model(seed), 2)
    return [send_shard([sink], version, rank, own) for rank, own in enumerate(parts)]


def publish(root: Path, version: int, seed: int, writer: writer_fence.Writer):
    return store.commit(root, version, write(root, version, seed, writer), 5, writer=writer)


def test_d13_a_learner_that_was_given_up_commits_nothing_after_its_successor_began(tmp_path):
    old = store.begin_attempt(tmp_path)
    publish(tmp_path, 4, 4, old)
    late = write(tmp_path, 5, 5, old)  # its commit is under way
    new = store.begin_attempt(tmp_path)
    store.rewind(tmp_path, 3)
    with pytest.raises(FencedError, match=r"attempt 2 publishes here, and this is attempt 1"):
        store.commit(tmp_path, 5, late, 5, writer=old)
    assert store.latest(tmp_path) is None
    version = publish(tmp_path, 4, 40, new)
    assert_same(dict(store.read(version.path)), small_model(40))
    with pytest.raises(FencedError):
        publish(tmp_path, 6, 6, old)
    assert store.versions(tmp_path) == [4], "the successor's, and nothing newer than it"
    publish(tmp_path, 5, 50, new)
    assert not list(tmp_path.glob("*.partial")), "what was refused goes with the next version"


def test_d13_ranks_of_two_attempts_never_write_into_one_folder(tmp_path):
    old = store.begin_attempt(tmp_path)
    new = store.begin_attempt(tmp_path)
    reports = write(tmp_path, 1, 1, new)
    write(tmp_path, 1, 99, old)
    version = store.commit(tmp_path, 1, reports, 5, writer=new)
    assert_same(dict(store.read(version.path)), small_model(1))
    folders = {partial_dir(tmp_path, 7, attempt) for attempt in (0, old.attempt, new.attempt)}
    assert len(folders) == 3


def test_of_two_that_begin_at_once_one_is_refused(tmp_path):
    writers: list[writer_fence.Writer] = []
    begins = [
        threading.Thread(target=lambda: writers.append(store.begin_attempt(tmp_path)))
        for _ in range(4)
    ]
    for begin in begins:
        begin.start()
    for begin in begins:
        begin.join(30)
    assert sorted(writer.attempt for writer in writers) == [1, 2, 3, 4]
    for writer in sorted(writers, key=lambda w: w.attempt)[:3]:
        with pytest.raises(FencedError):
            publish(tmp_path, 1, 1, writer)
    publish(tmp_path, 1, 1, max(writers, key=lambda w: w.attempt))


def test_an_attempt_of_the_same_number_with_another_token_is_refused(tmp_path):
    writer = store.begin_attempt(tmp_path)
    with pytest.raises(FencedError):
        publish(tmp_path, 1, 1, writer_fence.Writer(writer.attempt, "0" * 32))


def test_who_shows_nothing_is_refused_once_an_attempt_has_begun(tmp_path):
    nobody = writer_fence.Writer(0, "")
    reports = write(tmp_path, 1, 1, nobody)
    store.commit(tmp_path, 1, reports, 5)
    store.begin_attempt(tmp_path)
    with pytest.raises(FencedError, match="this is none"):
        store.commit(tmp_path, 2, write(tmp_path, 2, 2, nobody), 5)


@pytest.mark.parametrize("text", ["", "{}", '{"attempt": "x", "token": "y"}', "[1]"])
def test_a_number_that_cannot_be_read_refuses_and_is_never_taken_for_none(tmp_path, text):
    writer = store.begin_attempt(tmp_path)
    (tmp_path / writer_fence.NAME).write_text(text)
    with pytest.raises(WeightError, match=r"writer\.json: who publishes cannot be read"):
        publish(tmp_path, 1, 1, writer)
    with pytest.raises(WeightError, match="cannot be read"):
        store.begin_attempt(tmp_path)


async def test_a_learner_that_is_refused_so_is_not_asked_again():
    error = FencedError("attempt 2 publishes here, and this is attempt 1")
    assert pickle.loads(pickle.dumps(error)).args == error.args
    assert not may_pass(error)

    class Fenced(FakeLearner):
        async def publish(self):
            self.publishing += 1
            raise error

    learner = Fenced()
    sync = WeightSync(learner, FakeGeneration(), None, 1, time.monotonic)  # type: ignore[arg-type]
    with pytest.raises(FencedError):
        await sync.publish_last(0, 5)
    assert learner.publishing == 1


def test_d13_a_rank_that_was_given_up_writes_into_no_later_try_of_a_checkpoint(tmp_path):
    first = checkpoint_folder.begin(tmp_path, 3, 8)
    second = checkpoint_folder.begin(tmp_path, 3, 8)
    assert first != second
    assert not first.exists(), "what an earlier try left is gone"
    (second / "learner").mkdir()
    (second / "learner" / "x.safetensors").write_bytes(b"new")
    with pytest.raises(FileNotFoundError):
        (first / "learner.safetensors").write_bytes(b"late")
    found = checkpoint_folder.complete(second, make_state(3))
    assert found.folder == tmp_path / "step-000003"
    assert (found.folder / "learner" / "x.safetensors").read_bytes() == b"new"


def test_d14_a_run_whose_directory_another_process_took_notices(tmp_path):
    with RunDir.create(tmp_path / "x", tiny_config(run={"root": str(tmp_path)})) as run:
        run.check_claim()
        marker = run.path / MARKER
        other = {**json.loads(marker.read_text()), "host": "another", "pid": 7}
        marker.write_text(json.dumps(other))
        with pytest.raises(RunError, match=r"was taken by process 7 on another.*localflock"):
            run.check_claim()


def test_a_new_attempt_removes_the_half_versions_of_the_one_before(tmp_path: Path) -> None:
    store.begin_attempt(tmp_path)
    half = tmp_path / "v000003.a1.partial"
    half.mkdir()
    (half / "shard-00000-x.safetensors").write_bytes(b"half")
    beside = tmp_path / "notes"
    beside.mkdir()
    store.begin_attempt(tmp_path)
    assert not half.exists()
    assert beside.exists()
