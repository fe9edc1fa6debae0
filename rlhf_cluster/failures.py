"""Consequences of an error in a learner rank, in a call for one group, and in many groups.

Errors of a rank whose process lives. "Retry" means that another attempt may succeed:

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

Errors of a call for one group, which a worker raised or died of:

    raised for one group                                     another worker tries   after the last try
    WorkerError, StalledError, WeightError                   yes                    a discard
    ScoringError: a reward failed                            yes                    a discard
    RecordError: log-probabilities that are NaN              yes                    a discard
    DataError: a request that the engine refuses             yes                    a discard
    RecordLost: a node died with the rollouts                sampled again          a discard
    PoolLost: no worker is left                              no                     the run ends
    CoreLost, RankFailed: learner or buffer                  no                     restart budget
    every other error (full disk, bound, configuration)      no                     the run ends

A bad sample is blamed on the worker first, since a broken device or engine makes such samples, and
then on the group: one discard, counted with its reason. `Outcomes` ends the run when too many of
the last groups failed.

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

_OF_A_GROUP = (WorkerError, ScoringError, RecordError, DataError)

_OF_A_CALL = (*_OF_A_GROUP, StalledError, WeightError)

_OF_NO_GROUP = (PoolLost, CoreLost, RankFailed)


def may_pass_elsewhere(error: RlhfError) -> bool:
    """Whether another worker is asked, after one raised `error` for a group."""
    return isinstance(error, _OF_A_CALL) and not isinstance(error, (*_OF_NO_GROUP, RecordLost))


def costs_one_group(error: RlhfError) -> bool:
    """Whether `error`, which outlived its retries, discards a group and lets the run go on."""
    return isinstance(error, _OF_A_GROUP) and not isinstance(error, _OF_NO_GROUP)


def may_pass(error: Exception, starting: bool = False) -> bool:
    """Whether another attempt may not meet `error`. `starting`: it is of a rank's setup, where most
    errors are of what it was given."""
    if isinstance(error, RlhfError):
        return isinstance(error, StalledError | RankFailed)
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ in _OF_TORCH for kind in type(error).__mro__):
        return True
    if starting or isinstance(error, _COMES_AGAIN):
        return False
    return isinstance(error, RuntimeError | OSError)


def judged(error: Exception, starting: bool = False) -> Exception:
    """`error` itself, or the `RankFailed` that stands for one which may pass."""
    if isinstance(error, RankFailed) or not may_pass(error, starting):
        return error
    text = " ".join(str(error).split())
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."
    return RankFailed(f"{type(error).__name__}: {shown}" if shown else type(error).__name__)


WINDOW = 100

LEAST = 8
"""Groups before which no share of failures ends the run."""


class Outcomes:
    """The last `WINDOW` groups. `max_error_rate` is the run's `scoring.max_error_rate`."""

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def add(self, error: RlhfError | None) -> None:
        """One more group; `error` is what it failed with. Raises an error of its kind when more than
        `max_error_rate` of the last groups failed."""
        self._failed.append(error is not None)
        rate = sum(self._failed) / len(self._failed)
        if error is not None and len(self._failed) >= LEAST and rate > self._max_error_rate:
            raise type(error)(
                f"{rate:.0%} of the last {len(self._failed)} groups failed, over "
                f"scoring.max_error_rate = {self._max_error_rate:g}. The last reason: {error}"
            )
