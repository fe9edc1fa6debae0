"""The file system as transport: shards are files in the folder of their version.

Promises of the writing side:
- A file has a temporary name until it is complete.
- Free space is checked before a file is written.
- A failed write leaves nothing behind.

Promise of the reading side: data is read with `pread`, never mapped. So a file that shrinks or
vanishes while it is read causes an error, not a SIGBUS.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.util.durable_files import (
    make_folders,
    sync_folder,
)
from rlhf_cluster.util.slow_disk import check_not_abandoned
from rlhf_cluster.weights.transports.transport import (
    Blob,
    Deadline,
    ShardImage,
)

MANIFEST_NAME = "manifest.json"
_CALL_BYTES = 64 << 20  # between two checks of the deadline


def version_dir(root: str | Path, version: int) -> Path:
    """Return the folder of a published version."""
    return Path(root).absolute() / f"v{version:06d}"


def partial_dir(root: str | Path, version: int, attempt: int = 0) -> Path:
    """Return the folder in which an attempt writes a version before it is published."""
    final = version_dir(root, version)
    return final.with_name(
        f"{final.name}.a{attempt}.partial" if attempt else f"{final.name}.partial"
    )


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def gone(where: str) -> str:
    """Return the message for a version that does not exist. `where`: its name in errors."""
    return (
        f"{where}: there is no such version (any more). Retention removes all but the newest "
        "versions; pull the latest one"
    )


class FileSink:
    """Sink that writes a rank's shards below the store `root`, into folders of unfinished versions."""

    def __init__(
        self,
        root: str | Path,
        *,
        fsync: bool = False,
        free_bytes: Callable[[Path], int] = free_bytes,
        deadline: Deadline | None = None,
        attempt: int = 0,
    ) -> None:
        self._root, self._attempt = root, attempt
        self._fsync = fsync
        self._free_bytes = free_bytes
        self._deadline = deadline

    def write(self, version: int, name: str, image: ShardImage) -> None:
        folder = partial_dir(self._root, version, self._attempt)
        try:
            make_folders(folder, self._fsync)
            self._check_space(folder, image.num_bytes)
            self._write(folder / name, image)
        except StalledError:  # an OSError too, as every TimeoutError
            raise
        except OSError as error:
            raise WeightError(
                f"version {version}: cannot write {name} in {folder} ({error})"
            ) from error

    def _check_space(self, folder: Path, needed: int) -> None:
        free = self._free_bytes(folder)
        if needed > free:
            raise WeightError(
                f"{folder}: a shard needs {needed} bytes and {free} are free. Free space, keep fewer "
                "versions, or give weights.root another folder"
            )

    def _write(self, path: Path, image: ShardImage) -> None:
        # The name is unique to the thread: one that timed out may still write during the next try.
        temporary = path.with_suffix(f".tmp-{os.getpid()}-{threading.get_ident()}")
        try:
            with temporary.open("wb", buffering=0) as file:
                for chunk in image.chunks:
                    self._write_chunk(file.fileno(), chunk)
                if self._fsync:
                    os.fsync(file.fileno())
            check_not_abandoned(path)
            temporary.replace(path)
            if self._fsync:
                sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_chunk(self, fd: int, chunk: memoryview) -> None:
        done = 0
        while done < len(chunk):
            if self._deadline is not None:
                self._deadline.left_s()
            done += os.write(fd, chunk[done : done + _CALL_BYTES])


class FileSource:
    """Source of the versions in folder `root`."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)

    def where(self, version: int) -> str:
        return str(version_dir(self._root, version))

    def has(self, version: int) -> bool:
        return version_dir(self._root, version).is_dir()

    def manifest(self, version: int) -> bytes:
        folder = version_dir(self._root, version)
        try:
            return (folder / MANIFEST_NAME).read_bytes()
        except FileNotFoundError as error:
            raise WeightError(gone(str(folder))) from error
        except OSError as error:
            raise WeightError(
                f"{folder / MANIFEST_NAME}: cannot read the manifest ({error})"
            ) from error

    def open(
        self, version: int, names: Sequence[str], deadline: Deadline | None = None
    ) -> list[Blob]:
        return open_files(version_dir(self._root, version), names)


def open_files(folder: Path, names: Sequence[str]) -> list[Blob]:
    """Open the files `names` of `folder`. Raises `WeightError`, and none stays open."""
    opened: list[Blob] = []
    try:
        for name in names:
            opened.append(FileBlob(folder / name))
    except WeightError:
        for blob in opened:
            blob.close()
        raise
    return opened


class FileBlob:
    """One shard file, open for reading."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise WeightError(f"{path}: the shard file is missing") from error
        except OSError as error:
            raise WeightError(f"{path}: cannot open the shard file ({error})") from error
        self.num_bytes = os.fstat(self._fd).st_size

    def read_into(self, target: memoryview, position: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done:]], position + done)
            except OSError as error:
                raise WeightError(f"{self.where}: cannot read the shard file ({error})") from error
            if count == 0:
                raise WeightError(
                    f"{self.where}: ends at byte {position + done}, expected {len(target)} bytes "
                    f"from {position} on; the file is truncated"
                )
            done += count

    def close(self) -> None:
        os.close(self._fd)
