"""Kills processes of a run at chosen moments, and sees it go on.

Roles and moments are chosen by hypothesis, from a seed. A kill is SIGKILL to one process of the role:
an actor, found through Ray, a child of an engine that is more than one process, or the driver; or to
all processes of a node at once (`nodes.py`), in whose place another one comes: at once, or when the
run has gone on with what is left. The moment is found by watching the run's files; one that does not
come within its deadline is given up, and the kill happens all the same and is told to have missed it.
After a kill the run has to make two further steps or to end well, and mostly the role has to be whole
again before the next kill; the others meet a run that is still mending itself. When its process ends
with an error, the same command is given again, once a kill; nothing of the attempt before may then be
left.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings, strategies

from tests.chaos.nodes import Nodes
from tests.chaos.processes import Process, descendants, marked, of_pid, open_files
from tests.chaos.subject import GENERATE_DELAY_S, Stuck, Subject

CLASSES = {
    "generation": "GenerationActor",
    "scoring": "ScoringActor",
    "controller": "ControlActor",
    "learner": "RankActor",
    "buffer": "BufferActor",
}
ACTOR = re.compile(r"^ray::(\w+)")  # how Ray names the process of an actor
NODE = "node"
ENGINE_CHILD = "engine child"
ENGINE_WORKER = "VLLM::Worker"  # how vLLM names the processes of a tensor-parallel engine
ROLES = (*CLASSES, "driver", NODE, ENGINE_CHILD)
MOMENTS = (
    "step boundary",
    "during generation",
    "after a checkpoint",
    "during a checkpoint",
    "during a publish",
)
READY_WITHIN_S = 300.0
MOMENT_WITHIN_S = 30.0
WATCH_EVERY_S = 0.001
FURTHER_STEPS = 2
WHOLE_OF = 4  # all but one of so many kills wait until the role is whole again
DOUBLE_EVERY = 4  # about every fourth kill is followed by another one
CHANCES = 1000
EXAMPLES = 3  # of plans; the first of hypothesis is always the plainest
DOUBLE_WITHIN_S = 15.0
LOOK_EVERY_S = 0.3
BRAKE_EVERY_STEPS = 8
BRAKE_S, MAX_BRAKE_S = 3.0, 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    role: str
    moment: str
    chance: float  # in [0, 1): which process of the role, and how far into a generation
    whole: bool = (
        True  # the role has to be whole again before the next kill; a node is replaced late
    )
    also: str | None = None  # the role of a second kill soon after, while the run mends itself


@dataclass(slots=True, kw_only=True)
class Kill:
    role: str
    pid: int
    moment: str
    hit: bool  # the moment was seen; otherwise the kill came at any time
    step: int
    time_s: float  # unix time
    name: str = ""  # of its log: which learner rank, which worker
    took: list[str] = field(default_factory=list)  # roles of the run that were on the node
    recovery_s: float = 0.0  # until two further steps were done, or the run had ended well
    restarted: str = (
        ""  # why the same command had to be given again; empty: the run went on by itself
    )


def plan(
    seed: int, kills: int, roles: Sequence[str] = ROLES, moments: Sequence[str] = MOMENTS
) -> list[Planned]:
    """`kills` kills that hypothesis chooses from `plans`: the same for the same arguments and the same
    source, of which it takes numbers to try."""
    found: list[list[Planned]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    @given(plans(kills, roles, moments))
    def choose(planned: list[Planned]) -> None:
        found.append(planned)

    choose()
    return found[-1]


@strategies.composite
def plans(
    draw: Callable[..., Any], kills: int, roles: Sequence[str], moments: Sequence[str]
) -> list[Planned]:
    """Kills in any order; no role comes again before each had its turn."""
    order: list[str] = []
    while len(order) < kills:
        order += draw(strategies.permutations(roles))
    seconds = [*roles, *[None] * (DOUBLE_EVERY - 1) * len(roles)]
    return [
        Planned(
            role=role,
            moment=draw(strategies.sampled_from(moments)),
            chance=draw(strategies.integers(0, CHANCES - 1)) / CHANCES,
            whole=draw(strategies.integers(1, WHOLE_OF)) < WHOLE_OF,
            also=draw(strategies.sampled_from(seconds)),
        )
        for role in order[:kills]
    ]


def find_through_ray(subject: Subject) -> Callable[[str], list[Process]]:
    """Processes of a role's live actors. Ray knows the actors; the mark tells which are this run's,
    the name whose control actor it is."""
    from ray.util.state import list_actors

    def find(role: str) -> list[Process]:
        if role == ENGINE_CHILD:
            return engine_children(find("generation"))
        actors: list[Any] = list_actors(
            address=subject.address,
            filters=[("state", "=", "ALIVE"), ("class_name", "=", CLASSES[role])],
            detail=True,
        )
        mine = marked(str(subject.folder))
        found = []
        for actor in sorted(actors, key=lambda actor: actor.actor_id):
            process = of_pid(actor.pid)
            named = role == "controller" and actor.name == f"control:{subject.name}"
            if process is not None and (named or process in mine):
                found.append(process)
        return found

    return find


@dataclass(slots=True, kw_only=True)
class Monkey:
    subject: Subject
    find: Callable[[str], list[Process]]
    tell: Callable[[str], None] = lambda text: None
    nodes: Nodes | None = None
    kills: list[Kill] = field(default_factory=list)
    stragglers: dict[int, str] = field(default_factory=dict)
    _ended: set[Process] = field(default_factory=set)

    def attack(self, planned: Planned) -> bool:
        """One kill and what follows. False when the run ended well before. Raises `Stuck`."""
        found = self._target(planned)
        if found is None:
            return False
        target, size, hit = found
        before = len(self.kills)
        step = self._kill(planned.role, target, planned.moment, hit)
        since_s, start = time.time(), time.monotonic()
        if planned.also is not None:
            self._second(planned)
        if self.nodes is not None and not (planned.whole and self.nodes.raylets()):
            self.nodes.refill()
        self._goes_on(since_s, f"the {planned.role} ({target.pid}) was killed")
        if self.nodes is not None:
            self.nodes.refill()
        if planned.whole and planned.role != "driver":
            self._is_whole(planned.role, target, size, step)
        for kill in self.kills[before:]:
            kill.recovery_s = round(time.monotonic() - start, 2)
            self.tell(f"killed {asdict(kill)}")
        return True

    def _kill(self, role: str, target: Process, moment: str, hit: bool) -> int:
        """The step of the run at the kill."""
        step, took = (self.subject.status() or {"step": 0})["step"], []
        name = log_of(target, self.subject.path)
        if role == NODE:
            assert self.nodes is not None
            took = roles_of(self.nodes.lose(target))
        else:
            os.kill(target.pid, signal.SIGKILL)
        self.kills.append(
            Kill(
                role=role,
                pid=target.pid,
                moment=moment,
                hit=hit,
                step=step,
                time_s=time.time(),
                name=name,
                took=took,
            )
        )
        return step

    def _second(self, planned: Planned) -> None:
        """Another kill, soon after: while the run mends itself, or the command was given again. There
        may be no process of the role then."""
        assert planned.also is not None
        deadline = time.monotonic() + planned.chance * DOUBLE_WITHIN_S
        while time.monotonic() < deadline:
            if self.ended():
                return
            time.sleep(0.05)
        found = [process for process in self._of(planned.also) if process.alive()]
        if found:
            self._kill(planned.also, found[0], f"after the {planned.role}", True)

    def ended(self) -> bool:
        """Whether the run ended well. One that ended otherwise, by a kill, is started again, and the
        kill is blamed for it.

        Raises `Stuck` when it ends more often than it was hit.
        """
        code = self.subject.ended()
        if code not in (None, 0):
            if len(self.subject.ends) >= len(self.kills):
                raise Stuck(f"the run ended without a kill: {self.subject.last_line()}")
            self._ended = self.subject.processes()
            self.subject.repeat()
            self._blamed(driver=code < 0).restarted += self.subject.ends[-1]
        return code == 0

    def _blamed(self, driver: bool) -> Kill:
        """The kill that ended the process: the last one that can have; pools replace their workers."""
        suspects = ("driver",) if driver else ("controller", "learner", "buffer", NODE)
        latest = reversed(self.kills)
        return next((kill for kill in latest if kill.role in suspects), self.kills[-1])

    def _target(self, planned: Planned) -> tuple[Process, int, bool] | None:
        """The process to kill, now, of how many in its role, and whether its moment was seen. None
        when the run ended well.

        Waits for: a run that makes steps, a process of the role, the moment.
        """
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            if self.ended():
                return None
            status = self.subject.status()
            found = self._of(planned.role) if status and status["state"] == "running" else []
            if not found:
                time.sleep(0.1)
                continue
            target = found[int(planned.chance * len(found))]
            hit = self._await(planned)
            if target.alive():
                return target, len(found), hit
        raise Stuck(f"no steps, or no {planned.role} to kill, within {READY_WITHIN_S:g} s")

    def _of(self, role: str) -> list[Process]:
        if role == "driver":
            return [driver] if (driver := self.subject.driver) else []
        if role == NODE:
            return [] if self.nodes is None else self.nodes.raylets()
        found = self.find(role)
        self.subject.seen.update(found)
        return found

    def _await(self, planned: Planned) -> bool:
        """Waits for: the moment, at most `MOMENT_WITHIN_S`. Whether it came."""
        path, deadline = self.subject.path, time.monotonic() + MOMENT_WITHIN_S
        before = sight(path, planned.moment)
        while not (new := sight(path, planned.moment) - before):
            if self.subject.ended() is not None or time.monotonic() > deadline:
                return False
            time.sleep(WATCH_EVERY_S)
        if planned.moment == "during generation":
            time.sleep(planned.chance * GENERATE_DELAY_S)
        return bool(new)

    def _goes_on(self, since_s: float, why: str) -> None:
        """Waits for: further steps, or a good end. Raises `Stuck`."""
        lowest, ends = None, len(self.subject.ends)
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            if self.ended():
                return
            if len(self.subject.ends) > ends:
                ends, lowest = len(self.subject.ends), None
            status = self.subject.status()
            if status and status["time_s"] > since_s and status["state"] == "running":
                lowest = status["step"] if lowest is None else min(lowest, status["step"])
                if status["step"] >= lowest + FURTHER_STEPS:
                    self._note_stragglers()
                    return
            time.sleep(0.02)
        raise Stuck(f"{why}; no {FURTHER_STEPS} further steps within {READY_WITHIN_S:g} s")

    def _is_whole(self, role: str, killed: Process, size: int, step: int) -> None:
        """Waits for: as many processes of the role as before, or a good end. Raises `Stuck`.

        Brakes a run that would come to its end meanwhile, harder every few steps.
        """
        deadline, brake_s = time.monotonic() + READY_WITHIN_S, 0.0
        while time.monotonic() < deadline:
            if self.ended():
                return
            if killed not in (now := self._of(role)) and len(now) >= size:
                if brake_s:
                    self.subject.slow(GENERATE_DELAY_S)
                return
            times = ((self.subject.status() or {"step": 0})["step"] - step) // BRAKE_EVERY_STEPS
            wanted_s = min(BRAKE_S * 2 ** (times - 1), MAX_BRAKE_S) if times > 0 else 0.0
            if wanted_s > brake_s:
                brake_s = wanted_s
                self.subject.slow(brake_s)
            time.sleep(LOOK_EVERY_S)
        raise Stuck(f"fewer than {size} of the role {role} within {READY_WITHIN_S:g} s of a kill")

    def _note_stragglers(self) -> None:
        """Processes of an attempt that ended, alive while the next one makes steps."""
        left = {process for process in self._ended if process.alive()}
        self.stragglers |= {process.pid: process.command() for process in left}
        self._ended = set()


def engine_children(engines: Sequence[Process]) -> list[Process]:
    """The processes of tensor-parallel engines, beside those that they are children of."""
    children = [of_pid(pid) for engine in engines for pid in sorted(descendants(engine.pid))]
    alive = [process for process in children if process is not None]
    return [process for process in alive if process.command().startswith(ENGINE_WORKER)]


def log_of(process: Process, run: Path) -> str:
    """The name of the log of `run` that `process` has open; empty if none. It tells who it is."""
    logs = (path for path in open_files(process.pid) if path.parent == run / "logs")
    return next((path.stem for path in logs if path.suffix == ".log"), "")


def roles_of(commands: Sequence[str]) -> list[str]:
    """Of the actors among processes that are told by their commands."""
    roles = {name: role for role, name in CLASSES.items()}
    found = [roles.get(word[0]) for command in commands if (word := ACTOR.findall(command))]
    return sorted(role for role in found if role is not None)


def sight(run: Path, moment: str) -> set[Any]:
    """What can be seen of a moment; it comes when there is something new."""
    if moment in ("step boundary", "during generation"):
        return {_stat(run / "metrics.jsonl", "st_size")}
    folder, pattern = {
        "after a checkpoint": ("checkpoints", "step-*[0-9]"),
        "during a checkpoint": ("checkpoints", "step-*.partial"),
        "during a publish": ("weights", "v*.partial"),
    }[moment]
    return {(p.name, _stat(p, "st_ino")) for p in (run / folder).glob(pattern)}


def _stat(path: Path, name: str) -> int:
    try:
        return getattr(path.stat(), name)
    except FileNotFoundError:
        return 0
