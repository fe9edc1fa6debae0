"""Versions stored as adapters: one digest with the full ones, damage by name, the anchor stays."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.tensor_hashing import compute_digest
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from rlhf_cluster.weights.formats.lora_factors import (
    BASE,
    DOWN,
    GAIN,
    TRAINED,
    UP,
    merge,
)
from rlhf_cluster.weights.formats.stochastic_rounding import round_stochastically, stream_key
from rlhf_cluster.weights.manifest import LocalPart, ShardReport, decode, encode
from rlhf_cluster.weights.read_version import Held, open_version
from rlhf_cluster.weights.shards import ShardBase
from tests.support.builders.small_weights import (
    Tensors,
    assert_same,
    small_model,
    split,
    stepped,
    write,
)

RANK, SCALE = 3, 0.75
ADAPTED = {"q_proj.weight": (24, 18), "up_proj.weight": (300, 257)}
"""One smaller than a chunk of the hash, and one of several, whose rows end inside chunks."""


def base_model(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """With tied embeddings: a model's head has no tensor of its own."""
    generator = torch.Generator().manual_seed(3)
    adapted = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in ADAPTED.items()}
    return {**small_model(), **adapted}


def factors(seed: int, dora: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (rows, columns) in ADAPTED.items():
        found[name + DOWN] = torch.randn(RANK, columns, generator=generator)
        found[name + UP] = 0.1 * torch.randn(rows, RANK, generator=generator)
        if dora:
            found[name + GAIN] = 1 + 0.1 * torch.randn(rows, generator=generator)
    return found


def whole(
    base: Tensors, adapters: Tensors, dtype: torch.dtype, streams_of: int | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the model, rounded to nearest or by the streams of a version."""
    found = dict(base)
    for name, shape in ADAPTED.items():
        down, up, gain = (adapters.get(name + kind) for kind in (DOWN, UP, GAIN))
        assert down is not None
        assert up is not None
        merged = merge(base[name].reshape(-1), 0, down, up, SCALE, gain)
        if streams_of is None:
            rounded = merged.to(dtype)
        else:
            rounded = round_stochastically(merged, 0, stream_key(streams_of, name))
        found[name] = rounded.view(shape)
    return found


def parts_of(
    base: Tensors, adapters: Tensors, model: Tensors, ranks: int, streams_of: int | None = None
) -> list[list[LocalPart]]:
    """Every rank's parts, cut anywhere, the parts of one weight at other places than its factors."""
    tensors = {**model, **{name + BASE: base[name] for name in ADAPTED}, **adapters}
    cuts = {
        name: [(t.numel() * k + i) // ranks for k in range(1, ranks)]
        for i, (name, t) in enumerate(tensors.items())
    }

    def marked(part: LocalPart) -> LocalPart:
        if part.name not in ADAPTED:
            return part
        stream = None if streams_of is None else stream_key(streams_of, part.name)
        return replace(part, scale=SCALE, stream=stream)

    return [[marked(part) for part in parts] for parts in split(tensors, cuts, ranks)]


def is_frozen(part: LocalPart) -> bool:
    return part.scale is None and not part.name.endswith(TRAINED)


def write_parts(
    root: Path, version: int, ranks: list[list[LocalPart]], base: int | None
) -> list[ShardReport]:
    on = None if base is None else ShardBase(version=base, parts={})
    return [
        store.write_shard(
            root, version, rank, [p for p in parts if on is None or not is_frozen(p)], base=on
        )
        for rank, parts in enumerate(ranks)
    ]


class Publisher:
    """Publishes adapters with random values over one base; keeps what was published."""

    def __init__(
        self,
        root: Path,
        ranks: int = 1,
        dora: bool = False,
        base: torch.dtype = torch.bfloat16,
        keep: int = 10,
        streams: bool = False,
    ) -> None:
        self._root, self._ranks, self._dora, self._keep = root, ranks, dora, keep
        self._streams = streams
        self.base = base_model(base)
        self.models: dict[int, Tensors] = {}

    def __call__(self, version: int, base: int | None) -> WeightVersion:
        adapters = factors(version, self._dora)
        streams_of = version if self._streams else None
        self.models[version] = whole(self.base, adapters, torch.bfloat16, streams_of)
        ranks = parts_of(self.base, adapters, self.models[version], self._ranks, streams_of)
        reports = write_parts(self._root, version, ranks, base)
        expected = {name: tuple(t.shape) for name, t in self.models[version].items()}
        return store.commit(self._root, version, reports, self._keep, expected)


def the_shard(version: WeightVersion) -> Path:
    (shard,) = Path(version.path).glob("*.safetensors")
    return shard


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def last_byte(path: Path, name: str) -> int:
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return start + json.loads(path.read_bytes()[8:start])[name]["data_offsets"][1] - 1


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_versions_of_adapters_read_back_as_the_merged_weights_and_have_their_digest(
    tmp_path: Path, ranks: int, dora: bool
) -> None:
    publish = Publisher(tmp_path, ranks, dora)
    versions = [publish(0, None), publish(1, 0), publish(2, 0)]
    for version in versions:
        model = publish.models[version.version]
        found = dict(store.read(version.path, expected_digest=version.digest))
        assert_same({name: found[name] for name in model}, model)
        assert version.digest == compute_digest(model.items())
        assert version.num_tensors == len(model) == len(found)
        assert version.num_bytes == sum(t.nbytes for t in model.values())
    manifests = [store.open_version(v.path) for v in versions]
    assert [m.format for m in manifests] == ["adapter"] * 3
    assert [[link.version for link in m.chain] for m in manifests] == [[], [0], [0]]


def test_a_version_on_an_anchor_stores_the_adapters_and_a_header(tmp_path: Path) -> None:
    publish = Publisher(tmp_path)
    anchor, version = publish(0, None), publish(1, 0)
    adapters = sum(t.nbytes for t in factors(1, dora=False).values())
    assert adapters < version.stored_bytes < adapters + 1000
    assert anchor.stored_bytes > anchor.num_bytes > 10 * version.stored_bytes


def test_base_weights_of_a_wider_type_than_the_published_one_lose_nothing(tmp_path: Path) -> None:
    publish = Publisher(tmp_path, 2, base=torch.float32)
    publish(0, None)
    version = publish(1, 0)
    found = dict(store.read(version.path))
    assert found["q_proj.weight"].dtype == torch.bfloat16
    assert_same({name: found[name] for name in publish.models[1]}, publish.models[1])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_any_part_is_merged_to_the_same_bits(dora: bool) -> None:
    """More rows than one block of the sum, and parts that begin and end anywhere in a row."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 150, 1037
    base = torch.randn(rows * columns, generator=generator)
    down = torch.randn(4, columns, generator=generator)
    up = torch.randn(rows, 4, generator=generator)
    gain = torch.rand(rows, generator=generator) if dora else None
    all_of_it = merge(base, 0, down, up, 2.0, gain)
    exact = base.double() + 2.0 * (up.double() @ down.double()).view(-1)
    if gain is not None:
        exact *= gain.double().repeat_interleave(columns)
    torch.testing.assert_close(all_of_it.double(), exact, rtol=1e-5, atol=1e-4)
    for start, stop in [(0, 1), (1036, 1038), (5, 900), (1037, 3111), (700, 140_000), (9, 155_541)]:
        first, last = start // columns, -(-stop // columns)
        own = None if gain is None else gain[first:last]
        part = merge(base[start:stop], start, down, up[first:last], 2.0, own)
        assert torch.equal(part, all_of_it[start:stop]), (start, stop)
    assert merge(base[:0], 40, down, up[:0], 2.0).numel() == 0


def test_a_reader_that_holds_what_never_changes_reads_adapters_only(tmp_path: Path) -> None:
    """Seen by what is gone: the anchor's file."""
    publish = Publisher(tmp_path, dora=True)
    versions = [publish(v, None if v == 0 else 0) for v in range(4)]
    late, early = Held(), Held()
    for held, version in ((late, versions[2]), (early, versions[0])):
        dict(store.read(version.path, held=held))
        assert (held.version, held.digest) == (0, versions[0].digest)
    the_shard(versions[0]).unlink()
    for held in (late, early):
        for version in versions[1:]:
            found = dict(store.read(version.path, held=held))
            model = publish.models[version.version]
            assert_same({name: found[name] for name in model}, model)
    with pytest.raises(WeightError, match="builds on version 0, which cannot be read"):
        dict(store.read(versions[1].path))


def test_a_damaged_copy_in_memory_is_never_handed_out(tmp_path: Path) -> None:
    publish = Publisher(tmp_path)
    versions = [publish(0, None), publish(1, 0)]
    held = Held()
    dict(store.read(versions[0].path, held=held))
    held.tensors["q_proj.weight" + BASE][0, 0] += 1
    with pytest.raises(WeightError, match=r"q_proj.*the copy of version 0 in memory was damaged"):
        dict(store.read(versions[1].path, held=held))
    assert held == Held()
    assert len(dict(store.read(versions[1].path, held=held))) == len(publish.models[1])


@pytest.mark.parametrize("kind", [DOWN, UP, GAIN, BASE])
def test_damage_names_the_tensor_and_the_file_that_holds_it(tmp_path: Path, kind: str) -> None:
    publish = Publisher(tmp_path, dora=True)
    versions = [publish(0, None), publish(1, 0)]
    damaged = the_shard(versions[0 if kind == BASE else 1])
    flip(damaged, last_byte(damaged, "up_proj.weight" + kind))
    seen = []
    with pytest.raises(WeightError) as error:
        seen += [name for name, _ in store.read(versions[1].path)]
    assert f"'up_proj.weight{kind}'" in str(error.value)
    assert str(damaged) in str(error.value)
    assert "up_proj.weight" not in seen


def test_a_learner_that_merges_otherwise_is_found_by_the_reader(tmp_path: Path) -> None:
    """One bit of one element: as a matrix product on another device could differ."""
    base, adapters = base_model(), factors(0, dora=False)
    model = whole(base, adapters, torch.bfloat16)
    model["q_proj.weight"].view(torch.int16)[3, 5] ^= 1
    reports = write_parts(tmp_path, 0, parts_of(base, adapters, model, 1), None)
    version = store.commit(tmp_path, 0, reports, keep=2)
    with pytest.raises(WeightError, match=r"q_proj.*merges adapters otherwise than the learner"):
        dict(store.read(version.path))


def test_retention_keeps_the_anchor_while_a_version_builds_on_it(tmp_path: Path) -> None:
    publish = Publisher(tmp_path, keep=2)
    for version in range(5):
        publish(version, None if version == 0 else 0)
    assert store.versions(tmp_path) == [0, 3, 4]
    for version in range(5, 8):
        publish(version, None if version == 5 else 5)
    assert store.versions(tmp_path) == [5, 6, 7]


def test_an_export_holds_the_merged_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    publish = Publisher(tmp_path / "weights")
    publish(0, None)
    version = publish(1, 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = load_file(
        export_hf(version, tmp_path / "model", tmp_path / "out") / "model.safetensors"
    )
    assert_same({name: found[name] for name in publish.models[1]}, publish.models[1])
    assert len(found) == len(publish.models[1])


def _commit_on(root: Path, base: int, change: str) -> None:
    adapters = factors(1, dora=False)
    model = whole(base_model(), adapters, torch.bfloat16)
    parts = parts_of(base_model(), adapters, model, 1)[0]
    if change == "no B":
        parts = [p for p in parts if p.name != "q_proj.weight" + UP]
    elif change == "DoRA":
        gain = torch.ones(24)
        parts.append(LocalPart(name="q_proj.weight" + GAIN, shape=(24,), offset=0, tensor=gain))
    elif change == "not merged":
        parts = [replace(p, scale=None) if p.name == "q_proj.weight" else p for p in parts]
    store.commit(root, 9, write_parts(root, 9, [parts], base), keep=9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("gone", "version 9 builds on version 7, which cannot be read"),
        ("no B", "version 0, which has other tensors: q_proj.weight#lora_B"),
        ("DoRA", "version 0, which has other tensors: q_proj.weight#gain"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, change: str, words: str
) -> None:
    Publisher(tmp_path)(0, None)
    with pytest.raises(WeightError, match=words):
        _commit_on(tmp_path, 7 if change == "gone" else 0, change)
    assert store.versions(tmp_path) == [0]


def test_formats_do_not_build_on_each_other(tmp_path: Path) -> None:
    tensors = small_model()
    write_full = write(tmp_path / "full", 0, tensors)
    store.commit(tmp_path / "full", 0, write_full, keep=2)
    with pytest.raises(
        WeightError, match="format 'adapter' cannot build on version 0 of format 'full'"
    ):
        _commit_on(tmp_path / "full", 0, "")
    Publisher(tmp_path / "own")(0, None)
    reports = write(tmp_path / "own", 1, stepped(tensors, 1), base=(0, tensors))
    with pytest.raises(
        WeightError, match="format 'delta' cannot build on version 0 of format 'adap"
    ):
        store.commit(tmp_path / "own", 1, reports, keep=2)


def test_an_anchor_without_all_factors_of_a_weight_is_refused(tmp_path: Path) -> None:
    adapters: Mapping[str, torch.Tensor] = factors(0, dora=False)
    base = base_model()
    ranks = parts_of(base, adapters, whole(base, adapters, torch.bfloat16), 1)
    for missing in (BASE, DOWN, UP):
        parts = [p for p in ranks[0] if p.name != "up_proj.weight" + missing]
        reports = write_parts(tmp_path, 0, [parts], None)
        with pytest.raises(WeightError, match=f"up_proj.weight{missing} is missing"):
            store.commit(tmp_path, 0, reports, keep=2)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_l03_readers_round_what_they_merge_by_the_streams_that_the_manifest_names(
    tmp_path: Path, ranks: int, dora: bool
) -> None:
    publish = Publisher(tmp_path, ranks, dora, streams=True)
    held = Held()
    for version in (publish(0, None), publish(1, 0), publish(2, 0)):
        model = publish.models[version.version]
        assert_same(
            dict(store.read(version.path, expected_digest=version.digest, held=held)), model
        )
        assert version.digest == compute_digest(model.items())
        manifest = open_version(version.path)
        streams = {n: e.stream for n, e in manifest.tensors.items() if e.stream is not None}
        assert streams == {n: stream_key(version.version, n) for n in ADAPTED}
        assert decode(encode(manifest), "again") == manifest
    nearest = whole(publish.base, factors(2, dora), torch.bfloat16)
    assert not torch.equal(nearest["up_proj.weight"], publish.models[2]["up_proj.weight"])


def test_l03_ranks_that_name_different_streams_are_refused(tmp_path: Path) -> None:
    base, adapters = base_model(), factors(0, False)
    model = whole(base, adapters, torch.bfloat16, 0)
    ranks = parts_of(base, adapters, model, 2, 0)
    ranks[1] = [replace(p, stream=7) if p.name in ADAPTED else p for p in ranks[1]]
    reports = write_parts(tmp_path, 0, ranks, None)
    with pytest.raises(WeightError, match="stream 7.*all ranks must agree"):
        store.commit(tmp_path, 0, reports, 9, {n: tuple(t.shape) for n, t in model.items()})


@pytest.mark.parametrize("change", [{"stream": -1}, {"stream": 1 << 63}, {"dtype": "float32"}])
def test_l03_a_manifest_with_a_stream_that_cannot_be_is_refused(
    tmp_path: Path, change: Mapping[str, object]
) -> None:
    version = Publisher(tmp_path, streams=True)(0, None)
    tree = json.loads(encode(open_version(version.path)))
    tree["tensors"]["q_proj.weight"] |= change
    with pytest.raises(WeightError, match="stream"):
        decode(json.dumps(tree), "here")
