"""One scoring worker: a scorer behind plain methods that several threads may call at once.

If one pool serves everything, callers call `score`. If several pools do, callers call `score_part` of
a worker of each, and `join` of a worker of `[scoring]`. Only complete groups are stored, once.

This module does not import ray. Each method returns something small first and the record second. As
two return values of an actor, only the first has to be fetched by the control plane.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import SCORING
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.records import ExperienceGroup, GroupSummary, RolloutGroup, WeightVersion
from rlhf_cluster.scoring.score_parts import ScorePart
from rlhf_cluster.scoring.scorer import Scorer
from rlhf_cluster.util.deadlines import call_deadline


class ScoringWorker:
    """Worker that serves one scorer. Call `start` first; `close` when done."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        name: str,
        store: ExperienceStore | None = None,
        pool: str = SCORING,
    ) -> None:
        """Set up a worker of `pool`; `start` loads the models.

        `store` gets every scored group but held-out ones.
        """
        self._pool = pool
        self._config = config
        self._model_dir = model_dir
        self._name = name
        self._scorer: Scorer | None = None
        self._store = store
        self._reference_version = -1
        self._num_in_flight = 0
        self._counting = threading.Lock()  # held for an addition only

    def start(self) -> dict[str, float]:
        """Load models and rewards. Returns the seconds that it took.

        Raises `ConfigError`, `DataError`.
        """
        started = time.perf_counter()
        scorer = Scorer(self._config, self._model_dir, self._name, self._pool)
        scorer.setup()
        self._scorer = scorer
        return {"start_s": time.perf_counter() - started}

    def load_reference(self, version: WeightVersion) -> None:
        """Make `version` the reference.

        Raises `WeightError`, `StalledError`, and `WorkerError` as `Scorer.load_reference`.
        """
        # Groups that are being scored may use this reference or the one before.
        self._reference_version = version.version
        self._running_scorer().load_reference(version)

    def bring_version(self, version: WeightVersion) -> None:
        """Read the policy's `version` into memory for exact log-probabilities.

        Raises `WeightError`, and `StalledError` at the deadline of a pull; the read then continues.
        """
        with call_deadline(self._config.pull_deadline_s(version.num_bytes)):
            self._running_scorer().bring_version(version)

    def forget_versions(self) -> None:
        """Drop the policy's versions: other weights will be published with their numbers."""
        self._running_scorer().forget_versions()

    def score(self, group: RolloutGroup) -> tuple[GroupSummary, ExperienceGroup]:
        """Score one group and store it. Held-out groups get rewards only: nothing is trained on them.

        Raises `ScoringError`, `StalledError`, `WeightError`, `StoreError`, and `WorkerError` when the
        worker is not running.
        """
        with self._busy():
            return self._join_and_store(group, [self._part(group)])

    def score_part(self, group: RolloutGroup) -> tuple[int, ScorePart]:
        """Score the group with the rewards and models of this worker's pool.

        Returns the number of rollouts, and the part for `join`. Raises as `score`.
        """
        with self._busy():
            return len(group.rollouts), self._part(group)

    def join(self, group: RolloutGroup, *parts: ScorePart) -> tuple[GroupSummary, ExperienceGroup]:
        """Join the parts of all pools to the scored group, and store it. Raises as `score`."""
        with self._busy():
            return self._join_and_store(group, parts)

    def _part(self, group: RolloutGroup) -> ScorePart:
        part = self._running_scorer().part(group, with_logprobs=_is_trained(group))
        return replace(part, reference_version=self._reference_version)

    def _join_and_store(
        self, group: RolloutGroup, parts: Sequence[ScorePart]
    ) -> tuple[GroupSummary, ExperienceGroup]:
        is_trained = _is_trained(group)
        experience = self._running_scorer().join(group, parts, with_logprobs=is_trained)
        if self._store is not None and is_trained:
            self._store.write(experience, max(part.reference_version for part in parts))
        return experience.summary(), experience

    def health(self) -> dict[str, Any]:
        """Return the worker's name and load. Raises `WorkerError` when it cannot serve."""
        self._running_scorer()
        return {"worker": self._name, "num_in_flight": self._num_in_flight}

    def stats(self) -> dict[str, float]:
        """Return the scorer's totals, and the number of calls in progress."""
        return self._running_scorer().stats() | {"num_in_flight": float(self._num_in_flight)}

    def close(self) -> None:
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()

    def _running_scorer(self) -> Scorer:
        if self._scorer is None:
            raise WorkerError(f"{self._name}: not running; call start first")
        return self._scorer

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._add_in_flight(1)
        try:
            with call_deadline(self._config.scoring.request_timeout_s):
                yield
        finally:
            self._add_in_flight(-1)

    def _add_in_flight(self, change: int) -> None:
        with self._counting:
            self._num_in_flight += change


def _is_trained(group: RolloutGroup) -> bool:
    return group.ticket.purpose == "train"
