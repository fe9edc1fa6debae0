"""HTTP client for one JSON request with a hard deadline, and the format of a chat endpoint.

- A request ends at its deadline whatever the server does (no answer, one byte per second, an
  answer without end): another thread shuts the connection.
- It is retried, after growing pauses, if that may help: no connection, no answer in time, status
  408, 429 or 5xx. Each attempt has a separate connection, so a late answer is never mistaken for
  another's.
- Redirections are not followed: they would carry the key elsewhere.
- Only the look-up of the host's name has no deadline of ours: it has the resolver's.

Rewards and askers that use an OpenAI-compatible chat endpoint share `question_of` and
`content_of`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.reward import RewardSection
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.sections.section import Section
from rlhf_cluster.util import provenance

MAX_ANSWER_BYTES = 16 << 20

_AGAIN = (408, 429, 500, 502, 503, 504)

_SHOWN_CHARACTERS = 200


class ServerSection(Section):
    """Address of a server, and attempts and deadlines of a question."""

    url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """http:// or https://, without user, query and fragment."""
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_]\w*$")
    """Environment variable, where the server is asked from, whose value is sent as the bearer token.
    The value is written to no file and no message."""
    attempts: PositiveInt = 4
    """Attempts of one question before it fails."""
    attempt_s: PositiveFloat = 60.0
    """Deadline of one attempt, from connecting to the last byte."""
    backoff_s: PositiveFloat = 0.5
    """Pause before the second attempt; each later one is twice as long, up to 30 s."""


class RemoteSection(ServerSection, RewardSection):
    """Keys of every reward that asks a server, which its scoring workers do."""


class Server:
    def __init__(
        self,
        section: ServerSection,
        path: str = "",
        wait: Callable[[float], None] | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """`wait` sleeps between attempts. Raises `ConfigError` where the key is not there."""
        self._section = section
        parts = urlsplit(section.url)
        if not parts.hostname:
            raise ConfigError(f"url {section.url!r} has no host. Give http://host:port/path")
        self._host, self._port = parts.hostname, parts.port
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = (parts.path.rstrip("/") + path) or "/"
        self._closed = threading.Event()
        self._key = ""
        self._wait = wait or self._pause
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if section.api_key_env is not None:
            key = environment.get(section.api_key_env, "").strip()
            if not key:
                raise ConfigError(
                    f"api_key_env names {section.api_key_env}, which is not set where the server is "
                    "asked from. Set it there: for the scoring workers, or for the stage itself"
                )
            if not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"the value of {section.api_key_env} cannot be a key: it has white space or "
                    "characters that are not ASCII. Set it again"
                )
            self._headers["Authorization"] = f"Bearer {key}"
            self._key = key
            provenance.hide([key])

    def ask(self, question: Any, deadline: float) -> Any:
        """The server's answer to `question`, both JSON.

        Waits for: an answer, at most until `deadline` (of `time.monotonic`). Raises `RewardFailure`
        with the last attempt's reason.
        """
        body = json.dumps(question).encode("ascii")
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(body, deadline)
            except _Again as again:
                pause_s = min(self._section.backoff_s * 2.0 ** (attempt - 1), 30.0)
                too_late = time.monotonic() + pause_s >= deadline
                if attempt == self._section.attempts or too_late or self._closed.is_set():
                    raise RewardFailure(
                        f"{self._section.url}: {again.failure} ({attempt} attempts)",
                        again.failure.reason,
                    ) from again.failure
                self._wait(pause_s)

    def close(self) -> None:
        """Questions that wait for their next attempt fail."""
        self._closed.set()

    def _pause(self, seconds: float) -> None:
        self._closed.wait(seconds)

    def _attempt(self, body: bytes, deadline: float) -> Any:
        left_s = min(self._section.attempt_s, deadline - time.monotonic())
        if left_s <= 0:
            raise _Again("no time is left to ask it. Raise timeout_s", "timeout")
        shut = _Deadline(left_s)
        try:
            status, answer = self._exchange(body, left_s, shut)
        except (OSError, http.client.HTTPException) as error:
            if shut.is_over or isinstance(error, TimeoutError):
                raise _late(left_s) from error
            told = str(error) or type(error).__name__
            raise _Again(f"cannot be asked ({told}). Is it running?", "remote") from error
        finally:
            shut.cancel()
        if shut.is_over:
            raise _late(left_s)
        return _read(status, answer, self._key)

    def _exchange(self, body: bytes, left_s: float, shut: _Deadline) -> tuple[int, bytes]:
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=left_s)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=left_s, context=self._tls
            )
        with contextlib.closing(connection):
            connection.connect()
            shut.watch(connection.sock)
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES + 1)
            if response.length and len(answer) <= MAX_ANSWER_BYTES:
                raise http.client.IncompleteRead(answer, response.length)
            return response.status, answer


class _Again(Exception):
    """An attempt that failed in a way that another may not."""

    def __init__(self, message: str, reason: Any) -> None:
        super().__init__(message)
        self.failure = RewardFailure(message, reason)


class _Deadline:
    """Shuts a connection down at the deadline, which ends every read and write of it at once."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._socket: socket.socket | None = None
        self._changing = threading.Lock()  # held for a few lines only
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, connection: socket.socket) -> None:
        with self._changing:
            self._socket = connection
            if self.is_over:
                self._shut()

    def cancel(self) -> None:
        self._timer.cancel()
        with self._changing:
            self._socket = None

    def _end(self) -> None:
        with self._changing:
            self.is_over = True
            self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            # Of a TLS connection too this ends the plain one below it.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _late(seconds: float) -> _Again:
    return _Again(f"no whole answer within {seconds:.3g} s. Raise attempt_s", "timeout")


def _read(status: int, answer: bytes, key: str) -> Any:
    text = answer[: MAX_ANSWER_BYTES if key else _SHOWN_CHARACTERS].decode("utf-8", "replace")
    shown = (text.replace(key, "***") if key else text)[:_SHOWN_CHARACTERS]
    if status in _AGAIN:
        raise _Again(f"answered with status {status}: {shown!r}", "remote")
    if status != 200:
        raise RewardFailure(
            f"answered with status {status}: {shown!r}. Correct the url, the key or the request",
            "remote",
        )
    if len(answer) > MAX_ANSWER_BYTES:
        raise RewardFailure(f"answered with more than {MAX_ANSWER_BYTES} bytes", "reply")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise RewardFailure(f"answered {shown!r}, which is not JSON", "reply") from error


PATH = "/chat/completions"


def question_of(model: str, text: str, temperature: float, max_tokens: int) -> dict[str, Any]:
    """The request whose one message of the user is `text`."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": temperature,
        "max_tokens": max_tokens,
    }


def content_of(answer: Any) -> str:
    """Return the text of an answer. Raises `RewardFailure` for anything else."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RewardFailure(
            f"answered {str(answer)[:100]!r}, expected choices[0].message.content", "reply"
        )
    return content


def is_cut(answer: Any) -> bool:
    """The answer, one with a content, ended at its limit of tokens."""
    return answer["choices"][0].get("finish_reason") == "length"


def prompt_text(source: str | list[dict[str, str]]) -> str:
    """Return a prompt as the question about it quotes it."""
    if isinstance(source, str):
        return source
    return "\n".join(f"{message['role']}: {message['content']}" for message in source)
