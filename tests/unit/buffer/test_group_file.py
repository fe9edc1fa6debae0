"""Values of data files in stored groups: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_cluster.buffer.group_file import (
    from_text,
    to_text,
)
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.data.rows import read_rows
from rlhf_cluster.errors import StoreError
from tests.support.builders.stored_groups import (
    assert_same,
    sample,
)


@pytest.mark.parametrize(
    "value",
    [
        {"bytes": b"\x00\xff", "when": datetime(2026, 1, 2, 3, 4, 5, 6)},
        [datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), time(1, 2, 3), timedelta(-1, 2, 3)],
        [Decimal("1.10"), (1, ("a", b"")), {1: "x", (2,): None}, {"$dict": 1}, {"$": [], "a": {}}],
        [float("inf"), -0.0, 10**30, True, "\ud800"],
    ],
)
def test_values_of_data_files_come_back_as_they_were(value):
    assert_same(value, from_text(to_text(value)))
    assert to_text(value).isascii()


def test_every_type_that_a_parquet_file_has_comes_back(tmp_path):
    columns = {
        "u64": pa.array([2**64 - 1], pa.uint64()),
        "f16": pa.array([np.float16(0.1)], pa.float16()),
        "f32": pa.array([0.1], pa.float32()),
        "bytes": pa.array([b"abcd"], pa.binary(4)),
        "date": pa.array([date(2020, 1, 1)], pa.date64()),
        "time": pa.array([time(1, 2)], pa.time64("us")),
        "zone": pa.array([datetime(2020, 1, 1, 1)], pa.timestamp("us", "Europe/Berlin")),
        "when": pa.array([datetime(2020, 1, 1)], pa.timestamp("ns")),
        "for": pa.array([timedelta(1)], pa.duration("us")),
        "decimal": pa.array([Decimal("1.20")]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "struct": pa.array([{"x": 1, "y": [None, {"z": b""}]}]),
        "name": pa.array(["a"]).dictionary_encode(),
        "uuid": pa.array([bytes(range(16))], pa.uuid()),
        "null": pa.nulls(1),
    }
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    [row] = read_rows(tmp_path / "x.parquet")
    found = from_text(to_text(row.columns))
    assert found == row.columns
    assert [type(v) for v in found.values()] == [type(v) for v in row.columns.values()]


def test_a_value_that_cannot_be_written_is_refused_with_its_type():
    with pytest.raises(StoreError, match=r"type pathlib\.\w+, .*buffer.durable"):
        to_text({"where": [Path("x")]})


def test_a_group_without_rollouts_is_refused(tmp_path):
    with pytest.raises(StoreError, match="g00000012 has no rollouts"):
        ExperienceStore(tmp_path).write(dataclasses.replace(sample(), scored=()))
