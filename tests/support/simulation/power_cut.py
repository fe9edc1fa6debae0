"""What a power cut leaves: a recorder of file operations, and the folders that each prefix of them may
leave on disk.

The recorder follows the real operations below one folder. An audit hook of Python runs before each
`open`, rename, removal and `mkdir`; `os.fsync` is replaced while the recorder is on. At each of these
the folder is walked and compared with the walk before, so that every change of a name is seen, whoever
made it. Bytes of a file count as unsynced until an `fsync` of it, however they were written.

A disk holds, of every file, the bytes of its last `fsync`, and of every folder the names at its last
`fsync`. Changes of names since then are pending. `cuts` gives, for every prefix, the folder as it is
after the cut, in three models:

    LOST      nothing that is pending is there
    NAMES     all names are there, without the bytes that were not synced
    SOME      any subset of the pending changes, each whole, in their order
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LOST, NAMES, SOME = "lost", "names", "some"
SUBSETS = 6
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}

Folder = dict[str, int]
"""Numbers of files and folders by their names."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of names in `folder`: `old` loses its name there, and `new` gets it."""

    folder: int
    name: str
    old: int | None
    new: int | None


@dataclass(slots=True)
class Disk:
    """What is on the disk for sure, and `pending` changes of names, each group of them whole."""

    synced: dict[int, Folder] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    pending: list[tuple[Change, ...]] = field(default_factory=list)

    def copy(self) -> Disk:
        folders = {number: dict(names) for number, names in self.synced.items()}
        return Disk(folders, dict(self.contents), list(self.pending))


@dataclass(frozen=True, slots=True)
class Cut:
    """The disk at one moment, and what was promised by then."""

    disk: Disk
    promised: tuple[object, ...]
    after: str


_active: list[Recorder] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _active and event in _EVENTS:
        _active[-1].look(event)


sys.addaudithook(_hook)


