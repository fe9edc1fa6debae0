"""A copy of the newest version in a folder of this node, for all its readers.

    storage or another node --> local folder --> every reader of this node, and other nodes

The plan of `relay_plan` decides the source of each file: the storage serves each file about once, for
any number of nodes. Readers then read the local folder as they would the storage, and verify the same
hashes.

Promises:
- A node fetches each file once, for any number of readers: one of them fetches, the others wait.
- A file has its final name only when it is complete, with the length in the manifest. Its readers
  verify the content. A version that was found damaged (`distrust`) is fetched again. The storage
  serves it once more for all nodes together, and no node gets a copy that another one distrusts.
- When the planner cannot be reached, only the relay is lost: all files come from the storage then.
- Every wait ends with the deadline, also where a storage does not answer, and with it this reader's
  lock of the node's copies. A fetch from a node that hangs ends with its lease, and another source is
  tried.
- A read of the storage that returns nothing for `PROGRESS_SHARE` of the time is abandoned, and the
  plan asked again. So a reader that waits for this one, with the same deadline, gets the files that
  other nodes have by then.
- When the folder is full, or cannot be written, only the copy is lost. Its readers use the storage,
  and no file of the version stays in the folder.
- Files of runs that have ended are removed by the next run that has readers on this node, and no other
  files ever are (`mirror_folder`).

This module decides, and its ports (`mirror_ports`) act: files, threads, time and transfers. So a
simulated cluster runs this code too.

Space: the files of the newest version and those that it builds on, and during a fetch those of the
version before. Bytes between nodes are not encrypted, as in `rank_memory`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_cluster.errors import StalledError, StorageError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.manifest import Manifest, decode
from rlhf_cluster.weights.transports.mirror_carrier import finish
from rlhf_cluster.weights.transports.mirror_ports import (
    Carrier,
    Copies,
    NoProgress,
    Planner,
)
from rlhf_cluster.weights.transports.relay_plan import (
    Assignment,
    Piece,
)
from rlhf_cluster.weights.transports.shared_files import MANIFEST_NAME
from rlhf_cluster.weights.transports.transport import Deadline

log = logging.getLogger(__name__)

PARALLEL = 4
"""Files that a node fetches at once, and that it serves to others at once."""
MAX_FAILURES = 8
"""Fetches of one version that may fail, stalled storage reads apart, before it is refused."""
PROGRESS_SHARE = 1 / 3
"""Share of the time to fetch a version for which a storage read may return nothing.

