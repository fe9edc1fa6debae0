"""Stochastic rounding to bfloat16: exact on the grid and at the ends, unbiased, however it is cut."""

import itertools
import math

import pytest
import torch

from rlhf_cluster.weights.formats.stochastic_rounding import round_stochastically, stream_key

KEY = stream_key(3, "model.layers.0.self_attn.q_proj.weight")


def bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.int16).tolist()


def from_bits(*patterns: int) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def splitmix(key: int, count: int) -> list[int]:
    """The published generator in Python's integers, seeded with `key`."""
    mask, state, found = (1 << 64) - 1, key, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        word = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ word >> 27) * 0x94D049BB133111EB) & mask
        found.append(word ^ word >> 31)
    return found


def test_l03_the_draws_are_those_of_splitmix64() -> None:
    """A value between two neighbours goes up where its low bits and the draw carry."""
    low = 0x8123
    rounded = round_stochastically(from_bits(*[0x3F800000 + low] * 999), 0, KEY)
    draws = [word >> 16 * lane & 0xFFFF for word in splitmix(KEY, 250) for lane in range(4)][:999]
    assert bits(rounded) == [0x3F80 + (low + draw >= 1 << 16) for draw in draws]


def test_l03_every_value_of_the_grid_stays_to_the_bit() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for key in (0, KEY, (1 << 63) - 1):
        rounded = round_stochastically(every.float(), 0, key)
        number = ~every.isnan()
        assert bits(rounded[number]) == bits(every[number])
        assert rounded[~number].isnan().all()


def test_l03_nan_of_any_payload_stays_nan_and_infinity_stays() -> None:
    nan = from_bits(0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0xFF800001 - (1 << 32), -1).repeat(1000)
    assert round_stochastically(nan, 0, KEY).isnan().all()
    infinite = torch.tensor([math.inf, -math.inf]).repeat(1000)
    assert torch.equal(round_stochastically(infinite, 0, KEY).float(), infinite)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "value",
    [1 + 2**-10, 3.0e-3, 1.0e38, 2.0**-126 * 1.3, 2.0**-133 * 0.375, 2.0**-149],
    ids=["near 1", "a weight", "large", "smallest normal", "under the grid", "smallest of all"],
)
def test_l03_goes_to_one_of_both_neighbours_and_the_mean_is_the_value(
    value: float, sign: int
) -> None:
    count = 400_000
    values = torch.full((count,), sign * value)
    unit_bits = values[:1].view(torch.int32) & ~0xFFFF
    low, high = unit_bits.view(torch.float32).item(), (unit_bits + 0x10000).view(torch.float32)
    found = round_stochastically(values, 0, KEY).double()
    unit = high.double().item() - low
    share = (values[0].double().item() - low) / unit
    up = found == high.double()
    assert (up | (found == low)).all()
    spread = math.sqrt(share * (1 - share) / count)
    assert abs(up.double().mean().item() - share) < 5 * spread + 1e-12


def test_l03_over_the_largest_finite_number_the_next_is_infinity() -> None:
    largest = torch.finfo(torch.bfloat16).max
    values = from_bits(0x7F7F8000).repeat(10_000)
    found = round_stochastically(values, 0, KEY).double()
    assert set(found.tolist()) == {largest, math.inf}
    assert found.isinf().double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_l03_ranges_of_any_cut_have_the_bits_of_the_whole() -> None:
    values = torch.randn(200_003, generator=torch.Generator().manual_seed(0))
    whole = round_stochastically(values, 0, KEY)
    for cuts in ([0, 1, 2, 3, 5, 77, 65_537, 131_071, 200_003], [0, 65_536, 200_003]):
        parts = [round_stochastically(values[a:b], a, KEY) for a, b in itertools.pairwise(cuts)]
        assert bits(torch.cat(parts)) == bits(whole)
    assert round_stochastically(values[:0], 7, KEY).numel() == 0
    assert bits(round_stochastically(values, 0, KEY)) == bits(whole)


def test_l03_far_elements_of_a_large_tensor_have_draws_of_their_own() -> None:
    values = torch.full((4096,), 1 + 2**-8)
    found = {
        offset: bits(round_stochastically(values, offset, KEY))
        for offset in (0, 4, 1 << 32, 1 << 40)
    }
    assert found[0][4:] == found[4][:-4]
    assert len({tuple(f) for f in found.values()}) == 4


def test_l03_streams_of_versions_and_tensors_are_not_related() -> None:
    values = torch.full((100_000,), 1 + 2**-8)
    ups = [
        (round_stochastically(values, 0, stream_key(version, name)) > 1).double()
        for version in (0, 1, 2)
        for name in ("q_proj.weight", "k_proj.weight")
    ]
    correlations = torch.corrcoef(torch.stack(ups)) - torch.eye(len(ups))
    assert correlations.abs().max() < 5 / math.sqrt(len(values))
    # nor are neighbours in one stream
    for lag in (1, 2, 3, 4, 5, 8):
        pair = torch.stack([ups[0][lag:], ups[0][:-lag]])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(len(values))


@pytest.mark.parametrize("size", [1e-4, 3e-4, 1e-3, 4e-3])
def test_l03_an_update_of_weights_on_the_grid_is_kept_in_the_mean(size: float) -> None:
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(2_000_000, generator=draw).bfloat16().float()
    update = size * torch.randn(base.numel(), generator=draw)

    def kept(rounded: torch.Tensor) -> float:
        return ((rounded.float() - base) @ update / (update @ update)).item()

    nearest = kept((base + update).bfloat16())
    assert nearest == pytest.approx(
        {1e-4: 0.06, 3e-4: 0.18, 1e-3: 0.53, 4e-3: 0.97}[size], abs=0.03
    )
    assert kept(round_stochastically(base + update, 0, KEY)) == pytest.approx(1.0, abs=0.05)
