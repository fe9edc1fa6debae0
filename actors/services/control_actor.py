"""Control channel of a run: a small named actor that other processes can find.

The run's driver reads scale requests from it and leaves its status there. The actor decides nothing:
the driver checks and applies the requested sizes, and answers with the outcome. If the actor dies, the
driver starts another one (`rlhf_cluster.run.control_channel`). A caller with an open request then gets
an error that says so.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.cluster.named_actors import NAMESPACE

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray

from actors.cluster import loopback
from actors.cluster.calls import answer_now
from rlhf_cluster.errors import RunError, WorkerError
from rlhf_cluster.util.addresses import check_address

CALL_TIMEOUT_S = 30.0
SCALE_TIMEOUT_S = 900.0


def actor_name(run_name: str) -> str:
    return f"control:{run_name}"


class ControlActor:
    """Table of scale requests, their answers by request number, and the run's last status."""

    def __init__(self) -> None:
        self._wishes: list[tuple[int, dict[str, int]]] = []
        self._answers: dict[int, dict[str, str]] = {}
        self._status: dict[str, Any] = {}
        self._next = 0

    def ask_scale(self, sizes: dict[str, int]) -> int:
        self._next += 1
        self._wishes.append((self._next, sizes))
        return self._next

    def wishes(self) -> list[tuple[int, dict[str, int]]]:
        taken, self._wishes = self._wishes, []
        return taken

    def answer(self, number: int, results: dict[str, str]) -> None:
        self._answers[number] = results

    def result(self, number: int) -> dict[str, str] | None:
        return self._answers.get(number)

    def set_status(self, status: dict[str, Any]) -> None:
        self._status = status

    def status(self) -> dict[str, Any]:
        return self._status


def scale(run_dir: Path, sizes: Mapping[str, int], address: str | None) -> dict[str, str]:
    """Ask a running job to change its pools. Returns what was done, by pool.

    Raises: `RunError` after `SCALE_TIMEOUT_S`, if the run cannot be found, or if its control channel
    dies in the meantime.
    Waits for: the run to add or drain the workers.
    """
    for pool, size in sizes.items():
        if size < 1:
            raise RunError(f"scale {pool}={size}: expected a size of at least 1")
    where = address or _address_of(run_dir)
    control = find(run_dir.name, where)
    try:
        return _request_sizes(control, run_dir.name, sizes)
    except WorkerError as error:
        raise RunError(
            f"{run_dir.name}: the run's control channel was lost while it was asked to scale "
            f"{dict(sizes)} ({error}). The run continues and opens another within a minute: look at "
            "its status for what was done, and ask again"
        ) from error


def _request_sizes(control: Any, run: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """Send one scale request to `control`, and poll for its answer.

    Raises: `WorkerError` if `control` is dead, `RunError` after `SCALE_TIMEOUT_S`.
    """
    number = answer_now(control.ask_scale.remote(dict(sizes)), CALL_TIMEOUT_S, "control.ask_scale")
    deadline = time.monotonic() + SCALE_TIMEOUT_S
    while time.monotonic() < deadline:
        result = answer_now(control.result.remote(number), CALL_TIMEOUT_S, "control.result")
        if result is not None:
            return result
        time.sleep(0.5)
    raise RunError(
        f"{run}: no answer to scale {dict(sizes)} within {SCALE_TIMEOUT_S:g} s. It may still be in "
        "progress, waiting for nodes or for workers to drain: look at the run's status"
    )


def find(run_name: str, address: str) -> Any:
    """Join the cluster of a running job, and return the job's control actor.

    Raises: `RunError`; `ConfigError` for another machine's cluster that asks for no token.
    """
    check_address("address", address)
    try:
        loopback.refuse_silent(address)
        if not ray.is_initialized():
            loopback.follow(address)
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"{run_name}: cannot join the Ray cluster at {address}: {error}") from error
    try:
        return ray.get_actor(actor_name(run_name), namespace=NAMESPACE)
    except ValueError as error:
        raise RunError(
            f"{run_name}: no such run on the cluster at {address}; it has ended, runs elsewhere, or is "
            "about to open its control channel again: look at its status"
        ) from error


def _address_of(run_dir: Path) -> str:
    path = run_dir / "control.json"
    try:
        return json.loads(path.read_text())["ray_address"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise RunError(
            f"{path}: cannot read it ({type(error).__name__}: {error}). Give the run directory of "
            "a running job, or its cluster's address"
        ) from error
