"""The folder of checkpoints: whatever is torn, missing or half removed, the one before is found."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from rlhf_cluster.errors import CheckpointError
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.checkpoint.checkpoint_folder import (
    MARKER,
    STATE,
    newest,
)
from rlhf_cluster.run.checkpoint.run_state import RunState
from tests.support.builders.checkpoint_files import (
    make_state,
    write,
    write_whole,
)
from tests.support.processes.dying_process import survives


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with checkpoints of steps 2 and 4, and that of step 4."""
    write(tmp_path, 2)
    return tmp_path, write(tmp_path, 4)


def found_step(root: Path) -> int | None:
    checkpoint = newest(root).checkpoint
    return checkpoint.state.step if checkpoint else None


def test_the_newest_is_found_with_all_that_was_put_into_it(two):
    root, last = two
    found = newest(root)
    assert found.damaged == []
    assert found.checkpoint.folder == last
    assert found.checkpoint.state == make_state(4)
    assert found.checkpoint.learner == last / "learner" / "v000004"
    assert newest(root / "nothing").checkpoint is None


FILES = [MARKER, STATE, "learner/v000004/manifest.json", "learner/v000004/shard-00000.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "changed"])
def test_s32_a_damaged_file_makes_the_checkpoint_before_count(two, name, damage):
    root, last = two
    path = last / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "changed" and name.endswith(".safetensors"):
        return  # the tensors' own hashes find it: test_checkpoint_damage
    else:
        contents = {
            "empty": b"",
            "cut": data[: len(data) // 2],
            "longer": data + b"x",
            "changed": bytes([data[0] ^ 1]) + data[1:],
        }
        path.write_bytes(contents[damage])
    found = newest(root)
    assert found.checkpoint.state.step == 2
    assert len(found.damaged) == 1
    assert str(last) in found.damaged[0]


def test_s32_a_process_that_dies_between_any_two_file_operations_loses_no_checkpoint(tmp_path):
    """Writing 6 and removing 2 is cut off at each of its operations; then 8 is written as ever."""
    found = set()
    for die_at in range(1, 200):
        root = tmp_path / str(die_at)
        write(root, 2)
        write(root, 4)

        def write_six(root=root):
            write(root, 6)
            checkpoint_folder.retain(root, 2)

        done = survives(root, die_at, write_six)
        assert newest(root).damaged == []
        found.add(found_step(root))
        write(root, 8)
        assert found_step(root) == 8
        assert not [*root.glob("*.partial"), *root.glob("*.trash")]
        shutil.rmtree(root)
        if done:
            break
    else:
        raise AssertionError("no write got through")
    assert die_at > 12, "the audit hook saw too few steps to prove anything"
    assert found == {4, 6}


def test_a_leftover_of_the_same_step_never_lends_its_files_or_its_marker(tmp_path):
    write(tmp_path, 2)
    complete = write(tmp_path, 4)
    stale = tmp_path / "step-000006.partial"
    shutil.copytree(complete, stale)
    assert found_step(tmp_path) == 4
    partial = checkpoint_folder.begin(tmp_path, 6, 8)
    assert partial != stale, "a rank that was given up may write on into the old one"
    assert not stale.exists()
    assert list(partial.iterdir()) == []
    assert found_step(tmp_path) == 4


def test_a_checkpoint_under_another_step_s_name_does_not_count(two):
    root, last = two
    shutil.copytree(last, root / "step-000009")
    found = newest(root)
    assert found.checkpoint.folder == last
    assert "does not belong to step 4" in found.damaged[0]


def test_names_that_lead_out_of_the_folder_are_refused(two):
    root, last = two
    outside = root / "outside"
    outside.write_text("secret")
    for name in ("../outside", "/etc/passwd", "a/../../outside"):
        marker = json.loads((last / MARKER).read_text())
        marker["files"][name] = {"bytes": 6}
        (last / MARKER).write_text(json.dumps(marker))
        with pytest.raises(CheckpointError, match="names the file"):
            checkpoint_folder.check(last)


def test_older_ones_go_and_later_ones_of_another_future(tmp_path):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    assert [state.step for state in checkpoint_folder.retain(tmp_path, 3)] == [4, 6, 8]
    checkpoint_folder.set_aside_after(tmp_path, 4)
    aside = ["damaged-0000-step-000006", "damaged-0001-step-000008"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*aside, "step-000004"]


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2}, [4]),
        ({2: 0.9, 4: 0.1, 6: 0.3, 8: 0.95}, []),  # it is among the newest
        ({2: 0.5, 4: 0.5, 6: 0.1, 8: 0.1}, [4]),  # the last of equals
        ({2: NAN, 4: 0.1, 6: None, 8: -1.0}, [4]),
        ({2: float("inf"), 4: None, 6: None, 8: NAN}, []),
        ({2: -3.0, 4: -1.0, 6: -2.0, 8: None}, [4]),
    ],
)
def test_the_best_stays_beside_the_newest(tmp_path, scores, best):
    for step, score in scores.items():
        write(tmp_path, step, score)
    kept = [state.step for state in checkpoint_folder.retain(tmp_path, 2, keep_best=1)]
    assert kept == [*best, 6, 8]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:06d}" for step in kept]
    assert found_step(tmp_path) == 8, "a run goes on from the newest, not from the best"
    assert [state.step for state in checkpoint_folder.retain(tmp_path, 1)] == [8]


