"""Versions stored as differences: one digest with the full ones, bounded chains, damage by name."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.tensor_hashing import (
    CHUNK_BYTES,
    compute_digest,
)
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from rlhf_cluster.weights.manifest import MAX_CHAIN
from rlhf_cluster.weights.read_version import Held
from rlhf_cluster.weights.shards import ShardBase
from tests.support.builders.small_weights import (
    assert_same,
    publish,
    small_model,
    split,
    stepped,
    write,
)

NAME = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def publish_chain(
    root: Path, length: int, num_ranks: int = 2, keep: int = 10
) -> tuple[list[WeightVersion], list[Tensors]]:
    """Version 0 in full and `length - 1` differences, each from the one before; with its tensors."""
    tensors = [small_model()]
    versions = [publish(root, 0, tensors[0], num_ranks, keep)]
    for number in range(1, length):
        tensors.append(stepped(tensors[-1], seed=number))
        base = (number - 1, tensors[-2])
        versions.append(publish(root, number, tensors[-1], num_ranks, keep, base))
    return versions, tensors


def shards(version: WeightVersion) -> list[Path]:
    return sorted(Path(version.path).glob("*.safetensors"))


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def position_of(path: Path, name: str) -> tuple[int, int]:
    start = data_start(path)
    a, b = json.loads(path.read_bytes()[8:start])[name]["data_offsets"]
    return start + a, start + b


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def held_of(version: WeightVersion, tensors: Tensors) -> Held:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return Held(version=version.version, digest=version.digest, tensors=copies)


def test_a_chain_reads_back_exactly_and_has_the_digests_of_full_versions(tmp_path: Path) -> None:
    versions, tensors = publish_chain(tmp_path, 4)
    for version, expected in zip(versions, tensors, strict=True):
        assert_same(dict(store.read(version.path, expected_digest=version.digest)), expected)
        assert version.digest == compute_digest(expected.items())
    assert [len(store.open_version(v.path).chain) for v in versions] == [0, 1, 2, 3]
    assert len({v.digest for v in versions}) == 4


def test_a_difference_is_a_fraction_of_the_full_version(tmp_path: Path) -> None:
    """One rank, 2 % of the elements changed, about 1.5 bytes each, and a header."""
    versions, _ = publish_chain(tmp_path, 2, num_ranks=1)
    assert versions[0].stored_bytes > versions[0].num_bytes == versions[1].num_bytes
    assert versions[1].stored_bytes < 0.05 * versions[1].num_bytes


def test_equal_weights_store_nothing_but_what_the_commit_needs(tmp_path: Path) -> None:
    tensors = small_model()
    publish(tmp_path, 0, tensors, num_ranks=1)
    version = publish(tmp_path, 1, tensors, num_ranks=1, base=(0, tensors))
    (shard,) = shards(version)
    assert shard.stat().st_size == data_start(shard)
    assert_same(dict(store.read(version.path)), tensors)


@settings(max_examples=40)
@given(data=st.data())
def test_any_split_of_a_difference_has_one_digest(data: st.DataObject, tmp_path_factory) -> None:
    """Borders anywhere, and the base cut at other borders than the version."""
    numel = data.draw(st.sampled_from([1, 7, CHUNK_BYTES // 2 + 3, 3 * CHUNK_BYTES // 2]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    was = {"w": torch.randn(numel, generator=generator).to(torch.bfloat16)}
    now = stepped(was, seed=data.draw(st.integers(0, 99)), share=data.draw(st.floats(0, 0.3)))
    num_ranks = data.draw(st.integers(1, 4))
    border = st.lists(st.integers(0, numel), min_size=num_ranks - 1, max_size=num_ranks - 1)
    cuts = {"w": data.draw(border)}
    base_cuts = cuts if data.draw(st.booleans()) else {"w": data.draw(border)}
    root = tmp_path_factory.mktemp("store")
    ranks = split(was, base_cuts, num_ranks)
    reports = [store.write_shard(root, 0, rank, parts) for rank, parts in enumerate(ranks)]
    store.commit(root, 0, reports, keep=2)
    bases = [ShardBase(version=0, parts={p.name: p for p in parts}) for parts in ranks]
    reports = [
        store.write_shard(root, 1, rank, parts, base=bases[rank])
        for rank, parts in enumerate(split(now, cuts, num_ranks))
    ]
    version = store.commit(root, 1, reports, keep=2)
    assert version.digest == compute_digest(now.items())
    assert_same(dict(store.read(version.path)), now)


def test_publishing_again_as_a_difference_is_the_same_version(tmp_path: Path) -> None:
    versions, tensors = publish_chain(tmp_path, 2)
    assert publish(tmp_path, 1, tensors[1]).digest == versions[1].digest
    assert_same(dict(store.read(versions[1].path)), tensors[1])


def test_an_export_of_a_difference_holds_its_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    versions, tensors = publish_chain(tmp_path / "weights", 3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    folder = export_hf(versions[2], tmp_path / "model", tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert_same({name: found[name] for name in tensors[2]}, tensors[2])


# Workers that hold a version


@pytest.mark.parametrize("known", [0, 1, 3])
def test_a_reader_that_holds_a_version_of_the_chain_goes_on_from_it(
    tmp_path: Path, known: int
) -> None:
    """Seen by what it does not read: the files up to the one it holds may be gone."""
    versions, tensors = publish_chain(tmp_path, 4)
    held = held_of(versions[known], tensors[known])
    memory = {name: tensor.data_ptr() for name, tensor in held.tensors.items()}
    for version in versions[: known + 1]:
        for shard in shards(version):
            shard.unlink()
    found = dict(store.read(versions[3].path, held=held))
    assert_same(found, tensors[3])
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == memory
    assert held.version == 3
    assert_same(held.tensors, tensors[3])


@pytest.mark.parametrize("why", ["another digest", "a later version", "a version before the chain"])
def test_a_version_in_memory_that_is_not_of_the_chain_is_not_used(tmp_path: Path, why: str) -> None:
    versions, tensors = publish_chain(tmp_path, 3)
    held = held_of(versions[1], tensors[1])
    if why == "another digest":
        held.digest = versions[2].digest
    else:
        held.version = 9 if why == "a later version" else 0
    before = held.tensors
    assert_same(dict(store.read(versions[2].path, held=held)), tensors[2])
    assert_same(before, tensors[1])
    assert (held.version, held.digest) == (2, versions[2].digest)


def test_a_damaged_copy_in_memory_is_never_handed_out_and_the_files_are_not_blamed(
    tmp_path: Path,
) -> None:
    versions, tensors = publish_chain(tmp_path, 3)
    held = held_of(versions[1], tensors[1])
    held.tensors[NAME][0, 0] += 1
    with pytest.raises(WeightError, match=r"files are whole: the copy of version 1 in memory"):
        dict(store.read(versions[2].path, held=held))
    assert held == Held()
    assert_same(dict(store.read(versions[2].path)), tensors[2])


# Retention


def test_retention_keeps_what_a_kept_version_builds_on_and_nothing_more(tmp_path: Path) -> None:
    _, tensors = publish_chain(tmp_path, 4, keep=2)
    assert store.versions(tmp_path) == [0, 1, 2, 3]
    publish(tmp_path, 4, small_model(4), keep=2)
    assert store.versions(tmp_path) == [0, 1, 2, 3, 4]
    publish(tmp_path, 5, small_model(5), keep=2)
    assert store.versions(tmp_path) == [4, 5]
    assert len(tensors) == 4


def test_a_pinned_difference_keeps_its_chain(tmp_path: Path) -> None:
    _, tensors = publish_chain(tmp_path, 3)
    store.pin(tmp_path, 2)
    for number in (3, 4):
        publish(tmp_path, number, small_model(number), keep=1)
    assert store.versions(tmp_path) == [0, 1, 2, 4]
    assert_same(dict(store.read(tmp_path / "v000002")), tensors[2])
    store.unpin(tmp_path, 2)
    publish(tmp_path, 5, small_model(5), keep=1)
    assert store.versions(tmp_path) == [5]


def test_a_damaged_manifest_in_the_window_removes_nothing_until_it_leaves(tmp_path: Path) -> None:
    versions, _ = publish_chain(tmp_path, 3, keep=2)
    (Path(versions[2].path) / "manifest.json").write_text("{")
    publish(tmp_path, 3, small_model(3), keep=2)
    assert store.versions(tmp_path) == [0, 1, 2, 3]
    publish(tmp_path, 4, small_model(4), keep=2)
    assert store.versions(tmp_path) == [3, 4]


def test_a_reader_of_a_chain_that_is_being_deleted_gets_everything(tmp_path: Path) -> None:
    versions, tensors = publish_chain(tmp_path, 3)
    reader = store.read(versions[2].path)
    first = next(reader)
    publish(tmp_path, 3, small_model(3), keep=1)
    assert store.versions(tmp_path) == [3]
    assert_same(dict([first, *reader]), tensors[2])


# Bases that do not fit


def test_a_base_that_is_gone_is_refused_before_anything_changes(tmp_path: Path) -> None:
    tensors = small_model()
    publish(tmp_path, 5, tensors)
    reports = write(tmp_path, 6, stepped(tensors, 1), base=(4, tensors))
    with pytest.raises(
        WeightError, match=r"version 6 builds on version 4.*Publish it as a full snapshot"
    ):
        store.commit(tmp_path, 6, reports, keep=3)
    assert store.latest(tmp_path).version == 5
    assert publish(tmp_path, 6, stepped(tensors, 1)).version == 6


def test_ranks_with_different_bases_are_refused(tmp_path: Path) -> None:
    _, tensors = publish_chain(tmp_path, 2)
    newest = stepped(tensors[1], 2)
    mixed = [
        write(tmp_path, 2, newest, base=(1, tensors[1]))[0],
        write(tmp_path, 2, newest, base=(0, tensors[0]))[1],
    ]
    with pytest.raises(WeightError, match=r"version 2: its ranks build on different versions"):
        store.commit(tmp_path, 2, mixed, keep=3)


def test_a_base_with_other_tensors_is_refused_by_name(tmp_path: Path) -> None:
    tensors = small_model()
    publish(tmp_path, 0, tensors)
    more = {**tensors, "bias": torch.ones(2)}
    with pytest.raises(WeightError, match=r"version 0, which has other tensors: bias"):
        publish(tmp_path, 1, more, base=(0, tensors))


def test_a_chain_has_an_end(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(400)}
    publish(tmp_path, 0, tensors, num_ranks=1)
    for number in range(1, MAX_CHAIN + 1):
        publish(tmp_path, number, tensors, 1, base=(number - 1, tensors))
    assert len(store.open_version(tmp_path / f"v{MAX_CHAIN:06d}").chain) == MAX_CHAIN
    with pytest.raises(WeightError, match=rf"a chain of {MAX_CHAIN + 1} versions, at most"):
        publish(tmp_path, MAX_CHAIN + 1, tensors, 1, base=(MAX_CHAIN, tensors))
    assert_same(dict(store.read(tmp_path / f"v{MAX_CHAIN:06d}")), tensors)


# Damage


def test_a_chain_without_one_of_its_versions_names_it(tmp_path: Path) -> None:
    versions, tensors = publish_chain(tmp_path, 3)
    Path(versions[1].path).rename(tmp_path / "elsewhere")
    with pytest.raises(
        WeightError, match=r"v000002: builds on version 1, which cannot be read.*v000001"
    ):
        dict(store.read(versions[2].path))
    assert_same(dict(store.read(versions[0].path)), tensors[0])


def test_a_base_that_was_exchanged_is_found_by_its_digest(tmp_path: Path) -> None:
    versions, tensors = publish_chain(tmp_path, 2)
    other = publish(tmp_path / "other", 0, small_model(99))
    Path(versions[0].path).rename(tmp_path / "elsewhere")
    Path(other.path).rename(versions[0].path)
    with pytest.raises(WeightError, match=f"version 0 with digest {versions[0].digest}.*has"):
        dict(store.read(versions[1].path))
    assert len(tensors) == 2


# The manifest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "full"}, "format 'full' with a chain of 2 versions"),
        ({"chain": []}, "format 'delta' with a chain of 0 versions"),
        ({"chain": [1, 0]}, "expected rising numbers"),
        ({"chain": [0, 2]}, "expected rising numbers"),
        ({"chain": range(-70, 0)}, "chain"),
        ({"format": "full", "chain": []}, "has a difference, and the version no base"),
    ],
)
def test_a_manifest_whose_chain_cannot_be_is_refused(tmp_path: Path, change, says: str) -> None:
    versions, _ = publish_chain(tmp_path, 3)
    path = Path(versions[2].path) / "manifest.json"
    tree = json.loads(path.read_text())
    if "chain" in change:
        links = [{"version": n, "digest": "0" * 32} for n in change["chain"]]
        change = {**change, "chain": links}
    path.write_text(json.dumps({**tree, **change}))
    with pytest.raises(WeightError, match=says):
        store.open_version(versions[2].path)


# Space


def test_a_full_disk_leaves_the_last_good_version_and_the_next_publish_works(
    tmp_path: Path,
) -> None:
    versions, tensors = publish_chain(tmp_path, 2)
    newest = stepped(tensors[1], 2)
    (parts,) = split(newest, dict.fromkeys(newest, ()), 1)
    with pytest.raises(WeightError, match=r"needs \d+ bytes and 100 are free.*weights\.root"):
        store.write_shard(tmp_path, 2, 0, parts, free_bytes=lambda _: 100)
    assert store.latest(tmp_path) == versions[1]
    assert_same(dict(store.read(versions[1].path)), tensors[1])
    assert list(tmp_path.glob("v000002.partial/*")) == []
    assert publish(tmp_path, 2, newest).version == 2


def test_a_difference_asks_only_for_the_space_that_it_takes(tmp_path: Path) -> None:
    tensors = small_model()
    publish(tmp_path, 0, tensors, num_ranks=1)
    (parts,) = split(stepped(tensors, 1), dict.fromkeys(tensors, ()), 1)
    (was,) = split(tensors, dict.fromkeys(tensors, ()), 1)
    base = ShardBase(version=0, parts={part.name: part for part in was})
    free = sum(t.numel() * t.element_size() for t in tensors.values()) // 4
    with pytest.raises(WeightError, match="are free"):
        store.write_shard(tmp_path, 1, 0, parts, free_bytes=lambda _: free)
    assert store.write_shard(tmp_path, 1, 0, parts, base=base, free_bytes=lambda _: free).base == 0


def test_differences_from_two_bases_never_share_a_file_name(tmp_path: Path) -> None:
    """Same version, same tensors, payloads of equal length: only the base tells them apart."""
    now = {"w": torch.zeros(400)}
    names = set()
    for number in (0, 1):
        was = {"w": torch.zeros(400)}
        was["w"][100 + number] = 1
        publish(tmp_path, number, was, num_ranks=1)
        (report,) = write(tmp_path, 2, now, num_ranks=1, base=(number, was))
        names.add((report.file, report.num_bytes))
    assert len({file for file, _ in names}) == 2
    assert len({size for _, size in names}) == 1
