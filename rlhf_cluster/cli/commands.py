"""The command line.

Promises: `--help` answers at once, since everything heavy is imported inside the commands; an error
that this project raises on purpose ends as "error: message" on standard error with exit code 1, a
wrong use of the command line with 2, an interrupt with 130; RLHF_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cluster import __version__
from rlhf_cluster.cli import config_command, init_command, inspect_commands
from rlhf_cluster.cli.inspect_commands import Deep, table, utc
from rlhf_cluster.cli.json_output import Refused, print_json
from rlhf_cluster.errors import RlhfError, RunError, SeveralProblems

if TYPE_CHECKING:
    from rlhf_cluster.config import RunConfig
    from rlhf_cluster.config.load import AnyConfig

STOP_TIMEOUT_S = 120.0

app = typer.Typer(
    name="rlhf-cluster",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlhf-cluster {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and end."
        ),
    ] = False,
) -> None:
    """Decoupled, distributed RLHF for language models."""


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file (TOML).")]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run directory, a name below ./runs, or with --address a job id or run name.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as run.steps=10."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, also for an error.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Ray dashboard, such as http://HOST:8265."),
]


@app.command()
def run(
    config: ConfigArgument,
    set_: SetOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run of this name left.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Continue a run with another configuration.")
    ] = False,
) -> None:
    """Run CONFIG to its end, on this machine or on the Ray cluster it names.

    A run that was interrupted continues from its last checkpoint.
    """
    options = {"--overwrite": overwrite, "--accept-changes": accept_changes}
    argv = ["rlhf-cluster", "run", str(config)]
    argv += [word for override in set_ or [] for word in ("--set", override)]
    argv += [option for option, given in options.items() if given]
    found = _load(config, set_)
    from rlhf_cluster.planning.local_models import with_local_model

    for loaded in [with_local_model(each) for each in found]:  # all of them before the first runs
        absolute, again = loaded.with_absolute_paths(), (overwrite, accept_changes)
        for line in _run(absolute, config, set_ or [], argv, len(found) == 1, *again):
            typer.echo(line)


def _run(
    loaded: AnyConfig,
    config: Path,
    overrides: Sequence[str],
    argv: list[str],
    alone: bool,
    overwrite: bool,
    accept_changes: bool,
) -> list[str]:
    """Run one run or stage of CONFIG. Return the lines to show at its end."""
    from rlhf_cluster.config import GenerateConfig, StageConfig
    from rlhf_cluster.run.checkpoint.resume import standing

    there = standing(loaded, overwrite, accept_changes)  # before anything slow
    if there is not None and there.finished:
        return there.notes
    from actors.drivers.driver import drive

    if isinstance(loaded, StageConfig):
        from actors.drivers.offline_driver import StageDriver
        from rlhf_cluster.cli.summaries import stage_ending

        summary = drive(StageDriver, loaded, argv, overwrite, accept_changes)
        return stage_ending(summary, _own_name(), Path.cwd())
    if isinstance(loaded, GenerateConfig):
        from actors.drivers.dataset_driver import DatasetDriver
        from rlhf_cluster.cli.summaries import generation_ending

        _check_engine(loaded.as_run)
        summary = drive(DatasetDriver, loaded, argv, overwrite, accept_changes)
        return generation_ending(summary, _own_name(), Path.cwd())
    _check_engine(loaded)
    from actors.drivers.rl_driver import RLDriver
    from rlhf_cluster.cli.summaries import ending

    summary = drive(RLDriver, loaded, argv, overwrite, accept_changes)
    return ending(summary, loaded, config, overrides, _own_name(), Path.cwd(), alone)


@app.command()
def validate(
    config: ConfigArgument, set_: SetOption = None, deep: Deep = False, json_: JsonOption = False
) -> None:
    """Check CONFIG, the files it names, tokenizer and data, and show the resulting numbers.

    All problems are reported at once.
    """
    loaded = _load(config, set_)
    from rlhf_cluster.cli.validate_command import check_all
    from rlhf_cluster.errors import several

    placement = None
    if deep:
        from actors.cluster.ray_cluster import placement
    found = check_all(loaded, _check_engine, placement)
    where = [f"{config}, {each.name}" if len(loaded) > 1 else str(config) for each in found]
    problems = [(at, text) for at, each in zip(where, found, strict=True) for text in each.problems]
    if json_:
        print_json(
            {
                "file": str(config),
                "runs": [each.to_json() for each in found],
                "problems": [text for _, text in problems],
            }
        )
        if problems:
            raise Refused
        return
    for at, each in zip(where, found, strict=True):
        for line in each.lines(at):
            typer.echo(line)
    if problems:
        texts = [f"{at}: {text}" if len(loaded) > 1 else text for at, text in problems]
        raise several(texts, str(config))


@app.command()
def plan(config: ConfigArgument, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Show what the run needs of a cluster: one line per bundle. Needs no cluster."""
    loaded = _load(config, set_)
    from rlhf_cluster.config import RunConfig
    from rlhf_cluster.planning.kept_updates import kept_lines
    from rlhf_cluster.planning.placement import demand, total_resources

    runs = []
    for each in loaded:
        bundles = demand(each)
        runs.append(
            {
                "run": each.run.name,
                "bundles": [{"owner": b.owner, "resources": dict(b.resources)} for b in bundles],
                "total": total_resources(bundles),
                "notes": list(kept_lines(each)) if isinstance(each, RunConfig) else [],
            }
        )
    if json_:
        print_json({"file": str(config), "runs": runs})
        return
    for planned in runs:
        if len(runs) > 1:
            typer.echo(f"{planned['run']}:")
        for bundle in planned["bundles"]:
            amounts = ", ".join(f"{n:g} {kind}" for kind, n in bundle["resources"].items())
            typer.echo(f"{bundle['owner']:<16} {amounts}")
        typer.echo(f"{'total':<16} {planned['total']} in {len(planned['bundles'])} bundles")
        for line in planned["notes"]:
            typer.echo(line)


