"""Report of an active run, served to a browser on this machine and refreshed.

Promises:
- the server listens on loopback alone, and writes no file;
- only the address with the random token gets the page; every other request gets 403. Tokens are
  compared in constant time;
- the page is made at most once in `refresh_s`, for any number of readers;
- a page that cannot be made says why, and the next one is tried as usual;
- a request waits at most `make_timeout_s`. It then gets 503 with Retry-After, which a browser obeys.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rlhf_cluster.errors import RlhfError, RunError

HOST = "127.0.0.1"
REFRESH_S = 10
REQUEST_TIMEOUT_S = 10.0
MAKE_TIMEOUT_S = 20.0
_LOOK_S = 0.05  # delay between the end of the block and the end of the server


class _Server(ThreadingHTTPServer):
    """Server of one document, which `page` makes."""

    daemon_threads = True

    def __init__(
        self,
        port: int,
        token: str,
        refresh_s: int,
        make_timeout_s: float,
        page: Callable[[], str],
    ) -> None:
        self.path, self.refresh_s, self._make = f"/{token}", refresh_s, page
        self.make_timeout_s = make_timeout_s
        self._made: tuple[float, str] | None = None
        self._is_made = threading.Condition()
        self._making = False  # in a separate thread, so that a request can wait with a deadline
        super().__init__((HOST, port), _Handler)

    def page(self) -> str | None:
        """Return the page, or None while it is still being made.

        Waits for: the page, at most `make_timeout_s`.
        """
        with self._is_made:
            made = self._made
            if not self._making and (made is None or time.monotonic() - made[0] >= self.refresh_s):
                self._making = True
                threading.Thread(target=self._remake, name="report page", daemon=True).start()
            self._is_made.wait_for(lambda: not self._making, self.make_timeout_s)
            return None if self._making or self._made is None else self._made[1]

    def _remake(self) -> None:
        started, text = time.monotonic(), self._try()
        with self._is_made:
            self._made, self._making = (started, text), False
            self._is_made.notify_all()

    def _try(self) -> str:
        try:
            return self._make()
        # Only the browser can show the error, of any type.
        except Exception as error:
            return f"<!doctype html><title>report</title><p>No report: {escape(_words(error))}"


def _words(error: Exception) -> str:
    known = isinstance(error, RlhfError | OSError)
    return str(error) if known else f"{type(error).__name__}: {error}"


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server: _Server  # type: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if not hmac.compare_digest(self.path.encode(), self.server.path.encode()):
            self._answer(403, "403: the address of this report has a token that this one lacks\n")
            return
        page = self.server.page()
        if page is None:
            within, again = self.server.make_timeout_s, self.server.refresh_s
            told = f"503: no report within {within:g} s; it is being made. Ask again in {again} s\n"
            self._answer(503, told)
            return
        self._answer(200, page)

    do_HEAD = do_GET

    def _answer(self, status: int, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        kind = "text/html" if status == 200 else "text/plain"
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        if status != 403:
            self.send_header("Refresh", str(self.server.refresh_s))
        if status == 503:
            self.send_header("Retry-After", str(self.server.refresh_s))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the address holds the token."""


@contextmanager
def serve(
    page: Callable[[], str],
    port: int = 0,
    refresh_s: int = REFRESH_S,
    token: str | None = None,
    make_timeout_s: float = MAKE_TIMEOUT_S,
) -> Iterator[str]:
    """Serve the document of `page` while the block runs; yield the address.

    `port` 0: any that is free. `token` None: a new one of 256 bits. Raises `RunError` for a port that
    is taken.
    """
    secret = token or secrets.token_urlsafe(32)
    try:
        server = _Server(port, secret, refresh_s, make_timeout_s, page)
    except OSError as error:
        raise RunError(
            f"{HOST}:{port}: cannot serve the report there ({error.strerror}). Give --port another one"
        ) from error
    thread = threading.Thread(
        target=server.serve_forever, args=(_LOOK_S,), name="report", daemon=True
    )
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}{server.path}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(REQUEST_TIMEOUT_S)
