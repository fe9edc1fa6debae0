"""Values of data files as JSON text, and back: the same values of the same types.

JSON's own kinds are written as they are. What Parquet has beside them, and a dictionary whose keys are
not plain text, becomes an object with one key that starts with "$": {"$bytes": "aGk="}. Nothing else
is written: a value of any other type raises `StoreError`, none is turned into text silently.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from rlhf_cluster.errors import StoreError

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
    """ASCII only. Raises `StoreError`."""
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
