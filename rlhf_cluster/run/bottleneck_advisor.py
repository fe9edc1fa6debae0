"""Bottleneck of a run, and gain of one more worker, from the times of its last steps.

The model. A run has three stations: generation, scoring and learner. The demand D of each is known. It
is the time in seconds per step for which the station is busy:

    generation, scoring   mean over the pool's workers of the time they had a group (`occupancy`)
    learner               the step's wall time less the time it waited for groups

Pools of `[scoring.pools]` score the same group side by side, so the demand of scoring is the largest
of theirs. If the stations overlapped perfectly, a step would last max(D). If they took turns, it would
last sum(D). A measured step of S seconds is between the two:

    S = max(D) + c * (sum(D) - max(D)) + e      0 <= c <= 1, e >= 0

c is the degree to which they take turns: about 0 in an asynchronous run, 1 with `max_staleness = 0`.
e is what no station accounts for, such as waiting for a version to become live. One more worker in a
pool of w makes its demand D * w / (w + 1); c and e stay. The gain is S over the S that results. The
bottleneck is the station with the largest gain, if that is at least `WORTH_NAMING`.

Limits. The demand of a pool is assumed to shrink with its size. That is true while its workers are kept
busy. It is too optimistic where groups are few and long, since a single response is not made faster,
and where workers share cores or a GPU. There the gain is an upper estimate. An engine with spare
capacity in its batch may be as fast with many requests as with few, and then another engine gives
nothing. An engine is full while requests wait for its batch. Only for the share of groups for which
that holds (`full`) is the gain certain. The range that is shown with the gain is from the certain one
to the upper one, over four parts of the window. It covers noise and spare capacity, not the model's own
error. Over simulated runs in `tests/unit/run/test_bottleneck_advisor.py` the upper estimate is within
15 % of what the worker gave, where engines have no spare capacity.
The learner's gain is for one that is twice as fast. The size of a running learner cannot be changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]
Station = str  # "generation", "learner", "scoring", or another scoring pool's name

_SIZE, _BUSY = "pool/size/", "time/pool_busy_s/"
_GROUPS, _QUEUED = "generation/segments_total", "generation/segments_queued_total"
WINDOW = 32  # steps that are looked at
MIN_STEPS = 4
WORTH_NAMING = 1.05
TURNS = 0.5  # from this c on the stations take turns rather than overlap
NOBODY = 0.1  # share of the time without a working station from which it is reported
ROOM = 0.5  # share of groups at whose end requests waited, below which engines have capacity
_PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Mean times per step in seconds, and the sizes of the pools.

    `demand` is by station, `workers` by pool. `full` is the share of the groups at whose end requests
    waited for the engine's batch (1 where no record has it).
    """

    step_s: float
    learner_wait_s: float
    generation_wait_s: float
    demand: Mapping[Station, float]
    workers: Mapping[Station, int]
    full: float = 1.0

    @property
    def turns(self) -> float:
        """c of the model. It is 0 if fewer than two stations have anything to do."""
        largest, total = _bounds(self.demand)
        if total <= largest:
            return 0.0
        return min(1.0, max(0.0, (self.step_s - largest) / (total - largest)))

    @property
    def unaccounted_s(self) -> float:
        """e of the model."""
        return max(0.0, self.step_s - _bounds(self.demand)[1])

    def speed(self, changes: Mapping[Station, int], sure: bool = False) -> float:
        """Return the steps per second after `changes` over those of now.

        `changes` is the number of workers to add, by station. A negative number removes workers; at
        least one must stay. A learner is treated as one worker. With `sure`, engines are assumed to
        gain nothing while they have spare capacity.
        """
        demand = dict(self.demand)
        for station, change in changes.items():
            w = self.workers.get(station, 1)
            spared = change / (w + change)
            demand[station] *= 1 - spared * (self.full if sure and station == "generation" else 1)
        largest, total = _bounds(demand)
        after = largest + self.turns * (total - largest) + self.unaccounted_s
        return self.step_s / after if after > 0 else 1.0

    def gain(self, station: Station, sure: bool = False) -> float:
        """Return the steps per second with one more worker over those of now, at least 1.

        For the learner: with one that is twice as fast.
        """
        return max(1.0, self.speed({station: 1}, sure))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The bottleneck and the predicted gains. `bound` is None if no station is worth enlarging.

    `gains` are those of `Load.gain`. `ranges` are from the smallest certain gain to the largest gain
    over the `parts` of the window, which has `num_steps` steps.
    """

    bound: Station | None
    load: Load
    gains: Mapping[Station, float]
    ranges: Mapping[Station, tuple[float, float]]
    text: str
    parts: Sequence[Load]
    num_steps: int

    def metrics(self) -> dict[str, float]:
        return {f"advisor/gain/{station}": gain for station, gain in self.gains.items()}


def advise(records: Sequence[Record]) -> Advice | None:
    """Return advice from the last `WINDOW` steps of metrics.jsonl (`read_metrics`).

    None while fewer than `MIN_STEPS` steps were made since the pools have their size.
    """
    steps = _comparable([r for r in records if (r.get("time/step_s") or 0) > 0][-WINDOW:])
    if len(steps) < MIN_STEPS:
        return None
    full = _full(steps)
    load = _load(steps, full)
    gains = {station: load.gain(station) for station in load.demand}
    parts = [_load(part, full) for part in _split(steps)]
    ranges = {
        station: (
            min(part.gain(station, sure=True) for part in parts),
            max(part.gain(station) for part in parts),
        )
        for station in gains
    }
    best = max(gains, key=lambda station: gains[station])
    bound = best if gains[best] >= WORTH_NAMING else None
    text = _text(load, bound, gains, ranges)
    return Advice(
        bound=bound,
        load=load,
        gains=gains,
        ranges=ranges,
        text=text,
        parts=parts,
        num_steps=len(steps),
    )


def _comparable(steps: Sequence[Record]) -> list[Record]:
    """Return the last of `steps` that were all made with the pool sizes of the very last."""
    kept: list[Record] = []
    for step in reversed(steps):
        if kept and _workers(step) != _workers(kept[0]):
            break
        kept.append(step)
    return kept[::-1]


def _workers(record: Record) -> dict[Station, int]:
    found = {k[len(_SIZE) :]: size for k, size in record.items() if k.startswith(_SIZE)}
    return {pool: max(1, int(size)) for pool, size in found.items() if size is not None}


def _bounds(demand: Mapping[Station, float]) -> tuple[float, float]:
    """Return the seconds of the longest station, and the sum. All scoring pools are one station."""
    pools = [own for station, own in demand.items() if station not in ("generation", "learner")]
    stations = [demand.get("generation", 0.0), demand["learner"], max(pools, default=0.0)]
    return max(stations), sum(stations)


def _load(steps: Sequence[Record], full: float) -> Load:
    def mean(name: str) -> float:
        return sum(step.get(name) or 0.0 for step in steps) / len(steps)

    step_s, wait_s, idle_s = (
        mean("time/step_s"),
        mean("time/learner_wait_s"),
        mean("time/generation_wait_s"),
    )
    demand: dict[Station, float] = {"learner": max(0.0, step_s - wait_s)}
    if all(step.get("time/generation_busy_s") is not None for step in steps):
        demand["generation"] = mean("time/generation_busy_s")
        demand["scoring"] = mean("time/scoring_busy_s")
        busy = {k for step in steps for k in step if k.startswith(_BUSY)}
        demand |= {name[len(_BUSY) :]: mean(name) for name in sorted(busy)}
    else:  # an older record: generation is busy when it does not wait, scoring is not known
        demand["generation"] = max(0.0, step_s - idle_s)
    return Load(
        step_s=step_s,
        learner_wait_s=wait_s,
        generation_wait_s=idle_s,
        demand={station: min(step_s, seconds) for station, seconds in demand.items()},
        workers=_workers(steps[-1]),
        full=full,
    )


def _full(steps: Sequence[Record]) -> float:
    """Return `Load.full`. The counters of a resumed run begin at 0 again."""
    ends = groups = 0.0
    for before, after in pairwise(steps):
        if all(name in step for step in (before, after) for name in (_GROUPS, _QUEUED)):
            more = after[_GROUPS] - before[_GROUPS]
            if more > 0:
                groups += more
                ends += max(0.0, after[_QUEUED] - before[_QUEUED])
    return ends / groups if groups else 1.0


def _split(steps: Sequence[Record]) -> list[Sequence[Record]]:
    size = len(steps) / _PARTS
    return [steps[round(i * size) : round((i + 1) * size)] for i in range(_PARTS)]


def _text(
    load: Load,
    bound: Station | None,
    gains: Mapping[Station, float],
    ranges: Mapping[Station, tuple[float, float]],
) -> str:
    if bound is None:
        return f"balanced: no single worker more gives over {_times(WORTH_NAMING)}"
    waiting = _share(load.learner_wait_s, load.step_s)
    idle = _share(load.generation_wait_s, load.step_s)
    low, high = ranges[bound]
    about = f"about {_times(gains[bound])} ({_times(low)} to {_times(high)} over the last steps)"
    if bound == "learner":
        text = (
            f"learner-bound: the learner waits {waiting} of the time, generation {idle}; more "
            f"workers give little, a learner twice as fast {about}"
        )
    else:
        workers = load.workers.get(bound)
        change = "" if workers is None else f" ({workers} -> {workers + 1})"
        text = (
            f"{bound}-bound: learner waits {waiting} of the time; one more {bound} worker{change} "
            f"gives {about}"
        )
        if bound == "generation" and load.full < ROOM:
            text += (
                f"; engines have room, requests waited behind {_share(load.full, 1)} of the groups: "
                "more groups in flight (staleness.pipeline_depth) may give as much"
            )
    if load.turns >= TURNS:
        text += (
            "; the services take turns: a larger staleness.pipeline_depth within max_staleness "
            f"lets them overlap, at most {_times(load.step_s / max(load.demand.values()))}"
        )
    if load.unaccounted_s >= NOBODY * load.step_s:
        text += (
            f"; for {_share(load.unaccounted_s, load.step_s)} of the time none of them works: weights "
            "on their way (weights/publish_s, weights/pull_s), which no worker makes faster"
        )
    return text


def _share(part_s: float, whole_s: float) -> str:
    return f"{100 * min(1.0, part_s / whole_s):.0f} %"


def _times(gain: float) -> str:
    return f"{gain:.2f}x" if gain < 1.1 else f"{gain:.1f}x"
