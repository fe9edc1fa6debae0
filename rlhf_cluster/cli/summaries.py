"""Terminal summaries of runs, offline stages, and stages that make a data set.

A stage has one summary before it starts (what its settings result in). Each kind has one after it has
finished: the result, where it is stored, and for a run what to try next.

Promises: every path and command works unchanged in the folder where the run was started.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.planning.placement import demand, total_resources
from rlhf_cluster.planning.run_inputs import StageInputs
from rlhf_cluster.run.run_record import Snapshot
from rlhf_cluster.synthetic_data.dataset import LEFT_OUT
from rlhf_cluster.synthetic_data.revise_answers import PROBLEMS

FRESH = ("run.name", "run.steps")  # settings that the suggested longer run replaces
COOLER = "generation.temperature=0.8"  # a change that every configuration allows
MAX_NAME = 64


def ending(
    summary: Mapping[str, Any],
    config: RunConfig,
    config_path: Path,
    overrides: Sequence[str],
    command: str,
    here: Path,
    alone: bool = True,
) -> list[str]:
    """Return the last lines of a finished run: four results, and what to try next.

    `command` calls this program. Paths are relative to the folder `here`. `alone` is False where the
    file holds other runs too.
    """
    folder = shorten(Path(summary["run_dir"]), here)
    run = summary["run"] if Path(folder) == Path("runs") / summary["run"] else folder
    result = {
        "held-out reward": _reward(summary, config),
        "training reward": _training_reward(summary),
        "time": _time(summary["total_s"]),
        "trained model": shorten(Path(summary["final_model"]), here),
    }
    tries = {"Where it ended": [command, "status", run], "One page": [command, "report", run]}
    if alone:
        tries |= {
            "Check a change": [command, "validate", str(config_path), *_set([*overrides, COOLER])],
            "A longer run": [command, "run", str(config_path), *_longer(config, overrides)],
        }
    return [
        f"Run {summary['run']} finished: {summary['steps']:,} steps in {folder}",
        *(f"  {name:<15}  {text}" for name, text in result.items()),
        "",
        "Try next",
        *(f"  {name:<15}  {shlex.join(words)}" for name, words in tries.items()),
    ]


def _training_reward(summary: Mapping[str, Any]) -> str:
    """Describe the reward at the end of training, which an older summary may lack."""
    value = summary.get("reward_trained")
    return "not known" if value is None else f"{value:.3f}, mean of the last 10 steps"


def reached_rows(snapshot: Snapshot, summary: Mapping[str, Any], here: Path) -> dict[str, str]:
    """Return what a finished run or stage has reached, as name and text."""
    rows: dict[str, str] = {"steps": f"{snapshot.step:,} in {_time(summary['total_s'])}"}
    if snapshot.reward is not None:
        mean10 = snapshot.reward_mean10
        mean = "" if mean10 is None else f", {mean10:.3f} mean of the last 10 steps"
        rows["reward"] = f"{snapshot.reward:.3f} at the end{mean}"
    if "reward_before" in summary:
        before, after = summary["reward_before"], summary["reward_after"]
        rows["held out"] = "not measured"
        if before is not None or after is not None:
            rows["held out"] = f"{_three(before)} before, {_three(after)} after"
    if summary.get("metric") and "before" in summary:
        before, after = _number(summary["before"]), _number(summary["after"])
        rows[summary["metric"]] = f"{before} before, {after} after, on held-out units"
    places = {
        "model": "final_model",
        "data set": "data_file",
        "run directory": "run_dir",
    }
    for name, key in places.items():
        if summary.get(key):
            rows[name] = shorten(Path(summary[key]), here)
    return rows


def _three(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3f}"


def _reward(summary: Mapping[str, Any], config: RunConfig) -> str:
    before, after = summary["reward_before"], summary["reward_after"]
    if not config.evaluation.all_sets:
        return "not measured on held-out prompts (evaluation.num_prompts = 0)"
    first = config.evaluation.all_sets[0]
    size = "" if first.num_prompts is None else f"{first.num_prompts:,} "
    if first.skip_first and after is not None:
        return f"{after:.3f} after training, on {size}held-out prompts"
    if before is None or after is None:
        when = (
            "before" if after is not None else "after" if before is not None else "before or after"
        )
        return f"not known: no held-out prompt could be answered {when} training"
    return f"{before:.3f} -> {after:.3f} on {size}held-out prompts"


def _longer(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """Return the settings of this run with twice the steps and another name."""
    suffix = "-longer"
    name = config.run.name[: MAX_NAME - len(suffix)] + suffix
    kept = [text for text in overrides if text.partition("=")[0].strip() not in FRESH]
    return _set([*kept, f"run.name={name}", f"run.steps={2 * config.run.steps}"])


def _set(settings: Sequence[str]) -> list[str]:
    return [word for text in settings for word in ("--set", text)]


def shorten(path: Path, here: Path) -> str:
    """Return the path relative to the folder `here`; the whole path outside of it."""
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def derived_stage(config: StageConfig, inputs: StageInputs) -> dict[str, str]:
    """Return the numbers that the settings result in, as name and text."""
    counts = inputs.stream.counts
    epoch = inputs.stream.end_of(1)
    drawn = inputs.end or inputs.num_steps * inputs.units_per_step
    return {
        "stage": config.stage.type,
        "steps": f"{inputs.num_steps:,}, of {inputs.units_per_step:,} units each",
        "data": f"{counts.rows:,} rows, {counts.units:,} units",
        "epochs": f"{drawn / epoch:.3g} of {epoch:,} units",
        "held out": f"{counts.held_out:,} units"
        + (f", {counts.unread:,} more are not used" if counts.unread else ""),
        "longest sequence": f"at most {config.data.max_tokens:,} tokens",
        "row": f"{config.tokens_per_row:,} tokens",
        "total demand": total_resources(demand(config)),
        "run directory": str(config.run_dir),
    }


def stage_ending(summary: Mapping[str, Any], command: str, here: Path) -> list[str]:
    """Return the last lines of a finished stage. `command` calls this program; `here`: its folder."""
    folder, final = (shorten(Path(summary[k]), here) for k in ("run_dir", "final_model"))
    before, after = summary["before"], summary["after"]
    result = "not measured (data.held_out = 0)"
    if before is not None and after is not None:
        result = f"{before:.4g} -> {after:.4g} on held-out units"
    rows = {
        summary["metric"]: result,
        **_accuracies(summary["report"]),
        **{f"note {i}": note for i, note in enumerate(summary["data_notes"], start=1)},
        **{f"warning {i}": w for i, w in enumerate(summary["report"].get("warnings", ()), start=1)},
        "run directory": folder,
        "learning curve": f"{folder}/curve.png",
        "trained model": final,
    }
    return [
        f"Stage {summary['run']} ({summary['stage']}) finished: {summary['steps']:,} steps in "
        f"{summary['total_s']:.0f} s",
        *(f"  {name:<14}  {text}" for name, text in rows.items()),
        "",
        "Try next",
        f"  {'Where it ended':<14}  {shlex.join([command, 'status', folder])}",
    ]


def _accuracies(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the accuracies of a scorer, and of the ensemble that it completes, with intervals."""
    whole = report.get("ensemble")
    named = {"accuracy": report, "of all members": whole if isinstance(whole, Mapping) else {}}
    return {
        name: f"{own['accuracy']:.3f} [{own['accuracy_low']:.3f}, {own['accuracy_high']:.3f}]"
        for name, own in named.items()
        if "accuracy_low" in own
    }


