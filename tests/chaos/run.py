"""Runs of the tiny configuration under random SIGKILLs, each read by the checker afterwards.

    python -m tests.chaos.run --runs 20 --kills 3 --seed 0 --engine scripted --out chaos.json

One run at a time, on a Ray cluster of its own, with `--nodes` emulated nodes beside the head. Run i
has the seed `seed + i`, from which its kills follow: they stand in its record as `planned`, and the
same seed and options plan them again in the same source. With `--engine vllm` the engine is the real
one, on the CPU; `--parallel 2` makes it three processes, so that the death of an engine's child is
among the kills:

    python -m tests.chaos.run --engine vllm --parallel 2 --ranks 2 --out chaos_vllm.json

Runs have adapters, a moving reference and second copies of their checkpoints besides; `--features`
names those that are wanted.

A run with a violation keeps its directory and tells where it lies. The exit status is 0 when no run has
one. With `--go-on` the runs of the result at `--out` stay, and only other seeds are run; `--part 2/8`
runs every 8th seed from the 2nd on and adds to the result: a long result can be made in several parts,
of one source and the same options. The result is that of a benchmark:
machine, versions, command, date, figures, runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import ENVIRONMENT, machine, versions
from benchmarks.listing import code_of
from tests.chaos.checker import Report, check
from tests.chaos.monkey import (
    ENGINE_CHILD,
    MOMENTS,
    NODE,
    ROLES,
    Monkey,
    find_through_ray,
    plan,
)
from tests.chaos.nodes import Nodes
from tests.chaos.processes import Process
from tests.chaos.subject import ENGINES, FEATURES, GENERATE_DELAY_S, Stuck, Subject

STEPS_A_KILL = 24
LAST_STEPS = 4
FINISH_WITHIN_S = 300.0


def chaotic_run(
    subject: Subject,
    kills: Sequence[Any],
    find: Callable[[str], list[Process]],
    tell: Callable[[str], None],
    nodes: Nodes | None = None,
) -> tuple[Monkey, Report]:
    """Start `subject`, kill as planned, let it end, and read what it left."""
    monkey = Monkey(subject=subject, find=find, tell=tell, nodes=nodes)
    stuck = ""
    try:
        subject.start()
        subject.slow(GENERATE_DELAY_S)
        for planned in kills:
            if not monkey.attack(planned):
                break
        subject.slow(0.0)
        _finish(monkey)
    except Stuck as error:
        stuck = str(error)
    finally:
        subject.end()
    report = check(
        subject.path,
        subject.asked,
        monkey.stragglers | subject.remains(),
        subject.mirror,
        subject.copies,
    )
    if stuck:
        report.found("stuck", stuck)
    return monkey, report


def _finish(monkey: Monkey) -> None:
    """Waits for: the end. A kill whose effect comes late may still cost a repeat."""
    deadline = time.monotonic() + FINISH_WITHIN_S
    while not monkey.ended():
        if time.monotonic() > deadline:
            raise Stuck(f"the run was not over {FINISH_WITHIN_S:g} s after the last kill")
        time.sleep(0.05)


@contextmanager
def local_cluster(num_nodes: int = 0) -> Iterator[tuple[str, Nodes]]:
    """A Ray cluster of this process alone; yields its address, and its nodes beside the head. Where
    there are any, the actors of a run are on them."""
    os.environ |= {**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray.cluster_utils import Cluster

    from actors.cluster.calls import NAMESPACE
    from tests.support.processes.free_ports import free_ports

    arguments = {
        "num_cpus": 0 if num_nodes else 8,
        "object_store_memory": 256 << 20,
        "dashboard_port": free_ports(1)[0],
    }
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    nodes = Nodes(cluster=cluster, wanted=num_nodes)
    try:
        nodes.refill()
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield str(cluster.address), nodes
    finally:
        nodes.close()
        ray.shutdown()
        cluster.shutdown()


def one(seed: int, arguments: argparse.Namespace, address: str, nodes: Nodes) -> dict[str, Any]:
    """The record of one run."""
    nodes.refill()
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-", dir=arguments.keep))
    subject = Subject(
        folder=folder,
        address=address,
        steps=STEPS_A_KILL * arguments.kills + LAST_STEPS,
        engine=arguments.engine,
        ranks=arguments.ranks,
        parallel=arguments.parallel,
        features=tuple(arguments.features),
        name=f"chaos-{seed}-{os.getpid()}",
    )
    start = time.monotonic()
    kills = plan(seed, arguments.kills, arguments.roles, arguments.moments)
    print(f"run {seed}: {[f'{p.role} {p.moment}' for p in kills]}", flush=True)
    monkey, report = chaotic_run(
        subject,
        kills,
        find_through_ray(subject),
        lambda text: print(f"  {text}", flush=True),
        nodes,
    )
    if report.violations:
        print(f"run {seed}: violations; it lies in {folder}; the same kills:", flush=True)
        print(f"  python -m tests.chaos.run {again(seed, arguments)}", flush=True)
        for violation in report.violations:
            print(f"  {violation}", flush=True)
    else:
        subject.remove()
    found = asdict(report)
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "planned": [asdict(kill) for kill in kills],
        "kills": [asdict(kill) for kill in monkey.kills],
        "restarts": len(subject.ends),
        "violations": [str(violation) for violation in report.violations],
        **{key: value for key, value in found.items() if key != "violations"},
    }


OPTIONS = ("kills", "engine", "ranks", "parallel", "nodes", "roles", "moments", "features")


def earlier(arguments: argparse.Namespace) -> tuple[list[str], list[dict[str, Any]]]:
    """Commands and runs of the result that is gone on with. Raises `SystemExit` where it is of other
    options or versions."""
    if not arguments.go_on or not arguments.out.exists():
        return [], []
    result = json.loads(arguments.out.read_text(encoding="utf-8"))
    commands = result["command"].split(" && ")
    before = parse(shlex.split(commands[-1])[3:])
    differ = [name for name in OPTIONS if getattr(before, name) != getattr(arguments, name)]
    differ += ["versions"] * (result["versions"] != versions())
    if differ:
        raise SystemExit(f"{arguments.out}: made with other {differ[0]}. Give another --out")
    return commands, result["runs"]


def again(seed: int, arguments: argparse.Namespace) -> str:
    """The options that plan the same kills."""
    words = ["--runs", "1", "--seed", str(seed)]
    for name in OPTIONS:
        value = getattr(arguments, name)
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The numbers that may be quoted."""
    roles = Counter(kill["role"] for run in runs for kill in run["kills"])
    ranks = Counter(
        kill["name"] for run in runs for kill in run["kills"] if kill["role"] == "learner"
    )
    by_itself = Counter(
        kill["role"] for run in runs for kill in run["kills"] if not kill["restarted"]
    )
    kinds = ("groups_lost", "groups_trained_twice", "bound_violations", "orphans")
    return {
        "runs": len(runs),
        "runs_completed": sum(not run["violations"] for run in runs),
        "kills": roles.total(),
        **{f"kills/{role}": roles[role] for role in ROLES},
        **{f"kills/{name}": number for name, number in sorted(ranks.items())},
        **{f"went_on_by_itself/{role}": by_itself[role] for role in ROLES},
        "taken_with_nodes": sum(len(kill["took"]) for run in runs for kill in run["kills"]),
        "moments_hit": sum(kill["hit"] for run in runs for kill in run["kills"]),
        "restarts": sum(run["restarts"] for run in runs),
        "steps": sum(run["steps"] for run in runs),
        "groups_trained": sum(run["groups_trained"] for run in runs),
        **{kind: sum(run[kind] for run in runs) for kind in kinds},
    }


