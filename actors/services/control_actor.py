"""Control channel of a run: a small named actor that other processes can find.

The driver reads scale requests from it, checks and applies the sizes, and leaves the outcome there.

Promises:
- the control actor never ends the run. Ray restarts it under its name when it dies; one that is silent
  is killed for that. After `cluster.max_restarts` restarts within `cluster.restart_window_s` the
  run continues without one, and logs it;
- a request outlives a restart: its process repeats it until there is an answer, and the driver keeps
  the answers. It is carried out once, since it has a key that no other request has.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.cluster.ray_cluster import join, refuse_silent

# isort: split
import ray

from actors.cluster.calls import NAMESPACE, answer, answer_now
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RunError, WorkerError, WorkerSilent
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.util.addresses import check_address

CALL_TIMEOUT_S = 30.0
SCALE_TIMEOUT_S = 900.0


def actor_name(run_name: str) -> str:
    return f"control:{run_name}"


class ControlActor:
    """Scale requests that are open, and the answers to others, by key. A restart empties both."""

    def __init__(self) -> None:
        self._start = uuid.uuid4().hex
        self._open: dict[str, dict[str, int]] = {}
        self._answers: dict[str, dict[str, str]] = {}

    def scale(self, key: str, sizes: dict[str, int]) -> dict[str, str] | None:
        """Return the answer to the request `key`. Without one the request is open, and it is None."""
        if key not in self._answers:
            self._open[key] = sizes
        return self._answers.get(key)

    def exchange(self, answers: dict[str, dict[str, str]]) -> tuple[str, dict[str, dict[str, int]]]:
        """Take `answers` by key, and return a token of this start, and the open requests."""
        self._answers |= answers
        for key in answers:
            self._open.pop(key, None)
        return self._start, self._open


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Request of another process for sizes of pools."""

    key: str
    sizes: dict[str, int]


class ControlChannel:
    """The driver's end of the control actor. It is closed when no restarts are left."""

    def __init__(
        self,
        exchange: Callable[[dict[str, dict[str, str]]], Awaitable[tuple[str, dict[str, Any]]]],
        *,
        end: Callable[[bool], None],
        max_restarts: int,
        tell: Callable[[str], None],
        restarts: RestartWindow | None = None,
    ) -> None:
        """Open the channel.

        `exchange` calls the method of the actor, with a deadline, and raises `WorkerError`. `end` kills
        the actor: for good if its argument is True, else Ray restarts it.
        """
        self._exchange, self._end, self._tell = exchange, end, tell
        self._max_restarts = max_restarts
        self.restarts = restarts or RestartWindow()
        self.is_open = True
        self._start: str | None = None  # None: not known since the actor was killed
        self._open: dict[str, dict[str, int]] = {}  # requests whose process has no answer yet
        self._answers: dict[str, dict[str, str] | None] = {}  # None while it is carried out

    async def exchange(self) -> list[Wish]:
        """Leave the answers in the actor, and return the wishes made since the last call.

        Waits for: the actor, and if it died, for its restart. Raises nothing.
        """
        if not self.is_open:
            return []
        answers = {key: found for key in self._open if (found := self._answers[key]) is not None}
        try:
            start, self._open = await self._exchange(answers)
        except WorkerError as error:
            self._start = None
            if self._may_restart(error):
                self._end(False)
            return []
        if self._start not in (None, start):
            self._may_restart(WorkerError("control: the process died"))
        self._start = start
        new = [
            Wish(key=k, sizes=sizes) for k, sizes in self._open.items() if k not in self._answers
        ]
        self._answers |= {wish.key: None for wish in new}
        return new

    def answer(self, wish: Wish, results: Mapping[str, str]) -> None:
        """Make `results` the answer to `wish`. The next `exchange` delivers it."""
        self._answers[wish.key] = dict(results)

    def close(self) -> None:
        if self.is_open:
            self._end(True)
            self.is_open = False

    def _may_restart(self, error: WorkerError) -> bool:
        """Count a restart; without one left, close the channel and return False."""
        within = f"{self.restarts.window_s:g} s"
        if self.restarts.recent >= self._max_restarts:
            self.close()
            self._tell(
                f"the control channel was lost {self.restarts.recent + 1} times within {within}, over "
                f"cluster.max_restarts = {self._max_restarts}: the run goes on without it, and "
                f"cannot be scaled. Last: {error}"
            )
            return False
        self.restarts.count(error)
        self._tell(
            f"{error}: another control channel is open, restart {self.restarts.recent} of "
            f"{self._max_restarts}"
        )
        return True


def open_channel(
    config: RunConfig, patience_s: float, tell: Callable[[str], None]
) -> ControlChannel:
    """Start the run's control actor, and return the driver's end of it.

    Raises: `RunError` if a run of this name is alive on the cluster.
    Waits for: Ray to end the actor of an earlier attempt of the run, at most `patience_s`.
    """
    name, ends = actor_name(config.run.name), time.monotonic() + patience_s
    control = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ControlActor)
    while True:
        try:
            actor: Any = control.options(name=name, namespace=NAMESPACE).remote()
            break
        except ValueError as error:
            if time.monotonic() >= ends:
                raise RunError(
                    f"run {config.run.name!r} is already alive on this cluster (actor {name}). Stop "
                    "it, or choose another run.name"
                ) from error
        time.sleep(0.2)
    return ControlChannel(
        lambda answers: answer(actor.exchange.remote(answers), CALL_TIMEOUT_S, "control.exchange"),
        end=lambda for_good: ray.kill(actor, no_restart=for_good),
        max_restarts=config.cluster.max_restarts,
        tell=tell,
        restarts=RestartWindow(config.cluster.restart_window_s),
    )


def scale(run_dir: Path, sizes: Mapping[str, int], address: str | None) -> dict[str, str]:
    """Ask a running job to change its pools. Returns what was done, by pool.

    Raises: `RunError` after `SCALE_TIMEOUT_S`, if the run cannot be found, or if it has ended or lost
    its control channel for good.
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
            f"{run_dir.name}: the run ended, or lost its control channel for good, while it was "
            f"asked to scale {dict(sizes)} ({error}). Look at its status for what was done"
        ) from error


def _request_sizes(control: Any, run: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """Repeat one scale request to `control` until it has an answer.

    Raises: `WorkerError` if `control` is dead, `RunError` after `SCALE_TIMEOUT_S`.
    """
    key, deadline = uuid.uuid4().hex, time.monotonic() + SCALE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            asked = control.scale.remote(key, dict(sizes))
            if (result := answer_now(asked, CALL_TIMEOUT_S, "control.scale")) is not None:
                return result
        except WorkerSilent:  # the driver has it restarted; the request is then made again
            continue
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
        refuse_silent(address)
        if not ray.is_initialized():
            join(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"{run_name}: cannot join the Ray cluster at {address}: {error}") from error
    try:
        return ray.get_actor(actor_name(run_name), namespace=NAMESPACE)
    except ValueError as error:
        raise RunError(
            f"{run_name}: no such run on the cluster at {address}; it has ended, runs elsewhere, or "
            "has lost its control channel for good: look at its status"
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