class Recorder:
    """Follows folder `root`, which is there and counts as synced with all that is in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cuts: list[Cut] = []
        self._promised: list[object] = []
        self._numbers: dict[int, int] = {}  # of the file system's, which it gives again
        self._kinds: dict[int, bool] = {}  # whether it is a folder
        self._last = 0
        self._looking = False
        self._disk = Disk()
        self._tree = self._walk()
        for number, names in self._tree.items():
            self._disk.synced[number] = dict(names)
        for path in root.rglob("*"):
            if path.is_file():
                self._disk.contents[self._numbers[path.stat().st_ino]] = path.read_bytes()

    def promise(self, what: object) -> None:
        """From here on `what` survives."""
        self.look("promise")
        self._promised.append(what)
        self._note("promise")

    def look(self, event: str) -> None:
        """What has changed since the last look, and the cut that may come here."""
        if self._looking:
            return
        self._looking = True
        try:
            before, self._tree = self._tree, self._walk()
            changes = tuple(_changes(before, self._tree))
            if changes:
                self._disk.pending.append(changes)
                for number in self._tree.keys() - before.keys():
                    self._disk.synced.setdefault(number, {})
                self._note(event)
        finally:
            self._looking = False

    def synced(self, descriptor: int) -> None:
        """`descriptor` was synced."""
        self.look("fsync")
        self._looking = True
        try:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            number = self._numbers.get(os.fstat(descriptor).st_ino)
            if number is None or (self.root not in path.parents and path != self.root):
                return
            if number in self._tree:
                self._sync_folder(number)
            else:
                self._disk.contents[number] = path.read_bytes()
            self._note(f"fsync {path.relative_to(self.root)}")
        finally:
            self._looking = False

    def _sync_folder(self, folder: int) -> None:
        """A change that touches two folders is whole: a sync of one of them keeps it."""
        kept = [group for group in self._disk.pending if all(c.folder != folder for c in group)]
        due = [group for group in self._disk.pending if any(c.folder == folder for c in group)]
        for group in due:
            _apply(self._disk.synced, group)
        self._disk.pending = kept

    def _note(self, after: str) -> None:
        self.cuts.append(Cut(self._disk.copy(), tuple(self._promised), after))

    def _walk(self) -> dict[int, Folder]:
        found: dict[int, Folder] = {}
        alive: set[int] = set()
        top = self._number(self.root.stat().st_ino, True, alive)
        waiting = [(self.root, top)]
        while waiting:
            path, number = waiting.pop()
            names = found[number] = {}
            for entry in os.scandir(path):
                is_folder = entry.is_dir(follow_symlinks=False)
                names[entry.name] = self._number(entry.inode(), is_folder, alive)
                if is_folder:
                    waiting.append((path / entry.name, names[entry.name]))
        for inode in self._numbers.keys() - alive:
            del self._numbers[inode]
        return found

    def _number(self, inode: int, is_folder: bool, alive: set[int]) -> int:
        alive.add(inode)
        if inode not in self._numbers:
            self._numbers[inode] = self._last
            self._kinds[self._last] = is_folder
            self._last += 1
        return self._numbers[inode]

    def restore(self, cut: Cut, model: str, target: Path, chance: random.Random) -> None:
        """Make `target` what the cut leaves."""
        folders = {number: dict(names) for number, names in cut.disk.synced.items()}
        for group in cut.disk.pending:
            if model == NAMES or (model == SOME and chance.random() < 0.5):
                _apply(folders, group)
        self._build(folders, cut.disk.contents, 0, target)

    def _build(
        self, folders: dict[int, Folder], contents: dict[int, bytes], number: int, target: Path
    ) -> None:
        target.mkdir()
        for name, child in folders.get(number, {}).items():
            if self._kinds[child]:
                self._build(folders, contents, child, target / name)
            else:
                (target / name).write_bytes(contents.get(child, b""))


def _changes(before: dict[int, Folder], after: dict[int, Folder]) -> Iterator[Change]:
    for folder in before.keys() | after.keys():
        old, new = before.get(folder, {}), after.get(folder, {})
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                yield Change(folder, name, old.get(name), new.get(name))


def _apply(folders: dict[int, Folder], group: tuple[Change, ...]) -> None:
    for change in group:
        names = folders.setdefault(change.folder, {})
        if change.new is None:
            if names.get(change.name) == change.old:
                del names[change.name]
        else:
            names[change.name] = change.new


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    """Record what happens below `root` in the block."""
    recorder = Recorder(root)
    _active.append(recorder)
    try:
        with _fsync_is(recorder.synced):
            yield recorder
            recorder.look("end")
    finally:
        _active.remove(recorder)


@contextmanager
def _fsync_is(call: Callable[[int], None]) -> Iterator[None]:
    """The real one is slow, and nothing is lost with a disk that is only thought of."""
    fsync = os.fsync
    os.fsync = call  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = fsync


def survives(
    recorder: Recorder,
    scratch: Path,
    check: Callable[[Path, tuple[object, ...]], None],
    seed: int = 0,
) -> int:
    """`check` every folder that a cut may leave, with what was promised by then; how many."""
    chance, count = random.Random(seed), 0
    assert recorder.cuts, "nothing was recorded"
    scratch.mkdir()
    for number, cut in enumerate(recorder.cuts):
        # Of several pending changes one draw would often miss the subset that breaks a promise.
        draws = SUBSETS if len(cut.disk.pending) > 1 else 1
        for draw, model in enumerate((LOST, NAMES, *[SOME] * draws)):
            target = scratch / f"{number:04d}-{draw}-{model}"
            recorder.restore(cut, model, target, chance)
            try:
                with _fsync_is(lambda descriptor: None):
                    check(target, cut.promised)
            except Exception as error:
                error.add_note(f"cut {number} after {cut.after}, model {model}: {target}")
                raise
            count += 1
    return count
