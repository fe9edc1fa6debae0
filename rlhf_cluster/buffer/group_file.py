"""Format of a group on disk: one Arrow IPC file, encoded and decoded.

The file has one row per rollout and a column `record.field` for every field of `Ticket`, `Prompt`,
`Rollout`, `ScoredRollout` and `ExperienceGroup`, except those that belong to one step alone. Any
Arrow reader opens it.

Values of data files are JSON text, of the same types when read. JSON's own kinds are written as
they are. The kinds that only Parquet has, and dictionaries with keys that are not plain text,
become an object with one key that starts with "$": {"$bytes": "aGk="}. A value of any other type
raises `StoreError`; none is turned into text silently.

Promises:
- a decoded group equals the encoded one: arrays bitwise, absent ones absent;
- the file carries a seal with a checksum of all its other bytes. `decode` checks it before it
  parses anything, so a truncated or changed file is an error with its reason, never a group;
- `read_header` needs the first `HEADER_BYTES` alone. It trusts them: use it to choose a file, not
  to read a group.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
from xxhash import xxh3_128

from rlhf_cluster.errors import RecordError, StoreError
from rlhf_cluster.records import (
    Array,
    ExperienceGroup,
    FinishReason,
    Prompt,
    Rollout,
    ScoredRollout,
    Ticket,
)

if TYPE_CHECKING:
    import pyarrow as pa


_Codec = tuple[type, Callable[[Any], Any], Callable[[Any], Any]]

_CODECS: dict[str, _Codec] = {
    "bytes": (bytes, lambda v: base64.b64encode(v).decode(), base64.b64decode),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (
        timedelta,
        lambda v: [v.days, v.seconds, v.microseconds],
        lambda v: timedelta(*v),
    ),
    "decimal": (Decimal, str, Decimal),
    "uuid": (UUID, str, UUID),
    "tuple": (tuple, lambda v: [_pack(e) for e in v], lambda v: tuple(_unpack(e) for e in v)),
    "dict": (
        dict,
        lambda v: [[_pack(k), _pack(e)] for k, e in v.items()],
        lambda v: {_unpack(k): _unpack(e) for k, e in v},
    ),
}

_BY_TYPE = {kind: (name, encode) for name, (kind, encode, _) in _CODECS.items()}


def to_text(value: Any) -> str:
    """Return `value` as JSON text, ASCII only. Raises `StoreError`."""
    return json.dumps(_pack(value), separators=(",", ":"))


def from_text(text: str) -> Any:
    return _unpack(json.loads(text))


def _pack(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_pack(entry) for entry in value]
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _pack(entry) for key, entry in value.items()}
        kind = dict
    if kind not in _BY_TYPE:
        raise StoreError(
            f"a value of a prompt has the type {kind.__module__}.{kind.__name__}, expected one of "
            "JSON's or Parquet's. Leave that column out of the data, or set buffer.durable = false"
        )
    name, encode = _BY_TYPE[kind]
    return {f"${name}": encode(value)}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (key := next(iter(value))).startswith("$"):
        return _CODECS[key[1:]][2](value[key])
    return {key: _unpack(entry) for key, entry in value.items()}


FORMAT = 3

HEADER_BYTES = 1 << 15

_SEAL = re.compile(
    rb"rlhf_cluster group format=(\d{4}) newest_version=(-?\d{9,}) made_by=([0-9a-f]{32}) "
    rb"xxh3_128=([0-9a-f]{32})"
)

_ROLLOUT_ARRAYS = {
    "prompt_ids": np.int32,
    "response_ids": np.int32,
    "sampled_logprobs": np.float32,
    "versions": np.int32,
    "response_mask": np.bool_,
}

_SCORED_ARRAYS = {
    "ref_logprobs": np.float32,
    "exact_logprobs": np.float32,
    "teacher_logprobs": np.float32,
    "reference_kl": np.float32,
    "step_ends": np.int32,
    "step_rewards": np.float64,
}

_SCORED_MAPS = ("reward_parts", "watched")

_SCORED_TEXTS = ("scorer", "scorer_version")

_ROLLOUT_TEXTS = ("rollout_id", "prompt_id", "finish_reason", "worker")

_ROLLOUT_NUMBERS = ("temperature", "started_s", "finished_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Header of a file. `newest_version` is the newest weights that the group depends on.

    `made_by` identifies the settings that it was made with.
    """

    newest_version: int
    made_by: str


