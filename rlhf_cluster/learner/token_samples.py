"""Recorder of the learner's values for the tokens of a step's first rollouts, for the step's samples.

The values of a recorded rollout are from the first pass of the step that trains it:

    learner_logprobs     log-probabilities of the learner at the start of the step. If the loss does not
                         need these (`Algorithm.needs_proximal`) and a batch has several minibatches,
                         those of the learner in this pass, after earlier minibatches were trained
    correction_weights   factors by which the loss corrects each token for its sampler's distance
                         (`Algorithm.correction_weights`); None for an algorithm without a correction

Promises:
- values are the same on every rank, whichever rank computed a rollout;
- there is one collective per step, of the trained tokens of recorded rollouts. Every rank takes part.
  Until then all values stay on the device, and nothing is waited for;
- a rollout that no pass computed has no sample.
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
"""Function that gathers tables of all ranks, such as `passes.on_every_rank`.

gather(this rank's tables [n, COLUMNS] by rollout, n of every rollout) -> the tables of all rollouts, in
order, with 0 where no rank has a table.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    places: Mapping[int, int]  # sequence of the micro-batch -> rollout of the step
    sequence: Tensor  # [N]
    logprobs: Tensor  # [N]
    weights: Tensor | None  # [N]


class KeptTokens:
    """Recorder of one step: call `see` at every pass, then `join` once.

    Rollouts are counted over the step's groups in order. The first `limit` are recorded. With 0 nothing
    is computed or gathered.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[int] = set()
        self._passes: list[_Pass] = []
        self.found: dict[str, TokenSample] = {}

    @torch.no_grad()
    def see(self, rollouts: Sequence[int], inputs: LossInputs, algorithm: Algorithm) -> None:
        """Record a pass over a micro-batch. `rollouts`: those of its sequences, in order."""
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
        """Gather the values of all ranks, and set `found`, by rollout id.

        `groups` are those of the step, with the masks that it trained.

        Waits for: all ranks in `gather`. If no recorded token is trained, no rank calls it.
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
        """Return this rank's tables by rollout, [its trained tokens, COLUMNS].

        The columns are log-probability, weight, and a code for which of both are known.
        """
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
