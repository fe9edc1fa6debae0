"""The document of a run that failed: the first cause first, all that was known, and no secret."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.cli.commands import explain
from rlhf_cluster.errors import RunError, StalledError, WorkerError
from rlhf_cluster.observe.record import post_mortem
from rlhf_cluster.observe.record.post_mortem import (
    add_path_on_error,
    causes,
    describe,
    write,
)

SECRET = "hunter2-hunter2"


def failed() -> BaseException:
    """What reaches the driver: a worker's error, its translation, the loop's, a group around it."""
    try:
        try:
            try:
                raise OSError("the disk is gone")
            except OSError as error:
                raise WorkerError("scoring-1.score: the disk is gone") from error
        except WorkerError as error:
            first = error
        try:
            raise ExceptionGroup("loops", [first, ValueError("another loop")])
        except ExceptionGroup as group:
            raise StalledError("nothing to train on") from group
    except StalledError as error:
        return error


def document(error: BaseException | None = None, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "time_s": 1.0,
        "run": "r",
        "error": error or failed(),
        "status": {"step": 7, "state": "failed"},
        "services": {"generation": {"last_errors": {}}},
        "logs": {"controller": ["a line"]},
        "stacks": {"threads": {}, "tasks": {}},
        "config": {"run": {"name": "r"}},
        "packages": {"torch": "2"},
        "variables": {"HOME": "/root"},
        **changes,
    }
    return describe(**given)


def test_the_first_cause_stands_first_with_its_traceback():
    found = document()
    assert [(c["type"], c["role"]) for c in found["causes"]] == [
        ("OSError", "controller"),
        ("WorkerError", "scoring-1"),
        ("ValueError", "controller"),
        ("StalledError", "controller"),
    ]
    assert found["first_cause"] == "OSError: the disk is gone"
    assert "in failed" in found["causes"][0]["traceback"]
    assert "direct cause" not in found["causes"][1]["traceback"], "each has its own only"
    assert (found["step"], found["state"]) == (7, "failed")


def test_an_error_that_another_process_raised_names_it():
    error = WorkerError("x")
    error.__cause__ = RuntimeError("remote text")
    error.__cause__.proctitle, error.__cause__.pid = "ray::ScoringActor.score", 41
    assert causes(error)[0]["role"] == "ScoringActor.score (pid 41)"


def test_causes_that_form_a_ring_or_a_long_chain_end():
    first, second = RunError("1"), RunError("2")
    first.__cause__, second.__cause__ = second, first
    assert [c["message"] for c in causes(first)] == ["2", "1"]
    error = RunError("0")
    for number in range(1, 100):
        after = RunError(str(number))
        after.__cause__, error = error, after
    found = [c["message"] for c in causes(error)]
    assert (len(found), found[0], found[-1]) == (post_mortem.MAX_CAUSES, "0", "99")


def test_no_secret_is_in_any_part_of_it():
    url = f"s3://user:{SECRET}@bucket/x?signature={SECRET}"
    config = {
        "tracking": {"api_key": SECRET, "nested": [{"password": "pass-1234"}]},
        "checkpoint": {"copy_to": url},
    }
    error = WorkerError(f"cannot open {url}: variable-9876 was refused, pass-1234 too")
    found = document(
        error,
        config=config,
        logs={"controller": [f"token {SECRET}", "GET https://u:p@host/a?b=c done"]},
        services={"generation": {"last_errors": {"generation-0": "pass-1234"}}},
        stacks={"threads": {"t": [f'login("{SECRET}")']}, "tasks": {}},
        variables={"HF_TOKEN": "variable-9876", "HOME": "/root"},
    )
    text = json.dumps(found)
    for secret in (SECRET, "pass-1234", "variable-9876", "signature", "u:p@", "b=c"):
        assert secret not in text, secret
    assert found["config"]["tracking"]["api_key"] == "(hidden)"
    assert found["logs"]["controller"][1] == "GET https://(hidden)@host/a?(hidden) done"
    assert "s3://(hidden)@bucket/x" in found["causes"][0]["message"]
    assert "HF_TOKEN" not in text, "the environment is not in it at all"


def test_logs_are_told_by_their_last_lines(tmp_path):
    for number in range(post_mortem.MAX_LOGS + 3):
        (tmp_path / f"generation-{number}.log").write_text("one\n")
    lines = [f"line {number}" for number in range(100_000)]
    (tmp_path / "controller.log").write_text("\n".join(lines) + "\n" + "x" * 100_000 + "\n")
    found = post_mortem.read_tails(tmp_path)
    assert len(found) == post_mortem.MAX_LOGS
    assert len(found["controller"]) == post_mortem.LOG_LINES
    assert found["controller"][-2] == "line 99999"
    assert len(found["controller"][-1]) < 2 * post_mortem.MAX_TEXT


async def test_threads_and_tasks_are_told_by_where_they_are():
    gate, hold = asyncio.Event(), threading.Event()

    async def waits_at_the_gate() -> None:
        await gate.wait()

    thread = threading.Thread(target=hold.wait, name="holder")
    thread.start()
    task = asyncio.create_task(waits_at_the_gate(), name="gatekeeper")
    await asyncio.sleep(0)
    try:
        found = post_mortem.own_stacks()
    finally:
        gate.set()
        hold.set()
        await task
        thread.join()
    [stack] = [frames for name, frames in found["tasks"].items() if name.startswith("gatekeeper ")]
    assert "await gate.wait()" in stack[-1]
    assert any(name.startswith("holder ") for name in found["threads"])


def test_there_are_stacks_without_an_event_loop_too():
    found = post_mortem.own_stacks()
    assert found["tasks"] == {}
    assert any("own_stacks" in frames[-1] for frames in found["threads"].values())


def fails(path: Path, make: Callable[[], Any], error: BaseException) -> None:
    with add_path_on_error(path):
        write(path, make)
        raise error


def test_the_error_ends_with_where_the_document_is(tmp_path):
    path = tmp_path / post_mortem.NAME
    with pytest.raises(RunError) as told:
        fails(path, document, RunError("it broke"))
    assert explain(told.value) == f"it broke\nWhat was known when the run failed: {path}"
    assert json.loads(path.read_text())["run"] == "r"
    with pytest.raises(RunError) as told, add_path_on_error(path):
        raise RunError("before anything was known")
    assert explain(told.value) == "before anything was known"
    assert (tmp_path / f"earlier_{post_mortem.NAME}").exists()


def test_a_failure_while_writing_never_hides_the_error(tmp_path, caplog):
    def broken() -> dict[str, Any]:
        raise OSError("no space left")

    path = tmp_path / post_mortem.NAME
    with pytest.raises(StalledError, match="nothing to train on") as told:
        fails(path, broken, failed())
    assert explain(told.value) == "nothing to train on"
    assert "no space left" in caplog.text
    write(tmp_path / "gone" / "x.json", document)
    assert list(tmp_path.iterdir()) == []