def derived_generation(config: GenerateConfig, num_prompts: int) -> dict[str, str]:
    """Return the numbers that the settings result in, as name and text."""
    stage, longest = config.stage, config.generation.max_response_tokens
    samples = num_prompts * stage.samples
    facts = {
        "stage": f"{stage.type}, {stage.select}",
        "prompts": f"{num_prompts:,}, {stage.samples:,} samples each",
        "response tokens": f"at most {samples * longest:,}",
        "rows": f"at most {num_prompts * stage.rows_per_prompt:,}",
    }
    if stage.completions is not None:
        facts["completions"] = f"{stage.completions:,} from each reasoning step but the last"
    if (revise := stage.revise) is not None:
        facts["revisions"] = f"{revise.rounds} of each sample; principles: {len(revise.principles)}"
    return facts | {
        "total demand": total_resources(demand(config)),
        "run directory": str(config.run_dir),
    }


def generation_ending(summary: Mapping[str, Any], command: str, here: Path) -> list[str]:
    """Return the last lines of a finished stage. `command` calls this program; `here`: its folder."""
    report = summary["report"]
    rows = {
        "rows": f"{report['rows']:,} of {report['samples']:,} samples",
        "reward": f"{_number(report['reward_mean'])} of all, "
        f"{_number(report['selected_reward_mean'])} of what was selected",
    }
    if report["label_mean"] is not None:
        rows["step labels"] = f"{report['labels']:,}, mean {_number(report['label_mean'])}"
    if (revisions := report["revisions"]) is not None:
        better = _number(revisions["better_fraction"])
        rows["revisions"] = f"{revisions['revised']:,}, better than their response: {better}"
    left = {LEFT_OUT[name]: count for name, count in report["left_out"].items() if count}
    lost = {f"prompts discarded by {name}": n for name, n in report["discarded"].items()}
    failed = (revisions or {}).get("unrevised", {})
    given_up = {f"without a revision: {PROBLEMS[name]}": count for name, count in failed.items()}
    notes = [f"{count:,} {text}" for text, count in {**left, **given_up, **lost}.items()]
    folder = shorten(Path(summary["run_dir"]), here)
    return [
        f"Stage {summary['run']} ({summary['stage']}) finished: {report['prompts']:,} prompts in "
        f"{summary['total_s']:.0f} s",
        *(f"  {name:<14}  {text}" for name, text in rows.items()),
        *(f"  {'left out':<14}  {note}" for note in notes),
        f"  {'data set':<14}  {shorten(Path(summary['data_file']), here)}",
        "",
        "Try next",
        f"  {'Where it ended':<14}  {shlex.join([command, 'status', folder])}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
