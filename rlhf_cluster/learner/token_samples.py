"""What the learner made of the tokens of a step's first rollouts, for the samples of the step.

Of a kept rollout, from the first pass that trains it in the step:

    learner_logprobs     of the learner at the start of the step. Where the loss does without them
                         (`Algorithm.needs_proximal`) and a batch has several minibatches, of the
                         learner that this pass finds: earlier minibatches have then been trained
    correction_weights   what the loss multiplies each token by for its sampler's distance
                         (`Algorithm.correction_weights`); None for an algorithm without a correction

Promises: the same on every rank, whichever rank computed a rollout; one collective a step, of the kept
rollouts' trained tokens alone, in which every rank takes part; until then all stays on the device and
nothing is waited for. A rollout that no pass computed is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_cluster.algorithms.algorithm import (
    Algorithm,
    LossInputs,
)
from rlhf_cluster.records import ExperienceGroup, TokenSample

_SEEN, _WEIGHED = 1.0, 2.0
COLUMNS = 3

Gather = Callable[[Mapping[int, np.ndarray], Sequence[int]], list[np.ndarray]]
"""gather(this rank's tables [n, COLUMNS] by rollout, n of every rollout) -> the tables of all ranks, in
order, 0 where no rank has one (`passes.on_every_rank`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    places: Mapping[int, int]  # sequence of the micro-batch -> rollout of the step
    sequence: Tensor  # [N]
    logprobs: Tensor  # [N]
    weights: Tensor | None  # [N]


class KeptTokens:
    """Of one step: `see` at every pass, then `join` once. Rollouts are counted over the step's groups
    in order; the first `limit` are kept, and with 0 nothing is done or gathered."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[int] = set()
        self._passes: list[_Pass] = []
        self.found: dict[str, TokenSample] = {}

    @torch.no_grad()
    def see(self, rollouts: Sequence[int], inputs: LossInputs, algorithm: Algorithm) -> None:
        """A pass is made over a micro-batch: `rollouts` are those of its sequences, in order."""
        places = {
            place: rollout
            for place, rollout in enumerate(rollouts)
            if rollout < self._limit and rollout not in self._seen
        }
        if not places:
            return
        self._seen.update(places.values())
        weights = algorithm.correction_weights(inputs)
        self._passes.append(
            _Pass(
                places=places,
                sequence=inputs.sequence,
                logprobs=inputs.proximal_logprobs.detach(),
                weights=None if weights is None else weights.detach(),
            )
        )

    def join(self, groups: Sequence[ExperienceGroup], gather: Gather) -> None:
        """Sets `found`, by rollout id. `groups` are those of the step, with the masks that it trained.

        Waits in `gather` for all ranks, which come all or, where no kept token is trained, none.
        """
        scored = [s for group in groups for s in group.scored][: self._limit]
        masks = [s.rollout.response_mask for s in scored]
        lengths = [int(mask.sum()) for mask in masks]
        if not any(lengths):
            return
        everywhere = gather(self._own(), lengths)
        self.found = {
            one.rollout.rollout_id: _spread(values, mask)
            for one, mask, values in zip(scored, masks, everywhere, strict=True)
            if len(values) and values[0, 2] >= _SEEN
        }

    def _own(self) -> dict[int, np.ndarray]:
        """Rollout -> [its trained tokens, COLUMNS]: log-probability, weight, what there is of both."""
        own = {}
        for one in self._passes:
            known = _SEEN if one.weights is None else _WEIGHED
            weights = torch.zeros_like(one.logprobs) if one.weights is None else one.weights
            columns = (one.logprobs, weights, torch.full_like(one.logprobs, known))
            table, sequence = torch.stack(columns, 1).cpu().numpy(), one.sequence.cpu().numpy()
            own |= {rollout: table[sequence == place] for place, rollout in one.places.items()}
        return own


def _spread(values: np.ndarray, mask: np.ndarray) -> TokenSample:
    columns = np.full((2, len(mask)), np.nan, dtype=np.float32)
    columns[:, mask] = values[:, :2].T
    weighed = values[0, 2] == _WEIGHED
    return TokenSample(
        learner_logprobs=columns[0],
        correction_weights=columns[1] if weighed else None,
        trained=mask,
    )
