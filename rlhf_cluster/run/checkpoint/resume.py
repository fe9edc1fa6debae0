"""Resuming: what a run directory holds, and what the same command does with it.

    finished, same configuration       nothing to do
    a complete checkpoint              resume from the last one
    the last is damaged, and a copy    fetch the newest intact copy, resume from it
    none yet                           start from the beginning
    another configuration              refused with the differences, unless they are accepted

Promises:
- a run is started from the beginning only when it cannot have had a checkpoint. A run whose checkpoints
  are all damaged, or were turned off, is refused, and nothing of it is deleted;
- what is later than the checkpoint is cut from the run's record, so that every step is in it once;
- a run resumes from a checkpoint only after every tensor of it was read and verified (`whole`);
- a damaged checkpoint is named, and its copy is used, or the checkpoint before it. What was skipped is
  renamed (`checkpoint_folder` says how many stay);
- a storage that answers with an error, or not at all, is not treated as damage: the run is refused
  rather than set back.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from rlhf_cluster.config import GenerateConfig
from rlhf_cluster.errors import RunError
from rlhf_cluster.run.checkpoint import checkpoint_folder, remote_copies
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint, Found
from rlhf_cluster.run.run_directory import RunDir, list_settings
from rlhf_cluster.run.run_record import cut_metrics, read_metrics
from rlhf_cluster.util.durable_files import read_json
from rlhf_cluster.util.provenance import remove_secrets
from rlhf_cluster.weights import store
from rlhf_cluster.weights.read_version import verify
from rlhf_cluster.weights.transports.shared_files import version_dir
from rlhf_cluster.weights.transports.transport import Deadline

if TYPE_CHECKING:
    from rlhf_cluster.config.load import AnyConfig

FIXED = (
    "run.groups_per_step",
    "buffer.replay.fraction",
    "model",
    "sft",
    "learner.lora",
    "scoring.reference",
    "scoring.reference_update",
)
"""Settings, or whole sections, that may not change: a checkpoint would not fit any more."""
FREE = (
    "weights.transport",
    "weights.mirror",
    "weights.mirror_streams",
    "weights.relay_above_bytes",
    "weights.durable_every",  # of runs by commits that had transports without files
)
"""Settings of how versions travel. They change nothing that a run computes, and may change."""
FIXED_OF_STAGES = ("run.units_per_step", "run.seed", "model", "data", "stage", "learner.lora")
"""Such settings of an offline stage, whose position in the data is determined by its steps."""
FIXED_OF_GENERATION = (
    "run.seed",
    "model",
    "data",
    "stage.samples",
    "stage.completions",
    "stage.revise",
    "generation.temperature",
    "generation.max_response_tokens",
    "generation.segment_tokens",
    "scoring.rewards",
    "scoring.objective",
    "scoring.step_separator",
)
"""Such settings of a stage that makes a data set: its answers depend on them.

Settings of the selection among the answers may change."""
MAX_DIFFERENCES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Decision about an existing run directory. `notes` are messages to the user."""

    finished: bool
    checkpoint: Checkpoint | None
    notes: list[str]
    kept: bool = False  # what the directory holds stays, without a checkpoint


def whole(
    run: RunDir, timeout_s: float | None = None, sleep: Callable[[float], None] = time.sleep
) -> Found:
    """Return the newest intact checkpoint, and what is wrong with newer ones. Changes nothing.

    Every tensor is read and verified, also those of the stored reference that the checkpoint needs.

    Raises `StalledError` for one that is not read within `timeout_s`. Raises `StorageError` if reading
    fails: the checkpoint may be intact, so no older one is used.
    """

    def verify_all(checkpoint: Checkpoint) -> None:
        deadline = None
        if timeout_s is not None:
            deadline = Deadline(f"verifying {checkpoint.folder}", timeout_s)
        checkpoint_folder.verify_tensors(checkpoint, deadline)
        if (reference := checkpoint.state.reference) is not None:
            verify(version_dir(run.reference, reference), deadline=deadline)

    return checkpoint_folder.newest(run.checkpoints, also=verify_all, sleep=sleep)


