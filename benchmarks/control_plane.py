"""What a rollout costs the control plane, with 10, 100 and 1,000 scripted workers in each pool.

load      the loop of a run (`benchmarks/scripted_plane.py` says what is real and what is scripted).
          Groups of 8 rollouts, 4,000 groups a step whatever the number of workers, each answered by
          a generation worker after 10 to 100 ms and by a scoring worker after a tenth of that. The
          first steps are left out, until every worker has the history that the watch for stragglers
          keeps, and so are the last, whose groups were made before. `rollouts_per_s`: by the clock,
          with whatever else the machine did. `cost_us`: CPU
          time of the process a rollout, and `rollouts_per_cpu_s` what a core to itself would give;
          `cost_per_rollout_1000_over_10` is of it. What is done once a worker and not once a
          rollout is in it: a pull a version (`pull_cost_us_a_worker`) and a health check every 5 s.
          Sizes take turns, and of a size's repeats the cheapest counts: what others on the machine
          add is not ours. `..._small_steps`: 1,000 groups a step, one a version for each of 1,000.
endpoint  the same with 1,000 workers while a Prometheus would scrape: each worker counts its groups
          as `GenerationActor` does, through Ray's real metrics and agent, all on one node (which in
          a cluster has a few of them), and another process reads the agent's endpoint by HTTP.

python benchmarks/control_plane.py load endpoint
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import run_parts, write_result

SIZES = (10, 100, 1000)
GROUPS_PER_STEP, WARM_STEPS, STEPS = 4000, 6, 7
SMALL, SMALL_WARM_STEPS, SMALL_STEPS = 1000, 22, 16
REPEATS = 2
LAST_STEPS = 3  # of which the groups were made before
SCRAPES, SCRAPE_EVERY_S = 8, 2.0
SCRAPE = """
import json, sys, time, urllib.request
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    with urllib.request.urlopen(sys.argv[1], timeout=120) as reply:
        text = reply.read()
    took_s = time.perf_counter() - start
    lines = [line for line in text.splitlines() if line.startswith(b"ray_rlhf_")]
    workers = {line.split(b'worker="')[1].split(b'"')[0] for line in lines if b'worker="' in line}
    print(json.dumps({"scrape_s": took_s, "bytes": len(text), "series": len(lines),
                      "workers": len(workers)}), flush=True)
    time.sleep(float(sys.argv[3]))
"""


def seconds_of(ticket: Any) -> float:
    """10 to 100 ms, the same for a ticket in every run."""
    return 0.01 + 0.09 * (ticket.number * 7919 % 101) / 100


def measure(
    num_workers: int,
    groups_per_step: int,
    warm_steps: int,
    steps: int,
    told: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """One run; `told` hears the name of a generation worker whenever one is asked for a group.

    Returns the means over `steps` steps after the warm ones. `SystemExit` when the run lost a group.
    """
    from benchmarks.scripted_plane import GROUP_SIZE, control_plane

    ends: list[tuple[float, float]] = []

    async def run(folder: Path) -> None:
        total = warm_steps + steps + LAST_STEPS
        plane = control_plane(folder, num_workers, total, groups_per_step, seconds_of, told=told)
        async with plane as (pipeline, learner):
            train_step = learner.train_step

            async def timed(groups: Any) -> Any:
                ends.append((time.perf_counter(), time.process_time()))
                return await train_step(groups)

            learner.train_step = timed
            await pipeline.run()
            stats = await pipeline.buffer.stats()
            if stats.taken != total * groups_per_step or stats.num_discarded:
                raise SystemExit(f"groups were lost: {stats}")

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))
    (start_s, start_cpu_s), (end_s, end_cpu_s) = ends[warm_steps - 1], ends[warm_steps + steps - 1]
    rollouts = steps * groups_per_step * GROUP_SIZE
    return {
        "workers": num_workers,
        "rollouts_per_s": rollouts / (end_s - start_s),
        "cost_us": 1e6 * (end_cpu_s - start_cpu_s) / rollouts,
    }


def pull_cost_us(num_workers: int, versions: int = 5) -> float:
    """CPU time of one worker's pull of a version, which each worker does once a version."""
    from benchmarks.scripted_plane import ScriptedLearner, control_plane

    async def run(folder: Path) -> float:
        learner = ScriptedLearner()
        async with control_plane(folder, num_workers, 1, SMALL) as (pipeline, _):
            start = time.process_time()
            for learner.version in range(1, versions + 1):
                await pipeline.generation.pull(await learner.publish())
            return (time.process_time() - start) / versions / num_workers

    with tempfile.TemporaryDirectory() as folder:
        return 1e6 * asyncio.run(run(Path(folder)))


