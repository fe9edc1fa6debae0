"""A publisher that dies between any two steps on the file system.

Each try runs in a forked process that an audit hook ends, with no cleaning up, at the n-th file
system call of a publish; n counts up until a publish gets through.
"""

import shutil
from pathlib import Path

import pytest

from rlhf_cluster.weights import store
from tests.support.builders.small_weights import (
    assert_same,
    publish,
    small_model,
)
from tests.support.processes.dying_process import (
    in_a_child,
    survives,
)


@pytest.mark.parametrize("latest_before", [None, 3])
def test_latest_is_always_complete_and_publishing_goes_on(
    tmp_path: Path, latest_before: int | None
) -> None:
    seen: set[int | None] = set()
    before = tmp_path / "before"
    before.mkdir()
    if latest_before is not None:
        for number in (1, 2, latest_before):
            publish(before, number, small_model(number), keep=3)
    for die_at in range(1, 200):
        root = tmp_path / f"die-at-{die_at}"
        shutil.copytree(before, root, symlinks=True)
        done = survives(root, die_at, lambda root=root: publish(root, 4, small_model(4), keep=2))

        latest = store.latest(root)
        seen.add(latest and latest.version)
        if latest is not None:
            assert latest.version in (latest_before, 4)
            assert_same(dict(store.read(latest.path)), small_model(latest.version))
        for number in store.versions(root):
            assert_same(dict(store.read(root / f"v{number:06d}")), small_model(number))

        # Whoever comes next publishes version 4 or a later one, and finds a clean store after it.
        publish(root, 4 if latest is None or latest.version < 4 else 5, small_model(5), keep=1)
        left = sorted(path.name for path in root.iterdir())
        assert len(left) == 3, left
        if done:
            assert die_at > 10, "the audit hook saw too few steps to prove anything"
            break
    else:
        raise AssertionError("no publish got through")
    assert seen == {latest_before, 4}


def test_a_version_published_again_is_the_old_one_the_new_one_or_not_there(tmp_path: Path) -> None:
    """Never half of either, and what is published next finds a clean store."""
    seen: set[int] = set()
    before = tmp_path / "before"
    for number in (1, 2):
        publish(before, number, small_model(number))
    for die_at in range(1, 200):
        root = tmp_path / f"die-at-{die_at}"
        shutil.copytree(before, root, symlinks=True)
        again = lambda root=root: publish(root, 2, small_model(2), num_ranks=3)  # noqa: E731
        done = survives(root, die_at, again)
        latest = store.latest(root)
        assert latest is not None
        assert_same(dict(store.read(latest.path)), small_model(latest.version))
        seen.add(latest.version)
        again()
        assert_same(dict(store.read(root / "v000002")), small_model(2))
        assert sorted(p.name for p in root.iterdir()) == [
            ".commit.lock",
            "latest",
            "v000001",
            "v000002",
        ]
        if done:
            break
    else:
        raise AssertionError("no publish got through")
    assert seen == {1, 2}


def test_a_rewind_that_dies_can_be_repeated(tmp_path: Path) -> None:
    before = tmp_path / "before"
    for number in range(1, 5):
        publish(before, number, small_model(number))
    for die_at in range(1, 100):
        root = tmp_path / f"die-at-{die_at}"
        shutil.copytree(before, root, symlinks=True)
        done = survives(root, die_at, lambda root=root: store.rewind(root, 2))
        latest = store.latest(root)
        assert latest is not None
        assert latest.version in (2, 4)
        assert_same(dict(store.read(latest.path)), small_model(latest.version))
        assert store.rewind(root, 2).version == 2
        assert store.versions(root) == [1, 2]
        if done:
            assert die_at > 3
            break
    else:
        raise AssertionError("no rewind got through")


def test_latest_follows_the_pointer_when_retention_removes_what_it_had_read(tmp_path: Path) -> None:
    """A commit lands after the reader has read the pointer and before it opens the manifest."""
    publish(tmp_path, 1, small_model())
    num_commits = 0

    def commit_meanwhile(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal num_commits
        if event == "open" and str(arguments[0]).endswith("v000001/manifest.json"):
            num_commits += 1
            if num_commits == 1:
                publish(tmp_path, 2, small_model(2), keep=1)

    def look() -> None:
        version = store.latest(tmp_path)
        assert num_commits == 1
        assert version is not None
        assert version.version == 2

    assert in_a_child(look, commit_meanwhile) == 0
