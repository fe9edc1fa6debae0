"""How much less the quick start learns from batches that are 8 steps old, both sides tuned alike.

Every batch is exactly as stale as the case says (`benchmarks.in_process`); every run has the quick
start's 120 steps of 512 samples, and its reward is the mean of the last three greedy looks at 256
held-out prompts.

search   the same 12 settings, drawn once from `draw`, at staleness 0 and at 8, one seed
confirm  the best two of each staleness, on five other seeds
figures  `sync` and `stale_8`: the mean over the five seeds, each with the setting that was the better
         one on the other four, so that no run is counted by the seed that chose it; their difference
         with Welch's 95 % interval. Writes results/staleness_study.json, prints the tables

A run is merged into results/staleness_study_8.json as it ends, with the hash of its code; a finished
one is not run again unless setting or code changed:

    python -m benchmarks.staleness_study search --part 1/6
    python -m benchmarks.staleness_study confirm --part 1/5 --minutes 20
    python -m benchmarks.staleness_study figures
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.learning_curves import GROUP_SIZE, Case, changes, default_steps, one_writer, run
from benchmarks.listing import code_of

NAME = "staleness_study"
ROWS = "staleness_study_8"
STALENESS = (0, 8)
DRAW_SEED = 8
SETTINGS = 12
BEST = 2
SEARCH_SEED = 10
CONFIRM_SEEDS = (11, 12, 13, 14, 15)
LOOK_EVERY = 10
LOOKS_THAT_COUNT = 3
PROXIMAL = ("bypass", "bypass", "recompute")
MINIBATCHES = (1, 2, 4, 8)
CORRECTIONS = ("token_tis", "icepop", "sequence_mask", "none")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
Job = tuple[int, int, int]
"""Staleness, index of the setting, seed."""


def draw(seed: int = DRAW_SEED, count: int = SETTINGS) -> list[dict[str, Any]]:
    """Draw settings from the space that is searched, as a Latin hypercube: each axis is cut into
    `count` equal parts, and each part is drawn from once."""
    random = np.random.default_rng(seed)
    axes = [((random.permutation(count) + random.random(count)) / count).tolist() for _ in range(7)]
    found = []
    for rate, low, high, dual, proximal, minibatches, correction in zip(*axes, strict=True):
        algorithm = {
            "type": "grpo",
            "group_size": GROUP_SIZE,
            "proximal": _one_of(PROXIMAL, proximal),
            "clip_low": round(0.1 + 0.5 * low, 3),
            "clip_high": round(0.2 + 0.8 * high, 3),
            "correction": {"type": _one_of(CORRECTIONS, correction)},
        }
        if dual >= 0.5:  # half of them have none
            algorithm["dual_clip"] = round(1.5 + 1.5 * (2 * dual - 1), 3)
        learner = {
            "learning_rate": float(f"{1e-4 * 10**rate:.3g}"),
            "minibatches": _one_of(MINIBATCHES, minibatches),
        }
        found.append({"algorithm": algorithm, "learner": learner})
    return found


def _one_of(values: Sequence[Any], quantile: float) -> Any:
    return values[int(quantile * len(values))]


def case_of(staleness: int, index: int) -> Case:
    return Case(staleness=staleness, **draw()[index])


def key_of(job: Job) -> str:
    return "/".join(map(str, job))


def search_jobs() -> list[Job]:
    return [(staleness, i, SEARCH_SEED) for i in range(SETTINGS) for staleness in STALENESS]


def confirm_jobs(rows: Rows) -> list[Job]:
    """The selected settings on every fresh seed; ends the program while the search is incomplete."""
    _check_complete(search_jobs(), rows)
    chosen = [(staleness, i) for staleness in STALENESS for i in selected(rows, staleness)]
    return [(*setting, seed) for seed in CONFIRM_SEEDS for setting in chosen]


def _check_complete(jobs: Sequence[Job], rows: Rows) -> None:
    missing = [key_of(job) for job in jobs if key_of(job) not in rows]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(jobs)} runs are missing: {', '.join(missing)}")


def selected(rows: Rows, staleness: int) -> list[int]:
    """The settings that reached most in the search at this staleness, best first."""
    rewards = {i: reward(rows[key_of((staleness, i, SEARCH_SEED))]) for i in range(SETTINGS)}
    return sorted(rewards, key=lambda i: -rewards[i])[:BEST]


def reward(row: Row) -> float:
    return _last_looks([row], "reward")


def _last_looks(rows: Iterable[Row], name: str) -> float:
    return statistics.mean(look[name] for row in rows for look in row["looks"][-LOOKS_THAT_COUNT:])


def counted(rows: Rows, staleness: int) -> list[Row]:
    """One run a fresh seed: of the setting that is best on the other fresh seeds."""
    found = []
    for seed in CONFIRM_SEEDS:
        others = [s for s in CONFIRM_SEEDS if s != seed]
        best = max(selected(rows, staleness), key=lambda i: _mean(rows, staleness, i, others))
        found.append(rows[key_of((staleness, best, seed))])
    return found


def _mean(rows: Rows, staleness: int, index: int, seeds: Iterable[int]) -> float:
    return statistics.mean(reward(rows[key_of((staleness, index, seed))]) for seed in seeds)


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Welch's 95 % interval of mean(first) - mean(second); degrees of freedom are rounded down."""
    squares = [statistics.variance(values) / len(values) for values in (first, second)]
    difference, error = statistics.mean(first) - statistics.mean(second), math.sqrt(sum(squares))
    if error == 0:
        return difference, difference
    parts = zip(squares, (first, second), strict=True)
    freedom = sum(squares) ** 2 / sum(s**2 / (len(values) - 1) for s, values in parts)
    half = T_975[min(int(freedom + 1e-9), len(T_975)) - 1] * error
    return difference - half, difference + half


