"""The way from a configuration to a claimed run directory, the same for a run and a stage.

    check inputs -> Ray -> preflight -> run directory -> live view -> the run itself

Promises: what is wrong with the input is said before anything starts; a run that has finished is not
touched; whatever comes, the directory and the cluster are given back.
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
    """What `run` returns, or the summary of a run that has finished.

    `config` has absolute paths. `check` gets a scratch folder and returns the inputs, of which `notes`
    tells what a person should know; `run` gets them with a made model moved into the run directory.
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
    """What the run has to wait for on a cluster that it is given, if anything."""
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
    """A made model belongs to its run. One that is there from before is kept."""
    if config.model.init is None:
        return inputs
    if not rundir.model.exists():
        _copy_whole(inputs.model_dir, rundir.model)
    return replace(inputs, model_dir=rundir.model)


def _copy_whole(source: Path, target: Path) -> None:
    """Under its name the copy is whole: what a crash has left of one is removed before."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    sync_tree(partial)
    partial.rename(target)
