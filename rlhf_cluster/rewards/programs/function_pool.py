"""User functions in child processes that can be killed.

Promises:
- a call ends at its deadline, whatever the function does: the child and every process of its group
  are killed, and the next call starts a new one;
- an exception, a death, a hang and an unusable answer are `RewardFailure`s with a reason each;
- arguments and results are JSON, of any size; nothing is pickled;
- what the function prints never mixes with its answer;
- the function's module is found as in this process's working directory and PYTHONPATH.

A `FunctionProcess` serves one call at a time; a `FunctionPool` shares some among threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.reward_failure import RewardFailure

_CHUNK_BYTES = 1 << 16
_DEATH_CHECK_S = 0.5  # a grandchild may hold the pipe open, so the pipe's end is not enough
_KILL_TIMEOUT_S = 10.0
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
# Run as a file: as a module it would first import this package, several times its own start.
_CHILD = str(Path(__file__).resolve().with_name("function_child.py"))


class FunctionProcess:
    """A child process with one function loaded, started when first needed."""

    def __init__(self, function: str, start_timeout_s: float) -> None:
        """`function` is "module:function"."""
        self._function = function
        self._start_timeout_s = start_timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._request_fd = self._reply_fd = -1
        self._num_requests = 0

    def start(self) -> None:
        """Start the child unless one is alive. Raises `RewardFailure` when the import fails."""
        if self._child is not None and self._is_alive(self._child):
            return
        self.kill()
        self._spawn()
        try:
            reply = self._exchange(b"", 0, self._start_timeout_s, "importing it")
        except RewardFailure as failure:
            self.kill()
            raise RewardFailure(f"{self._function}: {failure}", "start") from failure
        if "error" in reply:
            self.kill()
            raise RewardFailure(f"{self._function} cannot be imported: {reply['error']}", "start")

    def call(self, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """The function's answer to keyword `arguments`, as JSON gives it back.

        Waits for: the answer, at most `timeout_s` once the child is up. Raises `RewardFailure`.
        """
        self.start()
        self._num_requests += 1
        number = self._num_requests
        request = json.dumps({"id": number, "arguments": arguments}).encode("ascii") + b"\n"
        try:
            reply = self._exchange(request, number, timeout_s, "answering")
        except RewardFailure:
            self.kill()
            raise
        if "error" in reply:
            raise RewardFailure(f"raised {reply['error']}", "raised")
        return reply.get("result")

    def interrupt(self) -> None:
        """Kill the child from another thread; the call that is running ends with a failure."""
        child = self._child
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the child and its process group, and release the pipes. Fine without a child."""
        if self._child is None:
            return
        self.interrupt()
        # A process in uninterruptible sleep ends when the kernel lets it; do not wait.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout=_KILL_TIMEOUT_S)
        self._child = None
        os.close(self._request_fd)
        os.close(self._reply_fd)

    def _spawn(self) -> None:
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        command = [sys.executable, "-P", "-u", _CHILD, self._function]
        paths = (os.environ.get("PYTHONPATH"), _PACKAGE_ROOT)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        try:
            self._child = subprocess.Popen(
                [*command, str(request_read), str(reply_write)],
                stdin=subprocess.DEVNULL,
                pass_fds=(request_read, reply_write),
                env=environment,
                start_new_session=True,  # so that its whole group can be killed
            )
        except OSError as error:
            os.close(request_write)
            os.close(reply_read)
            raise RewardFailure(
                f"{self._function}: no child process can be started ({error})", "start"
            ) from error
        finally:
            os.close(request_read)
            os.close(reply_write)
        self._request_fd, self._reply_fd = request_write, reply_read
        os.set_blocking(request_write, False)

    def _exchange(
        self, request: bytes, number: int, timeout_s: float, doing: str
    ) -> dict[str, Any]:
        """Send `request` while receiving the reply, so that neither pipe can fill up for ever.

        Waits for: a whole line. Unblocked by: the child's reply, its death, or the deadline.
        """
        deadline = time.monotonic() + timeout_s
        unsent, received = memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._reply_fd, selectors.EVENT_READ)
            if unsent:
                selector.register(self._request_fd, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise RewardFailure(
                        f"was still {doing} after {timeout_s:g} s and was killed. Make it faster, "
                        "or raise its timeout",
                        "timeout",
                    )
                ready = [key.fd for key, _ in selector.select(min(left_s, _DEATH_CHECK_S))]
                if not ready and self._child is not None and not self._is_alive(self._child):
                    raise self._death(doing)
                if self._reply_fd in ready:
                    received += self._receive(doing)
                if self._request_fd in ready:
                    unsent = unsent[self._send(unsent, doing) :]
                    if not unsent:
                        selector.unregister(self._request_fd)
        return self._parse(bytes(received), number)

    def _receive(self, doing: str) -> bytes:
        chunk = os.read(self._reply_fd, _CHUNK_BYTES)
        if not chunk:
            raise self._death(doing)
        return chunk

    def _send(self, unsent: memoryview, doing: str) -> int:
        try:
            return os.write(self._request_fd, unsent[:_CHUNK_BYTES])
        except BrokenPipeError as error:
            raise self._death(doing) from error

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or reply.get("id") != number:
            raise RewardFailure(
                f"its process sent {line[:60]!r}, expected the answer to request {number}. The "
                "function must not write to file descriptors it did not open",
                "reply",
            )
        return reply

    def _death(self, doing: str) -> RewardFailure:
        # Pipes close after the exit status is settled: killing what is left does not change it.
        self.interrupt()
        how = "not yet gone"
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(timeout=_KILL_TIMEOUT_S) if self._child else 0
            how = f"exit code {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
        return RewardFailure(f"its process died while {doing} ({how})", "died")

    @staticmethod
    def _is_alive(child: subprocess.Popen[bytes]) -> bool:
        # Not reaped here: its process group can be killed only while its number is taken.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, child.pid, look) is None


class FunctionPool:
    """Child processes of one function, shared by threads."""

    def __init__(
        self, function: str, processes: int, start_timeout_s: float, wait_timeout_s: float
    ) -> None:
        self._function = function
        self._wait_timeout_s = wait_timeout_s
        self._all = [FunctionProcess(function, start_timeout_s) for _ in range(processes)]
        # Last in, first out: an idle pool keeps using the child that is already up.
        self._idle: queue.LifoQueue[FunctionProcess] = queue.LifoQueue()
        for process in self._all:
            self._idle.put(process)
        self._closed = False

    def check(self) -> None:
        """Import the function in a child. Raises `ConfigError` when that fails."""
        process = self._take()
        try:
            process.start()
        except RewardFailure as failure:
            raise ConfigError(
                f"reward function {failure}. Give module:function of a module that can be imported "
                f"from {os.getcwd()} or PYTHONPATH"
            ) from failure
        finally:
            self._idle.put(process)

    def call(self, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """`FunctionProcess.call` on a free child. Waits for: another group's call to end."""
        process = self._take()
        try:
            return process.call(arguments, timeout_s)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Kill all children. Calls that are running fail; later ones are refused."""
        self._closed = True
        for process in self._all:
            process.interrupt()
        # Waits for: the running calls, which end at the death of their child.
        with contextlib.suppress(queue.Empty):
            for _ in self._all:
                self._idle.get(timeout=_KILL_TIMEOUT_S).kill()

    def _take(self) -> FunctionProcess:
        if self._closed:
            raise self._refusal()
        try:
            process = self._idle.get(timeout=self._wait_timeout_s)
        except queue.Empty:
            raise RewardFailure(
                f"all {len(self._all)} processes were busy for {self._wait_timeout_s:g} s. Raise "
                "processes, or lower timeout_s",
                "busy",
            ) from None
        if self._closed:
            self._idle.put(process)
            raise self._refusal()
        return process

    def _refusal(self) -> RewardFailure:
        return RewardFailure(f"{self._function}: the reward is closed", "busy")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
