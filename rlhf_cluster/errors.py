"""Every error that this project raises on purpose.

Each carries one message that names what was found, the bound or expectation, and the cure.
All are built from a single string, so that they survive pickling between processes. Each also
inherits the standard type that fits, so that `except ValueError` keeps working.
"""


class RlhfError(Exception):
    """Base of all errors of this project."""


class ConfigError(RlhfError, ValueError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination."""


class DataError(RlhfError, ValueError):
    """Prompts, preferences or a tokenizer that cannot be used as given."""


class RecordError(RlhfError, ValueError):
    """A record whose arrays do not fit each other."""


class PlacementError(RlhfError, RuntimeError):
    """What was asked for does not fit the cluster."""


class StalenessError(RlhfError, RuntimeError):
    """A token older than `max_staleness` reached the learner."""


class StalledError(RlhfError, TimeoutError):
    """A wait ran past its deadline; the message names what is missing."""


class WeightError(RlhfError, RuntimeError):
    """A weight version that is incomplete, damaged, or not the one expected."""


class FencedError(RlhfError, RuntimeError):
    """A learner or a run that was given up wanted to publish: another one has taken over."""


class CheckpointError(RlhfError, RuntimeError):
    """A checkpoint that cannot be written, or is not whole, or does not fit the run."""


class StorageError(CheckpointError):
    """A storage answers with an error: what is there may be whole, and never counts as damaged."""


class StoreError(RlhfError, RuntimeError):
    """A finished group that cannot be written to disk, or is missing or damaged there."""


class WorkerError(RlhfError, RuntimeError):
    """A worker died, hung, or answered with an error."""


class RecordLost(WorkerError):
    """A record that a call needs is gone: the only copy was on a node that died."""


class PoolLost(WorkerError):
    """A pool has used up its restarts: nobody is left to do its work."""


class RankFailed(WorkerError):
    """A learner rank raised what another attempt may not meet (`failures`); its process lives."""


class CoreLost(WorkerError):
    """A learner rank or the buffer is gone: a run can go on from a checkpoint (`run.restarts`).

    `process` says who, such as "learner-1"; "" where it is no single one.
    """

    process: str = ""


class ScoringError(RlhfError, RuntimeError):
    """A reward that raised, hung, or returned something that is not a score. Never a score of 0."""


class RunError(RlhfError, RuntimeError):
    """The run directory or the run's control channel cannot be used."""


class DivergenceError(RlhfError, ArithmeticError):
    """Training numbers that are no longer finite, step after step."""


class MetricError(RlhfError, ValueError):
    """A metric that is not in the table, or labels that do not fit it."""


def first_failure(failures: BaseExceptionGroup) -> BaseException:
    """Of a group of failures the first that this project raised on purpose, else the first."""
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
    """The actor's process is gone or cannot be reached."""


class WorkerSilent(WorkerError):
    """The actor did not answer within the deadline."""
