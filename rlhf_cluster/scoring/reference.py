"""The frozen reference model: log-probabilities of response tokens under the starting policy.

Promises: the distribution is the one of the rollout's temperature; the model goes through the same
code as the learner's (`PolicyLM`, `packing`), so that a policy equal to the reference has KL 0; one
entry comes back for every response token, in the order of the rollouts.

Shapes: T response tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from rlhf_cluster.config.sections import Dtype
from rlhf_cluster.errors import ScoringError, StalledError
from rlhf_cluster.learning.packing import MicroBatch, TokenSequence, collate, plan
from rlhf_cluster.learning.policy import load_policy
from rlhf_cluster.records import Rollout

Array = np.ndarray


class Reference:
    """Serves one thread at a time."""

    def __init__(
        self,
        model_dir: str,
        dtype: Dtype,
        device: str,
        tokens_per_batch: int,
        wait_timeout_s: float = 300.0,
    ) -> None:
        """Loads the model. Raises `ConfigError`."""
        self._policy = load_policy(model_dir, getattr(torch, dtype), device, trainable=False)
        self._device = device
        self._tokens_per_batch = tokens_per_batch
        self._wait_timeout_s = wait_timeout_s
        self._lock = threading.Lock()

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Array]:
        """[T] float32 for each rollout, in nats.

        Raises:
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline.
        """
        for rollout in rollouts:
            self._check(rollout)
        # Waits for: other groups' passes.
        if not self._lock.acquire(timeout=self._wait_timeout_s):
            raise StalledError(
                f"the reference model was busy for {self._wait_timeout_s:g} s; add scoring workers"
            )
        try:
            by_temperature = sorted(range(len(rollouts)), key=lambda i: rollouts[i].temperature)
            found: dict[int, Array] = {}
            for temperature, group in groupby(by_temperature, lambda i: rollouts[i].temperature):
                indices = list(group)
                values = self._forward([rollouts[i] for i in indices], temperature)
                found.update(zip(indices, values, strict=True))
            return [found[i] for i in range(len(rollouts))]
        finally:
            self._lock.release()

    def _check(self, rollout: Rollout) -> None:
        if not rollout.temperature > 0:
            raise ScoringError(
                f"rollout {rollout.rollout_id} was sampled at temperature {rollout.temperature:g}: "
                "greedy sampling has no distribution to compare with. Score it without a reference"
            )
        num_inputs = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
        if num_inputs > self._tokens_per_batch:
            raise ScoringError(
                f"rollout {rollout.rollout_id} has {num_inputs} positions, over "
                f"scoring.tokens_per_batch = {self._tokens_per_batch}. Raise it"
            )

    def _forward(self, rollouts: Sequence[Rollout], temperature: float) -> list[Array]:
        sequences = [
            TokenSequence(prompt_ids=r.prompt_ids, target_ids=r.response_ids) for r in rollouts
        ]
        lengths = [sequence.num_inputs for sequence in sequences]
        budget = self._tokens_per_batch
        found: dict[int, Array] = {}
        for planned in plan(lengths, 1, budget, budget, "padded")[0]:
            batch = collate(planned, sequences)
            values = self._scores(batch, temperature)
            for span in batch.spans:
                found[span.sequence] = values[span.row, span.start : span.stop].copy()
        return [found[i] for i in range(len(rollouts))]

    @torch.inference_mode()
    def _scores(self, batch: MicroBatch, temperature: float) -> Array:
        logprobs, _ = self._policy(
            *(
                torch.from_numpy(array).to(self._device)
                for array in (batch.input_ids, batch.position_ids, batch.labels)
            ),
            temperature=temperature,
        )
        return logprobs.float().cpu().numpy()
