"""Manifest of a version of the weights, and the reports from which it is assembled.

A manifest lists every tensor (type, shape, hash) with the parts that hold its elements, and every
shard file (length, hash of its header). Promises, checked whenever one is built or decoded:

- The parts of a tensor cover it once: no hole, no overlap, no part outside it.
- A file is a plain name in the manifest's folder, never a path, so nothing outside it is read.
- A `delta` version names every version it builds on, oldest first, by number and digest. The first
  is a full snapshot, the others build on those before them, and there are at most `MAX_CHAIN`.
- An `adapter` version lists the tensors of the model, and the `factors` that some of them are merged
  from on reading (`formats.lora_factors`). The first such version stores everything. Later ones
  build on it: they store adapters only, and use the tensors that never change from the first one.
- `digest` is the digest of the tensor hashes that are listed, whatever the format.
- An unknown format, hash scheme or key is refused, never guessed at.

Everything is JSON and safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import (
    HASH_SCHEME,
    combine_hashes,
)
from rlhf_cluster.weights.formats import lora_factors

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element, by the torch name of the type: the types that a version may hold."""

MAX_CHAIN = 64
"""Most versions that a version may build on. Bounds the files that a reader holds open, per rank."""
BORDERS = "#borders"
"""Suffix of a tensor's name, for the bytes of `tensor_hashing.border_pieces` that a commit reads."""

_KNOWN_FORMATS = ("full", "delta", "adapter")
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.safetensors$")]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPart:
    """One rank's share of one tensor: elements [offset, offset + numel) of it, flattened.

    `shape` is the whole tensor's. `tensor` is flat, contiguous, on the CPU, and may be empty. With a
    `scale` it is not stored: readers merge it from the parts named after it (`lora_factors.merge`).
    `stream` is the key of the stochastic rounding of merged elements to bfloat16
    (`stochastic_rounding`); None: they are rounded to nearest.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    tensor: Tensor  # [numel]
    scale: float | None = None
    stream: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """Description of the part of one tensor that a rank wrote.

    `piece_hashes` are those of `tensor_hashing.hash_pieces`, over the elements themselves, however
    they are stored. `delta_bytes` is as in `Part`, `scale` and `stream` as in `LocalPart`. With a
    scale, `delta_bytes` is 0. Without one, `stream` is None.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    numel: int
    piece_hashes: bytes
    delta_bytes: int | None = None
    scale: float | None = None
    stream: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """Description of the shard file that a rank wrote, about 1/4000 of its tensors' size."""

    version: int
    base: int | None  # the version that its differences are against
    rank: int
    file: str
    num_bytes: int
    parts: Mapping[str, PartReport]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(_Entry):
    """Elements [offset, offset + numel) of a tensor, stored under the tensor's name in `file`."""

    file: _FileName
    offset: _Count
    numel: Annotated[int, Field(gt=0)]
    delta_bytes: _Count | None = None
    """Length of the stored difference (`delta.encode`) from the same elements of the base version.

    At 0 the elements are equal, and nothing is stored. None: the elements themselves are stored.
    """


class TensorEntry(_Entry):
    """One tensor. `hash` covers name, type, shape and bytes, whatever the sharding.

    It has no parts, and nothing of it is stored, in two cases:
    - it has a `scale`: it is merged from the factors named after it with that scale, and rounded by
      the stream with the key `stream`;
    - it is the same as in the base version.
    """

    dtype: str
    shape: tuple[_Count, ...]
    hash: _Hash
    parts: tuple[Part, ...]
    scale: float | None = None
    stream: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class FileEntry(_Entry):
    """One shard file: its length, and the hash of its header (length field included)."""

    num_bytes: _Count
    header_hash: _Hash


class Link(_Entry):
    """A version that another one builds on."""

    version: _Count
    digest: _Hash


class Manifest(_Entry):
    """One version of the weights."""

    format: Literal["full", "delta", "adapter"] = "full"
    version: _Count
    chain: tuple[Link, ...] = ()
    """Versions that this one builds on: the full snapshot first, its base last. Empty when full."""
    created_s: float
    """Unix time of the commit, in seconds."""
    hash_scheme: str = HASH_SCHEME
    digest: _Hash
    """Digest of the tensors, equal for equal tensors, however many ranks wrote them."""
    files: dict[_FileName, FileEntry]
    tensors: dict[str, TensorEntry]
    """Tensors of the model, in the order in which the learner reported them."""
    factors: dict[str, TensorEntry] = {}
    """Stored tensors that those with a `scale` are merged from."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, file headers not counted."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def stored(self) -> Mapping[str, TensorEntry]:
        """Entries of all tensors whose elements this version, or one that it builds on, stores."""
        own = {name: entry for name, entry in self.tensors.items() if entry.scale is None}
        return {**own, **self.factors}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the version's own shard files."""
        return sum(entry.num_bytes for entry in self.files.values())

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.hash_scheme != HASH_SCHEME:
            raise ValueError(
                f"hash_scheme {self.hash_scheme!r}, this program knows {HASH_SCHEME!r}"
            )
        _check_chain(self)
        for name, entry in (*self.tensors.items(), *self.factors.items()):
            _check_entry(self, name, entry)
        _check_factors(self)
        digest = combine_hashes({name: entry.hash for name, entry in self.tensors.items()})
        if digest != self.digest:
            raise ValueError(f"digest is {self.digest}, the listed tensor hashes give {digest}")
        return self


