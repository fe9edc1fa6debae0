"""Classification of errors: those of a learner rank, of a call for one group, of many groups.

Errors of a rank whose process is alive. "Retry" means that another attempt may succeed:

    raised in a rank                                         a resumed run          at its first setup
    StalledError: a deadline passed                          retry                  retry
    DistError and below (NCCL, store, network of ranks)      retry                  retry
    OutOfMemoryError, AcceleratorError (CUDA), MemoryError   retry                  retry
    OSError: network, host, file system                      retry                  final
    RuntimeError itself: gloo, CUDA and torch raise it       retry                  final
    NotImplementedError, RecursionError                      final                  final
    every other RlhfError (configuration, records, bound,
    divergence, damaged or other weights, full disk)         final                  final
    anything else (TypeError, ValueError, KeyError, ...)     final                  final

A "retry" error becomes a `RankFailed`: the learner and the buffer return to the newest checkpoint
(`run.restarts`). The restart budget ends a run that hits the same error repeatedly, with the first
cause. A "final" error is raised unchanged and ends the run. A step that hangs raises nothing here:
the process that waits for the rank has a deadline, and treats the rank as dead.

Errors of a call for one group, whether the worker raised the error or died:

    raised for one group                                     another worker tries   after the last try
    WorkerError, StalledError, WeightError                   yes                    a discard
    ScoringError: a reward failed                            yes                    a discard
    RecordError: log-probabilities that are NaN              yes                    a discard
    DataError: a request that the engine refuses             yes                    a discard
    RecordLost: a node died with the rollouts                sampled again          a discard
    PoolLost: no worker is left                              no                     the run ends
    CoreLost, RankFailed: learner or buffer                  no                     restart budget
    every other error (full disk, bound, configuration)      no                     the run ends

A bad sample is first attributed to the worker, since a broken device or engine produces such samples.
If other workers fail too, it is attributed to the group, which is discarded and counted by its reason.
`ErrorRate` ends the run when too many of the last groups failed.

Classes of torch are recognised by their names, so this module does not import torch.
"""

from __future__ import annotations

from collections import deque

from rlhf_cluster.errors import (
    CoreLost,
    DataError,
    PoolLost,
    RankFailed,
    RecordError,
    RecordLost,
    RlhfError,
    ScoringError,
    StalledError,
    WeightError,
    WorkerError,
)

_OF_TORCH = frozenset({"DistError", "OutOfMemoryError", "AcceleratorError"})

_COMES_AGAIN = (NotImplementedError, RecursionError)

MAX_TEXT = 1000
"""Characters of an error's text that a `RankFailed` keeps."""

_OF_A_GROUP = (WorkerError, ScoringError, RecordError, DataError)

_OF_A_CALL = (*_OF_A_GROUP, StalledError, WeightError)

_OF_NO_GROUP = (PoolLost, CoreLost, RankFailed)


def is_retryable(error: RlhfError) -> bool:
    """Whether another worker should try a group for which one worker raised `error`."""
    return isinstance(error, _OF_A_CALL) and not isinstance(error, (*_OF_NO_GROUP, RecordLost))


def is_group_failure(error: RlhfError) -> bool:
    """Whether `error`, raised after the last retry, costs one group instead of ending the run."""
    return isinstance(error, _OF_A_GROUP) and not isinstance(error, _OF_NO_GROUP)


def may_pass(error: Exception, starting: bool = False) -> bool:
    """Whether another attempt of a learner rank may succeed after `error`.

    `starting`: the error is of a rank's setup, where most errors are caused by the configuration or
    the data, so that fewer of them are retried.
    """
    if isinstance(error, RlhfError):
        return isinstance(error, StalledError | RankFailed)
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ in _OF_TORCH for kind in type(error).__mro__):
        return True
    if starting or isinstance(error, _COMES_AGAIN):
        return False
    return isinstance(error, RuntimeError | OSError)


def as_rank_failure(error: Exception, starting: bool = False) -> Exception:
    """Return `error`, or a `RankFailed` with its type and text if another attempt may succeed."""
    if isinstance(error, RankFailed) or not may_pass(error, starting):
        return error
    text = " ".join(str(error).split())
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."
    return RankFailed(f"{type(error).__name__}: {shown}" if shown else type(error).__name__)


WINDOW = 100
"""Number of last groups whose share of failures is checked."""

LEAST = 8
"""Number of groups below which no share of failures ends the run."""


class ErrorRate:
    """Success or failure of the last `WINDOW` groups, checked against `scoring.max_error_rate`."""

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def add(self, error: RlhfError | None) -> None:
        """Record the outcome of one group: `error` if it failed, None if it succeeded.

        Raises an error of the same type when more than `max_error_rate` of the last groups failed.
        """
        self._failed.append(error is not None)
        rate = sum(self._failed) / len(self._failed)
        if error is not None and len(self._failed) >= LEAST and rate > self._max_error_rate:
            raise type(error)(
                f"{rate:.0%} of the last {len(self._failed)} groups failed, more than "
                f"scoring.max_error_rate = {self._max_error_rate:g}. The last reason: {error}"
            )
