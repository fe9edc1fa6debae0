"""The units of a stage: split, order, counts, and how they are laid into micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.data.packing import (
    TokenSequence,
    collate,
    plan,
    value_sequence,
)
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import (
    Unit,
    UnitStream,
    cut_end,
    load_units,
    make_sequence,
)
from rlhf_cluster.errors import DataError, RecordError
from rlhf_cluster.sections.offline_stage import StageData
from tests.support.builders.offline_stages import (
    make_unit,
    write_rows,
)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def numbered(num: int, name: str = "") -> list[Unit]:
    sequence = TokenSequence(prompt_ids=ids(1), target_ids=ids(2))
    return [make_unit(sequence, key=f"{name}{i}") for i in range(num)]


class Reading:
    """A unit a row, as many tokens as the row says; a row without a number teaches nothing."""

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        if row.columns.get("n") is None:
            raise UnusableRow(f"{name}, {row.place}: a response has no text")
        tokens = np.arange(row.columns["n"], dtype=np.int32)
        sequence = TokenSequence(prompt_ids=tokens[:1], target_ids=tokens[1:])
        text = str(row.columns["text"])
        return [Unit(sequences=(sequence,), key=text, content=text, place=row.place)]

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        cut = cut_end(unit.sequences[0], max_tokens)
        return None if cut is None else Unit(
            sequences=(cut,), key=unit.key, content=unit.content, place=unit.place
        )  # fmt: skip

    def times(self, unit: Unit) -> int:
        return 1


def data(path: str, **keys: Any) -> StageData:
    tree = {"sources": [{"path": path}], "max_tokens": 6, **keys}
    return StageData.model_validate(tree)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), min_size=3, max_size=3),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_two_epochs_of_weight_a_half_go_over_a_source_once(sizes, weights, seed) -> None:
    sources = [numbered(n, f"s{i}-") for i, n in enumerate(sizes)]
    if sum(n * w for n, w in zip(sizes, weights, strict=False)) < 1:
        return
    stream = UnitStream(sources, weights[: len(sizes)], seed)
    epochs = 4  # every weight goes over its source a whole number of times
    drawn = Counter(stream.at(place).key for place in range(stream.end_of(epochs)))
    for units, weight in zip(sources, weights, strict=False):
        assert {drawn[unit.key] for unit in units} == {int(epochs * weight)}


def test_the_unit_at_a_place_depends_on_seed_and_place_alone() -> None:
    sources = [numbered(7, "a"), numbered(5, "b")]
    first, again = (UnitStream(sources, [1.0, 2.0], 3) for _ in range(2))
    places = list(range(60))
    forward = [first.at(place).key for place in places]
    backward = [again.at(place).key for place in reversed(places)][::-1]
    assert forward == backward
    assert forward != [UnitStream(sources, [1.0, 2.0], 4).at(p).key for p in places]
    assert sorted(forward[:17]) == sorted(forward[17:34])
    assert forward[:17] != forward[17:34], "each epoch has an order of its own"
    batches = [u.key for step in range(12) for u in first.batch(step, 5)]
    assert batches == forward
    assert [u.key for u in first.batch(3, 5, end=17)] == forward[15:17]


def test_without_shuffling_the_rows_come_as_they_are() -> None:
    stream = UnitStream([numbered(3, "a"), numbered(2, "b")], [1.0, 1.0], 0, shuffle=False)
    assert [stream.at(i).key for i in range(6)] == ["a0", "a1", "a2", "b0", "b1", "a0"]


def test_what_is_held_out_is_never_trained_and_does_not_depend_on_the_files(tmp_path: Path) -> None:
    rows = [{"n": 4, "text": f"row {i}"} for i in range(200)]
    whole = write_rows(tmp_path / "whole.jsonl", rows)
    turned = write_rows(tmp_path / "turned.jsonl", rows[::-1])
    streams = [load_units(data(p, held_out=0.2), Reading(), 0) for p in (whole, turned)]
    held_out = [[u.key for u in s.held_out] for s in streams]
    assert held_out[0] == held_out[1]
    assert 20 < len(held_out[0]) < 60
    trained = {streams[0].at(i).key for i in range(streams[0].end_of(1))}
    assert trained.isdisjoint(held_out[0])
    assert len(trained) + len(held_out[0]) == 200
    some = load_units(data(whole, held_out=0.2, held_out_limit=5), Reading(), 0)
    assert [u.key for u in some.held_out] == held_out[0][:5]
    assert some.counts.unread == len(held_out[0]) - 5


def test_every_row_that_is_not_trained_as_it_stands_is_counted_by_its_reason(tmp_path) -> None:
    rows = [{"n": 4, "text": "a"}, {"n": 4, "text": "a"}, {"n": 30, "text": "long"}, {"n": None}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    kept = load_units(data(path, on_long="skip", on_unusable="skip"), Reading(), 0).counts
    assert (kept.rows, kept.units, kept.duplicates, kept.truncated) == (4, 1, 1, 0)
    assert kept.skipped == {"empty": 1, "longer than data.max_tokens": 1}
    assert kept.metrics()["stage/data_skipped"] == 2
    cut = load_units(data(path, on_long="truncate", on_unusable="skip"), Reading(), 0)
    assert (cut.counts.units, cut.counts.truncated) == (2, 1)
    assert max(cut.at(i).longest for i in range(2)) == 6
    assert "1 cut to data.max_tokens" in cut.counts.notes
    twice = load_units(
        data(path, on_long="skip", on_unusable="skip", deduplicate=False), Reading(), 0
    )
    assert twice.counts.units == 2
    with pytest.raises(DataError, match=r"longer than .* = 6 \(line 3; the longest has 29"):
        load_units(data(path, on_unusable="skip"), Reading(), 0)
    with pytest.raises(DataError, match=r"line 4: .*set data.on_unusable = 'skip'"):
        load_units(data(path, on_long="skip"), Reading(), 0)


def test_columns_of_a_source_are_renamed_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"count": 4, "text": "a"}])
    source = {"path": path, "columns": {"n": "count"}}
    tree = {"sources": [source], "max_tokens": 6}
    stream = load_units(StageData.model_validate(tree), Reading(), 0)
    assert stream.at(0).longest == 3
    source["columns"] = {"n": "number"}
    with pytest.raises(DataError, match=r"line 1: no column 'number'.*found 'count', 'text'"):
        load_units(StageData.model_validate(tree), Reading(), 0)


def test_the_trained_tokens_of_a_mask_become_targets() -> None:
    trained = np.array([0, 0, 1, 0, 1, 0], dtype=bool)
    sequence = make_sequence(ids(1, 2, 3, 4, 5, 6), trained)
    assert sequence is not None
    assert sequence.prompt_ids.tolist() == [1, 2]
    assert sequence.target_ids.tolist() == [3, 4, 5]
    assert sequence.target_mask is not None
    assert sequence.target_mask.tolist() == [True, False, True]
    assert make_sequence(ids(1, 2), np.array([True, False])) is None, "nothing predicts the first"


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    ranks=st.integers(1, 3),
    batching=st.sampled_from(["packed", "padded"]),
    draw=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_a_unit_lies_in_one_row_in_order_and_ranks_have_equal_counts(
    sizes, ranks, batching, draw
) -> None:
    lengths = [draw.randint(1, 6) for _ in range(sum(sizes))]
    plans = plan(lengths, ranks, 48, 24, batching, sizes)
    assert len({len(p) for p in plans}) == 1
    ends = np.cumsum(sizes).tolist()
    units = [tuple(range(e - n, e)) for e, n in zip(ends, sizes, strict=True)]
    of = {index: unit for unit in units for index in unit}
    found = []
    for row in (row for p in plans for batch in p for row in batch):
        assert sum(lengths[i] for i in row) <= 24
        position = 0
        while position < len(row):
            unit = of[row[position]]
            assert row[position : position + len(unit)] == unit
            found.append(unit)
            position += len(unit)
    assert sorted(found) == units
    if batching == "padded":
        assert all(row in units for p in plans for batch in p for row in batch)


def test_units_that_do_not_add_up_or_fit_are_refused() -> None:
    with pytest.raises(RecordError, match="do not add up to 3 sequences"):
        plan([1, 1, 1], 1, 8, 8, "packed", [2])
    with pytest.raises(DataError, match="unit 1 has 9 positions"):
        plan([1, 5, 4], 1, 8, 8, "packed", [1, 2])


def test_a_value_sequence_feeds_all_tokens_and_is_read_where_it_is_asked_for() -> None:
    last, some = value_sequence(ids(5, 6, 7)), value_sequence(ids(5, 6, 7), np.array([0, 2]))
    for sequence, read in ((last, [2]), (some, [0, 2])):
        batch = collate(((0,),), [sequence])
        assert batch.input_ids.tolist() == [[5, 6, 7]]
        assert np.flatnonzero(batch.mask[0]).tolist() == read
