"""What each algorithm learns on the quick-start task, and how staleness changes it.

algorithms  every algorithm of the table, one step stale, as the quick start runs
staleness   GRPO with batches 0, 2, 4 and 8 steps stale, two optimizer steps a batch, with the
            decoupled loss (proximal = "recompute") and without (proximal = "bypass")

Each case is run with three seeds for the quick start's 120 steps; the final reward is that of greedy
answers to its 256 held-out prompts. A run is `in_process.train`: the project's learner, rewards and
data in one process, with a plain sampler of exact staleness. It leaves out Ray, vLLM and the pipeline,
and with them their start-up and whatever depends on timing; what the quick start's own run reaches is
in results/loop.json.

Every run is merged into the result as it ends and a finished one is not run again unless its
settings changed, so the table can be filled in parts, by several processes at once:

    python benchmarks/learning_curves.py                          # all that is missing
    python benchmarks/learning_curves.py --only grpo --seeds 0
    python benchmarks/learning_curves.py --only 'staleness-4-*' --steps 20 --dry-run
    python benchmarks/learning_curves.py --draw                   # the picture alone
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import ENVIRONMENT, RESULTS, machine, write_result

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
PICTURE = Path(__file__).parents[1] / "docs" / "learning_curves.png"
NAME = "learning_curves"
SEEDS = (0, 1, 2)
GROUP_SIZE = 16
STALENESS = (0, 2, 4, 8)
SMOOTHED_STEPS = 10
BYPASS = {"proximal": "bypass"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table: what is different from configs/quickstart.toml."""

    staleness: int = 1
    algorithm: Mapping[str, Any]
    learner: Mapping[str, Any] = field(default_factory=dict)
    critic: Mapping[str, Any] = field(default_factory=dict)


SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "cispo": {"algorithm": {"correction": {"type": "none"}}},  # its clip truncates by itself
    # GSPO's published bounds suit steps that hardly move the policy; a tiny model's move it a lot
    "gspo": {"algorithm": {"clip_low": 0.05, "clip_high": 0.08, "correction": {"type": "none"}}},
    "ppo": {"critic": {"learning_rate": 1e-3}},
}
"""What an algorithm needs to learn this task, besides its own defaults."""


OTHERS = {"online_dpo", "on_policy_distillation"}
"""Algorithms without a row: what they learn from is not the reward alone."""


def cases() -> dict[str, Case]:
    """All rows by name. The algorithms are those of the table `ALGORITHMS` but for `OTHERS`."""
    from rlhf_cluster.algorithms import ALGORITHMS

    found = {}
    for name in sorted(set(ALGORITHMS) - OTHERS):
        own = SETTINGS.get(name, {})
        algorithm = {"type": name, "group_size": GROUP_SIZE, **BYPASS, **own.get("algorithm", {})}
        sections = {key: value for key, value in own.items() if key != "algorithm"}
        found[name] = Case(algorithm=algorithm, **sections)
    for staleness in STALENESS:
        for kind, proximal in (("decoupled", "recompute"), ("coupled", "bypass")):
            found[f"staleness-{staleness}-{kind}"] = Case(
                staleness=staleness,
                algorithm={"type": "grpo", "group_size": GROUP_SIZE, "proximal": proximal},
                learner={"minibatches": 2},
            )
    return found


def run(
    name: str, case: Case, seed: int, steps: int, look_every: int | None = None
) -> dict[str, Any]:
    """Train one case; returns what the result file keeps of it."""
    from benchmarks.in_process import train
    from rlhf_cluster.config import RunConfig, validate

    settings = tree_of(case, seed, steps)
    with tempfile.TemporaryDirectory() as folder:
        tree = {**settings, "run": {**settings["run"], "root": folder}}
        config = validate(RunConfig, tree, source=name)
        found = train(config, Path(folder), case.staleness, look_every)
    return {"case": name, "seed": seed, "settings": changes(case, steps), **found}


def tree_of(case: Case, seed: int, steps: int) -> dict[str, Any]:
    """The run file of a case: the quick start's, changed."""
    tree = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))
    tree["run"] |= {"seed": seed, "steps": steps}
    tree["algorithm"] = dict(case.algorithm)
    tree["learner"] |= case.learner
    tree["scoring"]["reference"] = False  # nothing here uses its log-probabilities
    tree["staleness"] = {"max_staleness": case.staleness}
    if case.critic:
        tree["critic"] = dict(case.critic)
    return tree


def default_steps() -> int:
    return int(tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["run"]["steps"])


def changes(case: Case, steps: int) -> dict[str, Any]:
    """What is different from the quick start, as a result keeps it."""
    sections = {"algorithm": case.algorithm, "learner": case.learner, "critic": case.critic}
    changed = {key: dict(value) for key, value in sections.items() if value}
    return {"steps": steps, "staleness": case.staleness, **changed}