def write(path: Path, commands: Sequence[str], runs: Sequence[dict[str, Any]], facts: Any) -> None:
    result = {
        "machine": facts,
        "versions": versions(),
        "command": " && ".join(commands),
        "date": datetime.now(UTC).date().isoformat(),
        "code": code_of(path.stem),
        "figures": figures(runs),
        "runs": list(runs),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def parse(command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="scripted")
    parser.add_argument("--ranks", type=int, default=1, help="of the learner")
    parser.add_argument("--parallel", type=int, default=1, help="processes of a real engine")
    parser.add_argument("--nodes", type=int, default=2, help="beside the head; with 0 none is lost")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--features", nargs="*", choices=sorted(FEATURES), default=list(FEATURES))
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    parser.add_argument("--keep", type=Path, help="folder of the runs' directories")
    parser.add_argument("--minutes", type=float, help="begin no further run after this long")
    parser.add_argument("--total", type=int, help="nor after so many kills, of all runs")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th run from the k-th on")
    parser.add_argument("--go-on", action="store_true", help="keep the runs that --out has")
    arguments = parser.parse_args(command)
    if arguments.go_on and arguments.out is None:
        parser.error("--go-on: of which result? Give --out")
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", arguments.part)
    if found is None or int(found[1]) > int(found[2]):
        parser.error(f"--part {arguments.part}: give k/n with 1 <= k <= n, such as 2/8")
    arguments.go_on |= arguments.part != "1/1" and arguments.out is not None
    if arguments.parallel > 1 and arguments.engine == "scripted":
        parser.error("--parallel: a scripted engine is one process; give --engine vllm")
    missing = {NODE: not arguments.nodes, ENGINE_CHILD: arguments.parallel == 1}
    arguments.roles = [role for role in arguments.roles if not missing.get(role)]
    if not arguments.roles:
        parser.error("--roles: there is nobody of them; see --nodes and --parallel")
    return arguments


def seeds_of(arguments: argparse.Namespace) -> range:
    """Seeds of the runs of a part; a part with --out adds its runs to the result."""
    part, parts = map(int, arguments.part.split("/"))
    return range(arguments.seed + part - 1, arguments.seed + arguments.runs, parts)


def main(command: Sequence[str]) -> int:
    arguments, facts = parse(command), machine()
    commands, runs = earlier(arguments)
    commands = [*commands, shlex.join(["python", "-m", "tests.chaos.run", *command])]
    done = {run["seed"] for run in runs}
    start = time.monotonic()
    with local_cluster(arguments.nodes) as (address, nodes):
        for seed in seeds_of(arguments):
            if seed in done:
                continue
            late = arguments.minutes and time.monotonic() - start > arguments.minutes * 60
            if late or (arguments.total and figures(runs)["kills"] >= arguments.total):
                break
            runs.append(one(seed, arguments, address, nodes))
            if arguments.out is not None:
                write(arguments.out, commands, runs, facts)
    print(json.dumps(figures(runs), indent=1))
    return 0 if all(not run["violations"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