@pytest.mark.parametrize("text", ["NaN", "Infinity"])
def test_a_number_that_another_writer_left_is_never_the_best(tmp_path, text):
    for step, score in {2: 0.5, 4: 0.9, 6: 0.1}.items():
        path = write(tmp_path, step, score)
        if step == 4:
            old, new = (path / STATE).read_bytes(), f'"score": {text}'.encode()
            (path / STATE).write_bytes(old.replace(b'"score": 0.9', new))
            marker = json.loads((path / MARKER).read_text())
            data = (path / STATE).read_bytes()
            marker["files"][STATE] = {"bytes": len(data), "hash": xxh3_128_hexdigest(data)}
            (path / MARKER).write_text(json.dumps(marker))
            assert not math.isfinite(checkpoint_folder.check(path).state.score)
    assert [state.step for state in checkpoint_folder.retain(tmp_path, 1, keep_best=1)] == [2, 6]


def test_a_damaged_checkpoint_is_never_the_best(tmp_path):
    for step, score in {2: 0.5, 4: 0.9, 6: 0.1}.items():
        write(tmp_path, step, score)
    (tmp_path / "step-000004" / MARKER).unlink()
    assert [state.step for state in checkpoint_folder.retain(tmp_path, 1, keep_best=1)] == [2, 6]


def test_the_best_survives_a_process_that_dies_between_any_two_file_operations(tmp_path):
    template = tmp_path / "template"
    for step, score in {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.2}.items():
        write_whole(template, step, 1, score)
    for die_at in range(1, 200):
        root = tmp_path / str(die_at)
        shutil.copytree(template, root)
        done = survives(
            root, die_at, lambda root=root: checkpoint_folder.retain(root, 1, keep_best=1)
        )
        assert newest(root).damaged == []
        assert {
            checkpoint_folder.check(root / f"step-{step:06d}").state.score for step in (4, 8)
        } == {
            0.9,
            0.2,
        }
        assert [state.step for state in checkpoint_folder.retain(root, 1, keep_best=1)] == [4, 8]
        if done:
            break
    else:
        raise AssertionError("the removal never got through")
    assert die_at > 12, "the audit hook saw too few steps to prove anything"


def test_no_space_is_said_before_anything_is_written(two):
    root, _ = two
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes and 10 are free.*checkpoint.keep"):
        checkpoint_folder.begin(root, 6, 100, free_bytes=lambda _: 10)
    assert not list(root.glob("*.partial"))
    assert found_step(root) == 4


def test_a_state_of_another_format_is_refused():
    text = make_state(4).to_json().replace('"format": 1', '"format": 2').encode()
    with pytest.raises(CheckpointError, match=r"has format 2, this version reads 1"):
        RunState.from_json(text, "x")
    with pytest.raises(CheckpointError, match="learner"):
        RunState.from_json(b'{"step": 1}', "x")
