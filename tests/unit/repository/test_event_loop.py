"""No coroutine asks a disk or the network itself: the loop would stand still with it, and healthy
processes would look dead."""

import ast
import asyncio
import threading

import pytest

from rlhf_cluster.util.slow_disk import Latest
from tests.support.checks.blocking_calls import Source

HARMLESS = frozenset(
    {"rlhf_cluster.observe.metrics.process_memory:resident_bytes"}
)  # /proc is no disk


def test_no_coroutine_calls_what_blocks():
    source = Source.of("rlhf_cluster", "actors", harmless=HARMLESS)
    assert len(list(source.functions)) > 500
    assert not [f"{where} {why}" for where, why in source.blocking_coroutines()]


KNOWN = """
from pathlib import Path
import os, shutil, time, asyncio
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

class User:
    port: Port
    def __init__(self, log: Log | None):
        self._log = log
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
        ("await asyncio.to_thread(self._log.note, 'a')", None),
        ("await asyncio.to_thread(lambda: open('x'))", None),
        ("self._log.quiet()", None),
    ],
)
def test_what_the_rule_sees(body, found):
    source = Source()
    source.add("known", ast.parse(KNOWN.replace("{body}", body)))
    reasons = [why.partition(": ")[2] for _, why in source.blocking_coroutines()]
    assert reasons == ([] if found is None else [found])


async def test_d04_a_disk_that_does_not_answer_holds_up_no_step():
    answers, begun = threading.Event(), threading.Event()

    def look() -> float:
        begun.set()
        answers.wait(30)
        return 0.25

    latest = Latest(look, 1.0)
    assert await asyncio.to_thread(begun.wait, 30)
    assert [latest.value() for _ in range(1000)] == [1.0] * 1000
    assert sum(thread.name == "disk" for thread in threading.enumerate()) <= 1
    answers.set()
    looking = latest._looking
    assert looking is not None
    await asyncio.to_thread(looking.join, 30)
    assert latest.value() == 0.25
