"""A network in virtual time: links that are shared evenly by the transfers on them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(eq=False)
class Link:
    bytes_per_s: float
    used: int = 0


@dataclass(eq=False)
class _Flow:
    left: float
    links: tuple[Link, ...]
    ended: asyncio.Future[None]
    rate: float = 0.0


class Network:
    """Transfers, each at the smallest of its even shares of the links that it takes."""

    def __init__(self) -> None:
        self._flows: dict[_Flow, None] = {}
        self._then = 0.0
        self._timer: asyncio.Handle | None = None

    async def move(self, num_bytes: float, *links: Link, progress_s: float | None = None) -> bool:
        """Whether all came; False when less than a byte did within `progress_s`."""
        flow = _Flow(num_bytes, links, asyncio.get_running_loop().create_future())
        self._flows[flow] = None
        self.changed()
        try:
            while True:
                before = flow.left
                done, _ = await asyncio.wait([flow.ended], timeout=progress_s)
                if done:
                    return True
                self._advance()
                if before - flow.left < 1.0:
                    return False
        finally:
            if self._flows.pop(flow, flow) is None:
                self.changed()

    def changed(self) -> None:
        """Flows or links are others: look at it once all that happens now has happened."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_soon(self._share)

    def _advance(self) -> None:
        """Bring what is left of each transfer to this moment."""
        now = asyncio.get_running_loop().time()
        passed, self._then = now - self._then, now
        for flow in self._flows:
            flow.left -= flow.rate * passed

    def _share(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        self._advance()
        for flow in list(self._flows):
            if flow.left <= 1.0:
                del self._flows[flow]
                if not flow.ended.done():
                    flow.ended.set_result(None)
        for flow in self._flows:
            for link in flow.links:
                link.used = 0
        for flow in self._flows:
            for link in flow.links:
                link.used += 1
        next_s = float("inf")
        for flow in self._flows:
            shares = (link.bytes_per_s / link.used for link in flow.links)
            flow.rate = min(shares)
            if flow.rate:
                next_s = min(next_s, flow.left / flow.rate)
        if next_s < float("inf"):
            self._timer = loop.call_later(next_s, self._share)
