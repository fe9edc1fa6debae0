"""What chooses and tells the kills of the chaos runs, without a run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.monkey import (
    ENGINE_CHILD,
    MOMENTS,
    NODE,
    ROLES,
    Kill,
    Monkey,
    engine_children,
    log_of,
    plan,
    roles_of,
    sight,
)
from tests.chaos.nodes import Nodes
from tests.chaos.processes import Process, descendants, marked, of_pid
from tests.chaos.run import again, earlier, figures, parse, seeds_of, write
from tests.chaos.subject import Stuck, Subject


def test_a_run_s_processes_are_found_by_their_mark_until_they_are_gone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"/x:{tmp_path}"}
    command = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        [found] = marked(str(tmp_path))
        assert found.pid == child.pid
        assert found.alive()
        assert "input()" in found.command()
        assert not Process(found.pid, found.started + 1).alive(), "another one of the same id"
        child.kill()
    assert not found.alive()
    assert of_pid(found.pid) is None
    assert marked(str(tmp_path)) == set()


def test_the_seed_alone_chooses_the_kills_and_every_role_has_its_turn() -> None:
    assert plan(7, 12) == plan(7, 12)
    assert plan(7, 12) != plan(8, 12)
    for start in (0, 8):
        assert {kill.role for kill in plan(7, 16)[start : start + 8]} == set(ROLES)
    assert [kill.role for kill in plan(7, 2, roles=["driver"])] == ["driver", "driver"]
    planned = [kill for seed in range(12) for kill in plan(seed, 32)]
    assert {kill.moment for kill in planned} == set(MOMENTS)
    assert {kill.also for kill in planned} == {*ROLES, None}
    assert {kill.whole for kill in planned} == {True, False}
    assert all(0 <= kill.chance < 1 for kill in planned)
    assert len({kill.chance for kill in planned}) > len(planned) / 4
    assert {NODE, ENGINE_CHILD} < set(ROLES)


def test_an_engine_s_children_are_told_from_its_other_processes(tmp_path: Path) -> None:
    """As vLLM starts them, under a name of their own; who is told by the log that it has open."""
    sleep = "import time; print(flush=True); time.sleep(600)"
    names = ["VLLM::Worker_TP0", "VLLM::Worker_TP1", "resource_tracker"]
    script = "import subprocess, sys\nfor name in sys.argv[2:]: c = subprocess.Popen([name, '-S', "
    script += f"'-c', '{sleep}'], executable=sys.executable, stdout=subprocess.PIPE); "
    script += "c.stdout.readline()\nlog = open(sys.argv[1], 'w'); print(flush=True); input()"
    log = tmp_path / "logs" / "generation-1.log"
    log.parent.mkdir()
    command = [sys.executable, "-S", "-c", script, str(log), *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        engine = of_pid(process.pid)
        assert engine is not None
        found = engine_children([engine])
        told = [child.command().split()[0] for child in found]
        name, nobody = log_of(engine, tmp_path), log_of(engine, tmp_path / "other")
        for pid in (*descendants(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
    assert told == names[:2]
    assert (name, nobody) == ("generation-1", "")
    assert engine_children([engine]) == []
    assert log_of(engine, tmp_path) == ""


@dataclass(slots=True, kw_only=True)
class EndingSubject(Subject):
    """A run whose attempts end with these codes, one after the other."""

    codes: list[int]

    def ended(self) -> int | None:
        return self.codes[0]

    def start(self) -> None:
        self.codes.pop(0)


def monkey_on(tmp_path: Path, codes: list[int], kills: int) -> Monkey:
    roles = ["learner", "driver", "scoring"][:kills]
    made = [Kill(role=r, pid=1, moment="", hit=True, step=0, time_s=0.0) for r in roles]
    subject = EndingSubject(folder=tmp_path, address="", steps=1, codes=codes)
    return Monkey(subject=subject, find=lambda role: [], kills=made)


def test_the_command_is_repeated_once_a_kill_and_no_more(tmp_path: Path) -> None:
    monkey = monkey_on(tmp_path, [-9, 1, 0], kills=3)
    (tmp_path / "output.txt").write_text("error: WorkerDied: learner-0\nlast line\n")
    assert [monkey.ended() for _ in range(3)] == [False, False, True]
    assert monkey.subject.ends == ["ended with -9", "ended with 1: error: WorkerDied: learner-0"]
    blamed = {kill.role: kill.restarted for kill in monkey.kills}
    assert blamed == {
        "driver": monkey.subject.ends[0],
        "learner": monkey.subject.ends[1],
        "scoring": "",
    }
    with pytest.raises(Stuck, match="ended without a kill: error: WorkerDied"):
        monkey_on(tmp_path, [1], kills=0).ended()
    again = monkey_on(tmp_path, [1, 1], kills=1)
    assert not again.ended()
    with pytest.raises(Stuck, match="without a kill"):
        again.ended()


class Emulation:
    """Of Ray's nodes: a process with a child each, which leaves nothing."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def add_node(self, num_cpus: int, resources: dict[str, float]) -> Any:
        child = "import os, time; time.sleep(600)"
        script = f"import subprocess, sys; c = [sys.executable, '-S', '-c', '{child}']; "
        script += "p = subprocess.Popen(c); print(p.pid, flush=True); p.wait()"
        process = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        child_pid = int(process.stdout.readline())
        cache = os.environ["XDG_CACHE_HOME"]
        started = SimpleNamespace(process=process)
        return SimpleNamespace(
            all_processes={"raylet": [started]}, child=of_pid(child_pid), cache=Path(cache)
        )

    def wait_for_nodes(self, timeout: float) -> None:
        """Nobody counts them here."""

    def remove_node(self, node: Any, allow_graceful: bool) -> None:
        assert not allow_graceful
        process = node.all_processes["raylet"][0].process
        process.wait(30)
        process.stdout.close()
        self.removed.append(str(node.cache))


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes(cluster=Emulation(), wanted=2)
    made.refill()
    yield made
    for raylet in made.raylets():
        made.lose(raylet)


