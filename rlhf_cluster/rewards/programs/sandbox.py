"""Runs an untrusted program, and reports its outcome.

A program sees an empty machine: its own process, user, network, IPC and mount namespaces; the
interpreter and the system's libraries, read-only; its own text; an empty folder of `disk_bytes` in
memory that goes with it; no network, no /proc, no environment, no other user's rights. Limits hold
on processor time, waiting time, memory of each process, processes, files and output.

Promises:
- whatever a program does is an `Outcome`; that the sandbox itself fails is a `RewardFailure`, and
  the two are never mixed up: a slow or failing machine does not make a program wrong;
- when `run` returns, every process that the program started is dead, also where this process is
  killed meanwhile (the kernel ends a process namespace with its first process);
- what a program was not given it cannot read: the expected answers stay outside.

Needs Linux 5.12 and the right to make user namespaces, as root or not. `check` tries every promise
for real and refuses a machine that does not hold one of them; there is no weaker mode.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.programs.candidate import EXITS
from rlhf_cluster.rewards.programs.jail import PACKAGES_DIR, PROGRAM_DIR, WORK_DIR
from rlhf_cluster.rewards.reward_failure import RewardFailure

_CHUNK_BYTES = 1 << 16
_KEPT_ERROR_BYTES = 4096
_END_TIMEOUT_S = 30.0  # the kernel ends a namespace at once; this bounds a broken one
_FOLDER = Path(__file__).resolve().parent
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache")
_ENVIRONMENT = {
    "HOME": WORK_DIR,
    "TMPDIR": WORK_DIR,
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",  # numeric libraries count the machine's processors otherwise
    "OPENBLAS_NUM_THREADS": "1",
}
_PROBE = """
import os, socket
child = os.fork()
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "processes cannot be started"
with open("note", "w") as file:
    file.write("x")
for path in ("/note", os.__file__):
    try:
        open(path, "a")
    except OSError:
        continue
    raise AssertionError(f"{path} can be written")
for path in ("/proc", "/home", "/root", "/etc/passwd", "/var", "/sys"):
    assert not os.path.isfile(path) and not os.path.exists(path + "/self"), f"{path} can be read"
try:
    socket.create_connection(("192.0.2.1", 80), 5)
except TimeoutError:
    raise AssertionError("the network can be reached")
except OSError as error:
    assert error.errno != 111, "the network can be reached"
