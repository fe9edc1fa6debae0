"""The log of one process on a disk that is slow, full, or does not answer."""

import errno
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.observe.record import logs
from rlhf_cluster.observe.record.logs import BackgroundFileHandler

PATIENT_S = 30.0


class Disk:
    """Writes, each of which waits until `answers` is set; `refuses` so many of them at first."""

    def __init__(self, refuses: int = 0, takes: int | None = None) -> None:
        self.answers, self.asked = threading.Event(), threading.Event()
        self.refuses, self.takes = refuses, takes

    def write(self, fd: int, data: memoryview) -> int:
        self.asked.set()
        assert self.answers.wait(PATIENT_S)
        if self.takes is not None:
            taken, self.takes = os.write(fd, data[: self.takes]), None
            return taken
        if self.refuses:
            self.refuses -= 1
            raise OSError(errno.ENOSPC, "no space")
        return os.write(fd, data)


@pytest.fixture
def logger():
    """One that nobody else hears."""
    logger = logging.Logger("n07")
    yield logger
    for handler in logger.handlers:
        handler.close()


def behind(
    logger: logging.Logger, path: Path, disk: Disk, max_waiting: int = 100
) -> BackgroundFileHandler:
    handler = BackgroundFileHandler(path, max_waiting, disk.write)
    handler.setFormatter(logs._LineFormatter("buffer", "buffer"))
    logger.addHandler(handler)
    return handler


def told(path: Path) -> list[str]:
    """The lines without time and level."""
    return [line.partition(": ")[2] for line in path.read_text().splitlines()]


def test_n07_who_logs_does_not_wait_for_a_disk_that_does_not_answer(logger, tmp_path):
    disk = Disk()
    handler = behind(logger, tmp_path / "a.log", disk)
    for number in range(50):
        logger.warning("line %d", number)
    assert disk.asked.wait(PATIENT_S)
    assert told(tmp_path / "a.log") == [], "the disk holds all of them up, and nobody here"
    disk.answers.set()
    handler.flush()
    assert told(tmp_path / "a.log") == [f"line {number}" for number in range(50)]


def test_n07_what_finds_no_room_is_dropped_and_counted(logger, tmp_path):
    disk = Disk()
    handler = behind(logger, tmp_path / "a.log", disk, max_waiting=2)
    logger.warning("under way")
    assert disk.asked.wait(PATIENT_S)
    for number in range(7):
        logger.warning("line %d", number)
    disk.answers.set()
    handler.flush()
    missing = "5 records are missing before this: the disk was slow or refused them"
    assert told(tmp_path / "a.log") == ["under way", missing, "line 0", "line 1"]
    line = (tmp_path / "a.log").read_text().splitlines()[1]
    assert re.match(r"\d{4}-.*Z WARNING buffer buffer rlhf_cluster\.observe\.record\.logs: ", line)


def test_n07_a_refused_line_is_counted_and_the_next_stands_on_a_line_of_its_own(logger, tmp_path):
    disk = Disk(refuses=2, takes=10)
    disk.answers.set()
    handler = behind(logger, tmp_path / "a.log", disk)
    for text in ("torn", "refused", "whole"):
        logger.warning(text)
    handler.flush()
    first, *others = (tmp_path / "a.log").read_text().splitlines()
    assert len(first) == 10
    missing = "2 records are missing before this: the disk was slow or refused them"
    assert [line.partition(": ")[2] for line in others] == [missing, "whole"]


def test_n07_the_text_is_that_of_the_moment_and_closing_writes_it(logger, tmp_path):
    disk, changing = Disk(), [1]
    handler = behind(logger, tmp_path / "a.log", disk)
    logger.warning("%s", changing)
    changing.append(2)
    disk.answers.set()
    handler.close()
    assert told(tmp_path / "a.log") == ["[1]"]


def test_a_disk_that_does_not_answer_is_waited_for_once_and_again_when_it_goes_on(logger, tmp_path):
    """The end of a process flushes, and then closes, each log: it waits `FLUSH_S` in all."""
    disk, waits = Disk(), list[float | None]()
    handler = behind(logger, tmp_path / "a.log", disk)

    def wait_for(predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        waits.append(timeout)
        return predicate()

    handler._waiting.all_tasks_done.wait_for = wait_for
    logger.warning("first")
    for _ in range(3):
        handler.flush()
    assert waits == [logs.FLUSH_S]
    disk.answers.set()
    handler._waiting.join()
    handler.close()
    assert waits == 2 * [logs.FLUSH_S]
    assert told(tmp_path / "a.log") == ["first"]


ENDING = """
import logging, os, sys
from rlhf_cluster.observe.record import logs
log = logs.configure("buffer", "buffer", sys.argv[1])
log.info("parent")
if (child := os.fork()) == 0:
    log.info("child")
    os._exit(0)
os.waitpid(child, 0)
log.info("last")
"""


def test_n07_the_last_line_of_a_process_and_those_of_a_forked_child_are_written(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", ENDING, tmp_path], env=environment, check=True)
    assert sorted(told(tmp_path / "buffer.log")) == ["child", "last", "parent"]
