"""Packing: sequences of unequal length to an equal number of micro-batches on every rank.

Promises:
- Every rank that calls `plan` with the same arguments gets the same plan; nothing is communicated.
- Every sequence is in exactly one row of exactly one micro-batch of exactly one rank.
- Every rank has the same number of micro-batches, at least one. Short ranks get dummies (no rows),
  because FSDP's collectives are matched by count: a rank with one pass fewer would hang the others.
- No micro-batch costs more than `tokens_per_micro_batch` positions, padding included.
- Sequences of one unit (a pair, the answers of one ranking) are packed end to end and in order in one
  row. So they share a micro-batch, and a loss can compare them.
- Lengths alone determine what is padding. Token ids are never compared with a padding id, so a model
  whose padding token is also its end token trains its end token.

A sequence of P prompt and T target tokens is fed as its first P + T - 1 tokens (`num_inputs`);
position s predicts token s + 1, so the targets' predictions are the LAST T positions, the first of
them at the last prompt token. Position ids start again at 0 for each sequence, and each padding token
has position 0: attention by position ids keeps all of them separate.

Shapes: B rows, S positions of a row, T target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rlhf_cluster.errors import ConfigError, DataError, RecordError

Array = np.ndarray
Batching = Literal["packed", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Prompt and target tokens, and streams with one value per target token.

    `target_mask` marks the trained targets; the others are context only.
    """

    prompt_ids: Array  # [P] integers, P >= 1
    target_ids: Array  # [T] integers, T >= 1
    target_mask: Array | None = None  # [T] bool, default all True
    streams: Mapping[str, Array] = field(default_factory=dict)  # each [T] float32

    def __post_init__(self) -> None:
        if len(self.prompt_ids) < 1 or len(self.target_ids) < 1:
            raise RecordError(
                f"a sequence needs prompt and target tokens, found {len(self.prompt_ids)} and "
                f"{len(self.target_ids)}"
            )
        per_token = dict(self.streams)
        if self.target_mask is not None:
            per_token["target_mask"] = self.target_mask
        for name, values in per_token.items():
            if values.shape != (len(self.target_ids),):
                raise RecordError(
                    f"stream {name} has shape {list(values.shape)}, expected one value per target "
                    f"token, [{len(self.target_ids)}]"
                )

    @property
    def num_inputs(self) -> int:
        """Number of positions of the sequence in a row: P + T - 1."""
        return len(self.prompt_ids) + len(self.target_ids) - 1


def value_sequence(
    token_ids: Array, at: Array | None = None, streams: Mapping[str, Array] | None = None
) -> TokenSequence:
    """Build a sequence for a value model: it is fed ALL L tokens.

    Values are read at the positions `at` [n], or at the last token only if `at` is None. Each of
    `streams` has one value per token [L] with `at`, and a single value [1] without.
    """
    after_end = np.zeros(1, dtype=token_ids.dtype)  # a dummy label, never fed and never read
    if at is None:
        return TokenSequence(prompt_ids=token_ids, target_ids=after_end, streams=streams or {})
    mask = np.zeros(len(token_ids), dtype=np.bool_)
    mask[at] = True
    return TokenSequence(
        prompt_ids=token_ids[:1],
        target_ids=np.concatenate([token_ids[1:], after_end]),
        target_mask=mask,
        streams=streams or {},
    )


Row = tuple[int, ...]
"""Indices of the sequences that are packed end to end in one row."""

