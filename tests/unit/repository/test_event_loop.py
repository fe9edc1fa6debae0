"""No coroutine asks a disk or the network itself: the loop would stand still with it, and healthy
processes would look dead."""

import ast
import asyncio
import threading
from pathlib import Path

import pytest

from rlhf_cluster.util.slow_disk import LatestValue
from tests.support.checks.blocking_calls import Source

HARMLESS = frozenset(
    {
        "rlhf_cluster.observe.occupancy:resident_bytes",  # /proc is no disk
        "rlhf_cluster.util.slow_disk:BackgroundWriter.put",  # it waits `grace_s`: see the test of that
    }
)


IN_A_THREAD = tuple(
    f"rlhf_cluster.weights.transports.{module}:"
    for module in ("node_mirror", "mirror_carrier", "mirror_folder")
)
"""`mirror_carrier.finish` runs these coroutines to their end in a thread; only a simulated cluster has
them on a loop, with ports that do not block."""


def test_no_coroutine_calls_what_blocks():
    source = Source.of("rlhf_cluster", "actors", harmless=HARMLESS)
    assert len(list(source.functions)) > 500
    found = [f"{where} {why}" for where, why in source.blocking_coroutines()]
    assert not [text for text in found if not text.startswith(IN_A_THREAD)]


def test_no_loop_of_the_product_runs_a_mirror():
    calls = [
        (path.name, ast.unparse(node))
        for folder in ("rlhf_cluster", "actors")
        for path in Path(folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "bringing"
    ]
    assert calls == [("node_mirror.py", "self.bringing")], "which `finish` gets"


def test_n07_a_write_behind_the_loop_has_no_grace():
    made = [
        (path, {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords})
        for folder in ("rlhf_cluster", "actors")
        for path in Path(folder).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "BackgroundWriter"
    ]
    assert len(made) >= 2
    assert [path for path, given in made if given.get("grace_s") != "0.0"] == []


KNOWN = """
from pathlib import Path
import os, shutil, time, asyncio, threading, logging
from typing import Protocol

class Port(Protocol):
    def note(self, text): ...

class Base:
    def load(self):
        return Path("x").read_bytes()

class Log(Base):
    def __init__(self, path):
        self._path = path
    def note(self, text):
        self._put(text)
    def _put(self, text):
        os.fsync(3)
    def quiet(self):
        return self._path

class Lines:
    _turn: threading.Condition = field(default_factory=threading.Condition)
    def __init__(self, path):
        self._file = path.open("ab")
        self._done = threading.Event()
        self._writer = threading.Thread(target=print)
    def append(self, line):
        self._file.write(line)
    def put(self, line):
        self._turn.wait_for(print, 0.5)
    def ended(self):
        self._done.wait(1)
    def close(self):
        self._writer.join(1)

log = logging.getLogger("known")
{handler}

class User:
    port: Port
    def __init__(self, log: Log | None):
        self._log = log
        self._lines = Lines(Path("x"))
    async def run(self, other: "Log", path: Path):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("self._log.note('a')", "note > _put > os.fsync"),
        ("self._log.load()", "load > .read_bytes"),
        ("other.note('a')", "note > _put > os.fsync"),
        ("self.port.note('a')", "note > _put > os.fsync"),
        ("log = self._log; log.note('a')", "note > _put > os.fsync"),
        ("path.exists()", ".exists"),
        ("shutil.rmtree(path)", "shutil.rmtree"),
        ("time.sleep(1)", "time.sleep"),
        ("open('x')", "open"),
        ("self._lines.append(b'')", "append > file.write"),
        ("self._lines.put(b'')", "put > Condition.wait_for"),
        ("self._lines.ended()", "ended > Event.wait"),
        ("self._lines.close()", "close > Thread.join"),
        ("log.info('a')", None),
        ("await asyncio.to_thread(self._log.note, 'a')", None),
        ("await asyncio.to_thread(lambda: open('x'))", None),
        ("self._log.quiet()", None),
    ],
)
def test_what_the_rule_sees(body, found):
    source = Source()
    source.add("known", ast.parse(KNOWN.replace("{body}", body).replace("{handler}", "")))
    reasons = [why.partition(": ")[2] for _, why in source.blocking_coroutines()]
    assert reasons == ([] if found is None else [found])


@pytest.mark.parametrize(
    ("handler", "found"),
    [
        ("log.addHandler(logging.FileHandler('x'))", "info > FileHandler"),
        (
            "class Own(logging.Handler):\n    def emit(self, record):\n        os.write(1, b'')",
            "info > emit > os.write",
        ),
        ("class Own(logging.Handler):\n    def emit(self, record):\n        pass", None),
    ],
)
def test_n07_the_rule_sees_what_a_log_line_does(handler, found):
    source = Source()
    text = KNOWN.replace("{body}", "log.info('a')").replace("{handler}", handler)
    source.add("known", ast.parse(text))
    reasons = [why.partition(": ")[2] for _, why in source.blocking_coroutines()]
    assert reasons == ([] if found is None else [found])


async def test_d04_a_disk_that_does_not_answer_holds_up_no_step():
    answers, begun = threading.Event(), threading.Event()

    def look() -> float:
        begun.set()
        answers.wait(30)
        return 0.25

    latest = LatestValue(look, 1.0)
    assert await asyncio.to_thread(begun.wait, 30)
    assert [latest.value() for _ in range(1000)] == [1.0] * 1000
    assert sum(thread.name == "disk" for thread in threading.enumerate()) <= 1
    answers.set()
    looking = latest._looking
    assert looking is not None
    await asyncio.to_thread(looking.join, 30)
    assert latest.value() == 0.25
