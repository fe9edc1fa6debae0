"""No thread that asyncio joins at the end: a disk or a host that hangs would keep the process."""

import ast
import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cluster.errors import StalledError
from rlhf_cluster.util.slow_disk import (
    DiskDeadline,
    run_in_thread,
)

SOURCES = sorted(path for room in ("rlhf_cluster", "actors") for path in Path(room).rglob("*.py"))
NEVER_S = 300.0


def joined_threads(tree: ast.AST) -> Iterator[int]:
    """Lines that give a call to the default executor of the loop."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name == "to_thread":
                yield node.lineno
        if isinstance(node, ast.ImportFrom) and any(n.name == "to_thread" for n in node.names):
            yield node.lineno
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "run_in_executor"
            and any(isinstance(a, ast.Constant) and a.value is None for a in _executor(node))
        ):
            yield node.lineno


def _executor(call: ast.Call) -> list[ast.expr]:
    return call.args[:1] + [k.value for k in call.keywords if k.arg == "executor"]


def test_n14_no_call_runs_in_a_thread_that_the_end_waits_for():
    assert len(SOURCES) > 200
    found = [f"{p}:{n}" for p in SOURCES for n in joined_threads(ast.parse(p.read_text()))]
    assert not found, (
        "call it with rlhf_cluster.util.slow_disk.run_in_thread, or DiskDeadline.aside"
    )


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("await asyncio.to_thread(read)", True),
        ("call = asyncio.to_thread", True),
        ("from asyncio import to_thread", True),
        ("loop.run_in_executor(None, read)", True),
        ("loop.run_in_executor(executor=None, func=read)", True),
        ("loop.run_in_executor(self._threads, read, None)", False),
        ("await aside(read)", False),
    ],
)
def test_what_the_rule_sees(line, is_found):
    assert bool(list(joined_threads(ast.parse(line)))) == is_found


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["its deadline", "a signal"])
def test_n14_a_driver_ends_while_a_disk_still_holds_its_call(is_cancelled):
    begun, answers = threading.Event(), threading.Event()

    def read() -> None:
        begun.set()
        assert answers.wait(NEVER_S)

    async def drive() -> None:
        if not is_cancelled:
            await DiskDeadline(limit_s=0.05, setting="a.timeout_s").aside("a file", read)
        call = asyncio.create_task(run_in_thread(read))
        assert await run_in_thread(begun.wait, NEVER_S)
        call.cancel()
        await call

    with pytest.raises(asyncio.CancelledError if is_cancelled else StalledError):
        asyncio.run(drive())
    assert begun.wait(NEVER_S)
    assert not answers.is_set(), "the run is over, and the disk has not answered"
    answers.set()
