"""Programs run in the sandbox, and the processes that they leave."""

import contextlib
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from rlhf_cluster.rewards.programs.sandbox import (
    Limits,
    Sandbox,
)

MARKED = """
import ctypes
ctypes.CDLL(None).prctl(15, b"{mark}", 0, 0, 0)
"""
GONE_WITHIN_S = 60.0


def isolation() -> None:
    """Skips where the machine allows no namespaces, which is asked without our own code."""
    asked = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"]
    if shutil.which("unshare") and subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("this machine allows no user namespaces")


def run(program: str, stdin: bytes = b"", call: str | None = None, **limits):
    generous = {"cpu_s": 60, "wall_s": 120.0}  # for what should end by something else
    return Sandbox(Limits(**(generous | limits))).run(program, stdin, call)


def marked() -> tuple[str, str]:
    """A name for processes, and the lines of a program that take it."""
    mark = "s-" + secrets.token_hex(6)
    return mark, MARKED.format(mark=mark)


def processes_named(mark: str) -> list[int]:
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().strip() == mark:
                found.append(int(comm.parent.name))
    return found


def until(holds) -> None:
    deadline = time.monotonic() + GONE_WITHIN_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


KILLING = """
import os
for number in {signals}:
    for pid in (os.getppid(), 1, -1):
        try:
            os.kill(pid, number)
        except OSError:
            pass
print("on", flush=True)
os.killpg(0, 9)
"""
