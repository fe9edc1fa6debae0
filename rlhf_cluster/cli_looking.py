"""Commands that look at runs and machines and change neither: report, trace, doctor.

A part of `rlhf_cluster.cli`, with the same promises.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_cluster.errors import RunError

RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run directories, or names below ./runs.")
]
LocalRunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, or a name below ./runs.")
]


def add_to(app: typer.Typer) -> None:
    for command in (report, trace, doctor):
        app.command()(command)


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Default: report.html in the run, or here for several."
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run that is over or going, or about several beside each other."""
    import time

    from rlhf_cluster.observe.report.page import page, write_page
    from rlhf_cluster.observe.report.reading import read_run
    from rlhf_cluster.rundir import find_run

    found = [find_run(run) for run in runs]
    path = out or (found[0].path if len(found) == 1 else Path()) / "report.html"
    write_page(path, page([read_run(run) for run in found], time.time()))
    typer.echo(path)


def trace(
    run_: LocalRunArgument,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="ID", help="A rollout, such as g00000012/3.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=1, help="All rollouts of a step.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE", help="Write the run as a trace for Perfetto."),
    ] = None,
) -> None:
    """Show what was recorded of a sample or a step, or write the run's timeline."""
    from rlhf_cluster.observe.timeline import write_timeline
    from rlhf_cluster.observe.tracing import trace_sample, trace_step
    from rlhf_cluster.rundir import find_run

    if sample is None and step is None and timeline is None:
        raise RunError("nothing to trace: give --sample ID, --step N or --timeline FILE")
    run = find_run(run_)
    if sample is not None:
        for line in trace_sample(run, sample).lines():
            typer.echo(line)
    if step is not None:
        for line in trace_step(run, step):
            typer.echo(line)
    if timeline is not None:
        number = write_timeline(run, timeline)
        typer.echo(f"{timeline}: {number} events. Open it at https://ui.perfetto.dev")


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A run file, for its folders.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of CONFIG."),
    ] = None,
) -> None:
    """Check this machine: software, processor, memory, disks, ports. Exit code 1: one is wrong."""
    from rlhf_cluster import doctor as checks

    if config is None:
        if set_:
            raise RunError("--set changes a setting of CONFIG: give a run file")
        facts = checks.look(Path("runs"))
    else:
        from rlhf_cluster.config import load_run
        from rlhf_cluster.planning.placement import demand

        loaded = load_run(config, set_ or ())
        gpus = sum(bundle.resources.get("GPU", 0.0) for bundle in demand(loaded))
        ports = (loaded.cluster.dashboard_port,) if loaded.cluster.dashboard else ()
        facts = checks.look(Path(loaded.run.root), loaded.weights_dir, gpus, ports)
    findings = checks.judge(facts)
    for line in checks.report(findings):
        typer.echo(line)
    wrong = [finding.name for finding in findings if finding.verdict == "wrong"]
    if wrong:
        raise RunError(f"{', '.join(wrong)}: not as a run needs it; the cures are above")
