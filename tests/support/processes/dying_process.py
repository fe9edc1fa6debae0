"""A process that dies between any two steps on the file system.

The work runs in a forked process that an audit hook ends, with no cleaning up, at its n-th file system
call.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
_DIED = 77
_DEADLINE_S = 60


def in_a_child(work: Callable[[], object], hook: Callable[[str, tuple[object, ...]], None]) -> int:
    """The exit code of a forked process that does `work` under an audit hook; 0: it got through."""
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(_DEADLINE_S)
        try:
            sys.addaudithook(hook)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survives(root: Path, die_at: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies at its `die_at`-th step below `root`. True if it lived."""
    steps = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps
        if event not in _STEPS or not str(arguments[0]).startswith(str(root)):
            return
        steps += 1
        if steps == die_at:
            os._exit(_DIED)

    code = in_a_child(work, count)
    assert code in (0, _DIED), f"step {die_at}: the work failed instead of dying"
    return code == 0
