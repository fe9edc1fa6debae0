"""A weight transport: reads versions from any storage that fsspec knows, such as an object store."""

from collections.abc import Sequence
from typing import Any

import fsspec

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.transport import Blob, Deadline


class FsspecBlob:
    def __init__(self, storage: Any, path: str) -> None:
        self._storage, self.where = storage, path
        self.num_bytes = int(storage.size(path))

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` with the bytes at `position`."""
        try:
            data = self._storage.cat_file(self.where, position, position + len(target))
        except OSError as error:
            raise WeightError(f"{self.where}: cannot read the shard file ({error})") from error
        if len(data) != len(target):
            raise WeightError(f"{self.where}: ends before byte {position + len(target)}")
        target[:] = data

    def close(self) -> None:
        """Release what is open: nothing."""


class FsspecSource:
    """A `ShardSource`. Hashes are verified by the reader, so damage on the way is found."""

    def __init__(self, url: str, **options: Any) -> None:
        self._storage, self._root = fsspec.core.url_to_fs(url, **options)

    def where(self, version: int) -> str:
        return f"{self._root}/v{version:06d}"

    def has(self, version: int) -> bool:
        return bool(self._storage.exists(f"{self.where(version)}/manifest.json"))

    def manifest(self, version: int) -> bytes:
        return self._read(lambda: self._storage.cat_file(f"{self.where(version)}/manifest.json"))

    def open(self, version: int, names: Sequence[str], deadline: Deadline | None) -> list[Blob]:
        folder = self.where(version)
        return self._read(lambda: [FsspecBlob(self._storage, f"{folder}/{n}") for n in names])

    def _read(self, call: Any) -> Any:
        try:
            return call()
        except OSError as error:
            raise WeightError(f"{self._root}: {type(error).__name__}: {error}") from error