def load() -> None:
    runs: dict[str, Any] = {}
    for repeat in range(REPEATS):
        for n in SIZES:
            runs[f"load/{n}/{repeat}"] = measure(n, GROUPS_PER_STEP, WARM_STEPS, STEPS)
        for n in (SIZES[0], SIZES[-1]):
            found = measure(n, SMALL, SMALL_WARM_STEPS, SMALL_STEPS)
            runs[f"small_steps/{n}/{repeat}"] = found
    best = {
        key: min((runs[f"{key}/{r}"] for r in range(REPEATS)), key=lambda run: run["cost_us"])
        for key in {name.rpartition("/")[0] for name in runs}
    }
    figures = {"pull_cost_us_a_worker": pull_cost_us(SIZES[-1])}
    for size in SIZES:
        run = best[f"load/{size}"]
        figures[f"rollouts_per_s_{size}_workers"] = run["rollouts_per_s"]
        figures[f"rollouts_per_cpu_s_{size}_workers"] = 1e6 / run["cost_us"]
        figures[f"cost_us_{size}_workers"] = run["cost_us"]
    for kind, end in (("load", ""), ("small_steps", "_small_steps")):
        ratio = best[f"{kind}/1000"]["cost_us"] / best[f"{kind}/10"]["cost_us"]
        figures[f"cost_per_rollout_1000_over_10{end}"] = ratio
    write_result("control_plane", figures, runs)
    print(json.dumps(figures, indent=2))


def endpoint() -> None:
    import ray

    from actors.cluster.ray_metrics import RayMetrics

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        [node] = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        exported: dict[str, RayMetrics] = {}

        def told(name: str) -> None:
            if name not in exported:
                exported[name] = RayMetrics("generation", {"run": "control-plane", "worker": name})
            metrics = exported[name]
            metrics.count("generation/groups_total")
            metrics.count("generation/tokens_total", 400)
            metrics.observe("generation/group_s", 0.05)
            metrics.gauge("generation/version_live", 1)
            metrics.gauge("generation/requests_running", 2)

        command = [sys.executable, "-c", SCRAPE, url, str(SCRAPES), str(SCRAPE_EVERY_S)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as scraper:
            run = measure(1000, SMALL, 2, 12, told)
            output, _ = scraper.communicate(timeout=300)
    finally:
        ray.shutdown()
    scrapes = [json.loads(line) for line in output.splitlines()]
    whole = [each for each in scrapes if each["workers"] >= 1000]
    if not whole:
        raise SystemExit(f"no scrape had all 1,000 workers: {scrapes}")
    figures = {
        "scrape_s_1000_workers": statistics.median(each["scrape_s"] for each in whole),
        "scrape_bytes_1000_workers": statistics.median(each["bytes"] for each in whole),
        "scrape_series_1000_workers": statistics.median(each["series"] for each in whole),
        "rollouts_per_s_while_scraped": run["rollouts_per_s"],
    }
    write_result("control_plane", figures, {"endpoint": {"load": run, "scrapes": scrapes}})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_parts(__doc__ or "", {"load": load, "endpoint": endpoint})
