"""Every error that this project raises on purpose.

Each carries one message that names the value, the bound or expectation, and the fix.
All are built from a single string, so that they survive pickling between processes. Each also
inherits the matching standard type, so that `except ValueError` catches it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class RlhfError(Exception):
    """Base of all errors of this project."""


class ConfigError(RlhfError, ValueError):
    """A configuration that cannot run: unknown key, wrong type or impossible combination."""


class SeveralProblems(ConfigError):
    """Problems that do not depend on each other. The message has all of them."""

    problems: tuple[str, ...] = ()
    """Message of each problem."""


class Gathered:
    """Errors of checks that do not depend on each other, gathered to be raised together."""

    def __init__(self) -> None:
        self.errors: list[RlhfError] = []

    def attempt(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return the result of `call`, or None where it raised an `RlhfError`, which is kept."""
        try:
            return call(*args, **kwargs)
        except RlhfError as error:
            self.errors.append(error)
            return None

    def refuse(self) -> None:
        """Raise the only error as it is, several as one `SeveralProblems`, and nothing without one."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise several([text for error in self.errors for text in problems_of(error)])


def problems_of(error: RlhfError) -> tuple[str, ...]:
    """Return the messages of an error: each of several problems, or its own."""
    return error.problems if isinstance(error, SeveralProblems) else (str(error),)


def several(problems: list[str], source: str = "") -> SeveralProblems:
    """Return the error of `problems`, with a count and a line for each."""
    noun = "problem" if len(problems) == 1 else "problems"
    lines = "\n".join(f"  - {problem}" for problem in problems)
    error = SeveralProblems(f"{source}{': ' if source else ''}{len(problems)} {noun}\n{lines}")
    error.problems = tuple(problems)
    return error


class DataError(RlhfError, ValueError):
    """Prompts, preferences or a tokenizer that cannot be used as they are."""


class RecordError(RlhfError, ValueError):
    """A record with missing or invalid values, or with arrays that do not match each other."""


class PlacementError(RlhfError, RuntimeError):
    """A placement, such as an actor's CPUs and GPUs, that does not fit the cluster."""


class StalenessError(RlhfError, RuntimeError):
    """A token that is older than the staleness bound and reached the learner."""


class StalledError(RlhfError, TimeoutError):
    """A wait that passed its deadline. The message names what is missing."""


class WeightError(RlhfError, RuntimeError):
    """A weight version that is incomplete, damaged, or not the expected one."""


class FencedError(RlhfError, RuntimeError):
    """An attempt to publish by a learner or a run that another one has replaced."""


class CheckpointError(RlhfError, RuntimeError):
    """A checkpoint that cannot be written, is incomplete, or does not fit the run."""


class StorageError(CheckpointError):
    """An error of the storage itself. The files may be intact and are not treated as damaged."""


class StoreError(RlhfError, RuntimeError):
    """A finished group that cannot be written to disk, or is missing or damaged on disk."""


class WorkerError(RlhfError, RuntimeError):
    """A worker that died, hung, or answered with an error."""


class RecordLost(WorkerError):
    """A record that a call needs and whose only copy was on a node that died."""


class PoolLost(WorkerError):
    """A pool that has used up its restarts and has no worker left."""


class RankFailed(WorkerError):
    """A learner rank's error that another attempt may avoid (`failures`). Its process is alive."""


class CoreLost(WorkerError):
    """A dead learner rank or buffer. The run can resume from a checkpoint (`run.restarts`)."""

    process: str = ""
    """Name of the dead process, such as "learner-1"; "" when it is not a single one."""


class ScoringError(RlhfError, RuntimeError):
    """A reward that raised, hung, or returned no valid score. It is never replaced by a score of 0."""


class RunError(RlhfError, RuntimeError):
    """A run directory or control channel that cannot be used."""


class DivergenceError(RlhfError, ArithmeticError):
    """Training values that were not finite in several consecutive steps."""


class MetricError(RlhfError, ValueError):
    """A metric that is not in the table, or labels that do not fit it."""


def first_failure(failures: BaseExceptionGroup) -> BaseException:
    """Return the first `RlhfError` in a nested group of errors, or the first error if none is one."""
    leaves: list[BaseException] = []
    waiting: list[BaseException] = [failures]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseExceptionGroup):
            waiting[:0] = error.exceptions
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, RlhfError)), leaves[0])


class WorkerDied(WorkerError):
    """An actor whose process is dead or cannot be reached."""


class WorkerSilent(WorkerError):
    """An actor that did not answer within the deadline."""
