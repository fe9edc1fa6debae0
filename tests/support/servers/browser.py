"""What a person would see of a page in headless Chromium, driven by its DevTools protocol.

`look` opens the page once for each width and colour scheme; the browser ends with the call. Every wait
has the deadline `WITHIN_S`.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WITHIN_S = 120.0
HEIGHT = 900
SCHEMES = ("light", "dark")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
OPTIONS += ["--remote-debugging-port=0"]
SEEN = """JSON.stringify({
    title: document.title,
    text: document.body.innerText,
    page_width: document.documentElement.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor,
    charts: [...document.querySelectorAll('svg')].filter(s => s.getBBox().width > 0).length,
})"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """`errors`: exceptions of scripts, and what the browser logs as errors. `page_width`: over `width`
    where a person has to scroll sideways. `background`: as CSS, such as "rgb(18, 22, 28)"."""

    width: int
    scheme: str
    errors: Sequence[str]
    title: str
    text: str
    page_width: int
    background: str
    charts: int
    picture: bytes


def look(
    address: str, widths: Sequence[int] = (1280, 390), schemes: Sequence[str] = SCHEMES
) -> list[Look]:
    with _browser() as socket:
        page = _Page(socket)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        return [page.look(address, *each) for each in product(widths, schemes)]


def check(looks: Sequence[Look]) -> None:
    """Of a report: nothing failed, it fits its width, is drawn, and follows the colour scheme."""
    for seen in looks:
        assert not seen.errors, seen.errors
        assert seen.page_width <= seen.width, "nobody has to scroll sideways"
        assert seen.charts > 3
    colours = {(seen.scheme, seen.background) for seen in looks}
    assert len(colours) == len(SCHEMES), colours
    assert len({seen.background for seen in looks}) == len(SCHEMES), colours
    assert len({seen.picture for seen in looks}) == len(looks), "nothing is drawn as it was before"


def texts_until(address: str, last: str, after_first: Callable[[], object]) -> list[str]:
    """What an open page shows one after the other, until it shows `last`; nobody touches it. Once it
    shows anything `after_first` is called."""
    with _browser() as socket:
        page, seen = _Page(socket), []
        page.call("Page.navigate", url=address)
        deadline = time.monotonic() + WITHIN_S
        while last not in seen:
            assert time.monotonic() < deadline, seen
            reply = page.ask("Runtime.evaluate", expression="document.body?.innerText")
            found = reply.get("result", {})  # none while it goes from one page to the next
            text = found.get("result", {}).get("value", "").strip()
            if text and text not in seen:
                seen.append(text)
                if len(seen) == 1:
                    after_first()
            time.sleep(0.05)
        return seen


class _Page:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number, self._events = socket, 0, []

    def look(self, address: str, width: int, scheme: str) -> Look:
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self._events.clear()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        seen = self.call("Runtime.evaluate", expression=SEEN)["result"]["value"]
        whole = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return Look(
            width=width,
            scheme=scheme,
            errors=list(self._errors()),
            picture=base64.b64decode(whole),
            **json.loads(seen),
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = self.ask(method, **parameters)
        assert "result" in reply, reply
        return reply["result"]

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Waits for: the browser's answer, which may be an error."""
        self._number += 1
        words = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(json.dumps(words))
        while (reply := self._receive()).get("id") != self._number:
            pass
        return reply

    def _receive(self) -> dict[str, Any]:
        found = json.loads(self._socket.recv(timeout=WITHIN_S))
        if "method" in found:
            self._events.append(found)
        return found

    def _errors(self) -> Iterator[str]:
        for event in self._events:
            told = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                yield str(told["exceptionDetails"])
            elif event["method"] == "Log.entryAdded" and told["entry"]["level"] == "error":
                yield f"{told['entry']['text']} {told['entry'].get('url', '')}"


@contextmanager
def _browser() -> Iterator[ClientConnection]:
    """The connection to an empty page of a browser with a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="chromium-"))
    process = subprocess.Popen(
        [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with connect(_page_of(process, folder), max_size=None, open_timeout=WITHIN_S) as socket:
            yield socket
    finally:
        process.kill()
        process.wait(WITHIN_S)
        shutil.rmtree(folder, ignore_errors=True)


def _page_of(process: subprocess.Popen[bytes], folder: Path) -> str:
    """Waits for: the browser to say its port, and to have a page."""
    deadline = time.monotonic() + WITHIN_S
    said = folder / "DevToolsActivePort"
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{CHROMIUM} ended with code {process.returncode}"
        lines = said.read_text().splitlines() if said.exists() else []
        if lines:
            url = f"http://127.0.0.1:{lines[0]}/json/list"
            with urllib.request.urlopen(url, timeout=WITHIN_S) as reply:
                pages = [each for each in json.load(reply) if each["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise AssertionError(f"{CHROMIUM} had no page within {WITHIN_S:g} s")
