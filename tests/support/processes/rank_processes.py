"""Learner ranks as processes: one set of them runs many jobs in turn, each in a group of its own.

A rank that is alone runs its jobs in the test's process. All of a set run all of its jobs: DeepSpeed
counts what a process built, and ranks whose counts differ do not work together.
"""

from __future__ import annotations

import multiprocessing as mp
import queue
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_cluster.util.process_group import serve_store

DEADLINE_S = 240
"""For a job on all ranks. A process that is still alive after all of them is killed by its alarm."""

Work = Callable[[int, int, str | None, Any], Any]
"""work(rank, world_size, address, job) -> result; a function of a module, run in the rank."""


def run_ranks(work: Work, world_size: int, jobs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{key: [result of rank 0, of rank 1...]} of every job, or fail with the rank's error."""
    if world_size == 1:
        return {key: [work(0, 1, None, job)] for key, job in jobs.items()}
    context = mp.get_context("spawn")
    results = context.Queue()
    stores = {key: serve_store(socket.create_server(("127.0.0.1", 0))) for key in jobs}
    addressed = [(k, f"tcp://{stores[k].host}:{stores[k].port}", job) for k, job in jobs.items()]
    processes = [
        context.Process(target=_run, args=(work, r, world_size, addressed, results), daemon=True)
        for r in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[str, list[Any]] = {key: [None] * world_size for key in jobs}
    running = world_size
    try:
        while running:
            rank, key, result = _next_result(results, processes)
            if key is None:
                assert result is None, f"rank {rank}: {result}"
                running -= 1
            else:
                found[key][rank] = result
    finally:
        for process in processes:
            process.kill() if running else process.join(30)
    return found


def _next_result(results: Any, processes: list[Any]) -> tuple[int, str | None, Any]:
    """Waits for a result, at most DEADLINE_S, or until a rank dies without one."""
    ends = time.monotonic() + DEADLINE_S
    while True:
        dead = [p.exitcode for p in processes if p.exitcode]
        try:
            return results.get(timeout=1)
        except queue.Empty:
            assert not dead, f"ranks died with exit codes {dead}"
            assert time.monotonic() < ends, f"no result within {DEADLINE_S} s"


def _run(work: Work, rank: int, world_size: int, jobs: list[Any], results: Any) -> None:
    signal.alarm(DEADLINE_S * (1 + len(jobs)))
    key = None
    try:
        for key, address, job in jobs:
            results.put((rank, key, work(rank, world_size, address, job)))
        results.put((rank, None, None))
    except BaseException as error:
        results.put((rank, None, f"job {key!r}: {type(error).__name__}: {error}"))
        raise