def encode(group: ExperienceGroup, header: Header) -> bytes:
    """Return the bytes of a file of `group`. Raises `StoreError` if the format cannot hold it."""
    import pyarrow as pa

    if not group.scored:
        raise StoreError(f"group {group.group_id} has no rollouts; expected at least one")
    columns = _group_columns(group) | _rollout_columns(group.scored)
    table = pa.table(columns)
    for number in range(
        1000
    ):  # until one that the data does not contain: the first, in all likelihood
        hole = f"{number:032x}".encode()
        seal = (
            f"rlhf_cluster group format={FORMAT:04d} newest_version={header.newest_version:09d} "
            f"made_by={header.made_by} xxh3_128="
        ).encode() + hole
        image = _image(table.replace_schema_metadata({b"rlhf_cluster": seal}))
        parts = image.split(hole)
        if len(parts) == 3:  # the schema is at both ends of the file
            return _checksum(parts).join(parts)
    raise StoreError(
        f"group {group.group_id}: holds the text of every seal tried; cannot be sealed"
    )


def read_header(start: bytes) -> Header:
    """Return the header of a file that begins with `start`. Raises `StoreError`."""
    found = _SEAL.search(start, 0, HEADER_BYTES)
    if found is None:
        raise StoreError("has no seal where it begins: cut off, or not a group of experience")
    if int(found[1]) != FORMAT:
        raise StoreError(
            f"has format {int(found[1])}, this version reads {FORMAT}. Read it with the version that "
            "wrote it"
        )
    return Header(newest_version=int(found[2]), made_by=found[3].decode())


def decode(image: bytes) -> tuple[ExperienceGroup, Header]:
    """Parse the result of `encode`. Raises `StoreError` unless every byte is as it was written."""
    import pyarrow as pa

    header = read_header(image)
    found = _SEAL.search(image, 0, HEADER_BYTES)
    assert found is not None
    parts = image.split(found[4])
    checksum = _checksum(parts)
    if checksum != found[4]:
        raise StoreError(
            f"{len(image)} bytes have the checksum {checksum.decode()}, expected "
            f"{found[4].decode()}: damaged after it was written, or not whole"
        )
    try:
        with pa.ipc.open_file(pa.py_buffer(image)) as reader:
            return _group(reader.get_batch(0)), header
    except (pa.ArrowException, KeyError, ValueError, TypeError, RecordError) as error:
        raise StoreError(f"cannot be read ({error!r}), although its checksum is right") from error


