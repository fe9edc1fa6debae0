"""The command `init`: write a first run file by three answers, or by flags."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_cluster.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from rlhf_cluster.planning.new_run_file import Answers

Ask = Callable[[str, str], str]
"""Asks a question with its default, and returns the answer."""
Given = Mapping[str, str | None]
"""Answers of flags by name: data, reward, model. None for those to ask."""


def add_to(app: typer.Typer) -> None:
    app.command()(init)


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The run file to write.")] = Path(
        "run.toml"
    ),
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FILE|TASK", help="A .jsonl or .parquet, or sort_digits."),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            metavar="REWARD",
            help="exact, maths, MODULE:FUNCTION, or the folder of a reward model.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="A folder, OWNER/NAME on the Hub, or small (made)."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Steps of training.")
    ] = 100,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing: sort_digits, exact, small unless given.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
) -> None:
    """Write a first run file by three answers: data, reward, model. Off a terminal, by flags."""
    given = {"data": data, "reward": reward, "model": model}
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    ask: Ask | None = (lambda question, default: default) if yes else None
    if ask is None and on_terminal:
        ask = _prompt
    cores = len(os.sched_getaffinity(0))
    write_run_file(file, given, steps, force, ask, not yes and on_terminal, cores)


def write_run_file(
    file: Path,
    given: Given,
    steps: int,
    force: bool,
    ask: Ask | None,
    again: bool,
    cores: int,
) -> None:
    """Gather the answers and write `file`.

    Args:
        given: what flags gave.
        ask: asks the user for the others; None without a terminal.
        again: ask again after an answer that cannot be used.
        cores: cores of this machine.

    Raises `RunError` where `file` exists without `force`, cannot be written, or flags are missing,
    and `ConfigError` or `DataError` for an answer that cannot be used.
    """
    if file.exists() and not force:
        raise RunError(f"{file} exists already. Give another name, or --force to overwrite it")
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and ask is None:
        raise RunError(
            f"no terminal to ask on, and {', '.join(missing)} not given. Give "
            f"{'it' if len(missing) == 1 else 'them'}, or --yes for the defaults"
        )
    from rlhf_cluster.planning.new_run_file import run_file_text

    text = run_file_text(_gather(file, given, steps, ask, again, cores))
    try:
        with file.open("w" if force else "x") as out:
            out.write(text)
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error}). Give another place") from error
    typer.echo(f"wrote {file}. Check it: rlhf-cluster validate {file}")
    typer.echo(f"then start it: rlhf-cluster run {file}")


def _gather(
    file: Path, given: Given, steps: int, ask: Ask | None, again: bool, cores: int
) -> Answers:
    """Return the checked answers of flags and user, and print the columns."""
    from rlhf_cluster.planning import new_run_file as new

    tasks, rules = ", ".join(new.TASKS), ", ".join(new.RULES)
    question = f"Data: a .jsonl or .parquet file, or {tasks}"
    data = _answer(given["data"], question, new.TASKS[0], new.look_at, ask, again)
    columns = new.look_at(data)
    if columns is not None:
        typer.echo(f"{data}: {columns.choice}")
    question = f"Reward: {rules}, MODULE:FUNCTION of yours, or the folder of a reward model"
    check = functools.partial(new.check_reward, columns=columns)
    reward = _answer(given["reward"], question, new.RULES[0], check, ask, again)
    question = f"Model: a folder, OWNER/NAME on the Hugging Face Hub, or {new.SMALL} (made here)"
    model = _answer(given["model"], question, new.SMALL, new.check_model, ask, again)
    return new.Answers(
        name=new.run_name(file),
        data=data,
        reward=reward,
        model=model,
        columns=columns,
        steps=steps,
        has_template=new.has_template(model),
        few_cores=cores < new.LOGICAL_CPUS,
    )


def _answer(
    given: str | None,
    question: str,
    default: str,
    check: Callable[[str], object],
    ask: Ask | None,
    again: bool,
) -> str:
    """Return what a flag gave, or the first answer that `check` lets pass."""
    while True:
        found = (ask(question, default) if given is None and ask else given or "").strip()
        try:
            check(found)
            return found
        except (ConfigError, DataError) as error:
            if given is not None or not again:
                raise
            typer.echo("\n".join([str(error), *getattr(error, "__notes__", [])]), err=True)


def _prompt(question: str, default: str) -> str:
    return str(typer.prompt(question, default=default))
