r"""448 generation workers on 56 nodes read versions of 140 GB, in simulated time; and how long a run
with 10,000 stored groups takes to resume, in real time.

The product's own pipeline, weight sync, worker pool, client, buffer, mirrors and relay decide
(`tests/support/simulation/simulated_cluster.py`); nodes, storage and network are simulated. The storage
gives and takes 10 GB/s in all, a node's network 25 GB/s, one connection 5 GB/s, a reader 25 GB/s from
memory.

    start_s_448_workers             each node reads the model from the storage once
    publish_to_live_s_448_readers   from the end of a step to its version live on all: the median
    over_storage_limit              the longest of these over the limit without any fault: one write and
                                    one read of all bytes at the storage's full rate
    over_storage_limit_after_a_slow_minute
                                    the same of versions after one that met 60 s in which every link had
                                    a hundredth of its rate
    ram_versions_held               copies in the memory of a node at one moment, the most of all nodes
                                    and scenarios
    publish_to_live_s_SCENARIO      the longest where something is lost, stalls or is slow, as it is
    healthy_workers_killed          over all scenarios: workers that were ended though they lived
    runs_ended                      runs that did not come to their last step
    resume_s_10000_groups           each look at, rename or read of a stored file takes 5 ms more

    python benchmarks/scale.py quiet losses stalls slow others resume
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import results, run_parts, write_result
from rlhf_cluster.buffer.group_recovery import Recovery
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.pipeline import MAX_READS
from rlhf_cluster.records import Ticket
from rlhf_cluster.util.slow_disk import DiskDeadline
from tests.support.fakes.services import (
    make_group,
    make_prompt,
)
from tests.support.simulation.simulated_cluster import (
    GB,
    Outcome,
    Shape,
    SimulatedCluster,
)
from tests.support.simulation.virtual_time import run_jumping

Events = Callable[[SimulatedCluster, int], None]
GROUPS, DELAY_S = 10_000, 0.005


def nothing(cluster: SimulatedCluster, step: int) -> None:
    return None


def at(step: int, happens: Callable[[SimulatedCluster], None]) -> Events:
    def events(cluster: SimulatedCluster, now: int) -> None:
        if now == step:
            happens(cluster)

    return events


def soon(delay_s: float, happens: Callable[[SimulatedCluster], None]) -> Events:
    """`delay_s` after the end of step 2: while its version is written, or read."""

    def events(cluster: SimulatedCluster, now: int) -> None:
        if now == 2:
            cluster.loop.call_later(delay_s, happens, cluster)

    return events


def hang(cluster: SimulatedCluster) -> None:
    """Workers on the first node never come up."""
    cluster.nodes[0].hangs = True


def hang_reading(cluster: SimulatedCluster) -> None:
    """The storage gives nothing to the first node any more."""
    cluster.nodes[0].hangs_reading = True


SMALL = {"pull_timeout_s": 20.0, "pull_bytes_per_s": 1 * GB}
SCENARIOS: dict[str, dict[str, tuple[Shape, Events]]] = {
    "quiet": {"quiet": (Shape(), nothing)},
    "losses": {
        "half_of_64_lost": (
            Shape(nodes=8, groups_per_step=64),
            soon(60.0, lambda c: c.lose_workers(32)),
        ),
        "rack_lost": (Shape(), soon(60.0, lambda c: c.lose_nodes(*range(8)))),
        "rack_lost_while_it_serves": (Shape(), soon(22.0, lambda c: c.lose_nodes(*range(8)))),
        "bad_node_at_start": (Shape(), at(0, hang)),
    },
    "stalls": {
        "storage_stalls_while_written": (Shape(), soon(5.0, lambda c: c.stall_storage(65.0))),
        "storage_stalls_while_read": (Shape(), soon(20.0, lambda c: c.stall_storage(65.0))),
        "storage_hangs_for_one_node": (Shape(), soon(15.0, hang_reading)),
        # the stall is longer than a worker may take for so small a version
        "stall_over_the_deadline": (
            Shape(num_bytes=8 * GB, generation=SMALL),
            soon(1.0, lambda c: c.stall_storage(120.0)),
        ),
        "stall_over_the_deadline_without_relay": (
            Shape(num_bytes=8 * GB, relay=False, storage=40 * GB),
            soon(20.0, lambda c: c.stall_storage(120.0)),
        ),
    },
    "slow": {
        "slow_minute_while_written": (
            Shape(steps=4),
            soon(5.0, lambda c: c.slow_links(60.0, 0.01)),
        ),
        "slow_minute_while_read": (Shape(steps=4), soon(20.0, lambda c: c.slow_links(60.0, 0.01))),
    },
}
"""By part. Something happens to the version of step 2, if anything does."""
OTHERS: dict[str, Shape] = {
    "storage_5_gb_per_s": Shape(storage=5 * GB, steps=2),
    "storage_20_gb_per_s": Shape(storage=20 * GB, steps=2),
    "connections_of_2.5_gb_per_s": Shape(stream=2.5 * GB, steps=2),
    "without_relay": Shape(relay=False, steps=2, generation={"pull_timeout_s": 10_000.0}),
}
SHOWN = 3
"""Words of a run that its result keeps."""


def simulated(shape: Shape, events: Events = nothing) -> Outcome:
    async def run() -> Outcome:
        return await SimulatedCluster(shape).run(events)

    return run_jumping(run())


def limit_s(shape: Shape) -> float:
    return 2 * shape.num_bytes / shape.storage


def over_limit(shape: Shape, outcome: Outcome) -> float:
    return statistics.median(outcome.live_s or [float("inf")]) / limit_s(shape)


def over_limit_after(shape: Shape, live_s: Sequence[float], versions: int) -> float:
    """The longest of all versions but the first so many."""
    return max(live_s[versions:], default=float("inf")) / limit_s(shape)


def found_in(shape: Shape, outcome: Outcome) -> dict[str, Any]:
    found = {**asdict(outcome), "over_limit": over_limit(shape, outcome)}
    return {**found, "told": outcome.told[:SHOWN], "num_told": len(outcome.told)}


def measure(part: str) -> None:
    for name, (shape, events) in SCENARIOS[part].items():
        outcome = simulated(shape, events)
        run = found_in(shape, outcome)
        done = outcome.steps == shape.steps
        print(f"{name}: {outcome.ended or 'whole' if done else outcome.ended}", flush=True)
        runs = {**results("scale").get("runs", {}), name: run}
        write_result("scale", figures_of(runs), [(name, run)])


def measure_others() -> None:
    for name, shape in OTHERS.items():
        run = found_in(shape, simulated(shape))
        figures = {f"{name}_over_storage_limit": run["over_limit"]}
        write_result("scale", figures, [(name, run)])


def figures_of(runs: Mapping[str, Any]) -> dict[str, float]:
    """Of the scenarios that have been run, in this part or before."""
    shapes = {
        name: shape
        for part in SCENARIOS.values()
        for name, (shape, _) in part.items()
        if name in runs
    }
    found = [runs[name] for name in shapes]
    figures = {
        "ram_versions_held": max(run["versions_held"] for run in found),
        "healthy_workers_killed": sum(run["healthy_killed"] for run in found),
        "runs_ended": sum(bool(run["ended"]) for run in found),
    }
    for name in set(shapes) - {"quiet"}:
        figures[f"publish_to_live_s_{name}"] = max(runs[name]["live_s"], default=float("inf"))
    if "quiet" in shapes:
        quiet = runs["quiet"]
        figures |= {
            "start_s_448_workers": quiet["started_s"],
            "publish_to_live_s_448_readers": statistics.median(quiet["live_s"]),
            "over_storage_limit": over_limit_after(shapes["quiet"], quiet["live_s"], 0),
        }
    slow = [name for name in SCENARIOS["slow"] if name in shapes]
    if slow:
        # versions 0 to 2, of which the last one met the slow minute, came before
        after = max(over_limit_after(shapes[name], runs[name]["live_s"], 3) for name in slow)
        figures["over_storage_limit_after_a_slow_minute"] = after
    return figures


class DelayedStore(ExperienceStore):
    """Every look at a file, rename and read takes `DELAY_S` more."""

    def header(self, number: int, attempt: int | None = None) -> Any:
        time.sleep(DELAY_S)
        return super().header(number, attempt)

    def adopt(self, number: int, attempt: int) -> None:
        time.sleep(DELAY_S)
        super().adopt(number, attempt)

    def read_with_header(self, number: int) -> Any:
        time.sleep(DELAY_S)
        return super().read_with_header(number)


def measure_resume() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = DelayedStore(Path(folder) / "experience")
        for number in range(GROUPS):
            ticket = Ticket(number=number, version=0)
            store.write(make_group(ticket, make_prompt(number), [1.0] * 8))
        (store.root / "attempt.json").write_text('{"attempt": 0}')
        took = asyncio.run(_resume(store, Path(folder)))
    print(took)
    write_result("scale", {"resume_s_10000_groups": sum(took.values())}, [("resume", took)])


async def _resume(store: ExperienceStore, folder: Path) -> dict[str, float]:
    """As a run that goes on from step 1, all of whose groups are stored."""
    patience = DiskDeadline(limit_s=60.0, setting="buffer.write_timeout_s")

    async def on_disk(call: Callable[..., Any], *arguments: Any) -> Any:
        return await patience.aside(str(store.root), call, *arguments)

    start = time.perf_counter()
    recovery = Recovery(
        store,
        folder / "checkpoints",
        every=1,
        span=2,
        look_ahead=GROUPS,
        keep_steps=1,
        step=1,
        tell=print,
    )
    await recovery.rewind_aside(on_disk)
    rewound = time.perf_counter()
    turns = asyncio.Semaphore(MAX_READS)

    async def recover(number: int) -> Any:
        async with turns:
            ticket = Ticket(number=number, version=0)
            return await on_disk(recovery.recover, ticket, make_prompt(number))

    found = await asyncio.gather(*map(recover, range(GROUPS)))
    assert all(each is not None for each in found), "a stored group was not used again"
    return {"rewind_s": rewound - start, "recover_s": time.perf_counter() - rewound}


if __name__ == "__main__":
    parts: dict[str, Callable[[], None]] = {part: partial(measure, part) for part in SCENARIOS}
    parts |= {"others": measure_others, "resume": measure_resume}
    run_parts(__doc__ or "", parts)
