"""One scoring worker: a scorer behind plain methods that several threads may call at once.

No ray here. `score` returns the small summary first and the record second, so that as two return
values only the first has to be fetched by the control plane.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.experience.store import ExperienceStore
from rlhf_cluster.records import ExperienceGroup, GroupSummary, RolloutGroup, WeightVersion
from rlhf_cluster.scoring.scorer import Scorer
from rlhf_cluster.weights.transport import ShardSource


class ScoringWorker:
    """Call `start` first; `close` when done."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        name: str,
        source: ShardSource | None = None,
        store: ExperienceStore | None = None,
    ) -> None:
        """`source` is where the policy's versions are read from; default: their files. `store`
        gets every scored group but held-out ones."""
        self._config = config
        self._source = source
        self._model_dir = model_dir
        self._name = name
        self._scorer: Scorer | None = None
        self._store = store
        self._reference_version = -1
        self._num_in_flight = 0
        self._counting = threading.Lock()  # held for an addition only

    def start(self) -> dict[str, float]:
        """Load models and rewards; returns how long it took. Raises `ConfigError`, `DataError`."""
        started = time.perf_counter()
        scorer = Scorer(self._config, self._model_dir, self._name, self._source)
        scorer.setup()
        self._scorer = scorer
        return {"start_s": time.perf_counter() - started}

    def load_reference(self, version: WeightVersion) -> None:
        """Raises `WeightError`, `StalledError`, and `WorkerError` as `Scorer.load_reference`."""
        self._reference_version = version.version  # groups under way may have it or the one before
        self._running_scorer().load_reference(version)

    def forget_versions(self) -> None:
        """Other weights than before will have the numbers of the policy's versions."""
        self._running_scorer().forget_versions()

    def score(self, group: RolloutGroup) -> tuple[GroupSummary, ExperienceGroup]:
        """Score one group and store it. Held-out groups get rewards only: nothing is trained on them.

        Raises `ScoringError`, `StalledError`, `WeightError`, `StoreError`, and `WorkerError` when the
        worker is not running.
        """
        scorer = self._running_scorer()
        self._add_in_flight(1)
        try:
            is_trained = group.ticket.purpose == "train"
            experience = scorer.score(group, with_logprobs=is_trained)
            if self._store is not None and is_trained:
                self._store.write(experience, self._reference_version)
        finally:
            self._add_in_flight(-1)
        return experience.summary(), experience

    def health(self) -> dict[str, Any]:
        """Raises `WorkerError` when this worker cannot serve."""
        self._running_scorer()
        return {"worker": self._name, "num_in_flight": self._num_in_flight}

    def stats(self) -> dict[str, float]:
        """The scorer's totals."""
        return self._running_scorer().stats() | {"num_in_flight": float(self._num_in_flight)}

    def close(self) -> None:
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()

    def _running_scorer(self) -> Scorer:
        if self._scorer is None:
            raise WorkerError(f"{self._name}: not running; call start first")
        return self._scorer

    def _add_in_flight(self, change: int) -> None:
        with self._counting:
            self._num_in_flight += change
