"""A policy that is not trained: log-probabilities of response tokens under its present weights.

The reference of a KL and the teacher have the weights of a folder. `load` replaces them by a
version's, read and verified concurrently with scoring and copied to the model between two groups.
`scoring.exact_logprobs` replaces them for each version that sampled a token.

Promises:
- The distribution is the one of the rollout's temperature.
- The model runs the same code as the learner's (`PolicyLM`, `packing`), so that with the same weights
  and type both compute the same values.
- One entry is returned for every response token, in the order of the rollouts.
- Weights are replaced by name, all of them or none. A tensor that is missing, extra or of another
  shape is refused before any is replaced.
- A group is scored with one set of weights, also while they are replaced.
- A policy with the same weights has KL 0 to it, unless it is quantized.
- With `quantization`, the linear layers hold the weights, in the model's type, rounded to 8 bits
  (`models.int8_linear`). Weights that are loaded later are rounded too. The values are then near the
  learner's, but not equal.

Memory: the model, and a second host copy of the stored weights while a version is loaded.

Shapes: T response tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rlhf_cluster.data.packing import MicroBatch, TokenSequence, collate, plan
from rlhf_cluster.errors import ScoringError, StalledError, WeightError
from rlhf_cluster.models.int8_linear import Linear8bit, quantize_linear
from rlhf_cluster.models.policy_model import checkpoint_name, load_policy
from rlhf_cluster.models.shared_passes import SharedPasses
from rlhf_cluster.records import Rollout, WeightVersion
from rlhf_cluster.sections.values import Dtype, FrozenQuantization, HeadDtype
from rlhf_cluster.util.waiting import remaining_s
from rlhf_cluster.weights.assemble import check_names
from rlhf_cluster.weights.store import read
from rlhf_cluster.weights.transports.transport import Deadline

Array = np.ndarray


class FrozenPolicy:
    """Frozen model. Several threads may call it; it serves `batch_groups` of them at once."""

    def __init__(
        self,
        name: str,
        model_dir: str,
        dtype: Dtype,
        device: str,
        tokens_per_batch: int,
        wait_timeout_s: float = 300.0,
        quantization: FrozenQuantization | None = None,
        head_dtype: HeadDtype = "float32",
        batch_groups: int = 1,
        load_timeout_s: float = 600.0,
    ) -> None:
        """Load the model of `model_dir`. `name` is its name in errors. Raises `ConfigError`."""
        self._name = name
        self._policy = load_policy(
            model_dir, getattr(torch, dtype), device, trainable=False, head_dtype=head_dtype
        )
        self._device = device
        self._tokens_per_batch = tokens_per_batch
        self._wait_timeout_s = wait_timeout_s
        self._lock = threading.Lock()
        self._load_timeout_s = load_timeout_s
        self._loading = threading.Lock()
        self._num_asked = 0
        self._together = SharedPasses(
            self._hold_and_compute,
            size=_num_inputs,
            budget=tokens_per_batch,
            max_calls=batch_groups,
            timeout_s=wait_timeout_s,
            late=self._busy,
        )
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._rounded: dict[str, Linear8bit] = {}
        stored = cast("dict[str, Tensor]", self._policy.lm.state_dict(keep_vars=True))
        buffers = {checkpoint_name(n): b for n, b in self._policy.named_buffers()}
        # The parameters list tied tensors once, with one of their names.
        self._targets: dict[str, Tensor] = {
            checkpoint_name(n): p for n, p in self._policy.named_parameters()
        } | {n: b for n, b in buffers.items() if n in stored}
        self._shapes = {n: tuple(target.shape) for n, target in self._targets.items()}
        if quantization is not None:
            self._quantize()

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Array]:
        """Return [T] float32 for each rollout, in nats, at its temperature.

        Raises:
            ScoringError: a rollout without a distribution (temperature 0), or longer than the
                token budget.
            StalledError: other groups held the model past the deadline.
        """
        self.check(rollouts)
        return self._together(rollouts)

    def load(self, version: WeightVersion) -> None:
        """Replace all weights by those of `version`.

        One load runs at a time. A load that hung in its storage while a later one was requested changes
        nothing when it continues.

        Waits for: the load before it, the storage and groups in progress, `load_timeout_s` in all.
        Raises `WeightError` when the weights are damaged, missing, not of this model or no longer
        requested, `StalledError` past the deadline; the weights are as before then.
        """
        what = f"the {self._name} of version {version.version}"
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
            with self.hold():
                if asked != self._num_asked:
                    raise WeightError(f"{what} is not loaded: another was asked for meanwhile")
                self.replace(what, tensors)
        finally:
            self._loading.release()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Reserve the model for this thread inside the block.

        Waits for: other groups' passes. Raises `StalledError` past the deadline.
        """
        if not self._lock.acquire(timeout=remaining_s(self._wait_timeout_s)):
            raise self._busy()
        try:
            yield
        finally:
            self._lock.release()

    @torch.no_grad()
    def replace(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace all weights by the checkpoint `tensors`; `what` names them in errors.

        The caller has entered `hold`. Raises `WeightError` when names or shapes are not the model's;
        nothing has changed then.
        """
        check_names(
            what,
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            self._shapes,
        )
        for name, tensor in tensors.items():
            if name in self._rounded:
                self._rounded[name].replace(tensor.to(self._dtype))
            else:
                self._targets[name].copy_(tensor)

    def check(self, rollouts: Sequence[Rollout]) -> None:
        """Check that all rollouts can be passed through the model.

        Raises `ScoringError` on a rollout without a distribution (temperature 0), or one that is
        longer than the token budget.
        """
        for rollout in rollouts:
            if not rollout.temperature > 0:
                raise ScoringError(
                    f"rollout {rollout.rollout_id} was sampled at temperature "
                    f"{rollout.temperature:g}: greedy sampling has no distribution to compare "
                    f"with. Score it without the {self._name} model"
                )
            num_inputs = _num_inputs(rollout)
            if num_inputs > self._tokens_per_batch:
                raise ScoringError(
                    f"rollout {rollout.rollout_id} has {num_inputs} positions, over "
                    f"scoring.tokens_per_batch = {self._tokens_per_batch}. Raise it"
                )

    def compute(self, rollouts: Sequence[Rollout]) -> list[Array]:
        """Return [T] float32 for each rollout. The caller has called `check` and entered `hold`."""
        by_temperature = sorted(range(len(rollouts)), key=lambda i: rollouts[i].temperature)
        found: dict[int, Array] = {}
        for temperature, group in groupby(by_temperature, lambda i: rollouts[i].temperature):
            indices = list(group)
            values = self._forward([rollouts[i] for i in indices], temperature)
            found.update(zip(indices, values, strict=True))
        return [found[i] for i in range(len(rollouts))]

    def _hold_and_compute(self, rollouts: list[Rollout]) -> list[Array]:
        with self.hold():
            return self.compute(rollouts)

    def _busy(self) -> StalledError:
        return StalledError(
            f"the {self._name} model was busy for {self._wait_timeout_s:g} s; add scoring workers"
        )

    def _quantize(self) -> None:
        quantize_linear(self._policy.lm.base_model, f"the {self._name} model")
        for name, layer in self._policy.named_modules():
            if isinstance(layer, Linear8bit):
                weight = checkpoint_name(f"{name}.weight")
                self._rounded[weight] = layer
                del self._targets[weight]

    def _forward(self, rollouts: Sequence[Rollout], temperature: float) -> list[Array]:
        sequences = [
            TokenSequence(prompt_ids=r.prompt_ids, target_ids=r.response_ids) for r in rollouts
        ]
        lengths = [sequence.num_inputs for sequence in sequences]
        budget = self._tokens_per_batch
        found: dict[int, Array] = {}
        for planned in plan(lengths, 1, budget, budget, "padded")[0]:
            batch = collate(planned, sequences)
            values = self._run_batch(batch, temperature)
            for span in batch.spans:
                found[span.sequence] = values[span.row, span.start : span.stop].copy()
        return [found[i] for i in range(len(rollouts))]

    @torch.inference_mode()
    def _run_batch(self, batch: MicroBatch, temperature: float) -> Array:
        logprobs, _ = self._policy(
            *(
                torch.from_numpy(array).to(self._device)
                for array in (batch.input_ids, batch.position_ids, batch.labels)
            ),
            temperature=temperature,
        )
        return logprobs.float().cpu().numpy()


def _num_inputs(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids) - 1