assert os.getpgrp() == os.getpid(), "others are in its process group"
assert os.getuid() == 65534 and len(os.environ) <= 6, "rights or variables are left"
print("held")
"""


class Outcome(StrEnum):
    """End of a program."""

    ENDED = "ended"  # by itself, with exit code 0: its output counts
    ERROR = "error"  # it raised, or left with another exit code
    SYNTAX = "syntax"  # no Python
    CPU = "cpu"  # out of processor time
    TIMEOUT = "timeout"  # out of waiting time
    MEMORY = "memory"  # reported by the program, like the four below; no report changes a score
    PROCESSES = "processes"
    FILES = "files"
    DENIED = "denied"
    NETWORK = "network"
    OUTPUT = "output"  # more than allowed
    KILLED = "killed"  # by another signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one program."""

    cpu_s: int = 5  # of each of its processes
    wall_s: float = 20.0  # from its start on
    memory_bytes: int = 512 << 20  # address space of each of its processes
    processes: int = 8  # and threads, at once
    disk_bytes: int = 16 << 20  # all files together; also the largest one
    open_files: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One program that was run."""

    outcome: Outcome
    output: bytes  # what it wrote to standard output, `output_bytes` at most
    detail: str  # the end of what it wrote to standard error, or the exit code


class Sandbox:
    def __init__(
        self, limits: Limits, packages: bool = False, start_timeout_s: float = 60.0
    ) -> None:
        """`packages`: the program may import packages of this project's environment."""
        self._limits = limits
        self._start_timeout_s = start_timeout_s
        self._packages = sysconfig.get_paths()["purelib"] if packages else None
        self._readable = _readable_folders(sys.base_prefix)

    def check(self) -> None:
        """Try every promise. Raises `ConfigError` where this machine does not hold one."""
        try:
            ran = self.run(_PROBE)
        except RewardFailure as failure:
            raise ConfigError(
                f"this machine cannot isolate programs: {failure}. A container needs a seccomp "
                "profile that allows unshare and mount; a host needs user namespaces "
                "(user.max_user_namespaces > 0, kernel.apparmor_restrict_unprivileged_userns = 0)"
            ) from failure
        if ran.outcome is not Outcome.ENDED or ran.output != b"held\n":
            raise ConfigError(
                f"the sandbox does not hold on this machine ({ran.outcome}: {ran.detail}). Raise "
                "the limits of the reward, or run it on another machine"
            )

    def run(self, program: str, stdin: bytes = b"", call: str | None = None) -> Ran:
        """Run `program` as a script on `stdin`; with `call`, the output is that value as JSON.

        Waits for: its end, at most the limits' `wall_s` once it has started. Safe to call from
        several threads. Raises `RewardFailure`: the sandbox could not be built, or was lost.
        """
        run = _Run(self._limits, self._start_timeout_s)
        try:
            run.start(self._spec(program, call), stdin)
            return run.finish()
        finally:
            run.close()

    def _spec(self, program: str, call: str | None) -> Mapping[str, Any]:
        limits = self._limits
        files = {
            "candidate.py": (_FOLDER / "candidate.py").read_text(encoding="utf-8"),
            "solution.py": program,
        }
        command = [_interpreter(), "-I", "-S", "-B", f"{PROGRAM_DIR}/candidate.py"]
        packages = [] if self._packages is None else [PACKAGES_DIR]
        return {
            "readable": self._readable,
            "files": files if call is None else files | {"call.py": call},
            "packages": self._packages,
            "command": [*command, *packages],
            "environment": _ENVIRONMENT,
            "disk_bytes": limits.disk_bytes,
            "num_files": 1024,
            "processes": limits.processes,
            "limits": {
                "CPU": limits.cpu_s,
                "AS": limits.memory_bytes,
                "FSIZE": limits.disk_bytes,
                "NOFILE": limits.open_files,
                "CORE": 0,
                "MEMLOCK": 0,
                "MSGQUEUE": 0,
            },
        }


