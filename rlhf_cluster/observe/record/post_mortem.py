"""Post-mortem: one readable document about why a run failed, written when it fails.

    post_mortem.json    what failed, first cause first, and what was known at that moment

Promises:
- the causes are in order, the first cause first, with their tracebacks, including that of another
  process if the error carries it;
- no part of it, messages, tracebacks and log lines included, holds the value of a setting or an
  environment variable whose name says that it is secret, or the credentials of a URL;
- every part is bounded: a document stays within a few megabytes whatever the run has logged;
- writing it never hides the error that it is about.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_cluster.observe.record import logs
from rlhf_cluster.util.durable_files import write_all
from rlhf_cluster.util.provenance import find_secrets, redact, remove_secrets

log = logging.getLogger(__name__)

NAME = "post_mortem.json"
LOG_LINES = 50
MAX_LOGS = 64
MAX_TEXT = 8_000  # characters of one message, traceback or line
MAX_CAUSES = 20
MAX_TASKS = 200
_TAIL_BYTES = 1 << 17
_ROLE = re.compile(r"^(?P<role>(?:generation|scoring|learner|buffer)(?:-\d+)?)\b")


def describe(
    *,
    time_s: float,
    run: str,
    error: BaseException,
    status: Mapping[str, Any],
    services: Mapping[str, Any],
    logs: Mapping[str, Sequence[str]],
    stacks: Mapping[str, Mapping[str, Sequence[str]]],
    config: Mapping[str, Any],
    packages: Mapping[str, Any],
    variables: Mapping[str, str],
) -> dict[str, Any]:
    """Build the document. `status` is the last snapshot, `services` the last state of pools and buffer.

    `variables` are those of the environment; they are not in the document, and the values of the secret
    ones are removed from it.
    """
    chain = causes(error)
    document = {
        "run": run,
        "time_s": time_s,
        "step": status.get("step"),
        "state": status.get("state"),
        "first_cause": f"{chain[0]['type']}: {chain[0]['message']}",
        "causes": chain,
        "status": status,
        "services": services,
        "stacks": stacks,
        "logs": logs,
        "packages": packages,
        "config": remove_secrets(config),
    }
    return redact(document, find_secrets(config, variables))


def causes(error: BaseException) -> list[dict[str, Any]]:
    """Return the errors that led to `error`, the first one first, `error` itself last."""
    found: list[BaseException] = []
    _collect(error, found, set())
    if len(found) > MAX_CAUSES:
        found = [*found[: MAX_CAUSES // 2], *found[-MAX_CAUSES // 2 :]]
    return [
        {
            "type": type(cause).__name__,
            "role": _role(cause),
            "message": _cut(str(cause)),
            "traceback": _cut(
                "".join(
                    traceback.format_exception(type(cause), cause, cause.__traceback__, chain=False)
                )
            ),
        }
        for cause in found
    ]


def read_tails(folder: Path) -> dict[str, list[str]]:
    """Return the last lines of the logs in `folder`, by name; of the newest logs if there are many.

    Waits for: this process's own log to be written, at most `logs.FLUSH_S`.
    """
    logs.flush()
    written = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.stem: _tail(path) for path in sorted(written[:MAX_LOGS])}


def own_stacks() -> dict[str, dict[str, list[str]]]:
    """Return the stack of every thread of this process, and every task of its running event loop."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    threads = {
        f"{names.get(ident, '?')} ({ident})": _frames(traceback.extract_stack(frame))
        for ident, frame in sys._current_frames().items()
    }
    try:
        tasks = list(asyncio.all_tasks())[:MAX_TASKS]
    except RuntimeError:  # no event loop
        tasks = []
    return {
        "threads": threads,
        "tasks": {
            f"{task.get_name()} {getattr(task.get_coro(), '__qualname__', '')}": _frames(
                traceback.StackSummary.extract(
                    (frame, frame.f_lineno) for frame in task.get_stack()
                )
            )
            for task in tasks
        },
    }


def write(path: Path, document: Callable[[], Mapping[str, Any]]) -> None:
    """Write the document that `document` returns, whole or not at all. Log what fails in it."""
    try:
        text = json.dumps(document(), indent=1, default=str) + "\n"
        write_all(path, text.encode())
    except Exception:  # the error that ends the run is on its way; this one must not take its place
        log.exception("%s: not written", path)


@contextmanager
def add_path_on_error(path: Path) -> Iterator[None]:
    """Add the path of the post-mortem to an error that leaves the block, if one was written there.

    A post-mortem that an earlier attempt left is kept under another name.
    """
    if path.exists():
        path.replace(path.with_name(f"earlier_{path.name}"))
    try:
        yield
    except Exception as error:
        if path.exists():
            error.add_note(f"What was known when the run failed: {path}")
        raise


def _collect(error: BaseException, found: list[BaseException], seen: set[int]) -> None:
    """Collect depth first: causes before the error. A group is replaced by its members."""
    if id(error) in seen:
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        _collect(before, found, seen)
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            _collect(member, found, seen)
    elif not isinstance(error, asyncio.CancelledError):
        found.append(error)


def _role(error: BaseException) -> str:
    """Return the process in which the error arose, if the error names it."""
    title = getattr(error, "proctitle", None)  # of an error that Ray carried here
    if isinstance(title, str):
        place = [
            f"{key} {getattr(error, key)}" for key in ("pid", "ip") if getattr(error, key, None)
        ]
        return f"{title.removeprefix('ray::')} ({', '.join(place)})" if place else title
    named = _ROLE.match(str(error))
    return named["role"] if named else "controller"


def _frames(stack: traceback.StackSummary) -> list[str]:
    return [f"{f.filename}:{f.lineno} {f.name}: {f.line or ''}".rstrip(": ") for f in stack]


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return [_cut(line) for line in lines[-LOG_LINES:]]


def _cut(text: str) -> str:
    half = MAX_TEXT // 2
    return text if len(text) <= MAX_TEXT else f"{text[:half]} ... {text[-half:]}"