def _image(table: pa.Table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _checksum(parts: Sequence[bytes]) -> bytes:
    checksum = xxh3_128()
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest().encode()


def _group_columns(group: ExperienceGroup) -> dict[str, Any]:
    """Return the columns that all rollouts share.

    A long value is in the file once, as a dictionary of one entry.
    """
    import pyarrow as pa

    num_rows = len(group.scored)
    ticket, prompt = group.ticket, group.prompt

    def shared(text: str) -> pa.Array:
        index = pa.array(np.zeros(num_rows, dtype=np.int32))
        return pa.DictionaryArray.from_arrays(index, pa.array([text], pa.large_string()))

    return {
        "ticket.number": pa.array([ticket.number] * num_rows, pa.int64()),
        "ticket.version": pa.array([ticket.version] * num_rows, pa.int64()),
        "ticket.purpose": shared(ticket.purpose),
        "ticket.attempt": pa.array([ticket.attempt] * num_rows, pa.int64()),
        "prompt.prompt_id": shared(prompt.prompt_id),
        "prompt.source": shared(to_text(prompt.source)),
        "prompt.columns": shared(to_text(prompt.columns)),
        "prompt.token_ids": _lists([prompt.token_ids] + [None] * (num_rows - 1), np.int32),
        "group.greedy_reward": pa.array([group.greedy_reward] * num_rows, pa.float64()),
    }


def _rollout_columns(scored: Sequence[ScoredRollout]) -> dict[str, Any]:
    import pyarrow as pa

    rollouts = [s.rollout for s in scored]
    columns: dict[str, Any] = {}
    for name in _ROLLOUT_TEXTS:
        columns[f"rollout.{name}"] = pa.array([str(getattr(r, name)) for r in rollouts])
    for name in _ROLLOUT_NUMBERS:
        columns[f"rollout.{name}"] = pa.array([getattr(r, name) for r in rollouts], pa.float64())
    for name, dtype in _ROLLOUT_ARRAYS.items():
        columns[f"rollout.{name}"] = _lists([getattr(r, name) for r in rollouts], dtype)
    for name in _SCORED_TEXTS:
        columns[f"scored.{name}"] = pa.array([getattr(s, name) for s in scored])
    columns["scored.reward"] = pa.array([s.reward for s in scored], pa.float64())
    parts = pa.map_(pa.string(), pa.float64())
    for name in _SCORED_MAPS:
        pairs = [[*getattr(s, name).items()] for s in scored]
        columns[f"scored.{name}"] = pa.array(pairs, parts)
    for name, dtype in _SCORED_ARRAYS.items():
        columns[f"scored.{name}"] = _lists([getattr(s, name) for s in scored], dtype)
    return columns


def _lists(arrays: Sequence[Array | None], dtype: Any) -> pa.Array:
    import pyarrow as pa

    empty = np.empty(0, dtype=dtype)
    filled = [empty if array is None else array for array in arrays]
    ends = np.cumsum([0, *map(len, filled)], dtype=np.int64)
    absent = pa.array([array is None for array in arrays])
    values = pa.array(np.concatenate(filled).astype(dtype, copy=False))
    return pa.LargeListArray.from_arrays(pa.array(ends), values, mask=absent)


def _arrays(column: Any) -> Callable[[int], Array | None]:
    """Return a function from a row to its array, without a copy except of booleans."""
    values = column.values.to_numpy(zero_copy_only=False)
    values.flags.writeable = False
    ends = column.offsets.to_numpy()
    there = column.is_valid().to_pylist()
    return lambda row: values[ends[row] : ends[row + 1]] if there[row] else None


def _group(batch: pa.RecordBatch) -> ExperienceGroup:
    arrays = {
        name: _arrays(batch.column(name))
        for name in batch.schema.names
        if hasattr(batch.column(name), "offsets")
        and name.removeprefix("scored.") not in _SCORED_MAPS
    }
    plain = {
        name: batch.column(name).to_pylist() for name in batch.schema.names if name not in arrays
    }
    token_ids = arrays["prompt.token_ids"](0)
    assert token_ids is not None
    return ExperienceGroup(
        ticket=Ticket(
            number=plain["ticket.number"][0],
            version=plain["ticket.version"][0],
            purpose=plain["ticket.purpose"][0],
            attempt=plain["ticket.attempt"][0],
        ),
        prompt=Prompt(
            prompt_id=plain["prompt.prompt_id"][0],
            token_ids=token_ids,
            source=from_text(plain["prompt.source"][0]),
            columns=from_text(plain["prompt.columns"][0]),
        ),
        scored=tuple(_read_scored_rollout(row, plain, arrays) for row in range(batch.num_rows)),
        greedy_reward=plain["group.greedy_reward"][0],
    )


def _read_scored_rollout(row: int, plain: dict[str, Any], arrays: dict[str, Any]) -> ScoredRollout:
    def texts(record: str, names: Sequence[str]) -> dict[str, Any]:
        return {name: plain[f"{record}.{name}"][row] for name in names}

    def tokens(record: str, names: dict[str, Any]) -> dict[str, Any]:
        return {name: arrays[f"{record}.{name}"](row) for name in names}

    rollout = texts("rollout", (*_ROLLOUT_TEXTS, *_ROLLOUT_NUMBERS))
    rollout["finish_reason"] = FinishReason(rollout["finish_reason"])
    return ScoredRollout(
        rollout=Rollout(**rollout, **tokens("rollout", _ROLLOUT_ARRAYS)),
        **{name: dict(plain[f"scored.{name}"][row]) for name in _SCORED_MAPS},
        **texts("scored", ("reward", *_SCORED_TEXTS)),
        **tokens("scored", _SCORED_ARRAYS),
    )
