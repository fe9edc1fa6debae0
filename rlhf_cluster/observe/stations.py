"""When a stored group was at each station of its way, from what was recorded of it and of its step.

    sampled   from the rollout's first to its last token              the record itself
    stored    scored, and whole on disk                               the time of its file
    trained   from the learner's taking the batch to the step's end   the step's line in metrics.jsonl

A file that was copied or written again has another time: one that does not lie between sampling and
training is not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SLACK_S = 1.0
"""By so much the clocks of two machines of a run may differ before a time is not believed."""


def stored_at(path: Path, finished_s: float, trained_from_s: float | None) -> float | None:
    """Unix time at which the group's file was whole; None where that is not known."""
    written_s = path.stat().st_mtime
    latest = float("inf") if trained_from_s is None else trained_from_s
    return written_s if finished_s - SLACK_S <= written_s <= latest + SLACK_S else None


def trained_between(
    records: Sequence[Mapping[str, Any]], step: int | None
) -> tuple[float, float] | None:
    """Unix times between which the learner trained `step`; None where its line is not there."""
    for record in records:
        if record["step"] == step and record.get("time/train_s") is not None:
            end = record["time_s"] - (record.get("time/publish_wait_s") or 0.0)
            return end - record["time/train_s"], end
    return None


def station_facts(
    path: Path,
    finished_s: float,
    records: Sequence[Mapping[str, Any]],
    step: int | None,
    shown: Callable[[float], str],
) -> dict[str, str]:
    """For people. `finished_s`: end of sampling; `step`: the first that trained it; None: none did."""
    trained = trained_between(records, step)
    stored_s = stored_at(path, finished_s, None if trained is None else trained[0])
    facts = {"scored and stored": "not known" if stored_s is None else shown(stored_s)}
    if step is not None:
        facts["trained"] = (
            "not known" if trained is None else f"{shown(trained[0])} to {shown(trained[1])}"
        )
    return facts
