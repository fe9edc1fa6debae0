"""How stale the quick start's batches may be before it learns less, and with which settings.

Every batch is exactly as stale as the case says (`benchmarks.in_process`), and every run is given as
many samples as the quick start, 120 steps of 512. A setting is an off-policy correction with its bounds
and a learning rate:

- on the first seed each setting runs at staleness 4, and those that reach most at 0, 2 and 8 too;
- for each staleness the `BEST` settings of the first seed then run on the other two;
- `sync` is the largest mean over the seeds at staleness 0, `best_at_N` the one at staleness N, and
  `settings` names them. Searched alike, they can be compared.

A run is merged into the result as it ends, and a finished one is not run again:

    python benchmarks/staleness_study.py                                  # all that is missing: hours
    python benchmarks/staleness_study.py --staleness 4 --only 'clip*' --seeds 0
    python benchmarks/staleness_study.py --list
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import ENVIRONMENT, RESULTS, machine, write_result
from benchmarks.learning_curves import GROUP_SIZE, Case, default_steps, run

NAME = "staleness_study"
STALENESS = (0, 2, 4, 8)
SEEDS = (0, 1, 2)
RATES = (1.5e-4, 3e-4, 6e-4)
BEST = 3
"""Settings of the first seed that the other seeds repeat, a staleness."""
NO_RULE = {"correction": {"type": "none"}}


def _clip(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"proximal": "bypass", "clip_low": low, "clip_high": high, **more}


ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    # the ratio is against the sampler, and its clip is the only bound of a step
    "clip": _clip(0.2, 0.28, **NO_RULE),
    "clip_tis": _clip(0.2, 0.28),
    "clip_dual": _clip(0.2, 0.28, dual_clip=3.0, **NO_RULE),
    "clip_icepop": _clip(0.2, 0.28, correction={"type": "icepop"}),
    "clip_sequence_mask": _clip(0.2, 0.28, correction={"type": "sequence_mask"}),
    "clip_geometric_mask": _clip(
        0.2, 0.28, correction={"type": "geometric_mask", "low": 0.8, "high": 1.25}
    ),
    "clip_kl_sampler": _clip(0.2, 0.28, kl_coef=0.1, kl_to="sampler"),
    # wider: several steps' worth of movement, since several have passed since it was sampled
    "wide": _clip(0.4, 0.7, **NO_RULE),
    "wide_tis": _clip(0.4, 0.7),
    "wide_dual": _clip(0.4, 0.7, dual_clip=3.0, **NO_RULE),
    "wider_dual": _clip(0.6, 1.5, dual_clip=4.0, **NO_RULE),
    "wider_tis": _clip(0.6, 1.5, correction={"type": "token_tis", "cap": 3.0}),
    # the decoupled loss: the ratio is against the start of the step, the weight against the sampler
    "decoupled_tis": {"proximal": "recompute"},
    "decoupled_icepop": {"proximal": "recompute", "correction": {"type": "icepop"}},
    "decoupled_none": {"proximal": "recompute", **NO_RULE},
    "interpolate_tis": {"proximal": "interpolate"},
    "interpolate_none": {"proximal": "interpolate", **NO_RULE},
    "interpolate_wide": {"proximal": "interpolate", "clip_low": 0.4, "clip_high": 0.7},
}


def cases() -> dict[str, Case]:
    """All cases by name, `setting@rate/staleness`."""
    return {
        f"{name}@{rate:g}/{staleness}": Case(
            staleness=staleness,
            algorithm={"type": "grpo", "group_size": GROUP_SIZE, **keys},
            learner={"learning_rate": rate},
        )
        for staleness in STALENESS
        for name, keys in ALGORITHMS.items()
        for rate in RATES
    }


def finished() -> dict[str, dict[str, Any]]:
    """The runs in the result file, by `case/seed`."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def means(runs: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Final reward by staleness and setting, the mean over the seeds, of those with all seeds."""
    found: dict[int, dict[str, float]] = {}
    by_case: dict[str, list[float]] = {}
    for record in runs.values():
        by_case.setdefault(record["case"], []).append(record["reward_after"])
    for case, rewards in by_case.items():
        if len(rewards) == len(SEEDS):
            setting, _, staleness = case.rpartition("/")
            found.setdefault(int(staleness), {})[setting] = statistics.mean(rewards)
    return found


def figures(runs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """The figures, and the setting behind each."""
    values, settings = {}, {}
    for staleness, by_setting in means(runs).items():
        name = f"best_at_{staleness}" if staleness else "sync"
        settings[name] = max(by_setting, key=lambda setting: by_setting[setting])
        values[name] = by_setting[settings[name]]
        default = by_setting.get("clip_tis@0.0003")
        if default is not None:
            values[f"quickstart_at_{staleness}"] = default
    return values, settings


def missing(staleness: int, pattern: str, seeds: list[int]) -> Iterator[tuple[str, int]]:
    """Case and seed of what is still to be run, the first seed first; then of its best settings."""
    names = [n for n in cases() if n.endswith(f"/{staleness}") and fnmatch(n, f"{pattern}/*")]
    if SEEDS[0] in seeds:
        yield from ((n, SEEDS[0]) for n in names if f"{n}/{SEEDS[0]}" not in finished())
    first = {
        n: finished()[f"{n}/{SEEDS[0]}"]["reward_after"]
        for n in names
        if f"{n}/{SEEDS[0]}" in finished()
    }
    best = sorted(first, key=lambda n: -first[n])[:BEST]
    for seed in (s for s in seeds if s != SEEDS[0]):
        yield from ((n, seed) for n in best if f"{n}/{seed}" not in finished())


def train(case: str, seed: int, before: Mapping[str, Any]) -> None:
    record = run(case, cases()[case], seed, default_steps())
    runs = {**finished(), f"{case}/{seed}": record}
    values, settings = figures(runs)
    write_result(NAME, values, runs, machine=before, settings=settings)
    print(f"{case}/{seed}: {record['reward_after']:.3f} in {record['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--staleness", nargs="+", type=int, default=list(STALENESS))
    parser.add_argument("--only", nargs="+", default=["*"], help="setting@rate, as patterns")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--list", action="store_true", help="what is finished, best first")
    args = parser.parse_args()
    if args.list:
        for key, record in sorted(finished().items(), key=lambda item: -item[1]["reward_after"]):
            print(f"{record['reward_after']:.3f}  {key}")
        return
    os.environ.update(ENVIRONMENT)
    before = machine()
    for staleness in args.staleness:
        for pattern in args.only:
            for case, seed in missing(staleness, pattern, args.seeds):
                train(case, seed, before)


if __name__ == "__main__":
    main()