At most a lease.
"""
_ASK_AGAIN_S = (0.01, 0.5)  # the first and the longest pause while no source is free


@dataclass(slots=True)
class _Wanted:
    """Pieces that a node still needs, shared by the tasks that fetch them concurrently."""

    sizes: dict[Piece, int | None]
    deadline: Deadline
    lock: Any
    progress_s: float
    direct: bool
    """Whether all pieces come from the storage, and the plan is not asked."""
    open: list[Piece] = field(default_factory=list)
    failures: int = 0
    is_over: bool = False
    """Whether the caller does not wait for the pieces any more."""

    def end(self) -> None:
        self.is_over = True

    def left_s(self, waits_for: str) -> float:
        """Return the seconds left. Raises `WeightError` once `is_over`, `StalledError`.

        A task that hung may resume when another reader has the folder: it must not write there.
        """
        if self.is_over:
            raise WeightError("the files are not waited for any more")
        return self.deadline.left_s(waits_for)


@dataclass(frozen=True, slots=True)
class _Lent:
    """A file that other nodes may fetch. Its memory is in use until the carrier drops `key`."""

    key: int
    identity: object


class Mirror:
    """Mirror of a store's versions in the copies of this node. Serves one call at a time."""

    def __init__(
        self,
        node: str,
        planner: Planner,
        copies: Copies,
        carrier: Carrier,
        lease_s: float = 120.0,
        told: Callable[[str], None] = log.warning,
    ) -> None:
        """Copy nothing yet.

        Args:
            node: the name of this process among all.
            lease_s: limit of a fetch from another node, in seconds.
            told: gets the reason when a version cannot be copied to the node.
        """
        self._node, self._planner, self._lease_s, self._told = node, planner, lease_s, told
        self._copies, self._carrier = copies, carrier
        self._lent: dict[Piece, _Lent] = {}
        self._seen: tuple[int, object] | None = None  # (version, which copy), of the last one
        self._distrusted: tuple[int, object] | None = None
        self._reading = (-1, "", 0)
        """Number and digest of the newest version, and how many of its copies were damaged."""

    def bring(self, version: WeightVersion, deadline: Deadline) -> WeightVersion:
        """Run `bringing` in the thread of the caller."""
        return finish(self.bringing(version, deadline))

    async def bringing(self, version: WeightVersion, deadline: Deadline) -> WeightVersion:
        """Copy `version`, and the versions that it builds on, to the local folder.

        Returns `version` with its path there; unchanged where the folder cannot take it. Waits for:
        another reader of this node that fetches it; its turn at a source; bytes. Raises `WeightError`,
        `StalledError`; other versions are as before then.
        """
        try:
            async with self._copies.turn(deadline):
                await self._bring(version, deadline)
        except StalledError:
            raise
        except (OSError, StorageError) as error:
            self._told(
                f"{self._node} reads version {version.version} from {version.path}, since it cannot "
                f"be copied to {self._copies.where} ({error}). Free space there, or give "
                "weights.mirror another folder"
            )
            return version
        return replace(version, path=self._copies.path(version.version))

    async def _bring(self, version: WeightVersion, deadline: Deadline) -> None:
        number = version.version
        incomplete = {number}
        try:
            await self._take_distrust(number, version.digest)
            manifest = await self._manifest(number, version.digest, deadline)
            chain = [await self._manifest(n.version, n.digest, deadline) for n in manifest.chain]
            missing = {
                piece: entry.num_bytes
                for m in (*chain, manifest)
                for name, entry in m.files.items()
                if not self._copies.has(piece := Piece(m.version, name))
            }
            kept = [link.version for link in manifest.chain] + [number]
            incomplete |= {piece.version for piece in missing}
            await self._make_room(sum(missing.values()), kept)
            await self._fetch(dict(missing), deadline)
        except StalledError:
            raise
        except OSError:
            for half in incomplete:
                self._remove(half)
            await self._tell_kept([])  # a node whose disk fails serves no other node
            raise
        self._seen = self._here(number)
        await self._remove_all_but(kept)

    async def _take_distrust(self, number: int, digest: str) -> None:
        """Remove the local copy of a version if it is the one that `distrust` marked.

        From then on this node asks the plan for another reading of the storage.
        """
        if self._reading[:2] != (number, digest):
            self._reading = (number, digest, 0)
        distrusted, self._distrusted = self._distrusted, None
        if distrusted is None or distrusted[0] != number:
            return
        self._reading = (number, digest, self._reading[2] + 1)
        if distrusted == self._here(number):
            self._remove(number)  # no other reader of this node has replaced it meanwhile
            await self._tell_kept([n for n in self._copies.versions() if n != number])

    async def _make_room(self, num_bytes: int, kept: Sequence[int]) -> None:
        """Remove other versions where the missing files of `kept` need their space.

        Raises `OSError` when the files do not fit even then. A folder in memory is never filled
        completely, because that costs the node more than a copy.
        """
        self._copies.remove_parts()
        if num_bytes and self._copies.free_bytes() < num_bytes:
            await self._remove_all_but(kept)
            free = self._copies.free_bytes()
            if free < num_bytes:
                raise OSError(errno.ENOSPC, f"{num_bytes} bytes are missing, and {free} are free")

    def distrust(self, version: int) -> None:
        """Mark `version` as damaged: the next `bring` fetches it again, and from no damaged copy.

        It does not where another reader of this node has fetched it again meanwhile.
        """
        if self._seen is not None and self._seen[0] == version:
            self._distrusted = self._seen

    def close(self) -> None:
        """Stop serving other nodes, and remove the files where this was the node's last reader."""
        self._carrier.close()
        self._copies.leave()

    # The copies of this node

    def _here(self, number: int) -> tuple[int, object] | None:
        """Return the number and the identity of the local copy of a version; None without one."""
        found = self._copies.identity(Piece(number, MANIFEST_NAME))
        return None if found is None else (number, found)

    async def _manifest(self, number: int, digest: str, deadline: Deadline) -> Manifest:
        """Return the manifest of a version, and copy it to the local folder.

        Raises `WeightError` where its digest is not the announced one.
        """
        piece = Piece(number, MANIFEST_NAME)
        for again in (False, True):
            if not self._copies.has(piece):
                await self._fetch({piece: None}, deadline, from_storage=again)
            where = self._carrier.where(number) if again else self._copies.path(number)
            try:
                manifest = decode(self._copies.read(piece), f"{where}: {MANIFEST_NAME}")
                if manifest.digest == digest:
                    return manifest
                raise WeightError(
                    f"{where}: digest {manifest.digest}, expected {digest}: not the version that was "
                    "announced. Pull the latest version again"
                )
            except WeightError:
                # damaged here, or published earlier with this number by a learner that died
                self._remove(number)
                if again:
                    raise
        raise AssertionError("the second try returns or raises")

    def _remove(self, number: int) -> None:
        self._end_loans([piece for piece in self._lent if piece.version == number])
        self._copies.remove(number)

    async def _remove_all_but(self, kept: Sequence[int]) -> None:
        for number in self._copies.versions():
            if number not in kept:
                self._remove(number)
        # another reader of the node may have removed or replaced files that this one lends
        self._end_loans([p for p in self._lent if p.version not in kept or not self._is_lent(p)])
        await self._tell_kept(kept)

    async def _tell_kept(self, kept: Sequence[int]) -> None:
        with contextlib.suppress(WeightError):  # it only saves other nodes requests that fail
            await self._carrier.ask(self._planner.keeps, self._node, kept)

    def _is_lent(self, piece: Piece) -> bool:
        """Whether the local file is still the one that other nodes are served."""
        return self._copies.identity(piece) == self._lent[piece].identity

    def _end_loans(self, pieces: Sequence[Piece]) -> None:
        self._carrier.drop([self._lent.pop(piece).key for piece in pieces])

    # Fetching

    async def _fetch(
        self, sizes: dict[Piece, int | None], deadline: Deadline, from_storage: bool = False
    ) -> None:
        """Fetch all pieces of `sizes` (bytes, or None: unknown), `PARALLEL` at once.

        Raises the first failure that no other source can make up for.
        """
        if not sizes:
            return
        waits_for = f"some of {len(sizes)} files"
        wanted = _Wanted(
            sizes,
            deadline,
            self._carrier.lock(),
            progress_s=min(self._lease_s, PROGRESS_SHARE * deadline.left_s(waits_for)),
            direct=from_storage,
            open=list(sizes),
        )
        await self._carrier.all_of(
            lambda: self._fetch_some(wanted),
            min(PARALLEL, len(sizes)),
            deadline,
            waits_for,
            wanted.end,
        )

    async def _fetch_some(self, wanted: _Wanted) -> None:
        """Fetch piece after piece until none is left. Waits for: its turn, and each piece."""
        pause_s, longest_s = _ASK_AGAIN_S
        while True:
            async with wanted.lock:
                if wanted.is_over or not wanted.open:
                    return
                found = await self._ask(wanted)
                if found is not None:
                    wanted.open.remove(found.piece)
            if found is None:
                await self._pause(pause_s, wanted)
                pause_s = min(longest_s, 2 * pause_s)
                continue
            pause_s = _ASK_AGAIN_S[0]
            await self._fetch_one(wanted, found)

    async def _pause(self, seconds: float, wanted: _Wanted) -> None:
        left_s = wanted.deadline.left_s("its turn at a source of the weights")
        await self._carrier.sleep(min(seconds, left_s))

    async def _ask(self, wanted: _Wanted) -> Assignment | None:
        if not wanted.direct:
            with contextlib.suppress(WeightError):
                asked = [self._translate(piece) for piece in wanted.open]
                arguments = (self._node, asked, (), ())
                found = await self._carrier.ask(self._planner.exchange, *arguments)
                return found and replace(found, piece=found.piece._replace(reading=0))
        return Assignment(piece=wanted.open[0], source=None)

    async def _fetch_one(self, wanted: _Wanted, found: Assignment) -> None:
        piece = found.piece
        try:
            await self._bring_one(found, wanted)
        except (WeightError, OSError) as error:
            await self._handle_failure(wanted, found, error)
            return
        if not wanted.direct:
            await self._report(done=[(piece, self._lend(piece))])

    async def _handle_failure(self, wanted: _Wanted, found: Assignment, error: Exception) -> None:
        """Report a failed fetch to the plan, and put the piece back among those to fetch.

        Raises `error` where no other source can make up for it.
        """
        piece = found.piece
        is_local = isinstance(error, OSError) and not isinstance(error, StalledError)
        if not wanted.direct:
            is_own = is_local or wanted.is_over or _has_ended(wanted.deadline)
            await self._report(failed=[(piece, blamed(found, is_own))])
        if is_local:
            raise error
        wanted.deadline.left_s(f"{piece.name} of version {piece.version}")
        if isinstance(error, NoProgress):
            # The storage may hang for this node alone. The pause gives another node a turn at it.
            await self._pause(2 * _ASK_AGAIN_S[1], wanted)
            wanted.open.append(piece)
            return
        wanted.failures += 1
        if found.source is None or wanted.failures > MAX_FAILURES:
            raise error
        wanted.open.append(piece)

    async def _report(self, done: Sequence[Any] = (), failed: Sequence[Any] = ()) -> None:
        with contextlib.suppress(WeightError):  # without the report, the lease ends by its time
            ended = [
                [(self._translate(piece), at) for piece, at in ends] for ends in (done, failed)
            ]
            await self._carrier.ask(self._planner.exchange, self._node, (), *ended)

    def _translate(self, piece: Piece) -> Piece:
        """Return `piece` with the number of its reading, as the plan knows it."""
        number, _, reading = self._reading
        return piece._replace(reading=reading) if piece.version == number else piece

    async def _bring_one(self, found: Assignment, wanted: _Wanted) -> None:
        piece = found.piece
        what = f"{piece.name} of version {piece.version}"
        wanted.left_s(what)
        with self._copies.part(piece) as part:
            await self._receive(found, part, wanted)
            size = wanted.sizes[piece]
            if size is not None and part.num_bytes != size:
                raise WeightError(
                    f"{what} has {part.num_bytes} bytes in "
                    f"{found.source or self._carrier.where(piece.version)}, expected {size}. Publish "
                    "the version again"
                )
            wanted.left_s(what)
            part.keep()

    async def _receive(self, found: Assignment, part: Any, wanted: _Wanted) -> None:
        piece = found.piece
        what = f"{piece.name} of version {piece.version}"
        if found.source is None:
            await self._carrier.from_storage(
                piece, part, wanted.progress_s, lambda: wanted.left_s(what)
            )
            return
        what = f"{what} from {found.source}"
        lease_s = min(self._lease_s, wanted.left_s(what))
        await self._carrier.from_node(
            found.address, part, Deadline(what, lease_s, self._carrier.clock)
        )

    def _lend(self, piece: Piece) -> Any:
        """Serve the local file of a piece to other nodes, and return its handle."""
        data, identity = self._copies.mapped(piece)
        handle = self._carrier.lend(data)
        if piece in self._lent:
            self._end_loans([piece])
        self._lent[piece] = _Lent(handle.key, identity)
        return handle


def blamed(found: Assignment, is_own: bool) -> str | None:
    """Return the source that a reader reports to the plan when a fetch failed; None: no source.

    `is_own`: the reader's deadline has passed or its disk failed, so the source is not to blame.
    """
    return None if is_own else found.source


def _has_ended(deadline: Deadline) -> bool:
    try:
        deadline.left_s()
    except (StalledError, WeightError):
        return True
    return False
