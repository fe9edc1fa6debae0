"""HTTP client for one JSON request with a hard deadline, and the format of a chat endpoint.

- A request ends at its deadline whatever the server does (no answer, one byte per second, an
  answer without end).
- It is retried, after growing pauses, if that may help: no connection, no answer in time, status
  408, 429 or 5xx. Each attempt has a separate connection, so a late answer is never mistaken for
  another's.
- Redirections are not followed: they would carry the key elsewhere. Proxies and passwords of the
  environment are not used.
- Only the look-up of the host's name has no deadline of ours: it has the resolver's.

Rewards and askers that use an OpenAI-compatible chat endpoint share `question_of` and
`content_of`.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
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
        try:
            self._url = httpx.URL(section.url.rstrip("/") + path)
            host, port = self._url.host, self._url.port
        except (httpx.InvalidURL, UnicodeError) as error:  # the second for a name that IDNA refuses
            raise ConfigError(
                f"url {section.url!r}: {error}. Give http://host:port/path"
            ) from error
        if not host or (port or 0) > 65535:
            where = "no host" if not host else f"port {port}, over the bound 65535"
            raise ConfigError(f"url {section.url!r} has {where}. Give http://host:port/path")
        self._tls = ssl.create_default_context()
        self._closed = threading.Event()
        self._key = ""
        self._wait = wait or self._pause
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            # A small packed answer could unpack to more than fits in memory.
            "Accept-Encoding": "identity",
        }
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
        try:
            status, answer = asyncio.run(self._exchange(body, left_s))
        except TimeoutError as error:
            raise _Again(
                f"no whole answer within {left_s:.3g} s. Raise attempt_s", "timeout"
            ) from error
        except (OSError, httpx.TransportError) as error:
            raise _Again(
                f"cannot be asked ({_describe_cause(error)}). Is it running?", "remote"
            ) from error
        return _read(status, answer, self._key)

    async def _exchange(self, body: bytes, left_s: float) -> tuple[int, bytes]:
        # httpx's own timeouts bound one read each, so one byte per second would never end.
        async with (
            asyncio.timeout(left_s),
            httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=None) as client,
            client.stream("POST", self._url, content=body, headers=self._headers) as response,
        ):
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    break
            return response.status_code, bytes(answer)


class _Again(Exception):
    """An attempt that failed in a way that another may not."""

    def __init__(self, message: str, reason: Any) -> None:
        super().__init__(message)
        self.failure = RewardFailure(message, reason)


def _describe_cause(error: BaseException) -> str:
    """Return the message of the first cause, which alone says why a connection failed."""
    while cause := error.__cause__ or error.__context__:
        # One error for each address of the host: they mostly say the same.
        error = cause.exceptions[0] if isinstance(cause, ExceptionGroup) else cause
    return str(error) or type(error).__name__


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
