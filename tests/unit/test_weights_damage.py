"""Torn, truncated, flipped, missing: every damage is found before a tensor is handed out."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from weight_cases import assert_same, publish, small_model, write

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import decode, encode


@pytest.fixture
def version(tmp_path: Path) -> WeightVersion:
    return publish(tmp_path, 1, small_model())


def shards(version: WeightVersion) -> list[Path]:
    return sorted(Path(version.path).glob("*.safetensors"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_names_tensor_and_file_and_is_never_yielded(version: WeightVersion) -> None:
    damaged = shards(version)[1]
    flip(damaged, damaged.stat().st_size - 1)
    seen = []
    with pytest.raises(WeightError) as caught:
        seen.extend(name for name, _ in store.read(version.path))
    assert str(damaged) in str(caught.value)
    named = next(name for name in small_model() if repr(name) in str(caught.value))
    assert named not in seen


def test_every_flipped_byte_of_a_small_version_is_found(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(3)}
    version = publish(tmp_path, 1, tensors, num_ranks=1)
    (shard,) = shards(version)
    for position in range(shard.stat().st_size):
        flip(shard, position)
        with pytest.raises(WeightError):
            dict(store.read(version.path))
        flip(shard, position)
    assert_same(dict(store.read(version.path)), tensors)


def test_without_verifying_damage_in_the_data_passes(version: WeightVersion) -> None:
    """So the hash is what finds it, and nothing else by chance."""
    flip(shards(version)[0], shards(version)[0].stat().st_size - 1)
    assert len(dict(store.read(version.path, verify=False))) == 3


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_file_is_torn(version: WeightVersion, lost: int) -> None:
    damaged = shards(version)[0]
    size = damaged.stat().st_size
    os.truncate(damaged, size - lost)
    with pytest.raises(WeightError, match=f"{damaged}: {size - lost} bytes, expected {size}.*torn"):
        dict(store.read(version.path))


def test_a_missing_shard_is_named(version: WeightVersion) -> None:
    shards(version)[1].unlink()
    with pytest.raises(WeightError, match=f"{shards(version)[0].parent}/shard-00001.*is missing"):
        dict(store.read(version.path))


def test_two_files_that_swapped_their_names_are_found(version: WeightVersion) -> None:
    first, second = shards(version)
    first_bytes = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_bytes)
    with pytest.raises(WeightError, match="shard-00000"):
        dict(store.read(version.path))


def test_a_shard_damaged_before_the_commit_is_refused_where_a_chunk_spans_ranks(
    tmp_path: Path,
) -> None:
    reports = write(tmp_path, 1, small_model())
    damaged = tmp_path / "v000001.partial" / reports[1].file
    # The second rank's matrix share begins inside a chunk; its first bytes are hashed at commit.
    header = int.from_bytes(damaged.read_bytes()[:8], "little")
    index = json.loads(damaged.read_bytes()[8 : 8 + header])
    flip(damaged, 8 + header + index["model.embed_tokens.weight"]["data_offsets"][0])
    with pytest.raises(WeightError, match=f"embed_tokens.*{damaged.name}.*damaged"):
        store.commit(tmp_path, 1, reports, keep=1)
    assert store.latest(tmp_path) is None


def test_a_shard_torn_or_lost_before_the_commit_is_refused(tmp_path: Path) -> None:
    reports = write(tmp_path, 1, small_model())
    shard = tmp_path / "v000001.partial" / reports[0].file
    os.truncate(shard, reports[0].num_bytes - 5)
    with pytest.raises(WeightError, match="torn"):
        store.commit(tmp_path, 1, reports, keep=1)
    shard.unlink()
    with pytest.raises(WeightError, match=f"{reports[0].file}: the shard file is missing"):
        store.commit(tmp_path, 1, reports, keep=1)
    assert store.latest(tmp_path) is None


def test_another_version_than_the_announced_one_is_refused(version: WeightVersion) -> None:
    with pytest.raises(WeightError, match=f"digest {version.digest}, expected 00.*announced"):
        store.read(version.path, expected_digest="0" * 32)


def test_a_version_in_the_wrong_folder_is_refused(version: WeightVersion) -> None:
    folder = Path(version.path)
    moved = folder.rename(folder.with_name("v000007"))
    with pytest.raises(WeightError, match="describes version 1, found in v000007"):
        store.open_version(moved)


# Retention under a reader


def test_a_reader_that_started_before_a_delete_gets_everything(tmp_path: Path) -> None:
    version = publish(tmp_path, 1, small_model())
    reader = store.read(version.path)
    first = next(reader)
    publish(tmp_path, 2, small_model(2), keep=1)
    assert not Path(version.path).exists()
    assert_same(dict([first, *reader]), small_model())


def test_a_reader_that_comes_too_late_is_told_to_pull_the_latest(tmp_path: Path) -> None:
    version = publish(tmp_path, 1, small_model())
    reader = store.read(version.path)
    publish(tmp_path, 2, small_model(2), keep=1)
    with pytest.raises(WeightError, match=r"v000001: there is no such version.*pull the latest"):
        next(reader)
    with pytest.raises(WeightError, match=r"v000001: there is no such version"):
        store.read(version.path)


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
    assert "format 'delta', this program reads full" in edited(
        version, lambda t: t.update(format="delta")
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
