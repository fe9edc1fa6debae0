"""Commands that look at runs and machines and change neither: report, monitor, trace, doctor.

A part of `rlhf_cluster.cli`, with the same promises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cluster.errors import RunError

if TYPE_CHECKING:
    from rlhf_cluster.planning.doctor import Finding

Deep = Annotated[
    bool, typer.Option("--deep", help="Compare tokenizers too, estimate memory, look for a place.")
]
RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Run directories, or names below ./runs.")
]
LocalRunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run directory, or a name below ./runs.")
]


def add_to(app: typer.Typer) -> None:
    for command in (report, monitor, trace, doctor):
        app.command()(command)


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Default: report.html in the run, or here for several."
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve it on this machine instead, and refresh it.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="N", min=0, max=65535, help="With --live; default: any free."
        ),
    ] = 0,
) -> None:
    """Write one HTML page about a finished or running run, or a comparison of several runs."""
    import time

    from rlhf_cluster.observe.report.page import page, write_page
    from rlhf_cluster.observe.report.read_run import read_run
    from rlhf_cluster.run.run_directory import find_run

    found = [find_run(run) for run in runs]
    if live:
        if out is not None:
            raise RunError(
                "--out with --live: a live page is served, not written. Give one of them"
            )
        from rlhf_cluster.observe.report.serve import REFRESH_S, serve

        with serve(lambda: page([read_run(run) for run in found], time.time()), port) as address:
            typer.echo(f"{address}\nmade anew every {REFRESH_S} s, until Ctrl-C")
            _wait_for_interrupt(lambda: False)
        return
    if port:
        raise RunError("--port without --live: a page that is written needs none. Add --live")
    path = out or (found[0].path if len(found) == 1 else Path()) / "report.html"
    write_page(path, page([read_run(run) for run in found], time.time()))
    typer.echo(path)


def monitor(
    run_: LocalRunArgument,
    prometheus: Annotated[
        Path | None,
        typer.Option("--prometheus", metavar="PATH", help="Default: the one on the PATH."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="HOST:PORT", help="Default: the nodes of the run."),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=1, max=65535, help="Of Prometheus.")
    ] = 9090,
) -> None:
    """Start a Prometheus on this machine that scrapes RUN, until Ctrl-C."""
    from rlhf_cluster.observe import local_prometheus as monitoring
    from rlhf_cluster.run.run_directory import find_run

    run = find_run(run_)
    program = monitoring.find_prometheus(prometheus)
    targets = target or monitoring.targets_of(run.path)
    discovery = None if target else monitoring.find_discovery(targets)
    configuration = monitoring.write_configuration(run.path / "monitor", targets, discovery)
    with monitoring.monitoring(program, configuration, port) as (address, process):
        typer.echo(f"{address}  scrapes {discovery or ', '.join(targets)}, until Ctrl-C")
        typer.echo(f"{address}/alerts  the alerts; docs/runbook.md says what to do")
        typer.echo(monitoring.GRAFANA)
        _wait_for_interrupt(lambda: process.poll() is not None)
        if process.poll() is not None:
            log = configuration.parent / "prometheus.log"
            raise RunError(f"{program} ended by itself, with code {process.returncode}: see {log}")


def trace(
    run_: LocalRunArgument,
    sample: Annotated[
        str | None,
        typer.Option("--sample", metavar="ID", help="GROUP/NUMBER, of a group that inspect lists."),
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=1, help="All rollouts of a step.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="N|N:M", help="With --sample: these tokens of it alone."),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="FILE", help="Write the run as a trace for Perfetto."),
    ] = None,
) -> None:
    """Show what was recorded of a sample or a step, or write the run's timeline."""
    from rlhf_cluster.observe.timeline import write_timeline
    from rlhf_cluster.observe.trace_rollout import parse_places, trace_sample, trace_step
    from rlhf_cluster.planning.run_tokenizer import find_decoder
    from rlhf_cluster.run.run_directory import find_run

    if sample is None and step is None and timeline is None:
        raise RunError("nothing to trace: give --sample ID, --step N or --timeline FILE")
    if token is not None and sample is None:
        raise RunError("--token without --sample: of which rollout? Give --sample ID")
    run = find_run(run_)
    decode, why = (
        (None, "")
        if sample is None and step is None
        else find_decoder(run.path, run.read_resolved())
    )
    if why:
        typer.echo(why, err=True)
    if sample is not None:
        places = None if token is None else parse_places(token)
        for line in trace_sample(run, sample, decode).lines(places):
            typer.echo(line)
    if step is not None:
        for line in trace_step(run, step, decode):
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
    stress: Annotated[
        bool, typer.Option("--stress", help="Also load each GPU with products and copies.")
    ] = False,
) -> None:
    """Check software, processor, GPUs, memory, disks, ports of this machine. Exit 1: one is wrong."""
    from rlhf_cluster.planning import doctor as checks
    from rlhf_cluster.planning import gpu_health, gpu_stress

    devices = [f"cuda:{index}" for index in range(gpu_stress.count_gpus())] if stress else []
    if stress and not devices:
        raise RunError(gpu_stress.NO_GPU)
    if config is None:
        if set_:
            raise RunError("--set changes a setting of CONFIG: give a run file")
        facts, kept = checks.look(Path("runs")), ()
    else:
        from rlhf_cluster.config import RunConfig
        from rlhf_cluster.config.load import load_all
        from rlhf_cluster.planning.kept_updates import kept_lines
        from rlhf_cluster.planning.placement import demand

        loaded = load_all(config, set_ or ())  # they run one after the other, in one folder
        gpus = max(sum(b.resources.get("GPU", 0.0) for b in demand(each)) for each in loaded)
        ports = tuple({c.cluster.dashboard_port for c in loaded if c.cluster.dashboard})
        publisher = next((c for c in loaded if isinstance(c, RunConfig)), loaded[0])
        facts = checks.look(Path(loaded[0].run.root), publisher.weights_dir, gpus, ports)
        kept = kept_lines(publisher) if isinstance(publisher, RunConfig) else ()
    nvml = gpu_health.load_nvml()
    findings = checks.judge(facts)
    findings += gpu_health.check_gpus(nvml, len(facts.gpus), facts.gpus_wanted)
    findings += gpu_stress.stress_gpus(devices)
    for line in (*checks.report(findings), *kept):
        typer.echo(line)
    _refuse_wrong(findings)


def _wait_for_interrupt(is_over: Callable[[], bool]) -> None:
    """Wait for Ctrl-C, SIGTERM, or until `is_over` returns True."""
    import signal
    import threading

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(0.5) and not is_over():
        pass


def _refuse_wrong(findings: Sequence[Finding]) -> None:
    wrong = [finding.name for finding in findings if finding.is_wrong]
    if wrong:
        raise RunError(f"{', '.join(wrong)}: not as a run needs it; what to do is above")


def utc(time_s: float | None) -> str | None:
    if time_s is None:
        return None
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def table(rows: Mapping[str, object]) -> None:
    width = max((len(key) for key in rows), default=0)
    for key, value in rows.items():
        typer.echo(f"  {key:<{width}}  {'-' if value is None else value}")
