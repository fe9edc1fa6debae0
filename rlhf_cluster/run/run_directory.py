"""The directory of a run: one owner at a time, and the paths of all files.

    <root>/<name>/ run.lock          the marker of a run directory, held by the process that runs
                   resolved.json     the whole configuration, without secrets
                   environment.json  versions, commit, command line, seed
                   status.json       the current state of the run, replaced as a whole
                   metrics.jsonl     one object per step
                   summary.json      the result, when the run is over
                   post_mortem.json  what is known of the end, when the run failed
                   samples/ logs/ model/ weights/ reference/ checkpoints/ experience/ final/ curve.png

A weights folder outside of it (`weights.root`) carries the same marker and is held as well.

Promises:
- the lock is the operating system's: it is released when its process dies, however that happens;
- a directory is claimed entirely or not at all: a process that is refused has written nothing;
- only a directory that carries our marker is ever emptied, and only on request, under the lock;
- values of keys and variables that hold secrets (token, password, api_key, ...) are never written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RunError, StorageError
from rlhf_cluster.run.run_record import Snapshot
from rlhf_cluster.util import provenance
from rlhf_cluster.util.durable_files import (
    make_folders,
    read_json,
    run_with_retries,
    sync_folder,
    take_lock,
    write_json,
)
from rlhf_cluster.util.provenance import describe_environment, remove_secrets

if TYPE_CHECKING:
    from rlhf_cluster.config.load import AnyConfig

log = logging.getLogger(__name__)

MARKER = "run.lock"
LOCK_PATIENCE_S = 0.5
FOLDERS = ("samples", "logs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The process that claimed a run directory."""

    host: str
    pid: int
    started: str  # UTC, ISO 8601

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


