"""What a run holds at one moment: memory and open files of every process, bytes on disk, objects.

heap_mib/ROLE, shared_mib/ROLE    anonymous and shared memory that is resident; pages of files are
                                  not counted, because the system shares them between programs
files/ROLE                        open file descriptors
ray_heap_mib/NAME, ray_files/NAME the same of Ray's own processes
disk_mib/STORE, disk_files/STORE  weights, checkpoints, experience: what a run keeps so much of
record_mib/WHAT                   metrics, samples, logs: what a run adds to with each step
objects/bytes_mib, objects/count  of the object store
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.chaos.processes import Process

MIB = 2**20
ROLES = {
    "GenerationActor": "generation",
    "ScoringActor": "scoring",
    "RankActor": "learner",
    "BufferActor": "buffer",
    "ControlActor": "control",
}
STORES = ("weights", "checkpoints", "experience", "reference", "skipped")
RECORDS = ("metrics.jsonl", "samples", "logs")
HEAP, SHARED = re.compile(r"^RssAnon:\s+(\d+) kB", re.M), re.compile(r"^RssShmem:\s+(\d+) kB", re.M)


def name_of(command: str, of_run: bool) -> str | None:
    """How the series of a process are called, without their kind: a role of the run, or a name with
    `ray/` before it. None for a process that Ray holds ready for work. `of_run`: it was started for
    the run; of others only the actors that have a role are the run's."""
    actor = re.match(r"ray::(\w+)", command)
    if actor is not None and actor[1] == "IDLE":
        return None
    if actor is not None and actor[1] in ROLES:
        return ROLES[actor[1]]
    if of_run:
        return "driver" if actor is None else actor[1]
    words = command.split() or ["unknown"]
    scripts = [Path(word).stem for word in words if word.endswith(".py")]
    return "ray/" + (actor[1] if actor else [*scripts, Path(words[0]).name][0])


def of_processes(of_run: Iterable[Process], others: Iterable[Process] = ()) -> dict[str, float]:
    """Several of one name are numbered in the order in which they started."""
    values: dict[str, float] = {}
    seen: Counter[str] = Counter()
    mine = set(of_run)
    for process in sorted(mine | set(others), key=lambda process: (process.started, process.pid)):
        name, memory = name_of(process.command(), process in mine), memory_mib(process.pid)
        if name is None or memory is None:
            continue
        prefix = "ray_" if name.startswith("ray/") else ""
        series = f"{name.removeprefix('ray/')}-{seen[name]}"
        seen[name] += 1
        values[f"{prefix}heap_mib/{series}"], values[f"{prefix}shared_mib/{series}"] = memory
        values[f"{prefix}files/{series}"] = float(open_files(process.pid))
    return values


def memory_mib(pid: int) -> tuple[float, float] | None:
    """Resident anonymous and shared memory; None for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    heap, shared = HEAP.search(text), SHARED.search(text)
    return None if heap is None or shared is None else (int(heap[1]) / 1024, int(shared[1]) / 1024)


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


def of_disk(run: Path) -> dict[str, float]:
    """Every entry of a run directory that is a store or a record, and all others together."""
    sizes = {name: size(run / name) for name in (*STORES, *RECORDS)}
    known = {run / name for name in sizes}
    others = [size(path) for path in run.iterdir() if path not in known]
    sizes["others"] = (sum(files for files, _ in others), sum(size for _, size in others))
    values: dict[str, float] = {}
    for name, (files, num_bytes) in sizes.items():
        kind = "record" if name in RECORDS else "disk"
        values[f"{kind}_mib/{name}"] = num_bytes / MIB
        if kind == "disk":
            values[f"disk_files/{name}"] = float(files)
    return values


def size(path: Path) -> tuple[int, int]:
    """Files below `path`, or it itself, and their bytes. What goes meanwhile is not counted."""
    files = num_bytes = 0
    for folder, _, names in os.walk(path) if path.is_dir() else [(path.parent, [], [path.name])]:
        for name in names:
            try:
                num_bytes += (Path(folder) / name).stat().st_size
                files += 1
            except FileNotFoundError:
                continue
    return files, num_bytes


def totals(values: Mapping[str, float], kind: str) -> float:
    """The sum over all series of a kind."""
    return sum(value for name, value in values.items() if name.rpartition("/")[0] == kind)
