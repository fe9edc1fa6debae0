"""The child process that runs a user's reward function.

    python -P function_child.py module:function REQUEST_FD REPLY_FD

Imports nothing of this project, so that it starts at once. Reads one JSON request a line and
writes one JSON reply a line:

    {"id": 1, "arguments": {...}}  ->  {"id": 1, "result": ...}  or  {"id": 1, "error": "..."}

The first reply, {"id": 0}, says that the function was imported. The function runs in the main
thread (it may use signals), sees an empty standard input, and whatever it prints goes to standard
error. When the parent goes away, the process and all that the function started are killed.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    path, request_fd, reply_fd = arguments[0], int(arguments[1]), int(arguments[2])
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.path.insert(0, os.getcwd())
    threading.Thread(target=_die_with_parent, args=(request_fd,), daemon=True).start()
    with open(request_fd, "rb") as requests, open(reply_fd, "wb", buffering=0) as replies:
        function, error = _load(path)
        _send(replies, {"id": 0} if function is not None else {"id": 0, "error": error})
        if function is None:
            return 1
        # Waits for: a request. Unblocked by: the parent's next one, or its end.
        for line in requests:
            request = json.loads(line)
            _send(replies, {"id": request["id"]} | _call(function, request["arguments"]))
    return 0


def _die_with_parent(request_fd: int) -> None:
    """Kill this process group once the parent is dead, also while the function runs.

    Waits for: the parent's end of the pipe to close.
    """
    poll = select.poll()
    poll.register(request_fd, 0)  # a hang-up is always reported
    poll.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _load(path: str) -> tuple[Callable[..., Any] | None, str]:
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    # The module is a user's: importing it may raise anything.
    except (Exception, SystemExit) as error:
        if os.environ.get("RLHF_DEBUG") == "1":  # the reply names file and line
            traceback.print_exc()
        return None, _describe(error)
    return (function, "") if callable(function) else (None, f"{name} is not callable")


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": _plain(function(**arguments))}
    # A user's function may raise anything, and sys.exit must not end the process.
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"error": _describe(error)}


def _plain(value: Any) -> Any:
    """Lists and numbers for arrays, tensors and their scalars; others become their text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, int | float | str):
        return value
    return {"type": type(value).__name__}


def _describe(error: BaseException) -> str:
    """The last line of the traceback, and where in the user's code it was raised."""
    text = traceback.format_exception_only(error)[-1].strip()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    if frames and Path(frames[-1].filename) == Path(importlib.__file__):
        frames = []
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{text}{where}"


def _send(replies: Any, reply: dict[str, Any]) -> None:
    unsent = memoryview(json.dumps(reply).encode("ascii") + b"\n")
    while unsent:
        unsent = unsent[replies.write(unsent) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