class RunDir:
    """Paths of one run. `create` and `reclaim` own the directory; `open` only reads it."""

    def __init__(self, path: Path, weights: Path, claims: tuple[_Claim, ...] = ()) -> None:
        self.path = path
        self.weights = weights
        self.resolved = path / "resolved.json"
        self.environment = path / "environment.json"
        self.status = path / "status.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.curve = path / "curve.png"
        self.samples = path / "samples"
        self.logs = path / "logs"
        self.model = path / "model"
        self.final = path / "final"
        self.reference = path / "reference"
        self.checkpoints = path / "checkpoints"
        self._claims = claims
        self._status_failed = False

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: AnyConfig,
        *,
        overwrite: bool = False,
        argv: Iterable[str] = (),
    ) -> RunDir:
        """Claim `path` for `config` and describe the run in it. Raises `RunError`.

        A directory is refused if a live process holds it, if an earlier run left it (unless
        `overwrite`), or if it is neither a run's nor empty. Close the result to release the lock.
        """
        path = Path(path).absolute()
        weights = Path(config.weights_dir).absolute()
        claims: list[_Claim] = []
        try:
            with _writing(path):
                for folder, key in _folders(path, weights):
                    claims.append(_claim(folder, key, overwrite))
                for claim in claims:
                    claim.take_over()
                run = cls(path, weights, tuple(claims))
                run._describe(config, argv)
        except BaseException:
            for claim in claims:
                claim.withdraw()
            raise
        return run

    @staticmethod
    def has_run(path: str | Path) -> bool:
        """Whether a run was, or is, in the directory."""
        return _owner(Path(path) / MARKER) is not None

    @classmethod
    def reclaim(cls, path: str | Path, config: AnyConfig) -> RunDir:
        """Claim the directory of an earlier run, and leave everything in it as it is.

        Call `go_on`, `restart` or `withdraw` next. Raises `RunError`.
        """
        path = Path(path).absolute()
        weights = Path(config.weights_dir).absolute()
        claims: list[_Claim] = []
        try:
            for folder, key in _folders(path, weights):
                claims.append(_claim(folder, key, overwrite=True))
        except BaseException:
            for claim in claims:
                claim.withdraw()
            raise
        return cls(path, weights, tuple(claims))

    def go_on(self, config: AnyConfig, argv: Iterable[str] = ()) -> None:
        """Own the directory and describe the run again, keeping what is in it."""
        with _writing(self.path):
            for claim in self._claims:
                claim.sign()
            self._describe(config, argv)

    def restart(self, config: AnyConfig, argv: Iterable[str] = ()) -> None:
        """Empty the directory and own it."""
        with _writing(self.path):
            for claim in self._claims:
                claim.take_over()
            self._describe(config, argv)

    def withdraw(self) -> None:
        """Release the directory as it was found."""
        for claim in self._claims:
            claim.withdraw()
        self._claims = ()

    @staticmethod
    def check_free(path: str | Path, config: AnyConfig, *, overwrite: bool = False) -> None:
        """Raise the `RunError` that `create` would raise now, and change nothing."""
        weights = Path(config.weights_dir).absolute()
        for folder, key in _folders(Path(path).absolute(), weights):
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                _claim(folder, key, overwrite).withdraw()

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run directory for reading. Raises `RunError`."""
        path = Path(path).absolute()
        if not (path / MARKER).is_file():
            raise RunError(
                f"{path}: not a run directory (it has no {MARKER}). Give the folder of a run, such "
                "as runs/<run.name>"
            )
        weights = path / "weights"
        resolved = read_json(path / "resolved.json")
        root = (resolved.get("weights") or {}).get("root") if resolved else None
        return cls(path, Path(root) / path.name if root else weights)

    def owner(self) -> Owner | None:
        """Return the process that claimed the directory last, dead or alive."""
        return _owner(self.path / MARKER)

    def is_held(self) -> bool:
        """Whether a live process holds the directory now."""
        try:
            lock = os.open(self.path / MARKER, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not take_lock(lock, self.path / MARKER, shared=True)
        finally:
            os.close(lock)

    def check_claim(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Check that no other process has signed the folders that this one owns.

        That can happen on a file system whose locks do not reach other nodes. Raises `RunError` then,
        and `StorageError` when it cannot be determined, after the tries of `run_with_retries`.
        """
        for claim in self._claims:
            marker = claim.folder / MARKER
            if (
                found := run_with_retries(lambda m=marker: _owner(m), marker, "", sleep)
            ) != claim.owner:
                raise RunError(
                    f"{marker.parent}: was taken by {found or 'another process'} while this process "
                    "held it. "
                    "This file system does not lock files between nodes (mount it without localflock): "
                    "start one run at a time there"
                )

    def write_status(self, snapshot: Snapshot) -> None:
        """Write `snapshot` to status.json.

        A failure is logged, and only once for failures in a row. The file is a view: a failure neither
        ends a run nor hides the error that does.
        """
        try:
            write_json(self.status, json.loads(snapshot.to_json()))
        except OSError as error:
            if not self._status_failed:
                log.warning(
                    "%s: cannot be written (%s); it shows an earlier time", self.status, error
                )
            self._status_failed = True
        else:
            self._status_failed = False

    def read_status(self) -> Snapshot | None:
        """Return the last status, or None when the run has not written one yet."""
        try:
            return Snapshot.from_json(self.status.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def read_resolved(self) -> dict[str, Any] | None:
        """Return the configuration that the run was last started with; None when it is missing.

        A directory that has no weight of an optimised reward was trained by GDPO with weight 1.
        """
        settings = read_json(self.resolved)
        algorithm = (settings or {}).get("algorithm") or {}
        if settings is not None and algorithm.get("type") == "gdpo":
            optimised = [r for r in settings["scoring"]["rewards"] if not r.get("watch")]
            unset = {r.get("name") or r["type"]: 1.0 for r in optimised}
            algorithm["reward_weights"] = {**unset, **algorithm.get("reward_weights", {})}
        return settings

    @property
    def has_summary(self) -> bool:
        return self.summary.exists()

    def read_summary(self) -> dict[str, Any]:
        """Return the result of a run that is over. Raises `RunError`."""
        found = read_json(self.summary)
        if found is None:
            raise RunError(f"{self.summary}: not there, or damaged. Has the run finished?")
        return found

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary, summary)

    def remove(self) -> None:
        """Release the lock and delete the directory of a run that was refused before it began."""
        if not self._claims:
            raise RunError(f"{self.path}: only the run that holds a directory may delete it")
        for folder in (self.path, self.weights):
            if folder.exists():
                shutil.rmtree(folder)
        self.close()

    def close(self) -> None:
        """Release the lock. The directory stays, marked as left by this run."""
        for claim in self._claims:
            os.close(claim.lock)
        self._claims = ()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self, config: AnyConfig, argv: Iterable[str]) -> None:
        for folder in FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        self.weights.mkdir(parents=True, exist_ok=True)
        settings = list_settings(config)
        provenance.hide(provenance.find_secrets(settings))
        write_json(self.resolved, remove_secrets(settings), fsync=True)
        facts = describe_environment(argv, config.run.seed)
        facts["model"] = provenance.describe_model(config.model.path)
        write_json(self.environment, facts, fsync=True)