@dataclass(slots=True)
class _Run:
    """One sandbox from start to end."""

    limits: Limits
    start_timeout_s: float
    jail: subprocess.Popen[bytes] | None = None
    pipes: dict[str, int] = field(default_factory=dict)
    received: dict[str, bytearray] = field(default_factory=dict)
    stopped: Outcome | None = None

    def start(self, spec: Mapping[str, Any], stdin: bytes) -> None:
        control_read, self.pipes["control"] = os.pipe()
        report_write = -1
        try:
            self.pipes["report"], report_write = os.pipe()
            command = [_interpreter(), "-I", "-S", "-B", str(_FOLDER / "jail.py")]
            self.jail = subprocess.Popen(
                [*command, str(control_read), str(report_write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(control_read, report_write),
                env={},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise RewardFailure(f"no sandbox can be started ({error})", "sandbox") from error
        finally:
            os.close(control_read)
            if report_write != -1:
                os.close(report_write)
        for name in ("stdin", "stdout", "stderr"):
            self.pipes[name] = os.dup(getattr(self.jail, name).fileno())
            getattr(self.jail, name).close()
        line = json.dumps(spec).encode("ascii") + b"\n"
        self.received = {name: bytearray() for name in ("report", "stdout", "stderr")}
        self._exchange({"control": line, "stdin": stdin})

    def finish(self) -> Ran:
        """Return the outcome. Raises `RewardFailure` where the sandbox did not say."""
        messages = [json.loads(line) for line in self.received["report"].splitlines()]
        failed = [str(m["sandbox"]) for m in messages if "sandbox" in m]
        if failed:
            raise RewardFailure(f"the sandbox cannot be built ({failed[0]})", "sandbox")
        output = bytes(self.received["stdout"][: self.limits.output_bytes])
        if self.stopped is not None:
            return Ran(outcome=self.stopped, output=output, detail=f"stopped: {self.stopped}")
        codes = [m["status"] for m in messages if "status" in m]
        error = self.received["stderr"].decode("utf-8", "replace").strip()
        if not codes:
            raise RewardFailure(f"the sandbox was lost ({error[-300:] or 'no word'})", "sandbox")
        detail = error or f"exit code {codes[0]}"
        return Ran(outcome=_outcome(codes[0]), output=output, detail=detail)

    def close(self) -> None:
        """End every process, and release the pipes.

        Waits for: the jail, which ends after everything in it. A process in uninterruptible sleep
        goes when the kernel lets it, and is not waited for longer than `_END_TIMEOUT_S`.
        """
        self._cut_lifeline()
        if self.jail is not None:
            try:
                self.jail.wait(timeout=_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.jail.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.jail.wait(timeout=_END_TIMEOUT_S)
        for fd in self.pipes.values():
            os.close(fd)
        self.pipes.clear()

    def _exchange(self, unsent: Mapping[str, bytes]) -> None:
        """Send and receive until all that the sandbox holds open is closed, which is its end.

        Waits for: the start, then the program's end, then the sandbox's. Each has its deadline;
        the program's is an outcome, the others are failures of the sandbox.
        """
        left = {name: memoryview(text) for name, text in unsent.items()}
        deadline, phase = time.monotonic() + self.start_timeout_s, "start"
        with selectors.DefaultSelector() as selector:
            for name in self.received:
                selector.register(self.pipes[name], selectors.EVENT_READ, name)
            for name in left:
                os.set_blocking(self.pipes[name], False)
                selector.register(self.pipes[name], selectors.EVENT_WRITE, name)
            open_ends = set(self.received)
            while open_ends:
                left_s = deadline - time.monotonic()
                if left_s <= 0 and phase == "run":
                    self.stopped = self.stopped or Outcome.TIMEOUT
                elif left_s <= 0:
                    raise RewardFailure(
                        f"the sandbox did not {phase} within its time. The machine is overloaded, "
                        "or raise start_timeout_s",
                        "sandbox",
                    )
                if self.stopped and phase == "run":
                    self._cut_lifeline()
                    deadline, phase = time.monotonic() + _END_TIMEOUT_S, "end"
                for key, _ in selector.select(max(left_s, 0.0)):
                    if key.data in left:
                        self._send(selector, key, left)
                    elif not self._receive(key.data):
                        selector.unregister(key.fd)
                        open_ends.discard(key.data)
                if phase == "start" and b'"started"' in self.received["report"]:
                    deadline, phase = time.monotonic() + self.limits.wall_s, "run"

    def _send(
        self,
        selector: selectors.BaseSelector,
        key: selectors.SelectorKey,
        left: dict[str, memoryview],
    ) -> None:
        name = key.data
        try:
            left[name] = left[name][os.write(key.fd, left[name][:_CHUNK_BYTES]) :]
        except BrokenPipeError:  # a program need not read its input
            left[name] = memoryview(b"")
        if left[name]:
            return
        selector.unregister(key.fd)
        if name == "stdin":  # the end of the input; the control pipe stays open as the lifeline
            os.close(self.pipes.pop(name))

    def _receive(self, name: str) -> bool:
        """False at the end of that pipe."""
        chunk = os.read(self.pipes[name], _CHUNK_BYTES)
        kept = self.received[name]
        kept += chunk
        if name == "stderr":
            del kept[:-_KEPT_ERROR_BYTES]
        elif name == "stdout" and len(kept) > self.limits.output_bytes:
            del kept[self.limits.output_bytes :]
            self.stopped = self.stopped or Outcome.OUTPUT
        return bool(chunk)

    def _cut_lifeline(self) -> None:
        if "control" in self.pipes:
            os.close(self.pipes.pop("control"))


def _outcome(code: int) -> Outcome:
    if code == 0:
        return Outcome.ENDED
    if code == -signal.SIGXCPU:
        return Outcome.CPU
    if code == -signal.SIGXFSZ:
        return Outcome.FILES
    return Outcome(EXITS.get(code, "killed" if code < 0 else "error"))


def _interpreter() -> str:
    """The interpreter without a virtual environment: its folder is one of the readable ones."""
    return str(Path(sys.executable).resolve())


def _readable_folders(prefix: str) -> list[str]:
    """The system's folders, and the interpreter's where it is not inside one of them."""
    inside = any(Path(prefix).is_relative_to(folder) for folder in _SYSTEM)
    return [*_SYSTEM] if inside else [*_SYSTEM, prefix]
