"""Terminal summary of a finished run: the result, where it is stored, what to try next.

Promises: every path and command works unchanged in the folder where the run was started.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_cluster.config import RunConfig

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
    """Return the last lines of a finished run.

    `command` calls this program. Paths are relative to the folder `here`. `alone` is False where the
    file holds other runs too.
    """
    folder = shorten(Path(summary["run_dir"]), here)
    run = summary["run"] if Path(folder) == Path("runs") / summary["run"] else folder
    result = {
        "reward": _reward(summary, config.evaluation.num_prompts),
        "run directory": folder,
        "learning curve": f"{folder}/curve.png",
        "trained model": shorten(Path(summary["final_model"]), here),
    }
    tries = {"Where it ended": [command, "status", run], "One page": [command, "report", run]}
    if alone:
        tries |= {
            "Check a change": [command, "validate", str(config_path), *_set([*overrides, COOLER])],
            "A longer run": [command, "run", str(config_path), *_longer(config, overrides)],
        }
    return [
        f"Run {summary['run']} finished: {summary['steps']:,} steps in {_time(summary['total_s'])}",
        *(f"  {name:<14}  {text}" for name, text in result.items()),
        "",
        "Try next",
        *(f"  {name:<14}  {shlex.join(words)}" for name, words in tries.items()),
    ]


def _reward(summary: Mapping[str, Any], num_prompts: int) -> str:
    before, after = summary["reward_before"], summary["reward_after"]
    if not num_prompts:
        return "not measured on held-out prompts (evaluation.num_prompts = 0)"
    if before is None or after is None:
        when = (
            "before" if after is not None else "after" if before is not None else "before or after"
        )
        return f"not known: no held-out prompt could be answered {when} training"
    return f"{before:.3f} -> {after:.3f} on {num_prompts:,} held-out prompts"


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
