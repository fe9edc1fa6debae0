"""Exact log-probabilities: of each token, under the version that sampled it, by learner numerics.

    exact[t] = log p(token t | everything before it; weights of versions[t])

in the learner's compute type, with the learner's code, from the weights as they were published: the
same weights as the engine's, other numerics. A rollout may mix versions (an update came in flight):
then the whole rollout goes through one pass for each of its versions, and each token's value is
taken from the pass of its own.

    engine mismatch    |sampled - exact|      same weights, engine against learner numerics
    staleness effect   |proximal - exact|     same numerics, other weights

Which versions are asked for. A group that is scored was not trained yet, and will be, at a learner
version s of at least the present one L. With the staleness bound S, s <= v + S for every version v
that sampled a token of it, so v >= L - S. With `on_stale = "drop"` it may be discarded instead;
but it was admitted at a learner version A with live versions of at least A - K (K = max_staleness)
and its turn comes at A + K at the latest, so v >= A - K >= L - 2 K. Nothing newer than L is
published, so v is among the newest S + 1 (2 K + 1) versions. The store keeps one more.

Cost: one pass more for each version of a rollout; a model in the learner's type; and on the host
`cached_versions` sets of published weights, those used last, beside the one that is being read. A
change to a version among them is a copy in memory; any other is read from the store again, with the
versions that it builds on, and verified. A group's rollouts are batched by version, the one in the
model first.

A read may take longer than a group may: it goes on in a thread of its own, one at a time, and who comes
again finds it further on, or done. `bring` is that read ahead of the groups.
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
from rlhf_cluster.util.deadlines import left_of_call
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.shared_files import (
    FileSource,
    version_dir,
)
from rlhf_cluster.weights.transports.transport import ShardSource

if TYPE_CHECKING:
    from torch import Tensor

_NAN = np.float32(np.nan)


class ExactLogprobs:
    """Several threads may call it; they take turns, version by version."""

    def __init__(
        self,
        model: FrozenPolicy,
        weights_dir: str | Path,
        cached_versions: int,
        source: ShardSource | None = None,
        wait_timeout_s: float = 300.0,
    ) -> None:
        """`model` is built from the run's model folder; `weights_dir` is the policy's store, whose
        versions are read from `source`, or else from their files. `wait_timeout_s`: for a read, where
        the call has no deadline of its own."""
        self._model = model
        self._weights_dir = Path(weights_dir)
        self._source = source or FileSource(weights_dir)
        self._cached_versions = cached_versions
        self._wait_timeout_s = wait_timeout_s
        self._cache: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._reads: dict[
            int, Future[dict[str, Tensor]]
        ] = {}  # under way, or waiting for their turn
        self._digests: dict[int, str] = {}  # of what was brought
        self._counting = threading.Lock()  # of these; held for no read
        self._one_read = threading.Lock()
        self._resident = -1
        self._epoch = 0  # how often something was forgotten
        self.num_reads = 0
        self.num_loads = 0

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """[T] float32 for each rollout, in nats.

        Raises:
            WeightError: a version is gone from the store, damaged, or not of this model.
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline, or a version was not read by
                then. Its read goes on.
        """
        self._model.check(rollouts)
        found = [np.full(len(r.response_ids), _NAN) for r in rollouts]
        wanted = {int(version) for r in rollouts for version in np.unique(r.versions)}
        resident = self._resident  # may change while others use the model; then this costs a copy
        for version in sorted(wanted, key=lambda v: (v != resident, v)):
            members = [i for i, r in enumerate(rollouts) if (r.versions == version).any()]
            tensors, epoch = None, self._epoch
            if version != self._resident:
                tensors = self._tensors(version, f"rollout {rollouts[members[0]].rollout_id}")
            with self._model.held():
                self._use(version, tensors if epoch == self._epoch else None)
                values = self._model.logprobs([rollouts[i] for i in members])
            for i, own in zip(members, values, strict=True):
                sampled_by_it = rollouts[i].versions == version
                found[i][sampled_by_it] = own[sampled_by_it]
        return found

    def bring(self, version: WeightVersion) -> None:
        """Have `version` in host memory, before a group needs it. What was read under its number with
        another digest is forgotten.

        Waits for: its read. Raises `WeightError`, and `StalledError` as `logprobs`.
        """
        with self._counting:
            if self._digests.get(version.version, version.digest) != version.digest:
                self._forget_one(version.version)
            self._digests[version.version] = version.digest
            for old in sorted(self._digests)[: -max(64, self._cached_versions)]:
                del self._digests[old]
        self._tensors(version.version, "the groups to come")

    def forget(self) -> None:
        """Versions are published anew: nothing that was read stands for its number any more.

        Waits for: the version that another thread is at. Raises `StalledError` past the deadline.
        """
        with self._counting:
            self._epoch += 1
            self._reads.clear()
            self._cache.clear()
            self._digests.clear()
        with self._model.held():
            self._resident = -1

    def _forget_one(self, version: int) -> None:
        self._epoch += 1
        self._reads.pop(version, None)
        self._cache.pop(version, None)
        if self._resident == version:
            self._resident = -1

    def _use(self, version: int, tensors: dict[str, Tensor] | None) -> None:
        """Bring `version` into the model, which this thread holds. Without `tensors` it was there,
        or what was read is forgotten."""
        if version == self._resident:
            return
        if tensors is None:
            tensors = self._tensors(version, "a group")
        self._resident = -1  # unless all tensors arrive
        self._model.load(f"version {version}", tensors)
        self._resident = version
        self.num_loads += 1

    def _tensors(self, version: int, who: str) -> dict[str, Tensor]:
        """From the cache, or from the read that is under way, or that begins now, for `who`."""
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
        wait_s = left_of_call(self._wait_timeout_s)
        try:
            return read.result(wait_s)
        except TimeoutError as error:
            if read.done():
                raise  # the storage's own, or it came just now: the next call has it
            raise StalledError(
                f"version {version} was not read within {wait_s:.3g} s; the read goes on. Where that "
                "is usual, give weights.root a faster storage, or raise scoring.request_timeout_s"
            ) from error

    def _read_behind(self, version: int, who: str, read: Future[dict[str, Tensor]]) -> None:
        try:
            with self._one_read:
                tensors = self._read(version, who)
        # Whatever it is, those who wait raise it.
        except BaseException as error:
            with self._counting:
                if self._reads.get(version) is read:
                    del self._reads[version]
            read.set_exception(error)
            return
        with self._counting:
            if self._reads.get(version) is read:  # else it was forgotten meanwhile
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