def list_settings(config: AnyConfig) -> dict[str, Any]:
    """Return all settings as a run directory stores them, with their secrets.

    GDPO's weights of rewards are those that the learner uses, set or not.
    """
    settings = config.model_dump(mode="json")
    if isinstance(config, RunConfig):
        settings["algorithm"] = config.trained_algorithm.model_dump(mode="json")
    return settings


def find_run(run: str, root: str | Path = "runs") -> RunDir:
    """Return the directory of `run`: a path, or a name below `root`. Raises `RunError`."""
    for path in (Path(run), Path(root) / run):
        if (path / MARKER).is_file():
            return RunDir.open(path)
    known = sorted(p.parent.name for p in Path(root).glob(f"*/{MARKER}"))
    listed = f"Runs in {root}: {', '.join(known)}" if known else f"There are no runs in {root}"
    raise RunError(
        f"{run}: no such run. {listed}. Give a run directory or one of these names, or --address "
        "for a job on a cluster"
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a `RunError` that says how to fix it."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be made the directory of a run ({error}). Free space there, make it "
            "writable, or give another folder with --set run.root=FOLDER"
        ) from error


@dataclass(slots=True, kw_only=True)
class _Claim:
    """Locked folder that is not changed yet."""

    folder: Path
    lock: int
    made: bool  # the folder did not exist before
    owner: Owner | None = None  # set once our name is on it

    def take_over(self) -> None:
        """Empty the folder and put our name on it."""
        for entry in self.folder.iterdir():
            if entry.name == MARKER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        self.sign()

    def sign(self) -> None:
        """Put our name on the folder."""
        self.owner = owner = Owner(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, (json.dumps(asdict(owner)) + "\n").encode(), 0)
        os.fsync(self.lock)
        sync_folder(self.folder)

    def withdraw(self) -> None:
        """Leave the folder as it was found, or marked as a run's if it was taken over."""
        if self.made and self.owner is None:
            (self.folder / MARKER).unlink()
            self.folder.rmdir()
        os.close(self.lock)


def _folders(path: Path, weights: Path) -> list[tuple[Path, str]]:
    """Return the folders that a run claims, each with its key.

    They are its directory, and its weights folder if that is elsewhere.
    """
    return [(path, "run.name")] + ([] if path in weights.parents else [(weights, "weights.root")])


def _claim(folder: Path, key: str, overwrite: bool) -> _Claim:
    """Lock a folder that is free: new, empty, or left by a run and to be overwritten."""
    made = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: a file stands where the run needs a folder. Change {key}")
    if not made and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise RunError(
            f"{folder}: the folder is not empty and no run made it (no {MARKER} there), so nothing "
            f"in it is touched, not even with --overwrite. Change {key}, or move its content away"
        )
    make_folders(folder)
    claim = _Claim(folder=folder, lock=_lock(folder / MARKER), made=made)
    owner = _owner(folder / MARKER)
    others = [entry for entry in folder.iterdir() if entry.name != MARKER]
    if (owner or others) and not overwrite:
        claim.withdraw()
        raise RunError(
            f"{folder}: holds a run that has finished or crashed ({owner or 'owner unknown'}). "
            "Start under another name with --set run.name=NEW, or give --overwrite to delete it and "
            "start from scratch"
        )
    return claim


def _lock(marker: Path) -> int:
    """Lock `marker`.

    Waits for: a reader that looks which process holds it, `LOCK_PATIENCE_S` at most. Raises `RunError`
    if another process holds it.
    """
    lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            if take_lock(lock, marker):
                return lock
        except StorageError:
            os.close(lock)
            raise
        if time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        os.close(lock)
        raise RunError(
            f"{marker.parent}: in use by {_owner(marker) or 'another process'}. Stop that run "
            f"(rlhf-cluster stop {marker.parent.name}), or start under another name with "
            "--set run.name=NEW"
        )


def _owner(marker: Path) -> Owner | None:
    found = read_json(marker)
    return Owner(**found) if found else None
