"""Plans and micro-batches: complete, within their bounds, equal in number on every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.data.packing import (
    TokenSequence,
    collate,
    plan,
)
from rlhf_cluster.errors import ConfigError, DataError, RecordError

LENGTHS = st.lists(st.integers(1, 32), max_size=60)


@settings(max_examples=200)
@given(
    lengths=LENGTHS,
    ranks=st.integers(1, 5),
    budget=st.integers(32, 200),
    batching=st.sampled_from(["packed", "padded"]),
)
def test_every_sequence_is_planned_once_within_the_bounds_and_ranks_match(
    lengths: list[int], ranks: int, budget: int, batching: str
) -> None:
    plans = plan(lengths, ranks, budget, 32, batching)  # type: ignore[arg-type]
    planned = [i for rank in plans for batch in rank for row in batch for i in row]
    assert sorted(planned) == list(range(len(lengths)))
    assert len(plans) == ranks
    assert len({len(rank) for rank in plans}) == 1
    assert len(plans[0]) >= 1
    for rank in plans:
        for batch in rank:
            widths = [sum(lengths[i] for i in row) for row in batch]
            assert all(0 < w <= 32 for w in widths)
            assert len(batch) * max(widths, default=0) <= budget
            if batching == "padded":
                assert all(len(row) == 1 for row in batch)


@settings(max_examples=50)
@given(lengths=LENGTHS.filter(bool), ranks=st.integers(1, 4))
def test_tokens_of_the_ranks_differ_by_no_more_than_one_sequence(
    lengths: list[int], ranks: int
) -> None:
    plans = plan(lengths, ranks, 32, 32, "packed")
    loads = [sum(lengths[i] for b in rank for row in b for i in row) for rank in plans]
    assert max(loads) - min(loads) <= max(lengths)


def test_the_same_lengths_give_the_same_plan() -> None:
    lengths = np.random.default_rng(0).integers(1, 32, 50).tolist()
    assert plan(lengths, 3, 64, 32, "packed") == plan(list(lengths), 3, 64, 32, "packed")


def test_packing_fills_rows_that_padding_would_waste() -> None:
    lengths = [20, 12, 16, 16, 8, 8, 8, 8]
    assert plan(lengths, 1, 96, 32, "packed") == [[((0, 1), (2, 3), (4, 5, 6, 7))]]
    assert sum(len(batch) for batch in plan(lengths, 1, 96, 32, "padded")[0]) == 8


def test_s14_a_rank_without_sequences_gets_as_many_dummies_as_the_others_have_passes() -> None:
    # rank 0 has 32 positions in one pass, rank 1 has 17 + 14 in two
    assert plan([32, 17, 14], 2, 32, 32, "padded") == [[((0,),), ()], [((1,),), ((2,),)]]
    assert plan([5], 3, 32, 32, "packed") == [[((0,),)], [()], [()]]


def test_an_empty_batch_is_one_dummy_a_rank() -> None:
    assert plan([], 2, 32, 32, "packed") == [[()], [()]]
    dummy = collate((), [], ["advantages"])
    assert dummy.input_ids.shape == (1, 1)
    assert not dummy.mask.any()
    assert dummy.streams["advantages"].shape == (1, 1)


def test_lengths_and_bounds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="sequence 1 has 33 positions"):
        plan([3, 33], 1, 64, 32, "packed")
    with pytest.raises(DataError, match="sequence 0 has 0 positions"):
        plan([0], 1, 64, 32, "packed")
    with pytest.raises(ConfigError, match="tokens_per_row = 32"):
        plan([3], 1, 31, 32, "packed")
    with pytest.raises(ConfigError, match="ranks = 0"):
        plan([3], 0, 64, 32, "packed")


def _sequence(prompt: list[int], target: list[int], **streams: list[float]) -> TokenSequence:
    return TokenSequence(
        prompt_ids=np.array(prompt, np.int32),
        target_ids=np.array(target, np.int32),
        streams={n: np.array(v, np.float32) for n, v in streams.items()},
    )


def test_a_packed_row_restarts_positions_and_shifts_labels_by_one() -> None:
    sequences = [
        _sequence([1, 2, 3], [4, 5], advantages=[0.1, 0.2]),
        _sequence([6], [7], advantages=[0.3]),
        _sequence([8, 9], [10, 11], advantages=[0.4, 0.5]),
    ]
    batch = collate(((0, 1), (2,)), sequences, ["advantages"])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6], [8, 9, 10, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, 5, 7], [9, 10, 11, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert batch.mask.astype(int).tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    expected = np.array([[0, 0, 0.1, 0.2, 0.3], [0, 0.4, 0.5, 0, 0]], np.float32)
    np.testing.assert_array_equal(batch.streams["advantages"], expected)


def test_spans_find_each_sequences_targets() -> None:
    draw = np.random.default_rng(0)
    sequences = [
        _sequence(draw.integers(0, 9, p).tolist(), draw.integers(0, 9, t).tolist())
        for p, t in [(3, 5), (1, 1), (6, 2), (2, 9)]
    ]
    [[planned]] = plan([s.num_inputs for s in sequences], 1, 64, 16, "packed")
    batch = collate(planned, sequences)
    assert sorted(s.sequence for s in batch.spans) == [0, 1, 2, 3]
    for span in batch.spans:
        found = batch.labels[span.row, span.start : span.stop]
        np.testing.assert_array_equal(found, sequences[span.sequence].target_ids)


def test_s15_an_end_token_that_is_also_the_padding_token_is_trained() -> None:
    pad = end = 0
    sequences = [_sequence([5, end], [7, end]), _sequence([pad], [pad, pad, end])]
    batch = collate(((0,), (1,)), sequences)
    assert batch.mask.sum() == 5
    assert batch.labels[batch.mask].tolist() == [7, end, pad, pad, end]


def test_masked_targets_are_not_trained() -> None:
    sequence = TokenSequence(
        prompt_ids=np.array([1], np.int32),
        target_ids=np.array([2, 3, 4], np.int32),
        target_mask=np.array([True, False, True]),
    )
    batch = collate(((0,),), [sequence])
    assert batch.labels[batch.mask].tolist() == [2, 4]


def test_streams_must_have_one_value_a_target_token() -> None:
    with pytest.raises(RecordError, match="stream advantages"):
        _sequence([1], [2, 3], advantages=[0.5])
    with pytest.raises(RecordError, match="needs prompt and target"):
        _sequence([], [2])
