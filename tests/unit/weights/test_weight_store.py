"""Publishing, reading, naming, retention."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.util.tensor_hashing import (
    CHUNK_BYTES,
    compute_digest,
)
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import LocalPart
from tests.support.builders.small_weights import (
    assert_same,
    publish,
    small_model,
    split,
    write,
)


def rank_part(tensor: torch.Tensor, name: str = "w", offset: int = 0, shape=None) -> LocalPart:
    return LocalPart(name=name, shape=shape or (tensor.numel(),), offset=offset, tensor=tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8])
def test_what_was_published_is_what_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = small_model(dtype=dtype)
    version = publish(tmp_path, 3, tensors)
    assert store.latest(tmp_path) == version
    found = dict(store.read(version.path, expected_digest=version.digest))
    assert list(found) == list(tensors)
    for name in tensors:
        assert found[name].shape == tensors[name].shape
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8)
        )
    assert version.num_tensors == 3
    assert version.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_an_empty_store_has_no_latest_version(tmp_path: Path) -> None:
    assert store.latest(tmp_path / "nothing") is None
    assert store.versions(tmp_path / "nothing") == []


def test_the_digest_does_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    tensors = small_model()
    digests = {publish(tmp_path, n, tensors, num_ranks=n).digest for n in (1, 2, 3, 7)}
    assert digests == {compute_digest(tensors.items())}


@settings(max_examples=60)
@given(data=st.data())
def test_any_split_reassembles_with_one_digest(data: st.DataObject, tmp_path_factory) -> None:
    """Over shapes, types, ranks and borders, empty shares and chunk-spanning borders included."""
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    tensors = {}
    for index in range(data.draw(st.integers(1, 3))):
        shape = (*data.draw(shapes), data.draw(st.sampled_from([1, 3, CHUNK_BYTES // 2 + 1])))
        dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        tensors[f"t{index}"] = torch.randn(shape, generator=generator).to(dtype)
    num_ranks = data.draw(st.integers(1, 4))
    cuts = {
        name: data.draw(
            st.lists(st.integers(0, t.numel()), min_size=num_ranks - 1, max_size=num_ranks - 1)
        )
        for name, t in tensors.items()
    }
    root = tmp_path_factory.mktemp("store")
    reports = [
        store.write_shard(root, 0, rank, parts)
        for rank, parts in enumerate(split(tensors, cuts, num_ranks))
    ]
    version = store.commit(root, 0, reports, keep=1)
    assert version.digest == compute_digest(tensors.items())
    assert_same(dict(store.read(version.path)), tensors)


def test_s24_changed_weights_have_another_digest(tmp_path: Path) -> None:
    tensors = small_model()
    before = publish(tmp_path, 0, tensors)
    with torch.no_grad():
        tensors["scale"] += 1
    after = publish(tmp_path, 1, tensors)
    assert before.digest != after.digest == compute_digest(tensors.items())


def test_renaming_retyping_and_reshaping_change_the_digest() -> None:
    zeros = torch.zeros(4, 2, dtype=torch.bfloat16)
    variants = [
        ("a", zeros),
        ("b", zeros),
        ("a", zeros.reshape(2, 4)),
        ("a", zeros.to(torch.float16)),
    ]
    assert len({compute_digest([variant]) for variant in variants}) == 4


def test_a_report_survives_pickling_and_is_small(tmp_path: Path) -> None:
    tensor = torch.zeros(1_000_000)
    report = store.write_shard(tmp_path, 0, 0, [rank_part(tensor)])
    assert pickle.loads(pickle.dumps(report)) == report
    assert len(pickle.dumps(report)) < tensor.numel() * 4 / 2000


# Names and coverage


def expected_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def refused(root: Path, tensors: dict[str, torch.Tensor], expected) -> str:
    with pytest.raises(WeightError) as caught:
        store.commit(root, 0, write(root, 0, tensors), keep=1, expected_names=expected)
    assert store.latest(root) is None
    return str(caught.value)


def test_s25_missing_extra_renamed_and_reshaped_tensors_are_listed(tmp_path: Path) -> None:
    tensors = small_model()
    expected = expected_of(tensors)
    dropped = {name: t for name, t in tensors.items() if name != "scale"}
    assert "missing: scale" in refused(tmp_path, dropped, expected)
    assert "not expected: bias" in refused(tmp_path, {**tensors, "bias": torch.ones(2)}, expected)
    message = refused(tmp_path, {**dropped, "scales": tensors["scale"]}, expected)
    assert "missing: scale" in message
    assert "not expected: scales" in message
    reshaped = {**tensors, "model.norm.weight": torch.ones(5)}
    assert "model.norm.weight has shape [5], expected [257]" in refused(
        tmp_path, reshaped, expected
    )


def test_s25_a_tied_head_is_stored_once_and_accepted(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=1, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    assert "lm_head.weight" not in parameters
    reports = write(tmp_path, 0, parameters)
    version = store.commit(tmp_path, 0, reports, 1, expected_names=expected_of(parameters))
    assert version.num_tensors == len(parameters)
    both = {**parameters, "lm_head.weight": model.lm_head.weight.detach()}
    with pytest.raises(WeightError, match="share memory; store tied weights once"):
        write(tmp_path, 1, both, num_ranks=1)
    both["lm_head.weight"] = both["lm_head.weight"].clone()
    reports = write(tmp_path, 1, both)
    with pytest.raises(WeightError, match=r"not expected: lm_head\.weight"):
        store.commit(tmp_path, 1, reports, 1, expected_names=expected_of(parameters))


def test_a_hole_names_tensor_and_elements(tmp_path: Path) -> None:
    first = store.write_shard(tmp_path, 0, 0, [rank_part(torch.ones(4), shape=(10,))])
    last = store.write_shard(tmp_path, 0, 1, [rank_part(torch.ones(4), offset=6, shape=(10,))])
    with pytest.raises(WeightError, match=r"'w': hole, elements \[4, 6\) of 10"):
        store.commit(tmp_path, 0, [first, last], keep=1)
    with pytest.raises(WeightError, match=r"'w': hole, elements \[4, 10\) of 10"):
        store.commit(tmp_path, 0, [first], keep=1)
    assert store.latest(tmp_path) is None


def test_an_overlap_names_tensor_and_file(tmp_path: Path) -> None:
    first = store.write_shard(tmp_path, 0, 0, [rank_part(torch.ones(6), shape=(10,))])
    last = store.write_shard(tmp_path, 0, 1, [rank_part(torch.ones(6), offset=4, shape=(10,))])
    with pytest.raises(WeightError, match=f"'w': overlap, {last.file} starts at element 4"):
        store.commit(tmp_path, 0, [first, last], keep=1)


def test_more_elements_than_the_shape_has_are_refused(tmp_path: Path) -> None:
    report = store.write_shard(tmp_path, 0, 0, [rank_part(torch.ones(12), shape=(10,))])
    with pytest.raises(WeightError, match=r"hold 12 elements, shape \[10\] has only 10"):
        store.commit(tmp_path, 0, [report], keep=1)


def test_ranks_that_disagree_on_shape_or_type_are_refused(tmp_path: Path) -> None:
    first = store.write_shard(tmp_path, 0, 0, [rank_part(torch.ones(5), shape=(10,))])
    other = torch.ones(5, dtype=torch.bfloat16)
    last = store.write_shard(tmp_path, 0, 1, [rank_part(other, offset=5, shape=(10,))])
    with pytest.raises(WeightError, match=r"bfloat16\[10\].*float32\[10\].*; all ranks must agree"):
        store.commit(tmp_path, 0, [first, last], keep=1)


def test_reports_of_another_version_and_double_reports_are_refused(tmp_path: Path) -> None:
    report = store.write_shard(tmp_path, 4, 0, [rank_part(torch.ones(5))])
    with pytest.raises(WeightError, match="version 5: rank 0 reports a shard of version 4"):
        store.commit(tmp_path, 5, [report], keep=1)
    with pytest.raises(WeightError, match="rank 0 reports two shards"):
        store.commit(tmp_path, 4, [report, report], keep=1)
    with pytest.raises(WeightError, match="holds no tensors"):
        store.commit(tmp_path, 4, [], keep=1)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(2, 3), "must be flat"),
        (torch.ones(8)[::2], "must be flat, contiguous"),
        (torch.ones(3, dtype=torch.complex64), "dtype torch.complex64 cannot be stored"),
    ],
)
def test_a_part_that_cannot_be_stored_is_refused(tmp_path: Path, tensor, says: str) -> None:
    with pytest.raises(WeightError, match=f"rank 1, tensor 'w': .*{says}"):
        store.write_shard(tmp_path, 0, 1, [rank_part(tensor)])


def test_a_rank_may_not_give_two_ranges_of_one_tensor(tmp_path: Path) -> None:
    part = rank_part(torch.ones(2))
    with pytest.raises(WeightError, match="'w': given twice"):
        store.write_shard(tmp_path, 0, 0, [part, part])


# Space, numbering, retention


def test_too_little_space_says_how_much_is_needed_and_free(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"needs 4\d{3} bytes and 1000 are free.*weights.root"):
        store.write_shard(tmp_path, 0, 0, [rank_part(torch.ones(1000))], free_bytes=lambda _: 1000)
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_an_unwritable_store_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightError, match=r"version 0: cannot write shard-00000.* in .*file"):
        store.write_shard(tmp_path / "file", 0, 0, [rank_part(torch.ones(10))])


def test_an_older_version_never_becomes_the_latest(tmp_path: Path) -> None:
    publish(tmp_path, 5, small_model())
    with pytest.raises(WeightError, match="version 4 is older than the latest, 5"):
        publish(tmp_path, 4, small_model(1))
    assert store.versions(tmp_path) == [5]


def test_publishing_a_version_again_needs_equal_weights(tmp_path: Path) -> None:
    first = publish(tmp_path, 5, small_model(), num_ranks=2)
    again = publish(tmp_path, 5, small_model(), num_ranks=3)
    assert again.digest == first.digest
    with pytest.raises(WeightError, match="version 5 is already published with digest"):
        publish(tmp_path, 5, small_model(1))
    assert_same(dict(store.read(first.path)), small_model())


def test_a_manifest_that_was_damaged_is_replaced_and_the_pin_stays(tmp_path: Path) -> None:
    publish(tmp_path, 4, small_model(4))
    first = publish(tmp_path, 5, small_model())
    store.pin(tmp_path, 5)
    (tmp_path / "v000005" / "manifest.json").write_text("{")
    assert publish(tmp_path, 5, small_model()) == first
    assert store.latest(tmp_path) == first
    publish(tmp_path, 6, small_model(6), keep=1)
    assert store.versions(tmp_path) == [5, 6]


def test_retention_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    for number in range(1, 7):
        publish(tmp_path, number, small_model(number), keep=3)
        if number == 2:
            store.pin(tmp_path, 2)
    assert store.versions(tmp_path) == [2, 4, 5, 6]
    assert_same(dict(store.read(tmp_path / "v000002")), small_model(2))
    store.unpin(tmp_path, 2)
    publish(tmp_path, 7, small_model(7), keep=1)
    assert store.versions(tmp_path) == [7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".commit.lock", "latest", "v000007"]


def test_pinning_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    publish(tmp_path, 1, small_model())
    with pytest.raises(WeightError, match=r"v000009.*no such version"):
        store.pin(tmp_path, 9)
    with pytest.raises(WeightError, match="keep at least 1"):
        publish(tmp_path, 2, small_model(), keep=0)


def test_half_written_versions_are_invisible_and_cleaned_by_the_next_commit(tmp_path: Path) -> None:
    publish(tmp_path, 1, small_model())
    write(tmp_path, 2, small_model(2))
    assert store.latest(tmp_path).version == 1
    publish(tmp_path, 3, small_model(3))
    assert list(tmp_path.glob("*.partial")) == []
    assert store.versions(tmp_path) == [1, 3]


def test_shards_of_an_earlier_try_with_more_ranks_do_not_stay(tmp_path: Path) -> None:
    write(tmp_path, 1, small_model(0), num_ranks=4)
    version = publish(tmp_path, 1, small_model(1), num_ranks=1)
    assert len(list(Path(version.path).iterdir())) == 2
    assert_same(dict(store.read(version.path)), small_model(1))


def test_two_publishes_of_one_version_cannot_mix_their_shards(tmp_path: Path) -> None:
    ours, theirs = small_model(0), small_model(1)
    our_reports = write(tmp_path, 1, ours)
    their_reports = write(tmp_path, 1, theirs)
    version = store.commit(tmp_path, 1, our_reports, keep=2)
    with pytest.raises(WeightError, match="the shard file is missing"):
        store.commit(tmp_path, 1, their_reports, keep=2)
    assert store.latest(tmp_path) == version
    assert_same(dict(store.read(version.path)), ours)


def test_a_commit_waits_no_longer_than_its_deadline_for_another(tmp_path: Path) -> None:
    publish(tmp_path, 1, small_model())
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".commit.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        reports = write(tmp_path, 2, small_model(2))
        with pytest.raises(StalledError, match=r"\.commit\.lock: another commit has held the lock"):
            store.commit(tmp_path, 2, reports, keep=2, lock_timeout_s=0.05)
        holder.kill()
        holder.wait(timeout=30)
    assert store.commit(tmp_path, 2, reports, keep=2).version == 2


def test_rewind_forgets_later_versions_so_that_they_can_be_published_afresh(tmp_path: Path) -> None:
    for number in range(1, 6):
        publish(tmp_path, number, small_model(number))
    store.pin(tmp_path, 5)
    write(tmp_path, 6, small_model(6))
    assert store.rewind(tmp_path, 3).version == 3
    assert store.versions(tmp_path) == [1, 2, 3]
    again = publish(tmp_path, 4, small_model(99))
    assert_same(dict(store.read(again.path)), small_model(99))
    assert store.rewind(tmp_path, 0) is None
    assert store.versions(tmp_path) == []
    assert store.rewind(tmp_path / "nothing", 0) is None


def test_tensors_come_in_the_order_of_the_first_rank(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(["z", "a", "m"])}
    version = publish(tmp_path, 0, tensors)
    assert [name for name, _ in store.read(version.path)] == ["z", "a", "m"]


def test_views_of_one_buffer_are_stored_apart(tmp_path: Path) -> None:
    buffer = torch.arange(10, dtype=torch.float32)
    parts = [rank_part(buffer[:4], "a"), rank_part(buffer[4:], "b")]
    version = store.commit(tmp_path, 0, [store.write_shard(tmp_path, 0, 0, parts)], keep=1)
    found = dict(store.read(version.path))
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert math.prod(found["b"].shape) == 6


def test_a_durable_publish_reads_back(tmp_path: Path) -> None:
    parts = [rank_part(torch.ones(5))]
    report = store.write_shard(tmp_path, 0, 0, parts, fsync=True)
    version = store.commit(tmp_path, 0, [report], keep=1, fsync=True)
    assert dict(store.read(version.path))["w"].tolist() == [1] * 5


@pytest.mark.parametrize("name", ["latest", "v000002/manifest.json"])
def test_d02_a_rewind_forgets_what_is_torn_and_nothing_that_cannot_be_read_for_now(
    tmp_path: Path, name: str
) -> None:
    for version in (1, 2):
        publish(tmp_path, version, small_model(seed=version))
    path = tmp_path / name
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading gives EIO
    with pytest.raises(WeightError, match="Input/output error"):
        store.rewind(tmp_path, 5)
    path.unlink()
    path.write_bytes(whole)
    assert store.rewind(tmp_path, 5).version == 2, "nothing was lost"
    path.write_bytes(b"")
    left = 2 if name == "latest" else 1
    assert store.rewind(tmp_path, 5).version == left
    assert store.versions(tmp_path) == [1, 2][:left]


def test_d02_a_version_that_cannot_be_read_for_now_is_not_replaced(tmp_path: Path) -> None:
    publish(tmp_path, 1, small_model())
    manifest = tmp_path / "v000001" / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")
    with pytest.raises(WeightError, match="Input/output error"):
        publish(tmp_path, 1, small_model(seed=1))
    assert manifest.is_symlink()