MicroBatchPlan = tuple[Row, ...]
"""Rows of one forward pass; no rows for a dummy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpan:
    """Location of the predictions of one sequence's targets: `values[row, start:stop]` is [T]."""

    sequence: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Arrays of one forward pass. A dummy has one position and trains nothing."""

    input_ids: Array  # [B, S] int64
    position_ids: Array  # [B, S] int64
    labels: Array  # [B, S] int64, the token after each position (0 if none)
    mask: Array  # [B, S] bool, True = the label is a trained target
    sequence: Array  # [B, S] int64, the index in `spans` of the sequence a target belongs to
    streams: Mapping[str, Array]  # each [B, S] float32, 0 where there is no target
    spans: tuple[TargetSpan, ...]


def plan(
    lengths: Sequence[int],
    ranks: int,
    tokens_per_micro_batch: int,
    tokens_per_row: int,
    batching: Batching,
    unit_sizes: Sequence[int] | None = None,
) -> list[list[MicroBatchPlan]]:
    """Distribute sequences over ranks, micro-batches and rows.

    Longest first, each sequence goes to the rank with the fewest tokens. On each rank sequences are
    put into rows (packed: first-fit decreasing; padded: one per row), and rows into micro-batches,
    longest first, so that the rows of one micro-batch have similar lengths.

    Args:
        lengths: positions of each sequence (`TokenSequence.num_inputs`).
        ranks: number of learner ranks.
        tokens_per_micro_batch: bound of rows times the longest row.
        tokens_per_row: capacity of a packed row, and bound of a single sequence.
        batching: "packed" or "padded".
        unit_sizes: number of sequences of each unit, in order. A unit is planned like one sequence
            with the total length of its sequences. Default: each sequence is a unit.

    Returns:
        One list of micro-batches per rank, all of the same length.

    Raises:
        DataError: a length outside [1, tokens_per_row].
        ConfigError: bounds that cannot hold one row.
        RecordError: units that do not add up to the sequences.
    """
    if unit_sizes is not None:
        units = _units(len(lengths), unit_sizes)
        sums = [sum(lengths[i] for i in unit) for unit in units]
        _check_bounds(sums, ranks, tokens_per_micro_batch, tokens_per_row, "unit")
        laid = plan(sums, ranks, tokens_per_micro_batch, tokens_per_row, batching)
        return [[tuple(_members(row, units) for row in batch) for batch in own] for own in laid]
    _check_bounds(lengths, ranks, tokens_per_micro_batch, tokens_per_row)
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    loads, shares = [0] * ranks, [[] for _ in range(ranks)]
    for index in longest_first:
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += lengths[index]
        shares[rank].append(index)
    capacity = tokens_per_row if batching == "packed" else 0
    plans = [
        _micro_batches(_rows(share, lengths, capacity), lengths, tokens_per_micro_batch)
        for share in shares
    ]
    count = max(1, *(len(p) for p in plans))
    return [p + [()] * (count - len(p)) for p in plans]


def _units(num_sequences: int, sizes: Sequence[int]) -> list[range]:
    """Return the indices of the sequences of each unit."""
    if any(size < 1 for size in sizes) or sum(sizes) != num_sequences:
        raise RecordError(
            f"units of {list(sizes)[:8]} sequences do not add up to {num_sequences} sequences; each "
            "unit has at least one"
        )
    ends = np.cumsum(sizes)
    return [range(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]


def _members(row: Row, units: Sequence[range]) -> Row:
    return tuple(index for unit in row for index in units[unit])


def _check_bounds(
    lengths: Sequence[int],
    ranks: int,
    tokens_per_micro_batch: int,
    tokens_per_row: int,
    what: str = "sequence",
) -> None:
    if ranks < 1:
        raise ConfigError(f"ranks = {ranks} must be at least 1")
    if not 1 <= tokens_per_row <= tokens_per_micro_batch:
        raise ConfigError(
            f"tokens_per_row = {tokens_per_row} must be in [1, tokens_per_micro_batch = "
            f"{tokens_per_micro_batch}]; lower it or raise the budget"
        )
    for index, length in enumerate(lengths):
        if not 1 <= length <= tokens_per_row:
            raise DataError(
                f"{what} {index} has {length} positions, outside [1, tokens_per_row = "
                f"{tokens_per_row}]; raise tokens_per_row or shorten the {what}"
            )


def _rows(share: Sequence[int], lengths: Sequence[int], capacity: int) -> list[Row]:
    """Put the sequences of `share` (longest first) into rows by first-fit decreasing.

    Returns the rows, longest first. A sequence longer than `capacity` gets its own row, so with
    capacity 0 every sequence does.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    for index in share:
        for row, tokens in enumerate(used):
            if tokens + lengths[index] <= capacity:
                rows[row].append(index)
                used[row] += lengths[index]
                break
        else:
            rows.append([index])
            used.append(lengths[index])
    order = sorted(range(len(rows)), key=lambda r: (-used[r], r))
    return [tuple(rows[r]) for r in order]


def _micro_batches(
    rows: Sequence[Row], lengths: Sequence[int], tokens_per_micro_batch: int
) -> list[MicroBatchPlan]:
    batches: list[list[Row]] = []
    width = 0
    for row in rows:
        # rows come longest first, so the first row of a micro-batch is its width
        if batches and (len(batches[-1]) + 1) * width <= tokens_per_micro_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
            width = sum(lengths[i] for i in row)
    return [tuple(batch) for batch in batches]


def collate(
    batch: MicroBatchPlan, sequences: Sequence[TokenSequence], streams: Sequence[str] = ()
) -> MicroBatch:
    """Build the arrays of one planned micro-batch, with the named streams (all sequences have them)."""
    num_rows = max(1, len(batch))
    width = max([1, *(sum(sequences[i].num_inputs for i in row) for row in batch)])
    shape = (num_rows, width)
    input_ids, position_ids, labels, owner = (np.zeros(shape, dtype=np.int64) for _ in range(4))
    mask = np.zeros(shape, dtype=np.bool_)
    values = {name: np.zeros(shape, dtype=np.float32) for name in streams}
    spans = []
    for row, members in enumerate(batch):
        begin = 0
        for index in members:
            sequence = sequences[index]
            end = begin + sequence.num_inputs
            tokens = np.concatenate([sequence.prompt_ids, sequence.target_ids])
            input_ids[row, begin:end] = tokens[:-1]
            labels[row, begin:end] = tokens[1:]
            position_ids[row, begin:end] = np.arange(end - begin)
            start = end - len(sequence.target_ids)
            owner[row, start:end] = len(spans)
            mask[row, start:end] = True if sequence.target_mask is None else sequence.target_mask
            for name, array in values.items():
                array[row, start:end] = sequence.streams[name]
            spans.append(TargetSpan(sequence=index, row=row, start=start, stop=end))
            begin = end
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        mask=mask,
        sequence=owner,
        streams=values,
        spans=tuple(spans),
    )
