"""Exact log-probabilities of sampled tokens: under the sampling version, with learner numerics.

    exact[t] = log p(token t | everything before it; weights of versions[t])

They are computed in the learner's compute type, with the learner's code, from the weights as they were
published: the same weights as the engine's, other numerics. A rollout may mix versions (an update came
in flight). Then the complete rollout is passed through the model once per version, and each token's
value is taken from the pass of its version.

    engine mismatch    |sampled - exact|      same weights, engine against learner numerics
    staleness effect   |proximal - exact|     same numerics, other weights

Versions that may be needed. A group that is scored was not trained yet, and will be, at a learner
version s of at least the present one L. With the staleness bound S, s <= v + S for every version v
that sampled a token of it, so v >= L - S. With `on_stale = "drop"` the group may be discarded instead.
But it was admitted at a learner version A with live versions of at least A - K (K = max_staleness)
and its turn comes at A + K at the latest, so v >= A - K >= L - 2 K. Nothing newer than L is
published, so v is among the newest S + 1 (2 K + 1) versions. The store keeps one more.

Cost:
- one additional pass for each version of a rollout;
- a model in the learner's type;
- on the host, the `cached_versions` sets of published weights that were used last, in addition to the
  one that is being read.

A change to a cached version is a copy in memory. Any other version is read from the store again, with
the versions that it builds on, and verified. A group's rollouts are batched by version, the one in the
model first.

A read may take longer than a call for a group may. So reads run in separate threads, one at a time,
and continue after such a call has timed out: a repeated call waits for the rest of the read. `bring`
starts the read before the groups need it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.records import Rollout, WeightVersion
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.util.waiting import remaining_s
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.shared_files import FileSource, version_dir

if TYPE_CHECKING:
    from torch import Tensor

_NAN = np.float32(np.nan)


class ExactLogprobs:
    """Exact log-probabilities from one model, whose weights are replaced version by version.

    Several threads may call it; they take turns for each version.
    """

    def __init__(
        self,
        model: FrozenPolicy,
        weights_dir: str | Path,
        cached_versions: int,
        wait_timeout_s: float = 300.0,
    ) -> None:
        """Hold no version yet.

        Args:
            model: built from the run's model folder.
            weights_dir: the policy's store.
            cached_versions: versions that are kept in host memory.
            wait_timeout_s: seconds to wait for a read, where the call has no deadline.
        """
        self._model = model
        self._weights_dir = Path(weights_dir)
        self._source = FileSource(weights_dir)
        self._cached_versions = cached_versions
        self._wait_timeout_s = wait_timeout_s
        self._cache: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        # reads in progress, or waiting for their turn
        self._reads: dict[int, Future[dict[str, Tensor]]] = {}
        self._digests: dict[int, str] = {}  # of the versions that `bring` was called with
        self._counting = threading.Lock()  # for the fields above; never held during a read
        self._one_read = threading.Lock()
        self._resident = -1
        self._epoch = 0  # how often versions were dropped
        self.num_reads = 0
        self.num_loads = 0

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Return [T] float32 for each rollout, in nats.

        Raises:
            WeightError: a version is missing in the store, damaged, or not of this model.
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline, or a version was not read by
                then. Its read continues.
        """
        self._model.check(rollouts)
        found = [np.full(len(r.response_ids), _NAN) for r in rollouts]
        wanted = {int(version) for r in rollouts for version in np.unique(r.versions)}
        # May change while other threads use the model: then the order costs a copy, nothing else.
        resident = self._resident
        for version in sorted(wanted, key=lambda v: (v != resident, v)):
            members = [i for i, r in enumerate(rollouts) if (r.versions == version).any()]
            tensors, epoch = None, self._epoch
            if version != self._resident:
                tensors = self._tensors(version, f"rollout {rollouts[members[0]].rollout_id}")
            with self._model.hold():
                self._use(version, tensors if epoch == self._epoch else None)
                values = self._model.compute([rollouts[i] for i in members])
            for i, own in zip(members, values, strict=True):
                sampled_by_it = rollouts[i].versions == version
                found[i][sampled_by_it] = own[sampled_by_it]
        return found

    def bring(self, version: WeightVersion) -> None:
        """Read `version` into host memory, before a group needs it.

        Weights that were read with its number and another digest are dropped. Waits for: the read.
        Raises `WeightError`, and `StalledError` as `logprobs`.
        """
        with self._counting:
            if self._digests.get(version.version, version.digest) != version.digest:
                self._forget_one(version.version)
            self._digests[version.version] = version.digest
            for old in sorted(self._digests)[: -max(64, self._cached_versions)]:
                del self._digests[old]
        self._tensors(version.version, "the groups to come")

    def forget(self) -> None:
        """Drop all weights that were read, because their numbers will be published again.

        Waits for: the pass of another thread through the model. Raises `StalledError` past the
        deadline.
        """
        with self._counting:
            self._epoch += 1
            self._reads.clear()
            self._cache.clear()
            self._digests.clear()
        with self._model.hold():
            self._resident = -1

    def _forget_one(self, version: int) -> None:
        self._epoch += 1
        self._reads.pop(version, None)
        self._cache.pop(version, None)
        if self._resident == version:
            self._resident = -1

    def _use(self, version: int, tensors: dict[str, Tensor] | None) -> None:
        """Load `version` into the model, which this thread holds.

        `tensors`: its weights. None: the model had the version before, or its weights were dropped
        since; then they are read if necessary.
        """
        if version == self._resident:
            return
        if tensors is None:
            tensors = self._tensors(version, "a group")
        self._resident = -1  # unless all tensors arrive
        self._model.replace(f"version {version}", tensors)
        self._resident = version
        self.num_loads += 1

    def _tensors(self, version: int, who: str) -> dict[str, Tensor]:
        """Return the weights of `version`: from the cache, a read in progress, or a new read.

        `who` names in errors the group or rollout that needs them. Waits for: the read. Raises
        `WeightError`, `StalledError`.
        """
        with self._counting:
            if version in self._cache:
                self._cache.move_to_end(version)
                return self._cache[version]
            read = self._reads.get(version)
            if read is None:
                read = self._reads[version] = Future()
                work = threading.Thread(
                    target=self._read_behind, args=(version, who, read), name="disk", daemon=True
                )
                work.start()
        wait_s = remaining_s(self._wait_timeout_s)
        try:
            return read.result(wait_s)
        except TimeoutError as error:
            if read.done():
                raise  # the read itself timed out, or ended just now: the next call has its result
            raise StalledError(
                f"version {version} was not read within {wait_s:.3g} s; the read continues. Where that "
                "is usual, give weights.root a faster storage, or raise scoring.request_timeout_s"
            ) from error

    def _read_behind(self, version: int, who: str, read: Future[dict[str, Tensor]]) -> None:
        try:
            with self._one_read:
                tensors = self._read(version, who)
        # An error of any kind is raised in the calls that wait for the read.
        except BaseException as error:
            with self._counting:
                if self._reads.get(version) is read:
                    del self._reads[version]
            read.set_exception(error)
            return
        with self._counting:
            if self._reads.get(version) is read:  # else the version was dropped meanwhile
                del self._reads[version]
                self._cache[version] = tensors
                while len(self._cache) > self._cached_versions:
                    self._cache.popitem(last=False)
        read.set_result(tensors)

    def _read(self, version: int, who: str) -> dict[str, Tensor]:
        self.num_reads += 1
        try:
            path = version_dir(self._weights_dir, version)
            return dict(store.read(path, source=self._source))
        except WeightError as error:
            if self._source.has(version):
                raise
            there = store.versions(self._weights_dir)
            raise WeightError(
                f"version {version}, which sampled tokens of {who}, is not in "
                f"{self._weights_dir}: versions there are {there}. The store keeps all that a "
                "group in flight can be of: this is a fault of the system, or of who deleted it"
            ) from error
