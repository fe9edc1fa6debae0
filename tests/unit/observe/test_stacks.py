"""Processes of a run tell where they are when they are asked, and nobody else gets the signal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cluster.observe.record import stacks

STUCK = """
import sys, threading
sys.path.insert(0, {root!r})
from rlhf_cluster.observe.record import stacks
lock = threading.Lock()
def waits_for_a_lock_that_nobody_gives_back():
    lock.acquire()
    print("up", flush=True)
    lock.acquire()
stacks.answer({folder!r}, "learner-0")
waits_for_a_lock_that_nobody_gives_back()
"""
ROOT = str(Path(__file__).parents[3])


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[str]]:
    """One that has printed a line."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        yield child
    finally:
        child.kill()
        child.wait()


def test_a_process_that_hangs_tells_where_and_one_that_is_stopped_is_told_as_silent(tmp_path: Path):
    with process(STUCK.format(root=ROOT, folder=str(tmp_path))) as child:
        for _ in range(2):
            told = stacks.ask(tmp_path, within_s=60.0)
            assert list(told) == ["learner-0"]
            assert sum("waits_for_a_lock_that_nobody" in line for line in told["learner-0"]) == 1
        child.send_signal(signal.SIGSTOP)
        assert "did not answer" in stacks.ask(tmp_path, within_s=0.2)["learner-0"][0]
    assert stacks.ask(tmp_path, within_s=60.0) == {}


def test_a_pid_that_is_another_process_by_now_gets_no_signal(tmp_path: Path):
    with process("print('up', flush=True)\nimport time\ntime.sleep(600)") as child:
        who = {"host": stacks.socket.gethostname(), "pid": child.pid, "start": "1"}
        (tmp_path / "learner-0.stacks").write_text(json.dumps(who) + "\n")
        (tmp_path / "torn.stacks").write_text('{"host')
        assert stacks.ask(tmp_path, within_s=60.0) == {}
        assert stacks.hosts(tmp_path) == {who["host"]}
        assert child.poll() is None, "the signal would have ended it"