def whole_or_copy(
    run: RunDir, config: AnyConfig, sleep: Callable[[float], None] = time.sleep
) -> Found:
    """Return what `whole` does, or fetch an intact copy from `checkpoint.copy_to` into `run`.

    A copy is fetched when `run` has no intact checkpoint, or when newer ones are damaged. Copies newer
    than everything in `run` are ignored unless nothing in it is intact: a user who deleted newer
    checkpoints wants to go back.

    Call while holding `run`. Raises `StorageError`, `StalledError` if a storage does not answer.
    """
    timeout_s = config.checkpoint.timeout_s
    found = whole(run, timeout_s, sleep)
    copy = remote_copies.folder_of(config)
    own = found.checkpoint
    if (own is not None and not found.damaged) or copy is None:
        return found
    last = max(checkpoint_folder.steps(run.checkpoints), default=-1)

    def wanted(step: int) -> bool:
        return own is None or own.state.step < step <= last

    fetched = remote_copies.fetch_newest(
        run, copy, timeout_s, lambda run: whole(run, timeout_s, sleep), wanted, sleep
    )
    damaged = [*found.damaged, *(d for d in fetched.damaged if d not in found.damaged)]
    if fetched.checkpoint is None:
        return replace(found, damaged=damaged)
    return replace(fetched, damaged=damaged)


def whole_copy(run: RunDir, config: AnyConfig, overwrite: bool) -> Found:
    """Return the newest intact copy for a directory that was just created, or no checkpoint.

    With `overwrite` the copies of an earlier run of this name are removed. Raises `CheckpointError`,
    and `RunError` when there are copies and none is intact.
    """
    copy = remote_copies.folder_of(config)
    if copy is None or overwrite:
        if copy is not None:
            remote_copies.forget(copy)
        return Found(checkpoint=None)
    found = whole_or_copy(run, config)
    if found.checkpoint is None and found.damaged:
        raise RunError(
            f"{copy.shown}: a run of this name has copies there and none is whole: "
            f"{'; '.join(found.damaged)}. Start under another name with --set run.name=NEW, or give "
            "--overwrite to delete them and start from scratch"
        )
    return found


def look(
    run: RunDir, config: AnyConfig, accept_changes: bool, found: Found | None = None
) -> Continuation:
    """Decide what the same command does with `run`, whose checkpoints are `found`.

    Without `found`, tensors are not read, and remote copies are not looked up: a later call may choose
    another checkpoint. Changes nothing. Raises `RunError`.
    """
    is_last = found is not None or config.checkpoint.copy_to is None
    described = run.read_resolved()
    changes = differences(described, describe(config), defaults(config)) if described else []
    free = _of(changes, FREE)
    changes = [change for change in changes if change not in free]
    if found is not None and found.origin:  # fetched to where the run never was
        changes = [change for change in changes if not change.startswith("run.root = ")]
    finished = run.summary.is_file()
    if finished and not changes:
        note = f"Run {config.run.name} has finished; --overwrite starts it anew"
        return Continuation(finished=True, checkpoint=None, notes=[note])
    if isinstance(config, GenerateConfig):
        return _keep(run, changes, accept_changes)
    found = found or checkpoint_folder.newest(run.checkpoints)
    if found.checkpoint is None and not is_last:
        return Continuation(finished=False, checkpoint=None, notes=[])
    if found.checkpoint is None:
        done = _last_step(run)
        if (done or finished) and changes and not accept_changes:
            what = "has finished" if finished else f"began with {done} steps"
            raise RunError(_explain(run.path, changes, what))
        if found.damaged or finished or (done and not _had_checkpoints(described)):
            why = found.damaged or ["it was run without checkpoints"]
            raise RunError(
                f"{run.path}: {done} steps are done and no checkpoint is whole: {'; '.join(why)}. "
                "Start under another name with --set run.name=NEW, or give --overwrite to delete it "
                "and start from scratch"
            )
        note = f"{run.path}: {done} steps and no checkpoint yet; starts from the beginning"
        return Continuation(finished=False, checkpoint=None, notes=[note])
    step = found.checkpoint.state.step
    settings = FIXED_OF_STAGES if "stage" in type(config).model_fields else FIXED
    fixed = _of(changes, settings)
    if fixed:
        raise RunError(
            _explain(run.path, fixed, f"has {step} steps behind it")
            + ". These cannot change in a run; start another one with --set run.name=NEW"
        )
    if changes and not accept_changes:
        raise RunError(_explain(run.path, changes, f"has {step} steps behind it"))
    if config.run.steps is not None and config.run.steps < step:
        raise RunError(
            f"run.steps = {config.run.steps} is under the {step} steps that {run.path} has done. "
            "Raise it, or start another run with --set run.name=NEW"
        )
    notes = [f"passed over: {text}" for text in found.damaged]
    notes += [found.origin] * bool(found.origin)
    notes += [f"changed: {change}" for change in changes]
    notes.append(f"Run {config.run.name} continues from its checkpoint of step {step}")
    return Continuation(finished=False, checkpoint=found.checkpoint, notes=notes)