@app.command()
def submit(
    config: ConfigArgument,
    address: Annotated[
        str, typer.Option("--address", metavar="URL", help="Ray dashboard, http://HOST:8265.")
    ],
    set_: SetOption = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", metavar="NAME", help="Name of the run (run.name).")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the job's output until it ends.")
    ] = False,
) -> None:
    """Start CONFIG as a job on a Ray cluster."""
    from actors.jobs import jobs
    from actors.jobs.dashboard_calls import Waiting

    waiting = Waiting(say=lambda line: typer.echo(line, err=True))
    job = jobs.submit(config, list(set_ or []), address, run_id, waiting=waiting)
    typer.echo(f"submitted job {job}")
    if follow:
        for line in jobs.follow(job, address):
            typer.echo(line)
        state = jobs.status(job, address)
        if state["state"] != "SUCCEEDED":
            raise RunError(f"job {job} ended: {state['state']}. {state['message'] or ''}".strip())


@app.command()
def status(
    run_: RunArgument,
    address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """Show where a run stands."""
    if address is not None:
        from actors.jobs import jobs

        rows = jobs.status(run_, address)
        log = rows.pop("log")
        if json_:
            print_json({"run": run_, **rows, "log": log})
            return
        times = {key: utc(rows.pop(f"{key}_s")) for key in ("started", "ended")}
        table({**rows, **times})
        for line in ["the end of its log:", *log] if log else []:
            typer.echo(f"  {line}")
        return
    from rlhf_cluster.run.run_directory import find_run

    found = find_run(run_)
    snapshot = found.read_status()
    if snapshot is None:
        state = "starting" if found.is_held() else "ended before it wrote a status"
        if json_:
            print_json({"run": found.path.name, "state": state})
        else:
            typer.echo(f"{run_}: {state}")
        return
    crashed = snapshot.is_active and not found.is_held()
    reached = found.read_summary() if snapshot.state == "finished" and found.has_summary else None
    if json_:
        print_json({**json.loads(snapshot.to_json()), "crashed": crashed, "summary": reached})
        return
    from rich.console import Console

    from rlhf_cluster.observe.report.live_view import render

    if reached is not None:
        from rlhf_cluster.cli.summaries import reached_rows

        typer.echo(f"{snapshot.run}: finished")
        table(reached_rows(snapshot, reached, Path.cwd()))
        return
    Console().print(render(snapshot))
    if crashed:
        typer.echo(f"its process is gone ({found.owner()}): the run has crashed", err=True)


@app.command()
def logs(
    run_: RunArgument,
    actor: Annotated[
        str | None, typer.Option("--actor", metavar="NAME", help="One process, generation-0.")
    ] = None,
    tail: Annotated[
        int | None, typer.Option("--tail", metavar="N", min=1, help="Only the last N lines.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Print the logs of a run, all processes by time or one of them."""
    if address is not None:
        from actors.jobs import jobs

        lines = jobs.logs(run_, address, tail, actor)
    else:
        from rlhf_cluster.cli.run_control import read_run_logs
        from rlhf_cluster.run.run_directory import find_run

        lines = read_run_logs(find_run(run_), actor, tail)
    for line in lines:
        typer.echo(line)


@app.command()
def inspect(
    run_: Annotated[
        str, typer.Argument(metavar="RUN", help="A run directory, or a name below ./runs.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="ID", help="Only groups of this prompt.")
    ] = None,
    version: Annotated[
        int | None, typer.Option("--version", metavar="V", help="With tokens of this version.")
    ] = None,
    min_reward: Annotated[
        float | None, typer.Option("--min-reward", metavar="X", help="Mean reward at least this.")
    ] = None,
    max_reward: Annotated[
        float | None, typer.Option("--max-reward", metavar="X", help="Mean reward at most this.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", help="Trained at this step.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N groups.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """List a run's groups: those on disk, verified, and its samples. Damaged files end in an error."""
    from rlhf_cluster.errors import StoreError
    from rlhf_cluster.observe.list_groups import GroupFilter, lines_of, list_groups
    from rlhf_cluster.planning.run_tokenizer import find_decoder
    from rlhf_cluster.run.run_directory import find_run

    wanted = GroupFilter(
        prompt=prompt, version=version, min_reward=min_reward, max_reward=max_reward, step=step
    )
    run = find_run(run_)
    decode, why = find_decoder(run.path, run.read_resolved())
    listing = list_groups(run.path, wanted, limit, decode)
    if why and any(row.response is None for row in listing.rows):
        typer.echo(why, err=True)
    if json_:
        groups = [dataclasses.asdict(row) for row in listing.rows]
        print_json({"run": run.path.name, "groups": groups, "problems": listing.damaged})
        if listing.damaged:
            raise Refused
        return
    for line in lines_of(listing.rows):
        typer.echo(line)
    if listing.damaged:
        raise StoreError("\n".join(["damaged files:", *listing.damaged]))


@app.command()
def stop(run_: RunArgument, address: AddressOption = None) -> None:
    """End a run, keeping what it has written."""
    if address is not None:
        from actors.jobs import jobs

        jobs.stop(run_, address)
    else:
        from rlhf_cluster.cli.run_control import stop_run
        from rlhf_cluster.run.run_directory import find_run

        stop_run(find_run(run_), STOP_TIMEOUT_S)
    typer.echo(f"{run_}: stopped")


@app.command()
def scale(
    run_: RunArgument,
    sizes: Annotated[
        list[str], typer.Argument(metavar="POOL=WORKERS...", help="Such as generation=3 scoring=2.")
    ],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Ray dashboard, http://HOST:8265, or cluster, HOST:6379; default: the run's own.",
        ),
    ] = None,
) -> None:
    """Change the number of workers of a running run's pools."""
    from rlhf_cluster.cli.run_control import parse_sizes
    from rlhf_cluster.run.run_directory import find_run

    wanted = parse_sizes(sizes)
    if address is not None and address.startswith(("http://", "https://")):
        from actors.jobs import jobs

        results = jobs.scale(run_, wanted, address)
    else:
        path = find_run(run_).path if address is None else Path(run_)
        from actors.services.control_actor import scale as scale_run

        results = scale_run(path, wanted, address)
    results = {pool: text.removeprefix(f"{pool}: ") for pool, text in results.items()}
    refused = {pool: text for pool, text in results.items() if text.startswith("refused")}
    table({pool: text for pool, text in results.items() if pool not in refused})
    if refused:
        raise RunError("; ".join(f"{run_}: {pool} {text}" for pool, text in refused.items()))


inspect_commands.add_to(app)
config_command.add_to(app)
init_command.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: this process's) and return the exit code."""
    from rlhf_cluster.util.provenance import check_actors

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_actors(importlib.util.find_spec("actors"))
        app(args=words, prog_name="rlhf-cluster")
    except Refused:
        return 1
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return 130
    # The last line of defence: whatever went wrong becomes one line, and a traceback on request.
    except Exception as error:
        if os.environ.get("RLHF_DEBUG") == "1":
            traceback.print_exc()
        if "--json" in words:
            print_json(_as_json(error))
        else:
            typer.echo(f"error: {explain(error)}", err=True)
        return 1
    return 0


def _as_json(error: Exception) -> dict[str, object]:
    """Return an error as the object that --json prints: its text, and each of several problems."""
    problems = error.problems if isinstance(error, SeveralProblems) else ()
    return {"error": explain(error), "problems": list(problems) or [explain(error)]}


def explain(error: Exception) -> str:
    """Return the text of an error for the user: its message and notes, one per line, no secrets."""
    from rlhf_cluster.util.provenance import redact_process_secrets

    return redact_process_secrets("\n".join([_message(error), *getattr(error, "__notes__", [])]))


def _message(error: Exception) -> str:
    if isinstance(error, RlhfError):
        return str(error)
    where = "" if os.environ.get("RLHF_DEBUG") == "1" else " (RLHF_DEBUG=1 shows where)"
    return f"unexpected {type(error).__name__}: {error}{where}"


def _load(config: Path, overrides: Sequence[str] | None) -> list[AnyConfig]:
    from rlhf_cluster.config.load import load_all

    return load_all(config, overrides or ())


def _check_engine(config: RunConfig) -> None:
    """Refuse now what every generation worker would refuse when it starts."""
    from actors.vllm.vllm_arguments import engine_arguments

    engine_arguments(config, model_dir="", worker_name="generation-0")


def _own_name() -> str:
    """Return the command that calls this program: as it was called, if the user can type that."""
    called = Path(sys.argv[0])
    found = called.name == "rlhf-cluster" and shutil.which("rlhf-cluster") != str(called.absolute())
    return sys.argv[0] if found else "rlhf-cluster"


if __name__ == "__main__":
    sys.exit(main())
