"""Manifests and pointers that were damaged, and readers beside a publisher.

What happens to shards, by each transport, is in test_weight_transports.py.
"""

import json
import threading
from pathlib import Path

import pytest
import torch

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import decode, encode
from tests.support.builders.small_weights import (
    assert_same,
    publish,
    small_model,
    write,
)


@pytest.fixture
def version(tmp_path: Path) -> WeightVersion:
    return publish(tmp_path, 1, small_model())


def test_another_version_than_the_announced_one_is_refused(version: WeightVersion) -> None:
    with pytest.raises(WeightError, match=f"digest {version.digest}, expected 00.*announced"):
        store.read(version.path, expected_digest="0" * 32)


def test_a_version_in_the_wrong_folder_is_refused(version: WeightVersion) -> None:
    folder = Path(version.path)
    moved = folder.rename(folder.with_name("v000007"))
    with pytest.raises(WeightError, match="describes version 1, found in v000007"):
        store.open_version(moved)


# Retention under a reader


def test_readers_beside_a_publisher_see_whole_versions_or_a_clear_error(tmp_path: Path) -> None:
    """Retention deletes what is being read; every version read to its end holds one fill value."""
    num_versions = 40
    publish(tmp_path, 0, {"a": torch.zeros(2000), "b": torch.zeros(3)}, keep=1)
    seen: list[set[float]] = []
    newest: list[int] = []
    failures: list[Exception] = []

    def read_until_last() -> None:
        while not newest or newest[-1] < num_versions:
            version = store.latest(tmp_path)
            try:
                values = {x for _, t in store.read(version.path) for x in t.tolist()}
            except WeightError as error:
                if "no such version" not in str(error):
                    failures.append(error)
                    return
            else:
                seen.append(values | {float(version.version)})
                newest.append(version.version)

    reader = threading.Thread(target=read_until_last)
    reader.start()
    for number in range(1, num_versions + 1):
        fill = {"a": torch.full((2000,), float(number)), "b": torch.full((3,), float(number))}
        publish(tmp_path, number, fill, keep=1)
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert failures == []
    assert all(len(values) == 1 for values in seen)
    assert newest == sorted(newest)


def test_the_pointer_is_replaced_and_never_written_in_place(tmp_path: Path) -> None:
    publish(tmp_path, 1, small_model())
    with (tmp_path / "latest").open() as before:
        publish(tmp_path, 2, small_model(2))
        assert before.read() == "v000001\n"
    assert (tmp_path / "latest").read_text() == "v000002\n"


def test_racing_commits_leave_the_newest_as_the_latest(tmp_path: Path) -> None:
    reports = {n: write(tmp_path, n, small_model(n)) for n in range(1, 9)}
    outcomes: dict[int, object] = {}

    def run(number: int) -> None:
        try:
            outcomes[number] = store.commit(tmp_path, number, reports[number], keep=3)
        except WeightError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(outcomes) == 8
    assert isinstance(outcomes[8], WeightVersion)
    assert store.latest(tmp_path).version == 8
    for number in store.versions(tmp_path):
        assert_same(dict(store.read(tmp_path / f"v{number:06d}")), small_model(number))


# The manifest


def edited(version: WeightVersion, edit) -> str:
    tree = json.loads((Path(version.path) / "manifest.json").read_text())
    edit(tree)
    with pytest.raises(WeightError) as caught:
        decode(json.dumps(tree), "m.json")
    assert str(caught.value).startswith("m.json: ")
    return str(caught.value)


def test_a_manifest_survives_encoding(version: WeightVersion) -> None:
    manifest = store.open_version(version.path)
    assert decode(encode(manifest), "x") == manifest


def test_an_unknown_format_or_key_is_refused(version: WeightVersion) -> None:
    assert "format 'zip', this program reads full, delta" in edited(
        version, lambda t: t.update(format="zip")
    )
    assert "base" in edited(version, lambda t: t.update(base=3))
    assert "hash_scheme 'crc32'" in edited(version, lambda t: t.update(hash_scheme="crc32"))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x"])
def test_a_file_outside_the_folder_is_refused(version: WeightVersion, name: str) -> None:
    def edit(tree) -> None:
        (first, *_) = tree["files"]
        tree["files"][name] = tree["files"].pop(first)
        for tensor in tree["tensors"].values():
            for part in tensor["parts"]:
                part["file"] = name if part["file"] == first else part["file"]

    assert "should match pattern" in edited(version, edit)


def test_a_manifest_that_was_altered_does_not_match_its_digest(version: WeightVersion) -> None:
    def swap_hashes(tree) -> None:
        tree["tensors"]["scale"]["hash"] = "0" * 32

    assert "the listed tensor hashes give" in edited(version, swap_hashes)

    def drop(tree) -> None:
        del tree["tensors"]["scale"]

    assert "the listed tensor hashes give" in edited(version, drop)

    def shrink(tree) -> None:
        tree["tensors"]["model.norm.weight"]["parts"].pop()

    assert "'model.norm.weight': hole" in edited(version, shrink)

    def retype(tree) -> None:
        tree["tensors"]["scale"]["dtype"] = "object"

    assert "dtype 'object'" in edited(version, retype)


def test_a_torn_manifest_is_damage(version: WeightVersion) -> None:
    path = Path(version.path) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(WeightError, match=r"manifest.json: not valid JSON.*torn or damaged"):
        store.latest(path.parent.parent)


def test_a_pointer_that_is_no_version_is_damage(version: WeightVersion) -> None:
    (Path(version.path).parent / "latest").write_text("../../etc\n")
    with pytest.raises(
        WeightError, match=r"latest: holds '../../etc', expected a name like v000042"
    ):
        store.latest(Path(version.path).parent)