def test_a_lost_node_takes_all_its_processes_and_its_cache_and_another_one_comes(
    nodes: Nodes,
) -> None:
    first, second = nodes.nodes
    assert nodes.raylets() == [first.raylet, second.raylet]
    (first.cache / "something").touch()
    [command] = nodes.lose(first.raylet)
    assert "time.sleep" in command
    assert not first.raylet.alive()
    assert not first.handle.child.alive()
    assert not first.cache.exists()
    assert second.handle.child.alive(), "the other node is untouched"
    assert nodes.raylets() == [second.raylet]
    assert "XDG_CACHE_HOME" not in os.environ or os.environ["XDG_CACHE_HOME"] != str(first.cache)
    nodes.refill()
    assert len(nodes.raylets()) == 2


def test_the_loss_of_a_node_is_a_kill_that_tells_what_was_on_it(
    nodes: Nodes, tmp_path: Path
) -> None:
    monkey = monkey_on(tmp_path, [0], kills=0)
    monkey.nodes = nodes
    [target, _] = nodes.raylets()
    assert monkey._of(NODE) == nodes.raylets()
    monkey._kill(NODE, target, "step boundary", True)
    [kill] = monkey.kills
    assert (kill.role, kill.pid, kill.took) == (NODE, target.pid, [])
    assert monkey.subject.seen == set(), "Ray's processes are none of the run's"
    commands = ["ray::GenerationActor.generate", "ray::BufferActor", "ray::IDLE", "raylet x"]
    assert roles_of(commands) == ["buffer", "generation"]


@pytest.mark.parametrize(
    ("moment", "name", "other"),
    [
        ("step boundary", "metrics.jsonl", "status.json"),
        ("after a checkpoint", "checkpoints/step-000004", "checkpoints/step-000006.partial"),
        ("during a checkpoint", "checkpoints/step-000004.partial", "checkpoints/step-000004"),
        ("during a publish", "weights/v000004.partial", "weights/v000004"),
    ],
)
def test_a_moment_is_seen_when_its_file_is_there(
    tmp_path: Path, moment: str, name: str, other: str
) -> None:
    for path in (other, name):
        before = sight(tmp_path, moment)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x")
        assert bool(sight(tmp_path, moment) - before) == (path == name)


