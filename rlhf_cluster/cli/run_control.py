"""Control of a run from another process: read its logs, stop it, resize its pools."""

from __future__ import annotations

import difflib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_cluster.errors import ConfigError, RunError, StalledError
from rlhf_cluster.observe.record.logs import log_names, read_logs

if TYPE_CHECKING:
    from rlhf_cluster.run.run_directory import RunDir

STOP_CHECK_S = 0.1


def parse_sizes(arguments: Sequence[str]) -> dict[str, int]:
    """Parse requested workers by pool, such as "generation=3". Raises `ConfigError`.

    The run knows its pools and refuses any other (`no_such_pool`).
    """
    sizes: dict[str, int] = {}
    for argument in arguments:
        pool, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r}: expected POOL=WORKERS, such as generation=3")
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(
                f"{argument!r}: expected a number of workers, at least 1, found {text!r}. To end "
                "the run use stop"
            )
        if pool in sizes:
            raise ConfigError(f"{argument!r}: {pool} is given twice. Give each pool once")
        sizes[pool] = int(text)
    return sizes


def read_run_logs(run: RunDir, name: str | None, tail: int | None) -> Iterator[str]:
    """Yield lines of one process's log, or of all logs by time. Raises `RunError` without the log."""
    names = log_names(run.logs)
    if not names:
        raise RunError(f"{run.logs}: no logs yet; is the run still starting?")
    if name is not None and name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise RunError(f"{run.path}: no log of {name!r}{hint} There are: {', '.join(names)}")
    return read_logs(run.logs, [name] if name else names, tail)


def stop_run(run: RunDir, timeout_s: float) -> None:
    """End a run of this machine as Ctrl-C would, and wait until it has ended.

    Waits for: the run to release its directory. Unblocked by: its end, graceful or not.
    Raises `RunError` when it is not running or runs elsewhere, `StalledError` after `timeout_s`.
    """
    owner = run.owner()
    if owner is None or not run.is_held():
        raise RunError(f"{run.path}: not running; the last owner was {owner or 'nobody'}")
    if owner.host != socket.gethostname():
        raise RunError(
            f"{run.path}: runs as {owner}, this is {socket.gethostname()}. Stop it there, or by "
            "its job id with --address"
        )
    os.kill(owner.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while run.is_held():
        if time.monotonic() > deadline:
            raise StalledError(
                f"{run.path}: {owner} was asked to stop and still runs after {timeout_s:g} s. End "
                f"it with kill -9 {owner.pid}"
            )
        time.sleep(STOP_CHECK_S)
