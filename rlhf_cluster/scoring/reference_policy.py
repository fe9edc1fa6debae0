"""Frozen policies that rate every response token: the reference of a KL, and the teacher.

`Reference` computes log-probabilities for a KL to it. `scoring.moving_reference` decides which
weights it has and when it moves. They are read and verified concurrently with scoring, and copied
to the model between two groups. `Teacher` is loaded from a separate folder and never moves.

Promises, in addition to those of `FrozenPolicy`:
- A policy equal to the reference has KL 0, unless the reference is quantized. Then every version
  that it loads is rounded again from the stored one.
- A group is scored with one reference, also while the reference is replaced.
- A teacher whose tokenizer has other tokens than the policy's is refused before a group is scored.
  Its vocabulary may have more padding. The probability of a sampled token is then lower by the
  probability of the padding, which is about zero in a trained model.

Memory: the model, and a second host copy of the stored weights while the reference is replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.data.tokenizer import check_same_tokens
from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.records import Rollout, WeightVersion
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.sections.values import (
    Dtype,
    FrozenQuantization,
    HeadDtype,
)
from rlhf_cluster.weights.store import read
from rlhf_cluster.weights.transports.transport import Deadline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reference:
    """Reference of a KL. Several threads may call it; it serves `batch_groups` of them at once."""

    def __init__(
        self,
        model_dir: str,
        dtype: Dtype,
        device: str,
        tokens_per_batch: int,
        wait_timeout_s: float = 300.0,
        quantization: FrozenQuantization | None = None,
        batch_groups: int = 1,
        load_timeout_s: float = 600.0,
        head_dtype: HeadDtype = "float32",
    ) -> None:
        """Load the model of `model_dir`, the reference until `load`. Raises `ConfigError`."""
        self._load_timeout_s = load_timeout_s
        self._loading = threading.Lock()
        self._num_asked = 0
        self._model = FrozenPolicy(
            "reference",
            model_dir,
            dtype,
            device,
            tokens_per_batch,
            wait_timeout_s,
            quantization,
            head_dtype,
        )
        self._together = self._model.together(batch_groups)

    def load(self, version: WeightVersion) -> None:
        """Make the weights of `version` the reference.

        One load runs at a time. A load that hung in its storage while a later one was requested changes
        nothing when it continues.

        Waits for: the load before it, the storage and groups in progress, `load_timeout_s` in all.
        Raises `WeightError` when the weights are damaged, missing, not of this model or no longer
        requested, `StalledError` past the deadline; the reference is as before then.
        """
        what = f"the reference of version {version.version}"
        deadline = Deadline(f"loading {what}", self._load_timeout_s)
        self._num_asked += 1  # the last request wins, in whatever order two loads run
        asked = self._num_asked
        if not self._loading.acquire(timeout=deadline.left_s()):
            raise StalledError(
                f"{what} waited {self._load_timeout_s:g} s for the load before it, which hangs in its "
                "storage. Look at that disk, or raise run.start_timeout_s"
            )
        try:
            tensors = dict(read(version.path, expected_digest=version.digest, deadline=deadline))
            with self._model.held():
                if asked != self._num_asked:
                    raise WeightError(f"{what} is not loaded: another was asked for meanwhile")
                self._model.load(what, tensors)
        finally:
            self._loading.release()

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Return [T] float32 for each rollout, in nats.

        Raises:
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline.
        """
        self._model.check(rollouts)
        return self._together(rollouts)


class Teacher:
    """Teacher policy. Several threads may call it; it serves `scoring.batch_groups` at once."""

    def __init__(
        self,
        folder: str,
        scoring: Scoring,
        tokenizer: PreTrainedTokenizerBase,
        device: str,
        head_dtype: HeadDtype = "float32",
    ) -> None:
        """Load the model of `folder`. Raises `ConfigError`."""
        check_same_tokens("scoring.teacher", folder, tokenizer)
        self._model = FrozenPolicy(
            "teacher",
            folder,
            scoring.dtype,
            device,
            scoring.tokens_per_batch,
            scoring.request_timeout_s,
            scoring.quantization,
            head_dtype,
        )
        self._together = self._model.together(scoring.batch_groups)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Return [T] float32 for each rollout, in nats, at its temperature.

        Raises:
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline.
        """
        self._model.check(rollouts)
        return self._together(rollouts)