def test_a_run_that_violates_names_the_options_that_plan_its_kills() -> None:
    asked = parse(["--seed", "5", "--kills", "2", "--roles", "driver", "buffer"])
    told = parse(shlex.split(again(9, asked)))
    assert (told.runs, told.seed) == (1, 9)
    for name in ("kills", "engine", "ranks", "parallel", "nodes", "roles", "moments", "features"):
        assert getattr(told, name) == getattr(asked, name), name
    assert NODE in parse([]).roles
    assert NODE not in parse(["--nodes", "0"]).roles, "there is none to lose"
    assert ENGINE_CHILD not in parse([]).roles, "a scripted engine has none"
    parts = ["--engine", "vllm", "--parallel", "2"]
    assert ENGINE_CHILD in parse(parts).roles
    assert parse(shlex.split(again(1, parse(parts)))).parallel == 2
    for refused in (["--parallel", "2"], ["--roles", NODE, "--nodes", "0"]):
        with pytest.raises(SystemExit):
            parse(refused)


def test_figures_are_the_sums_over_the_runs() -> None:
    counts = {"groups_lost": 1, "groups_trained_twice": 2, "bound_violations": 3, "orphans": 4}
    kills = [
        {"role": "learner", "restarted": "", "hit": True, "took": [], "name": "learner-1"},
        {"role": "driver", "restarted": "ended with -9", "hit": True, "took": [], "name": ""},
        {"role": "node", "restarted": "", "hit": False, "took": ["buffer", "scoring"], "name": ""},
    ]
    base = {"kills": kills, "restarts": 1, "steps": 5, "groups_trained": 6, **counts}
    found = figures([{**base, "violations": []}, {**base, "violations": ["orphan: x"]}])
    assert (found["runs"], found["runs_completed"], found["kills"]) == (2, 1, 6)
    assert (found["kills/driver"], found["went_on_by_itself/driver"]) == (2, 0)
    assert (found["kills/node"], found["went_on_by_itself/node"]) == (2, 2)
    assert (found["kills/learner"], found["kills/learner-1"]) == (2, 2), "each rank is told"
    assert found["taken_with_nodes"] == 4
    assert (found["moments_hit"], found["steps"], found["groups_trained"]) == (4, 10, 12)
    assert {name: found[name] for name in counts} == {name: 2 * n for name, n in counts.items()}


def test_a_result_is_gone_on_with_where_it_is_of_the_same_options(tmp_path):
    out = tmp_path / "chaos.json"
    words = ["--kills", "2", "--out", str(out)]
    go_on = parse([*words, "--go-on"])
    assert earlier(go_on) == ([], []), "there is nothing yet"
    first = f"python -m tests.chaos.run {' '.join(words)}"
    one = {
        **dict.fromkeys(("groups_lost", "groups_trained_twice", "bound_violations", "orphans"), 0),
        **{
            "seed": 0,
            "kills": [],
            "violations": [],
            "restarts": 1,
            "steps": 4,
            "groups_trained": 16,
        },
    }
    write(out, [first], [one], {})
    assert earlier(go_on) == ([first], [one])
    assert earlier(parse(words)) == ([], []), "it was not asked for"
    with pytest.raises(SystemExit, match="made with other kills"):
        earlier(parse(["--kills", "3", "--out", str(out), "--go-on"]))


def test_the_parts_of_a_chaos_run_are_all_its_seeds_once_and_add_to_the_result(tmp_path: Path):
    out = ["--out", str(tmp_path / "chaos.json")]
    parts = [parse(["--runs", "10", "--seed", "3", "--part", f"{k}/4", *out]) for k in range(1, 5)]
    assert sorted(seed for part in parts for seed in seeds_of(part)) == list(range(3, 13))
    assert all(part.go_on for part in parts)
    assert not parse(["--runs", "10", *out]).go_on
    for wrong in ("0/2", "3/2", "1", "x/2"):
        with pytest.raises(SystemExit):
            parse(["--part", wrong])
