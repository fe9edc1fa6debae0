"""The difference between two tensors: exact to the bit, short, and refused when damaged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import tensor_bytes
from rlhf_cluster.weights.formats import delta
from rlhf_cluster.weights.sync import BasePlan


def restored(was: np.ndarray, payload: bytes | bytearray) -> bytes:
    target = was.copy()
    delta.apply(memoryview(target).cast("B"), payload, was.itemsize)
    return target.tobytes()


def payload_of(was: np.ndarray, now: np.ndarray) -> bytearray | None:
    return delta.encode(was.view(np.uint8).data, now.view(np.uint8).data, was.itemsize)


@settings(max_examples=200)
@given(
    item_bytes=st.sampled_from([1, 2, 4, 8]),
    base=st.binary(min_size=8, max_size=400),
    changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=12),
)
def test_any_bytes_come_back_exactly(item_bytes: int, base: bytes, changes) -> None:
    length = len(base) // item_bytes * item_bytes
    new = bytearray(base[:length])
    for position, value in changes:
        new[position % length] = value
    was, now = (np.frombuffer(x[:length], f"<u{item_bytes}") for x in (base, bytes(new)))
    payload = payload_of(was, now)
    if payload is None:
        assert (was != now).mean() > 0.5
    else:
        assert restored(was, payload) == bytes(new)
        assert (len(payload) == 0) == (was.tobytes() == bytes(new))


def test_nan_infinity_and_the_sign_of_zero_survive() -> None:
    base = torch.zeros(64, dtype=torch.bfloat16)
    new = base.clone()
    new[:4] = torch.tensor([-0.0, float("nan"), float("inf"), -1e-40])
    payload = delta.encode(tensor_bytes(base), tensor_bytes(new), 2)
    target = base.clone()
    delta.apply(tensor_bytes(target), payload, 2)
    assert torch.equal(target.view(torch.int16), new.view(torch.int16))
    assert not torch.equal(target.view(torch.int16), base.view(torch.int16))


@pytest.mark.parametrize("around", [-1, 0, 1])
def test_changes_at_the_borders_of_blocks_come_back(around: int) -> None:
    numel = 2 * delta.BLOCK_ELEMENTS + around
    was = np.zeros(numel, np.uint16)
    now = was.copy()
    ends = [0, delta.BLOCK_ELEMENTS - 1, delta.BLOCK_ELEMENTS, numel - 1]
    now[ends] = [1, 65535, 7, 32768]
    payload = payload_of(was, now)
    assert payload is not None
    assert len(payload) < 100
    assert restored(was, payload) == now.tobytes()


def test_one_change_in_a_hundred_by_one_step_costs_under_two_bytes_each() -> None:
    """Entropy: a gap of mean 100 needs about log2(100 e) = 8.1 bits, the direction 1 bit."""
    random = np.random.default_rng(0)
    was = random.integers(0, 65536, 400_000, np.uint16)
    now = was.copy()
    chosen = random.random(len(was)) < 0.01
    now[chosen] += random.choice(np.array([1, 65535], np.uint16), chosen.sum())
    payload = payload_of(was, now)
    assert payload is not None
    assert 9.1 / 8 < len(payload) / chosen.sum() < 2
    assert restored(was, payload) == now.tobytes()


def test_when_most_elements_changed_there_is_no_difference() -> None:
    was = np.arange(1000, dtype=np.uint16)
    assert payload_of(was, was + np.uint16(1)) is None


def test_most_elements_is_judged_by_a_sample_first_and_then_by_the_count() -> None:
    was = np.zeros(2 * delta.SAMPLE, np.uint16)
    sampled, beside = was.copy(), was.copy()
    sampled[::2] = 1  # half of all, and the whole sample
    beside[1::2] = 1  # half of all, and nothing of the sample
    assert payload_of(was, sampled) is None
    payload = payload_of(was, beside)
    assert payload is not None
    assert restored(was, payload) == beside.tobytes()
    beside[:2] = 1
    assert payload_of(was, beside) is None


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(WeightError, match="4 bytes and 6: they must be equal"):
        delta.encode(memoryview(bytes(4)), memoryview(bytes(6)), 2)


def test_a_cut_or_lengthened_payload_is_refused() -> None:
    was = np.zeros(50, np.uint16)
    now = was.copy()
    now[[3, 40]] = 9
    payload = payload_of(was, now)
    assert payload is not None
    for cut in range(1, len(payload)):
        with pytest.raises(WeightError, match="the difference"):
            restored(was, payload[:cut])
    with pytest.raises(WeightError, match="2 bytes after its last block"):
        restored(was, payload + b"xx")


def test_a_damaged_payload_ends_in_an_error_or_other_bytes_but_never_outside_the_tensor() -> None:
    """What passes here with other bytes is found by the tensor's hash."""
    was = np.zeros(300, np.uint32)
    now = was.copy()
    now[::40] = 0x01020304
    payload = payload_of(was, now)
    assert payload is not None
    refused = 0
    for position in range(len(payload)):
        for bit in (0x01, 0x80):
            damaged = bytearray(payload)
            damaged[position] ^= bit
            try:
                restored(was, damaged)
            except WeightError:
                refused += 1
    assert refused > len(payload)


def test_a_frame_that_expands_beyond_its_block_is_refused() -> None:
    import zstandard

    frame = zstandard.ZstdCompressor().compress(bytes(1 << 20))
    payload = np.array([1, len(frame)], "<u4").tobytes() + frame
    with pytest.raises(WeightError, match="decompress|frame of"):
        restored(np.zeros(10, np.uint16), payload)


# Which version builds on which


def test_every_anchor_every_th_version_is_an_anchor() -> None:
    plan = BasePlan(3)
    bases = []
    for version in range(7):
        bases.append(plan.take_base())
        plan.committed(version)
    assert bases == [None, 0, 1, None, 3, 4, None]


def test_with_one_every_version_is_an_anchor() -> None:
    plan = BasePlan(1)
    for version in range(3):
        assert plan.take_base() is None
        plan.committed(version)


def test_adapters_all_build_on_the_anchor_until_a_publish_fails() -> None:
    plan = BasePlan(None)
    bases = []
    for version in range(100):
        bases.append(plan.take_base())
        if version != 98:
            plan.committed(version)
    assert bases == [None, *[0] * 98, None]
    assert plan.take_base() == 99


def test_after_a_failed_publish_comes_an_anchor() -> None:
    plan = BasePlan(8)
    assert plan.take_base() is None
    plan.committed(0)
    assert plan.take_base() == 0  # version 1 fails: no `committed`
    assert plan.take_base() is None
    plan.committed(2)
    assert plan.take_base() == 2