def figures(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Final reward of each run, and the mean over the seeds of each case."""
    found: dict[str, float] = {}
    by_case: dict[str, list[float]] = {}
    for key, record in sorted(runs.items()):
        found[f"reward_after/{key}"] = record["reward_after"]
        by_case.setdefault(record["case"], []).append(record["reward_after"])
    means = {f"reward_after/{c}/mean": statistics.mean(v) for c, v in by_case.items()}
    return {**means, **found}


def finished() -> dict[str, dict[str, Any]]:
    """The runs in the result file, by `case/seed`."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


@contextmanager
def one_writer() -> Iterator[None]:
    """Keep other processes from merging into a result."""
    RESULTS.mkdir(exist_ok=True)
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def draw(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The picture: reward over steps by algorithm, and final reward over staleness."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
    _draw_algorithms(left, runs)
    _draw_staleness(right, runs)
    for axes in (left, right):
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            where = "upper left" if axes is left else "lower left"
            axes.legend(loc=where, frameon=False, fontsize=9)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _draw_algorithms(axes: Any, runs: Mapping[str, Mapping[str, Any]]) -> None:
    import numpy as np
    from matplotlib import colormaps

    from rlhf_cluster.observe.report.learning_curve import moving_average

    names = sorted({r["case"] for r in runs.values() if not r["case"].startswith("staleness-")})
    colors = colormaps["tab10"].colors + colormaps["Dark2"].colors  # type: ignore[attr-defined]
    for name, color in zip(names, colors, strict=False):
        own = [r for r in runs.values() if r["case"] == name]
        steps = min(len(r["rewards"]) for r in own)
        mean = np.mean([r["rewards"][:steps] for r in own], axis=0)
        after = statistics.mean(r["reward_after"] for r in own)
        seeds = "" if len(own) == len(SEEDS) else f" ({len(own)} seed)"
        label = f"{name} {after:.2f}{seeds}"
        axes.plot(moving_average(mean, SMOOTHED_STEPS), color=color, lw=1.6, label=label)
    axes.set_title(
        f"reward of sampled answers, mean of {len(SEEDS)} seeds (legend: held-out, greedy)"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("reward")


def _draw_staleness(axes: Any, runs: Mapping[str, Mapping[str, Any]]) -> None:
    for kind, color in (("decoupled", "#2b6cb0"), ("coupled", "#dd6b20")):
        rewards = {
            staleness: [
                r["reward_after"]
                for r in runs.values()
                if r["case"] == f"staleness-{staleness}-{kind}"
            ]
            for staleness in STALENESS
        }
        known = [s for s in STALENESS if rewards[s]]
        if not known:
            continue
        middle = [statistics.mean(rewards[s]) for s in known]
        below = [m - min(rewards[s]) for s, m in zip(known, middle, strict=True)]
        above = [max(rewards[s]) - m for s, m in zip(known, middle, strict=True)]
        label = f"{kind} loss"
        axes.errorbar(
            known, middle, (below, above), color=color, marker="o", capsize=4, label=label
        )
    axes.set_title("GRPO: final held-out reward, least to best seed")
    axes.set_xlabel("staleness of every batch [steps]")
    axes.set_xticks(STALENESS)


def _train_missing(names: Sequence[str], seeds: Sequence[int], steps: int, again: bool) -> None:
    table, before = cases(), machine()
    for seed in seeds:
        for name in names:
            key = f"{name}/{seed}"
            known = finished().get(key)
            if known and not again and known["settings"] == changes(table[name], steps):
                print(f"{key}: {known['reward_after']:.3f} (finished before)")
                continue
            record = run(name, table[name], seed, steps)
            print(
                f"{key}: {record['reward_before']:.3f} -> {record['reward_after']:.3f} "
                f"in {record['seconds']:.0f} s",
                flush=True,
            )
            with one_writer():
                runs = {**finished(), key: record}
                write_result(NAME, figures(runs), runs, machine=before)


def main() -> None:
    table = cases()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="cases, as patterns")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=default_steps())
    parser.add_argument("--again", action="store_true", help="also what is finished")
    parser.add_argument("--dry-run", action="store_true", help="print the reward, write nothing")
    parser.add_argument("--draw", action="store_true", help="only draw what is finished")
    args = parser.parse_args()
    names = [n for n in table if any(fnmatch(n, pattern) for pattern in args.only)]
    if not names:
        parser.error(f"--only {args.only}: no such case; there are {', '.join(table)}")
    os.environ.update(ENVIRONMENT)
    if args.dry_run:
        for name in names:
            for seed in args.seeds:
                print({**run(name, table[name], seed, args.steps), "rewards": ...}, flush=True)
        return
    if not args.draw:
        _train_missing(names, args.seeds, args.steps, args.again)
    draw(finished(), PICTURE)


if __name__ == "__main__":
    main()
