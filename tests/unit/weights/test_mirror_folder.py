"""The folder of a node's copies: whatever else lies beside it is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cluster.weights.transports.mirror_folder import (
    MARK,
    begin_use,
    copies_of,
    is_in_use,
    sweep,
)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_n02_a_sweep_removes_nothing_that_no_mirror_made(tmp_path: Path) -> None:
    mirror, elsewhere = tmp_path / "mirror", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARK).touch()
    (elsewhere / "v000001").mkdir()
    mirror.mkdir()
    for name in ("run/v000001", "rlhf_mirror_notes", "rlhf_mirror_" + 16 * "a"):
        (mirror / name).mkdir(parents=True)
        (mirror / name / "kept").touch()
    (mirror / "rlhf_mirror_notes" / MARK).touch()  # the mark, but not the name
    for name in ("....use", ".run.use", "..use", MARK):
        (mirror / name).touch()
    (mirror / ("rlhf_mirror_" + 16 * "b")).symlink_to(elsewhere)
    linked = mirror / ("rlhf_mirror_" + 16 * "c")
    linked.mkdir()
    (linked / MARK).symlink_to(elsewhere / MARK)
    before = tree(tmp_path)
    sweep(mirror)
    assert tree(tmp_path) == before


def test_n02_a_folder_is_swept_once_nobody_uses_it_and_no_sooner(tmp_path: Path) -> None:
    local = copies_of(tmp_path / "store", tmp_path / "mirror")
    first, second = begin_use(local), begin_use(local)
    assert first is not None
    assert second is not None
    (local / "v000001").mkdir()
    os.close(first)
    sweep(local.parent)
    assert is_in_use(second, local)
    assert (local / "v000001").is_dir()
    os.close(second)
    sweep(local.parent)
    assert tree(local.parent) == []


@pytest.mark.parametrize("taken", ["folder", "file", "link"])
def test_n02_a_name_that_something_else_has_is_refused_and_left(tmp_path: Path, taken: str) -> None:
    local = copies_of(tmp_path / "store", tmp_path)
    if taken == "folder":
        (local / "v000001").mkdir(parents=True)
    elif taken == "file":
        local.touch()
    else:
        local.symlink_to(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="not a folder that this user's runs made"):
        begin_use(local)
    sweep(tmp_path)
    assert tree(tmp_path) == before


def test_n02_what_a_lost_process_left_half_made_or_half_removed_is_removed_too(
    tmp_path: Path,
) -> None:
    local = copies_of(tmp_path / "store", tmp_path / "mirror")
    fd = begin_use(local)
    assert fd is not None
    os.close(fd)
    local.rename(local.with_name(local.name + ".0123abcd"))
    sweep(local.parent)
    assert tree(local.parent) == []


KILLED_MAKER = """
import os, pathlib, sys
from rlhf_cluster.weights.transports.mirror_folder import begin_use
left = int(sys.argv[2])
def at_a_change(event, arguments):
    global left
    if event in ("os.rename", "open") and "rlhf_mirror_" in str(arguments[0]):
        if not left:
            os._exit(9)
        left -= 1
sys.addaudithook(at_a_change)
os.close(begin_use(pathlib.Path(sys.argv[1])))
"""


def test_what_a_process_that_is_killed_while_it_makes_the_folder_leaves_is_removed(
    tmp_path: Path,
) -> None:
    for num_changes in range(9):
        mirror = tmp_path / str(num_changes)
        arguments = [str(copies_of(tmp_path / "store", mirror)), str(num_changes)]
        command = [sys.executable, "-c", KILLED_MAKER, *arguments]
        ended = subprocess.run(command, check=False, timeout=60).returncode
        assert tree(mirror) != [], "it is killed after its first change, if at all"
        sweep(mirror)
        assert tree(mirror) == [], num_changes
        if ended == 0:
            return
        assert ended == 9
    raise AssertionError("no process made the folder")


def test_an_empty_folder_is_removed_only_with_the_name_of_a_half_made_one(tmp_path: Path) -> None:
    name = "rlhf_mirror_" + 16 * "a"
    names = (name, name + ".notes", name + ".0123abc", "rlhf_mirror_notes.0123abcd", ".0123abcd")
    for kept in names:
        (tmp_path / kept).mkdir()
    (tmp_path / (name + ".0123abce")).mkdir()
    (tmp_path / (name + ".0123abce") / "file").touch()
    (tmp_path / (name + ".0123abcf")).touch()
    (tmp_path / (name + ".01234567")).symlink_to(tmp_path / name)
    before = tree(tmp_path)
    (tmp_path / (name + ".0123abcd")).mkdir()
    sweep(tmp_path)
    assert tree(tmp_path) == before


def test_a_folder_that_is_swept_before_it_has_its_mark_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = copies_of(tmp_path / "store", tmp_path)
    opens = os.open

    def open_after_a_sweep(path: Path, *arguments: int) -> int:
        sweep(tmp_path)
        return opens(path, *arguments)

    monkeypatch.setattr(os, "open", open_after_a_sweep)
    assert begin_use(local) is None
    monkeypatch.undo()
    assert tree(tmp_path) == []
    use = begin_use(local)
    assert use is not None
    os.close(use)


def test_n02_stores_have_folders_of_their_own_and_one_store_one_folder(tmp_path: Path) -> None:
    roots = [tmp_path / "a" / "run" / "weights", tmp_path / "b" / "run" / "weights"]
    folders = {copies_of(root, tmp_path / "mirror") for root in (*roots, roots[0])}
    assert len(folders) == 2


def test_n02_a_mark_that_was_removed_is_in_use_no_more(tmp_path: Path) -> None:
    local = copies_of(tmp_path / "store", tmp_path / "mirror")
    fd = begin_use(local)
    assert fd is not None
    (local / MARK).unlink()
    assert not is_in_use(fd, local)
    os.close(fd)


KILLED_SWEEP = """
import os, pathlib, sys
from rlhf_cluster.weights.transports.mirror_folder import sweep
left = int(sys.argv[2])
def at_a_removal(event, arguments):
    global left
    if event in ("os.remove", "os.rmdir", "os.rename"):
        if not left:
            os._exit(9)
        left -= 1
sys.addaudithook(at_a_removal)
sweep(pathlib.Path(sys.argv[1]))
"""


def test_a_sweep_that_is_killed_anywhere_is_ended_by_the_next_one(tmp_path: Path) -> None:
    """Workers are killed while they leave; what they leave is as large as the weights."""
    for num_removals in range(20):
        mirror = tmp_path / str(num_removals)
        local = copies_of(tmp_path / "store", mirror)
        use = begin_use(local)
        assert use is not None
        for version in ("v000001", "v000002"):
            (local / version).mkdir()
            (local / version / "shard").touch()
        (local / ".lock").touch()
        os.close(use)
        arguments = [sys.executable, "-c", KILLED_SWEEP, str(mirror), str(num_removals)]
        ended = subprocess.run(arguments, check=False, timeout=60).returncode
        sweep(mirror)
        assert tree(mirror) == [], num_removals
        if ended == 0:
            return
        assert ended == 9
    raise AssertionError("no sweep came to its end")