def _keep(run: RunDir, changes: list[str], accept_changes: bool) -> Continuation:
    """Resume a stage that makes a data set: every finished prompt is kept."""
    fixed = _of(changes, FIXED_OF_GENERATION)
    if fixed:
        raise RunError(
            _explain(run.path, fixed, "has answers of other settings")
            + ". These cannot change in a run; start another one with --set run.name=NEW"
        )
    if changes and not accept_changes:
        raise RunError(_explain(run.path, changes, "began with other settings"))
    notes = [f"changed: {change}" for change in changes]
    notes.append(f"{run.path} goes on: prompts that were finished are not sampled again")
    return Continuation(finished=False, checkpoint=None, notes=notes, kept=True)


def standing(config: AnyConfig, overwrite: bool, accept_changes: bool) -> Continuation | None:
    """Call `look` on the run's directory in its current state; None if nothing is continued.

    Changes nothing. Raises `RunError`, also for a directory that is in use or not a run's.
    """
    left = not overwrite and RunDir.has_run(config.run_dir)
    RunDir.check_free(config.run_dir, config, overwrite=overwrite or left)
    return look(RunDir.open(config.run_dir), config, accept_changes) if left else None


def cut_back(run: RunDir, checkpoint: Checkpoint | None) -> None:
    """Cut from the record what is later than the checkpoint, or all of it without one.

    Call while holding `run`.
    """
    step = -1 if checkpoint is None else checkpoint.state.step
    checkpoint_folder.set_aside_after(run.checkpoints, step)
    cut_metrics(run.metrics, step)
    for sample in run.samples.glob("step-*.parquet"):
        if int(sample.stem.removeprefix("step-")) > step:
            sample.unlink()
    for report in (run.path / "skipped").glob("*.json"):
        found = read_json(report)  # None: partially written at a power cut
        if found is None or found["version"] >= step:
            report.unlink()
    for result in (run.summary, run.curve):
        result.unlink(missing_ok=True)
    shutil.rmtree(run.final, ignore_errors=True)


def rewind_weights(run: RunDir, checkpoint: Checkpoint | None) -> None:
    """Remove the stored weights from the checkpoint's version on, which will be published again.

    The stored reference becomes that of the checkpoint. Without a checkpoint nothing stays. Raises
    `WeightError`, `StalledError`.
    """
    store.rewind(run.weights, -1 if checkpoint is None else checkpoint.state.step - 1)
    if checkpoint is None:
        store.rewind(run.reference, -1)
    elif checkpoint.state.reference is not None:
        store.rewind(run.reference, checkpoint.state.reference)


def describe(config: AnyConfig) -> dict[str, Any]:
    """Return the configuration as a run directory stores it: complete, without secrets."""
    return remove_secrets(list_settings(config))


def defaults(section: BaseModel) -> dict[str, Any]:
    """Return the default values of the settings of `section`, and of the sections in it."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found[name] = defaults(value)
        elif not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], unsaid: Mapping[str, Any] | None = None
) -> list[str]:
    """Return one "key = value, was value" for each setting that differs.

    A setting that is missing in `before`, because it is newer, had its value in `unsaid`.
    """
    old, new = dict(_flat(unsaid or {})) | dict(_flat(before)), dict(_flat(after))
    return [
        f"{key} = {_format_value(new.get(key))}, was {_format_value(old.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings with dotted keys.

    An empty mapping yields nothing: it is the default of some settings, and not a value like others.
    """
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _format_value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _of(changes: list[str], settings: Iterable[str]) -> list[str]:
    """Return the changes of `settings`, which are keys or whole sections."""
    return [c for c in changes if any(c.startswith((f"{f}.", f"{f} =")) for f in settings)]


def _explain(path: Path, changes: list[str], what: str) -> str:
    more = len(changes) - MAX_DIFFERENCES
    lines = [f"  - {change}" for change in changes[:MAX_DIFFERENCES]]
    lines += [f"  - and {more} more"] * (more > 0)
    return (
        f"{path}: this run {what}, and its configuration differs:\n" + "\n".join(lines) + "\n"
        "Give --accept-changes to go on with it, or start another run with --set run.name=NEW"
    )


def _last_step(run: RunDir) -> int:
    records = read_metrics(run.metrics)
    return records[-1]["step"] if records else 0


def _had_checkpoints(described: Mapping[str, Any] | None) -> bool:
    return bool(((described or {}).get("checkpoint") or {}).get("every"))
