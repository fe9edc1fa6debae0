"""The versioned weight store: immutable versions in one folder that all processes see.

    v000042/          manifest.json and shard files; complete, never changed again
    v000043.a2.partial/  being written by the ranks of attempt 2; invisible
    writer.json       the attempt that publishes (`weights.writer_fence`)
    v000041.pin       keeps version 41 whatever the retention
    latest            the name of the newest version

Promises:
- `latest` names a complete version, or does not exist, whenever any process is killed.
- `latest` only moves forward (`rewind` is the one exception), and only to committed versions.
- A version on disk above `latest` was never visible. The next commit removes it, with every older
  half-written one.
- A learner that was replaced makes nothing visible any more.
- Retention keeps the newest `keep` versions, the pinned ones, and all that these build on. It never
  removes the latest.
- A reader gets every tensor verified before it sees it, or a `WeightError` that names tensor and
  file. If retention removes a version while it is read, the reader gets such an error at worst.

A version is stored as a full snapshot, or as the difference from another one (its base), which its
ranks name in their reports. Its digest is that of its tensors either way.

A file lock lets one commit run at a time. Readers take no lock.
"""

from __future__ import annotations

import functools
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.durable_files import (
    find_storage_cause,
    remove_folder,
    sync_folder,
    write_all,
)
from rlhf_cluster.util.slow_disk import check_not_abandoned
from rlhf_cluster.weights.assemble import assemble
from rlhf_cluster.weights.manifest import (
    MAX_CHAIN,
    Manifest,
    ShardReport,
    encode,
)
from rlhf_cluster.weights.read_version import (
    open_version,
    read,
)
from rlhf_cluster.weights.shards import write_shard
from rlhf_cluster.weights.transports.shared_files import (
    MANIFEST_NAME,
    FileSource,
    gone,
    open_files,
    partial_dir,
    version_dir,
)
from rlhf_cluster.weights.transports.transport import ShardSource
from rlhf_cluster.weights.writer_fence import (
    LOCK_TIMEOUT_S,
    Writer,
    check,
    commit_lock,
    next_writer,
    publishing,
)

__all__ = [
    "begin_attempt",
    "commit",
    "latest",
    "open_version",
    "pin",
    "pinned",
    "read",
    "rewind",
    "unpin",
    "versions",
    "write_shard",
]

_POINTER = "latest"
_POINTER_TRIES = 20


def commit(
    root: str | Path,
    version: int,
    reports: Sequence[ShardReport],
    keep: int,
    expected_names: Mapping[str, tuple[int, ...]] | None = None,
    *,
    fsync: bool = False,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
    clock: Callable[[], float] = time.time,
    writer: Writer | None = None,
    fence: str | Path | None = None,
) -> WeightVersion:
    """Check what all ranks wrote, make it visible as `version`, and apply retention.

    `expected_names` maps every tensor's name to its shape; a missing, extra or renamed tensor is
    refused. Committing the latest version again, with equal tensors, puts the new files in the
    place of the old ones, which may be damaged. `fence` is the store that names the attempt that
    publishes, where that is another store.

    Raises `WeightError`: hole, overlap, wrong names, truncated file, a version older than the latest,
    ranks with different bases, a base that is missing or ends a chain of `MAX_CHAIN`.
    `StalledError`: another commit held the lock for `lock_timeout_s`. `FencedError`: `writer` is not
    the attempt that publishes in this store.
    """
    if keep < 1:
        raise WeightError(f"keep = {keep}: retention must keep at least 1 version")
    attempt = 0 if writer is None else writer.attempt
    partial = partial_dir(root, version, attempt)
    final = version_dir(root, version)
    final.parent.mkdir(parents=True, exist_ok=True)
    elsewhere = nullcontext() if fence is None else publishing(fence, writer, lock_timeout_s)
    with commit_lock(final.parent, lock_timeout_s), elsewhere:
        if fence is None:
            check(final.parent, writer)
        newest = _read_pointer(final.parent)
        if newest is not None and version < newest:
            raise WeightError(
                f"version {version} is older than the latest, {newest}: publishing goes forward. "
                "After a resume from an earlier step, rewind the store first"
            )
        base = base_of(FileSource(final.parent), version, reports)
        opens = functools.partial(open_files, partial)
        manifest = assemble(opens, version, reports, expected_names, base, clock())
        if version == newest:
            _check_same_tensors(final, manifest)
            # Before the folder goes: `latest` never names one that is not there.
            newest = _step_back(final.parent, version)
            remove_folder(final)
        # It also frees the name `final`: a commit that was killed after its rename holds it.
        _remove_leftovers(final.parent, newest)
        write_all(partial / MANIFEST_NAME, encode(manifest).encode(), fsync)
        _remove_strangers(partial, manifest)
        check_not_abandoned(final)
        partial.rename(final)
        if fsync:
            sync_folder(final.parent)
        _point_at(final.parent, version, fsync)
        _retain(final.parent, version, keep, attempt)
    return describe(final, manifest)