def figures(rows: Rows) -> dict[str, float]:
    """All figures; ends the program while a run is missing."""
    _check_complete(confirm_jobs(rows), rows)
    found: dict[str, float] = {}
    rewards = {}
    for staleness, name in zip(STALENESS, ("sync", "stale_8"), strict=True):
        runs = counted(rows, staleness)
        rewards[name] = [reward(row) for row in runs]
        found[name] = statistics.mean(rewards[name])
        found[f"{name}/deviation"] = statistics.stdev(rewards[name])
        for axis in ("kl", "effective_sample_size"):
            found[f"{name}/{axis}"] = _last_looks(runs, axis)
        for index in selected(rows, staleness):
            found[f"{name}/setting_{index}"] = _mean(rows, staleness, index, CONFIRM_SEEDS)
        for proximal in sorted(set(PROXIMAL)):
            found[f"{name}/search/{proximal}"] = max(
                reward(rows[key_of((staleness, i, SEARCH_SEED))])
                for i, setting in enumerate(draw())
                if setting["algorithm"]["proximal"] == proximal
            )
    found["difference"] = found["sync"] - found["stale_8"]
    found["difference_low"], found["difference_high"] = interval(*rewards.values())
    return found


def tables(rows: Rows) -> str:
    """The confirmed settings and their rewards, and all of the search, as Markdown."""
    space = "proximal | correction | clip | dual clip | minibatches | learning rate"
    lines = [f"| staleness | setting | seeds | held-out reward | KL | ESS | {space} |"]
    lines.append("|---" * lines[0].count(" | ") + "|---|")
    by_case: dict[tuple[int, int, int], list[Row]] = {}
    for key, row in rows.items():
        staleness, index, seed = map(int, key.split("/"))
        by_case.setdefault((staleness, index, int(seed != SEARCH_SEED)), []).append(row)
    means = {case: statistics.mean(map(reward, runs)) for case, runs in by_case.items()}
    for case in sorted(by_case, key=lambda case: (-case[2], case[0], -means[case])):
        (staleness, index, fresh), runs = case, by_case[case]
        setting = draw()[index]
        a, learner = setting["algorithm"], setting["learner"]
        axes = [_last_looks(runs, axis) for axis in ("kl", "effective_sample_size")]
        shown = (
            *(staleness, index, f"{len(runs)} fresh" if fresh else "search"),
            *(f"{means[case]:.3f}", f"{axes[0]:.4f}", f"{axes[1]:.2f}"),
            *(a["proximal"], a["correction"]["type"], f"{a['clip_low']} / {a['clip_high']}"),
            *(a.get("dual_clip", "none"), learner["minibatches"], f"{learner['learning_rate']:g}"),
        )
        lines.append(f"| {' | '.join(map(str, shown))} |")
    return "\n".join(lines)


def finished() -> dict[str, Row]:
    """The runs of today's code and settings, by staleness/setting/seed."""
    code = code_of(NAME)["hash"]
    return {
        key: row
        for key, row in harness.results(ROWS).get("runs", {}).items()
        if row["code"] == code and row["settings"] == _settings(key)
    }


def _settings(key: str) -> dict[str, Any]:
    staleness, index, _ = map(int, key.split("/"))
    return changes(case_of(staleness, index), default_steps())


def train(jobs: Sequence[Job], minutes: float) -> None:
    """Run what is missing; start none that would end after `minutes`, were it as long as the
    longest before it."""
    before, started, longest = harness.machine(), time.monotonic(), 0.0
    for job in jobs:
        if key_of(job) in finished():
            continue
        if time.monotonic() - started + longest > 60 * minutes:
            break
        code, (staleness, index, seed) = code_of(NAME), job
        row = run(key_of(job), case_of(staleness, index), seed, default_steps(), LOOK_EVERY)
        row["code"] = code["hash"]
        with one_writer():
            harness.write_result(ROWS, {}, {key_of(job): row}, machine=before, code=code)
        longest = max(longest, row["seconds"])
        print(f"{key_of(job)}: {reward(row):.3f} in {row['seconds']:.0f} s", flush=True)


def write_figures() -> None:
    """Replace the published result as a whole, by runs that are all of the same code."""
    found = harness.results(ROWS)
    rows: Rows = found.get("runs", {})
    codes = {row["code"] for row in rows.values()}
    if len(codes) > 1:
        raise SystemExit(f"{len(rows)} runs are of {len(codes)} versions of the code: run the rest")
    values = figures(rows)
    code = {**code_of(NAME), "hash": codes.pop()}
    (harness.RESULTS / f"{NAME}.json").unlink(missing_ok=True)
    harness.write_result(NAME, values, rows, machine=found["machine"], code=code)
    print(tables(rows), *(f"{name} {value:.4f}" for name, value in values.items()), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("search", "confirm", "figures"))
    parser.add_argument("--part", default="1/1", help="k/n: the k-th of n parts of the runs")
    parser.add_argument("--minutes", type=float, default=20, help="start no run that ends later")
    args = parser.parse_args()
    os.environ.update(harness.ENVIRONMENT)
    if args.what == "figures":
        write_figures()
        return
    part, parts = map(int, args.part.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--part {args.part}: k is from 1 to n")
    jobs = search_jobs() if args.what == "search" else confirm_jobs(finished())
    train(jobs[part - 1 :: parts], args.minutes)


if __name__ == "__main__":
    main()
