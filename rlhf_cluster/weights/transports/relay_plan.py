"""Plan of the weight relay: which node fetches which file of a version from which other node.

    learner rank, or storage --> a few nodes, a different file each --> the others, file by file

A shared storage needs a hundred times longer to serve a version to a hundred nodes than to one. So
the ranks that wrote a version serve each file about once; where they cannot, the storage does. Every
node serves the files that it has while it fetches the rest.
This is the plan of a swarm (Cohen 2003, BitTorrent) with one planner: the rarest file first, so
that no file stays behind, and never more than `streams` reads of the storage at once.

Promises:
- With n nodes and p files of equal size, all nodes have all files after about p + log2(n) times
  the time that one file takes over a node's network.
- A node that dies, hangs or serves unusable data costs each of the others a lease at most. Its turn
  at its source ends automatically, and a reader that got nothing from the node is not sent there
  again. After `MAX_STRIKES` such readers the node serves no reader.
- One reader alone, which may itself be the slow one, cannot exclude a source. Each strike expires
  after `STRIKE_S`, so a short network problem excludes a node only for this time.
- A file that no living node has is fetched from the storage again.
- A version that readers found damaged is read from the storage once more, for all of them together:
  they ask for its files with a higher `reading`, and never get the copies that they distrust.

This module is bookkeeping only: `node_mirror` moves the bytes, and an actor carries the requests.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_STRIKES = 2
"""Number of readers that got nothing from a node after which the node serves no reader."""
STRIKE_S = 600.0
"""Seconds after which the failure of a reader at a node expires."""


class Piece(NamedTuple):
    """One file of a published version. A tuple, since the plan looks thousands of them up."""

    version: int
    name: str
    reading: int = 0
    """Number of copies of the version that its reader found damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Fetch `piece` from node `source`, at `address`; from the storage where `source` is None."""

    piece: Piece
    source: str | None
    address: Any = None


@dataclass(slots=True, kw_only=True)
class RelayPlan:
    """Holders of every piece, and the fetches in progress.

    Args:
        streams: reads of the storage at once.
        uploads: nodes that one node serves at once.
        lease_s: seconds for which a fetch may occupy its source.
    """

    streams: int
    uploads: int
    lease_s: float = 120.0
    clock: Callable[[], float] = time.monotonic
    _holders: dict[Piece, dict[str, Any]] = field(default_factory=dict)
    _free: dict[Piece, dict[str, None]] = field(default_factory=dict)
    """Holders of a piece that can serve another reader, the one that has waited longest first."""
    _has: dict[str, set[Piece]] = field(default_factory=dict)
    _uses: dict[str, int] = field(default_factory=dict)
    """Number of fetches in progress per source node."""
    _reading: set[Piece] = field(default_factory=set)
    """Pieces that nodes are reading from the storage."""
    _leases: dict[tuple[str, Piece], tuple[float, str | None]] = field(default_factory=dict)
    """End and source of the lease of each (node, piece), the oldest first."""
    _unreported: set[tuple[str, Piece]] = field(default_factory=set)
    """Fetches whose end was not reported, also those whose lease has ended."""
    _outdated: set[tuple[str, Piece]] = field(default_factory=set)
    """Fetches from before `begin_anew` whose end was not reported."""
    _strikes: dict[str, dict[str, float]] = field(default_factory=dict)
    """Time of the last failure of each reader at each source: source -> reader -> time."""

    def exchange(
        self,
        node: str,
        wanted: Sequence[Piece],
        done: Sequence[tuple[Piece, Any]],
        failed: Sequence[tuple[Piece, str | None]],
    ) -> Assignment | None:
        """Call `done`, `failed` and `next` at once; None where nothing is wanted."""
        for piece, address in done:
            self.done(node, piece, address)
        for piece, source in failed:
            self.failed(node, piece, source)
        return self.next(node, wanted) if wanted else None

    def next(self, node: str, wanted: Sequence[Piece]) -> Assignment | None:
        """Return the piece of `wanted` that `node` fetches next, and its source.

        `node` must not be fetching any of them. None: no source is free, ask again soon.
        """
        self._end_leases()
        for piece in self._has.get(node, set()).intersection(wanted):
            self._drop(node, piece)  # another reader of its node removed it
        shunned = {source for source in self._strikes if node in self._accusers(source)}
        for piece in self._by_rarity(node, wanted, shunned):
            found = self._from_storage(piece, shunned) or self._from_a_node(piece, shunned)
            if found is not None:
                self._take(node, found)
                return found
        return None

    def _by_rarity(self, node: str, wanted: Sequence[Piece], shunned: set[str]) -> list[Piece]:
        """Return the pieces of `wanted` that a source may have a turn for, the rarest first."""
        found = [p for p in wanted if self._free.get(p) or self._from_storage(p, shunned)]
        return sorted(found, key=lambda piece: (self._num_holders(piece), _rank(node, piece)))

    def done(self, node: str, piece: Piece, address: Any) -> None:
        """Record that `node` has the piece, and serves it at `address`."""
        if not self._settle(node, piece):
            return
        self._release(node, piece)
        if len(self._accusers(node)) < MAX_STRIKES:
            self._holders.setdefault(piece, {})[node] = address
            self._has.setdefault(node, set()).add(piece)
            if self._uses.get(node, 0) < self.uploads:
                self._free.setdefault(piece, {})[node] = None

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]]) -> None:
        """Record that `node` serves these pieces, each at its address, and no others any more."""
        self.forget(node)
        for piece, address in pieces:
            self.done(node, piece, address)

    def failed(self, node: str, piece: Piece, source: str | None) -> None:
        """Record that `node` did not get the piece from `source`, which is not asked for it again.

        With `source` None, no other node is blamed: the fault is of `node` or of the storage.
        """
        if not self._settle(node, piece):
            return
        self._release(node, piece)
        if source is None:
            return
        self._strikes.setdefault(source, {})[node] = self.clock()
        if len(self._accusers(source)) >= MAX_STRIKES:
            self.forget(source)
        else:
            self._drop(source, piece)

    def keeps(self, node: str, versions: Collection[int]) -> None:
        """Record that `node` has removed its files of all versions but these.

        Pieces of versions that are older than all of these are dropped for every node: no node that
        is up to date needs them.
        """
        oldest = min(versions, default=0)
        for piece in [p for p in self._has.get(node, ()) if p.version not in versions]:
            self._drop(node, piece)
        for piece in [p for p in self._holders if p.version < oldest]:
            for holder in list(self._holders[piece]):
                self._drop(holder, piece)
        for fetches in (self._unreported, self._outdated):
            fetches -= {fetch for fetch in fetches if fetch[1].version < oldest}

    def forget(self, node: str) -> None:
        """Drop all pieces that `node` has, because they cannot be used."""
        for piece in list(self._has.get(node, ())):
            self._drop(node, piece)

    def begin_anew(self) -> None:
        """Drop everything, because versions will be published again with other files.

        A report that comes later, about a fetch that began before, is ignored.
        """
        self._outdated |= self._unreported
        self._unreported.clear()
        for state in (self._holders, self._free, self._has, self._uses, self._leases):
            state.clear()
        self._strikes.clear()
        self._reading.clear()

    def _settle(self, node: str, piece: Piece) -> bool:
        """End the fetch of a report. Return False if it began before `begin_anew`."""
        is_outdated = (node, piece) in self._outdated
        for fetches in (self._unreported, self._outdated):
            fetches.discard((node, piece))
        return not is_outdated

    def _accusers(self, source: str) -> dict[str, float]:
        """Return the readers that got nothing from `source` in the last `STRIKE_S` seconds."""
        strikes = self._strikes.get(source)
        if not strikes:
            return {}
        now = self.clock()
        for reader in [r for r, then in strikes.items() if then + STRIKE_S <= now]:
            del strikes[reader]
        return strikes

    def _from_storage(self, piece: Piece, shunned: set[str]) -> Assignment | None:
        """Return a read of the storage if only `shunned` nodes have the piece and none reads it."""
        if piece in self._reading or len(self._reading) >= self.streams:
            return None
        holders = self._holders.get(piece, ())
        return Assignment(piece=piece, source=None) if shunned.issuperset(holders) else None

    def _from_a_node(self, piece: Piece, shunned: set[str]) -> Assignment | None:
        for source in self._free.get(piece, ()):
            if source not in shunned:
                address = self._holders[piece][source]
                return Assignment(piece=piece, source=source, address=address)
        return None

    def _num_holders(self, piece: Piece) -> int:
        return len(self._holders.get(piece, ()))

    def _take(self, node: str, found: Assignment) -> None:
        source, piece = found.source, found.piece
        self._release(node, piece)  # an answer that came too late for who asked
        self._unreported.add((node, piece))
        self._outdated.discard((node, piece))  # a node asks again after its report, or without one
        self._leases[node, piece] = self.clock() + self.lease_s, source
        if source is None:
            self._reading.add(piece)
            return
        self._uses[source] = self._uses.get(source, 0) + 1
        if self._uses[source] >= self.uploads:
            for other in self._has[source]:
                self._free[other].pop(source, None)

    def _release(self, node: str, piece: Piece) -> None:
        """End the turn of `node` at its source, if it has one."""
        if (node, piece) not in self._leases:
            return
        _, source = self._leases.pop((node, piece))
        if source is None:
            self._reading.discard(piece)
            return
        self._uses[source] -= 1
        for other in self._has.get(source, ()):
            self._free.setdefault(other, {})[source] = None

    def _end_leases(self) -> None:
        now = self.clock()
        by_end = self._leases.items()  # each is as long as the others
        ended = [use for use, _ in itertools.takewhile(lambda lease: lease[1][0] <= now, by_end)]
        for node, piece in ended:
            self._release(node, piece)

    def _drop(self, node: str, piece: Piece) -> None:
        self._has.get(node, set()).discard(piece)
        for holders in (self._holders.get(piece, {}), self._free.get(piece, {})):
            holders.pop(node, None)
        if not self._num_holders(piece):
            self._holders.pop(piece, None)
            self._free.pop(piece, None)


def _rank(node: str, piece: Piece) -> int:
    """Return a number that orders equally rare pieces, in a different order for each node."""
    return zlib.crc32(f"{node}/{piece.version}/{piece.name}".encode())
