"""Units of an offline stage: groups of sequences that are trained together, and their order.

A unit is one sequence (supervised fine-tuning), a chosen and a rejected one, or the answers of one
ranking. Two texts determine its use. A hash of `key` puts it on one side of the held-out split, so
equal keys are never on both sides. `content` finds duplicates.

    rows of each source -> units -> too long? -> seen before? -> held out | trained, epoch after epoch

Promises:
- the whole data set is read and checked when it is loaded; every row that is skipped, shortened or
  refused is counted by its reason;
- the unit at an index of the endless stream depends on data, seed and index alone, so a resumed
  stage needs only the number of units drawn;
- epoch e uses each source `weight` times: with 0.5 one half of it, and the other half in the next
  epoch. Within an epoch the units of all sources are mixed;
- a hash of the key selects held-out units, and another hash orders them: neither depends on the
  order or the number of the files.

Shapes: L tokens of a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.rows import Row, expand, read_rows
from rlhf_cluster.data.tasks import train_rows
from rlhf_cluster.errors import DataError, RecordError

if TYPE_CHECKING:
    from rlhf_cluster.sections.offline_stage import (
        Source,
        StageData,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Sequences that are packed and trained together, in this order."""

    sequences: tuple[TokenSequence, ...]
    key: str  # such as the prompt; equal keys are on one side of the held-out split
    content: str  # equal contents are the same row twice
    place: str  # file and row, for messages
    values: Mapping[str, float] = field(default_factory=dict)  # numbers of the whole unit

    def __post_init__(self) -> None:
        if not self.sequences:
            raise RecordError(f"{self.place}: a unit without sequences; it has at least one")

    @property
    def longest(self) -> int:
        """Number of tokens that a model reads of the longest sequence."""
        return max(sequence.num_inputs for sequence in self.sequences)

    @property
    def num_trained(self) -> int:
        """Number of trained targets of all sequences."""
        return sum(num_trained(sequence) for sequence in self.sequences)


def num_trained(sequence: TokenSequence) -> int:
    mask = sequence.target_mask
    return len(sequence.target_ids) if mask is None else int(mask.sum())


def make_sequence(token_ids: np.ndarray, trained: np.ndarray) -> TokenSequence | None:
    """Build a sequence of tokens [L] that trains those marked in `trained` [L]; None if it trains none.

    Tokens after the last trained one are dropped. The first token is never trained, since no position
    predicts it.
    """
    places = np.flatnonzero(trained[1:]) + 1
    if not len(places):
        return None
    first, stop = int(places[0]), int(places[-1]) + 1
    return TokenSequence(
        prompt_ids=token_ids[:first],
        target_ids=token_ids[first:stop],
        target_mask=trained[first:stop].astype(np.bool_),
    )


def cut_end(sequence: TokenSequence, max_tokens: int) -> TokenSequence | None:
    """Cut the sequence to `max_tokens` inputs; None if no trained target is left."""
    num_targets = max_tokens + 1 - len(sequence.prompt_ids)
    if num_targets >= len(sequence.target_ids):
        return sequence
    if num_targets < 1:
        return None
    mask = None if sequence.target_mask is None else sequence.target_mask[:num_targets]
    if mask is not None and not mask.any():
        return None
    return replace(
        sequence,
        target_ids=sequence.target_ids[:num_targets],
        target_mask=mask,
        streams={name: values[:num_targets] for name, values in sequence.streams.items()},
    )


def flatten_units(units: Sequence[Unit]) -> tuple[list[TokenSequence], list[int]]:
    """Return all sequences in order, and the number of sequences of each unit."""
    return [s for unit in units for s in unit.sequences], [len(unit.sequences) for unit in units]


def is_held_out(key: str, share: float) -> bool:
    """Whether a unit with this key is in a held-out part of about `share` of all keys."""
    return xxh3_64_intdigest(key.encode()) < share * 2**64


def find_held_out_order(key: str) -> int:
    """Return the sort key of a held-out unit. It does not depend on the order of the files."""
    return xxh3_64_intdigest(f"order/{key}".encode())


_NAMED_ROWS = 8  # places listed in a message


class Reader(Protocol):
    """Conversion of rows to units by a kind of stage."""

    def read(self, row: Row, name: str) -> Sequence[Unit]: ...

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None: ...

    def times(self, unit: Unit) -> int: ...