def encode(manifest: Manifest) -> str:
    """Return the manifest as JSON."""
    return manifest.model_dump_json(indent=1)


def decode(text: str | bytes, source: str) -> Manifest:
    """Parse and check a manifest. Raises `WeightError` that starts with `source`."""
    try:
        tree: Any = json.loads(text)
    except ValueError as error:
        raise WeightError(
            f"{source}: not valid JSON ({error}); the file is torn or damaged"
        ) from error
    found = tree.get("format") if isinstance(tree, dict) else None
    if found not in _KNOWN_FORMATS:
        raise WeightError(
            f"{source}: format {found!r}, this program reads {', '.join(_KNOWN_FORMATS)}. "
            "Read it with the release that wrote it, or publish again"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise WeightError(f"{source}: {explain_problems(error)}") from None
    except WeightError as error:
        raise WeightError(f"{source}: {error}") from error


def explain_problems(error: ValidationError) -> str:
    """Return where and what the first five problems are, in one line."""
    problems = error.errors(include_url=False, include_input=False)
    return "; ".join(
        ": ".join(
            filter(None, (".".join(map(str, p["loc"])), p["msg"].removeprefix("Value error, ")))
        )
        for p in problems[:5]
    )


def check_coverage(name: str, shape: Sequence[int], parts: Sequence[Part]) -> None:
    """Raise `WeightError` unless the parts, in order, cover the flattened tensor exactly once."""
    numel, reached = math.prod(shape), 0
    for part in parts:
        if part.offset > reached:
            raise WeightError(
                f"tensor {name!r}: hole, elements [{reached}, {part.offset}) of {numel} are in "
                "no shard"
            )
        if part.offset < reached:
            raise WeightError(
                f"tensor {name!r}: overlap, {part.file} starts at element {part.offset}, "
                f"but those before {reached} are already in another shard"
            )
        reached += part.numel
    if reached < numel:
        raise WeightError(
            f"tensor {name!r}: hole, elements [{reached}, {numel}) of {numel} are in no shard"
        )
    if reached > numel:
        raise WeightError(
            f"tensor {name!r}: shards hold {reached} elements, shape {list(shape)} has only {numel}"
        )


def _check_entry(manifest: Manifest, name: str, entry: TensorEntry) -> None:
    if entry.dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has dtype {entry.dtype!r}, known: {_known_types()}")
    for part in entry.parts:
        if part.delta_bytes is not None and manifest.format != "delta":
            raise ValueError(f"tensor {name!r} has a difference, and the version no base")
        if part.file not in manifest.files:
            raise ValueError(f"tensor {name!r} has a part in {part.file!r}, not in `files`")
    if entry.stream is not None and (entry.scale is None or entry.dtype != "bfloat16"):
        raise ValueError(f"tensor {name!r} has a stream, and is not merged in bfloat16")
    is_kept = manifest.format == "adapter" and bool(manifest.chain)
    if entry.parts or not (is_kept or entry.scale is not None):
        check_coverage(name, entry.shape, entry.parts)


def _check_factors(manifest: Manifest) -> None:
    merged = {n: e for n, e in manifest.tensors.items() if e.scale is not None}
    if (manifest.format == "adapter") != bool(merged):
        raise ValueError(f"format {manifest.format!r} with {len(merged)} merged tensors")
    shapes = {name: entry.shape for name, entry in manifest.factors.items()}
    for name, entry in merged.items():
        if entry.parts:
            raise ValueError(f"tensor {name!r} is both stored and merged")
        lora_factors.check_factors(name, entry.shape, shapes)
    for name in shapes:
        if not lora_factors.is_factor(name) or name.rpartition("#")[0] not in merged:
            raise ValueError(f"factor {name!r} is of no tensor")


def _check_chain(manifest: Manifest) -> None:
    numbers = [link.version for link in manifest.chain]
    if manifest.format != "adapter" and (manifest.format == "delta") != bool(numbers):
        raise ValueError(f"format {manifest.format!r} with a chain of {len(numbers)} versions")
    if numbers != sorted(set(numbers)) or (numbers and numbers[-1] >= manifest.version):
        raise ValueError(f"version {manifest.version} builds on {numbers}, expected rising numbers")
    if len(numbers) > MAX_CHAIN:
        raise ValueError(f"a chain of {len(numbers)} versions, at most {MAX_CHAIN} are allowed")


def _known_types() -> str:
    return ", ".join(ITEM_BYTES)
