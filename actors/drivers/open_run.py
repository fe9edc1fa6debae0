"""Start of a run or stage, from its configuration to a claimed run directory.

    check inputs -> Ray -> preflight -> run directory -> live view -> the run itself

Promises:
- errors in the input are reported before anything starts;
- a finished run is not changed;
- directory and cluster are released, however the run ends.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from actors.cluster.ray_cluster import (
    connected,
    metrics_targets,
)

# isort: split
import ray
from rich.console import Console

from actors.cluster.launch import (
    preflight,
    resources_by_node,
)
from actors.drivers.checkpoint_cut import claimed
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.observe.record.post_mortem import (
    NAME,
    add_path_on_error,
)
from rlhf_cluster.observe.report.live_view import LiveView
from rlhf_cluster.planning.cluster_room import (
    address_of,
    judge_placement,
)
from rlhf_cluster.planning.placement import demand
from rlhf_cluster.planning.run_inputs import Inputs, StageInputs
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.checkpoint.resume import Continuation
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.durable_files import sync_tree
from rlhf_cluster.util.json_files import write_json

InputsT = TypeVar("InputsT", Inputs, StageInputs)


def in_run_directory(
    config: AnyConfig,
    argv: list[str],
    overwrite: bool,
    accept_changes: bool,
    check: Callable[[Path], InputsT],
    notes: Callable[[InputsT], Sequence[str]],
    run: Callable[[InputsT, RunDir, LiveView, Continuation], dict[str, Any]],
) -> dict[str, Any]:
    """Claim the run directory, call `run`, and return its summary.

    For a finished run, the stored summary is returned at once.

    Args:
        config: configuration with absolute paths.
        check: checks and returns the inputs; gets a scratch folder.
        notes: returns notes about the inputs, which are printed for the user.
        run: the run itself; gets the inputs, with a newly made model moved into the run directory.
    """
    there = resume.standing(config, overwrite, accept_changes)
    if there is not None and there.finished:
        return RunDir.open(config.run_dir).read_summary()
    with tempfile.TemporaryDirectory(prefix="rlhf-cluster-") as scratch:
        inputs = check(Path(scratch))
        with connected(config) as address:
            preflight(demand(config), config.cluster.node_timeout_s)
            rundir, found = claimed(config, argv, overwrite, accept_changes)
            with rundir:
                if found.finished:
                    return rundir.read_summary()
                inputs = _move_in(inputs, config, rundir)
                facts = {"ray_address": address, "metrics": metrics_targets()}
                write_json(rundir.path / "control.json", facts)
                console = Console()
                for note in [*found.notes, *notes(inputs), *_waits_for(config)]:
                    console.print(note, markup=False, highlight=False, soft_wrap=True)
                live = config.observe.live and console.is_terminal
                with add_path_on_error(rundir.path / NAME), LiveView(console, live=live) as view:
                    return run(inputs, rundir, view, found)


def _waits_for(config: AnyConfig) -> list[str]:
    """Return a note if the run has to wait for resources of an existing cluster, else []."""
    if address_of(config) is None:
        return []
    found = judge_placement(
        demand(config),
        resources_by_node(),
        ray.available_resources(),
        config.cluster.node_timeout_s,
    )
    return [] if found.verdict == "ok" else [f"waiting: {found.value}. {found.cure}"]


def _move_in(inputs: InputsT, config: AnyConfig, rundir: RunDir) -> InputsT:
    """Copy a newly made model into the run directory, unless the run has one already."""
    if config.model.init is None:
        return inputs
    if not rundir.model.exists():
        _copy_whole(inputs.model_dir, rundir.model)
    return replace(inputs, model_dir=rundir.model)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder so that `target` only exists once the copy is complete.

    A partial copy that a crash has left is removed first.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    sync_tree(partial)
    partial.rename(target)