def begin_attempt(root: str | Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Writer:
    """Return a new attempt, the only one that may publish from this call on.

    Removes the half-written versions of earlier attempts. Raises `WeightError`, `StalledError`.
    """
    root = Path(root).absolute()
    root.mkdir(parents=True, exist_ok=True)
    with commit_lock(root, lock_timeout_s):
        writer = next_writer(root)
        for partial in root.glob("v*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
    return writer


def latest(root: str | Path) -> WeightVersion | None:
    """Return the newest version, or None when nothing was committed yet. Raises `WeightError`."""
    root = Path(root).absolute()
    for _ in range(_POINTER_TRIES):
        version = _read_pointer(root)
        if version is None:
            return None
        folder = version_dir(root, version)
        try:
            return describe(folder, open_version(folder))
        except WeightError:
            # Retention may have removed it since the pointer was read; then the pointer has moved.
            if _read_pointer(root) == version:
                raise
    raise WeightError(f"{root / _POINTER}: moved {_POINTER_TRIES} times while it was read")


def versions(root: str | Path) -> list[int]:
    """Return the numbers of the visible versions, oldest first."""
    root = Path(root).absolute()
    newest = _read_pointer(root)
    return [] if newest is None else [v for v in _on_disk(root) if v <= newest]


def pin(root: str | Path, version: int) -> None:
    """Keep a version whatever the retention, also after a power cut. Raises `WeightError`."""
    folder = version_dir(root, version)
    with _as_weight_error(f"{folder}: cannot be pinned"):
        folder.with_suffix(".pin").touch()
        sync_folder(folder.parent)
        # Looked at after the pin is set: before it, retention may still remove the folder.
        there = folder.is_dir()
    if not there:
        unpin(root, version)
        raise WeightError(gone(str(folder)))


def unpin(root: str | Path, version: int) -> None:
    """Leave a version to retention. Raises `WeightError`."""
    folder = version_dir(root, version)
    with _as_weight_error(f"{folder}: cannot be unpinned"):
        folder.with_suffix(".pin").unlink(missing_ok=True)


def pinned(root: str | Path) -> list[int]:
    """Return the numbers of the pinned versions. Raises `WeightError`."""
    with _as_weight_error(f"{root}: cannot be listed"):
        found = (_number(path.stem) for path in Path(root).glob("v*.pin"))
        return sorted(number for number in found if number is not None)


@contextmanager
def _as_weight_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WeightError(f"{what} ({error}). Look at that disk") from error


def rewind(
    root: str | Path, version: int, *, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> WeightVersion | None:
    """Remove every version above `version`, also pinned ones, and return the latest that is left.

    For a resume from an earlier step, whose versions will be published again. A latest version that a
    power cut truncated, or that `latest` cannot name any more, is removed too. Raises `WeightError`
    when the storage answers with an error.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        return None
    with commit_lock(root, lock_timeout_s):
        newest = _pointer_or_next(root, version)
        while newest is not None and (newest > version or not _opens(root, newest)):
            newest = _step_back(root, min(newest, version + 1))
        _remove_leftovers(root, newest)
    return latest(root)


def adopt(root: str | Path, version: int) -> None:
    """Make a version whose complete folder was copied into the store the latest one, and pin it."""
    root = Path(root).absolute()
    with commit_lock(root):
        open_version(version_dir(root, version))
        _point_at(root, version, fsync=True)
    pin(root, version)


def _read_pointer(root: Path) -> int | None:
    try:
        text = (root / _POINTER).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WeightError(f"{root / _POINTER}: cannot read it ({error})") from error
    number = _number(text)
    if number is None:
        raise WeightError(f"{root / _POINTER}: holds {text[:40]!r}, expected a name like v000042")
    return number


def _pointer_or_next(root: Path, version: int) -> int | None:
    """Return `_read_pointer`, or `version` + 1 where the pointer holds no name of a version.

    With `version` + 1, the caller checks all versions on disk up to `version`.
    """
    try:
        return _read_pointer(root)
    except WeightError as error:
        if find_storage_cause(error):
            raise
        return version + 1


def _opens(root: Path, version: int) -> bool:
    """Whether a version can be opened: False where it is damaged or missing.

    Raises the `WeightError` of a storage that fails.
    """
    try:
        open_version(version_dir(root, version))
    except WeightError as error:
        if find_storage_cause(error):
            raise
        return False
    return True


def _point_at(root: Path, version: int, fsync: bool) -> None:
    write_all(root / _POINTER, f"{version_dir(root, version).name}\n".encode(), fsync)


def _number(name: str) -> int | None:
    match = re.fullmatch(r"v(\d{6,})", name)
    return int(match[1]) if match else None


def _on_disk(root: Path) -> list[int]:
    found = (_number(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(number for number in found if number is not None)


def _remove_leftovers(root: Path, newest: int | None) -> None:
    """Remove versions that never became visible, and the rest of unfinished removals."""
    for number in _on_disk(root):
        if newest is None or number > newest:
            _remove_version(root, number)
    for trash in root.glob("*.trash"):
        shutil.rmtree(trash, ignore_errors=True)


def base_of(source: ShardSource, version: int, reports: Iterable[ShardReport]) -> Manifest | None:
    """Return the version that all reports build on; None when they report a full snapshot.

    Raises `WeightError`: the reports disagree, the version is not in `source`, or it ends a chain of
    `MAX_CHAIN`.
    """
    bases = {report.base for report in reports}
    if len(bases) > 1:
        raise WeightError(f"version {version}: its ranks build on different versions, {bases}")
    number = next(iter(bases), None)
    if number is None:
        return None
    try:
        base = open_version(source.where(number), source)
    except WeightError as error:
        raise WeightError(
            f"version {version} builds on version {number}, which cannot be read ({error}). "
            "Publish it as a full snapshot"
        ) from error
    if len(base.chain) >= MAX_CHAIN:
        raise WeightError(
            f"version {version} would end a chain of {len(base.chain) + 1} versions, at most "
            f"{MAX_CHAIN} are allowed. Publish it as a full snapshot"
        )
    return base


def _retain(root: Path, newest: int, keep: int, attempt: int) -> None:
    numbers = _on_disk(root)
    kept = {newest, *numbers[-keep:]}
    kept |= {n for n in numbers if version_dir(root, n).with_suffix(".pin").exists()}
    for number in sorted(set(numbers) - _with_bases(root, kept)):
        _remove_version(root, number)
    for partial in root.glob("v*.partial"):
        number = _number(partial.name.partition(".")[0])
        given_up = number is not None and partial != partial_dir(root, number, attempt)
        if number is not None and (number <= newest or given_up):
            shutil.rmtree(partial, ignore_errors=True)


def _with_bases(root: Path, kept: set[int]) -> set[int]:
    """Return `kept`, and every version that one of them builds on."""
    needed = set(kept)
    for number in kept:
        try:
            needed |= {link.version for link in open_version(version_dir(root, number)).chain}
        except WeightError:
            # It is damaged, so it may build on any version: all stay until retention drops this one.
            return needed | set(_on_disk(root))
    return needed


def _remove_version(root: Path, version: int) -> None:
    folder = version_dir(root, version)
    remove_folder(folder)
    folder.with_suffix(".pin").unlink(missing_ok=True)


def _remove_strangers(partial: Path, manifest: Manifest) -> None:
    """Remove files that an earlier try left in `partial`, such as one with more ranks."""
    for entry in partial.iterdir():
        if entry.name not in manifest.files and entry.name != MANIFEST_NAME:
            entry.unlink(missing_ok=True)


def _check_same_tensors(final: Path, manifest: Manifest) -> None:
    """Check that the version in `final` has the tensors that `manifest` lists. Raises `WeightError`."""
    try:
        found = open_version(final)
    except WeightError as error:
        if find_storage_cause(error):
            raise
        return  # damaged, so no reader can have read it
    if found.digest != manifest.digest:
        raise WeightError(
            f"version {manifest.version} is already published with digest {found.digest}, this one "
            f"has {manifest.digest}: versions never change. Publish under the next number"
        )


def _step_back(root: Path, version: int) -> int | None:
    """Make the version before `version` the latest one, and return it; None where there is none.

    If the process is killed after this, that version is the newest of the store.
    """
    earlier = [number for number in _on_disk(root) if number < version]
    if not earlier:
        (root / _POINTER).unlink()
        sync_folder(root)
        return None
    _point_at(root, earlier[-1], fsync=True)
    return earlier[-1]


def describe(folder: Path, manifest: Manifest) -> WeightVersion:
    """Return the record by which the version in `folder` is announced."""
    return WeightVersion(
        version=manifest.version,
        path=str(folder),
        digest=manifest.digest,
        num_tensors=len(manifest.tensors),
        num_bytes=manifest.num_bytes,
        stored_bytes=manifest.stored_bytes,
    )