@dataclass(slots=True, kw_only=True)
class Counts:
    """Counts of rows and units by outcome."""

    rows: int = 0
    units: int = 0  # trained and held out
    held_out: int = 0
    unread: int = 0  # held out, but beyond data.held_out_limit
    truncated: int = 0
    duplicates: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # rows or units by reason

    @property
    def notes(self) -> list[str]:
        """Human-readable counts of the rows that are not trained exactly as in the files."""
        found = [f"{count} skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        if self.truncated:
            found.append(f"{self.truncated} cut to data.max_tokens")
        if self.duplicates:
            found.append(f"{self.duplicates} skipped: duplicates of earlier rows")
        return found

    def metrics(self) -> dict[str, float]:
        return {
            "stage/data_rows": float(self.rows),
            "stage/data_units": float(self.units),
            "stage/data_held_out": float(self.held_out),
            "stage/data_truncated": float(self.truncated),
            "stage/data_duplicates": float(self.duplicates),
            "stage/data_skipped": float(sum(self.skipped.values())),
        }


class UnitStream:
    """Endless stream of the trained units of all sources, and the held-out units."""

    def __init__(
        self,
        sources: Sequence[Sequence[Unit]],
        weights: Sequence[float],
        seed: int,
        shuffle: bool = True,
        held_out: Sequence[Unit] = (),
        counts: Counts | None = None,
    ) -> None:
        """Combine `sources` by `weights`. Raises `DataError` for a source without units."""
        self.held_out = list(held_out)
        self.counts = counts or Counts()
        self._sources, self._weights = sources, weights
        self._seed, self._shuffle = seed, shuffle
        for number, units in enumerate(sources):
            if not units:
                raise DataError(
                    f"data.sources: source {number} has no units left to train on; see what was "
                    "skipped and held out"
                )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._order = lru_cache(maxsize=2 * len(sources))(self._make_order)

    def end_of(self, epochs: int) -> int:
        """Return the number of units of the first `epochs` epochs."""
        return sum(self._num_drawn(i, epochs) for i in range(len(self._sources)))

    def batch(self, step: int, size: int, end: int | None = None) -> list[Unit]:
        """Return the units of step `step` (from 0): `size`, or fewer if the stream stops at `end`."""
        stop = (step + 1) * size
        return [self.at(place) for place in range(step * size, min(stop, end or stop))]

    def at(self, place: int) -> Unit:
        """Return the unit at index `place` of the endless stream."""
        epoch = int(place / self.end_of(1)) if self.end_of(1) else 0
        while self.end_of(epoch) > place:
            epoch -= 1
        while self.end_of(epoch + 1) <= place:
            epoch += 1
        source, drawn = self._epoch(epoch)[place - self.end_of(epoch)]
        units = self._sources[source]
        return units[self._order(source, drawn // len(units))[drawn % len(units)]]

    def _num_drawn(self, source: int, epochs: int) -> int:
        """Return the number of units that the first `epochs` epochs draw from `source`."""
        return int(epochs * self._weights[source] * len(self._sources[source]) + 1e-9)

    def _make_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Return (source, index in the source's stream) of all units of an epoch, in order."""
        places = [
            (source, drawn)
            for source in range(len(self._sources))
            for drawn in range(self._num_drawn(source, epoch), self._num_drawn(source, epoch + 1))
        ]
        return [places[i] for i in self._permutation(len(places), f"epoch/{epoch}")]

    def _make_order(self, source: int, around: int) -> np.ndarray:
        """Return the order of a source's units in its pass number `around`."""
        return self._permutation(len(self._sources[source]), f"source/{source}/{around}")

    def _permutation(self, size: int, name: str) -> np.ndarray:
        if not self._shuffle:
            return np.arange(size)
        seed = xxh3_64_intdigest(f"{self._seed}/{name}".encode())
        return np.random.default_rng(seed).permutation(size)


def load_units(data: StageData, reader: Reader, seed: int) -> UnitStream:
    """Read all sources and build their stream.

    Raises `DataError` for the first row that cannot be used, and for data with nothing to train on.
    """
    counts, seen = Counts(), set[str]()
    held_out: list[Unit] = []
    sources = []
    for number, source in enumerate(data.sources):
        name, rows = _rows(source, f"{seed}/{number}")
        counts.rows += len(rows)
        units = _fitting(_read(rows, name, source, data, reader, counts), data, reader, counts)
        if data.deduplicate:
            units = _new(units, seen, counts)
        held_out += [u for u in units if is_held_out(u.key, data.held_out)]
        trained = [u for u in units if not is_held_out(u.key, data.held_out)]
        sources.append([u for u in trained for _ in range(reader.times(u))])
        if left := sum(not reader.times(u) for u in trained):
            counts.skipped["not in the part that this member trains on"] += left
        counts.units += len(units)
        if not sources[-1]:
            raise DataError(
                f"{name}: {len(rows)} rows, and nothing left to train on. {'; '.join(counts.notes)}. "
                "Raise data.max_tokens, lower data.held_out, or give other data"
            )
    held_out.sort(key=lambda unit: (find_held_out_order(unit.key), unit.content))
    counts.unread = max(0, len(held_out) - data.held_out_limit)
    held_out = held_out[: data.held_out_limit]
    counts.held_out = len(held_out)
    if data.held_out and not held_out:
        raise DataError(
            f"data.held_out = {data.held_out:g}: none of {counts.units} units is held out. Raise it, "
            "or set data.held_out = 0"
        )
    weights = [source.weight for source in data.sources]
    return UnitStream(sources, weights, seed, data.shuffle, held_out, counts)


def _rows(source: Source, seed: str) -> tuple[str, list[Row]]:
    """Return the source's name and rows. The answer of a task's row is its completion."""
    if source.path is not None:
        path = expand(source.path)
        return str(path), read_rows(path, source.limit)
    assert source.task is not None
    assert source.limit is not None
    made = train_rows(source.task, seed, 0, source.limit)
    rows = [Row(n, f"row {n}", {**r, "completion": r["answer"]}) for n, r in enumerate(made)]
    return f"task {source.task}", rows


def _read(
    rows: Sequence[Row],
    name: str,
    source: Source,
    data: StageData,
    reader: Reader,
    counts: Counts,
) -> list[Unit]:
    units: list[Unit] = []
    for row in rows:
        try:
            units += reader.read(rename_columns(row, name, source), name)
        except UnusableRow as error:
            if data.on_unusable == "error":
                raise DataError(f"{error}, or set data.on_unusable = 'skip'") from error
            counts.skipped[error.reason] += 1
    return units


def rename_columns(row: Row, name: str, source: Source) -> Row:
    """Rename the row's columns as `source.columns` says. Raises `DataError` for a missing column."""
    missing = [theirs for theirs in source.columns.values() if theirs not in row.columns]
    if missing:
        raise DataError(
            f"{name}, {row.place}: no column {missing[0]!r}, which columns of the source names; found "
            f"{', '.join(map(repr, row.columns))}"
        )
    taken = {ours: row.columns[theirs] for ours, theirs in source.columns.items()}
    others = {k: v for k, v in row.columns.items() if k not in source.columns.values()}
    return Row(row.number, row.place, {**others, **taken})


def _fitting(units: Sequence[Unit], data: StageData, reader: Reader, counts: Counts) -> list[Unit]:
    """Return the units that fit `data.max_tokens`, shortened if `data.on_long` asks for it."""
    long = [unit for unit in units if unit.longest > data.max_tokens]
    if long and data.on_long == "error":
        places = ", ".join(unit.place for unit in long[:_NAMED_ROWS])
        more = ", ..." if len(long) > _NAMED_ROWS else ""
        raise DataError(
            f"{len(long)} of {len(units)} units have a sequence longer than data.max_tokens = "
            f"{data.max_tokens} ({places}{more}; the longest has {max(u.longest for u in long)} "
            "tokens). Raise data.max_tokens, or set data.on_long = 'skip' or 'truncate'"
        )
    fitting = []
    for unit in units:
        kept: Unit | None = unit
        if unit.longest > data.max_tokens:
            kept = reader.shorten(unit, data.max_tokens) if data.on_long == "truncate" else None
            if kept is None:
                counts.skipped["longer than data.max_tokens"] += 1
            else:
                counts.truncated += 1
        if kept is not None:
            fitting.append(kept)
    return fitting


def _new(units: Sequence[Unit], seen: set[str], counts: Counts) -> list[Unit]:
    """Return the units whose content is not in `seen`, and add theirs to it."""
    found = []
    for unit in units:
        if unit.content in seen:
            counts.duplicates += 1
        else:
            seen.add(unit.content)
            found.append(unit)
    return found
