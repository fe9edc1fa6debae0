"""Reward models: a score of a whole response, learned from pairs (Bradley-Terry) or rankings
(Plackett-Luce).

A row is a pair in any layout of `data.pairs`, or a ranking. A response is scored by the value after the
last real token of (prompt, response, end token), the ids that reinforcement learning will show the
model; the head has no bias and starts at 0. What is exported loads as the reward `reward_model`.

The report (`objectives.report`) is of held-out pairs, of a ranking its best against its worst: accuracy
with its interval, calibration, and the correlation of score and length.

Promises: the loss is the mean over the pairs (rankings) of the batch, whatever the ranks, micro-batches
and packing. Truncation drops the oldest tokens of the prompt, the same ones for all of a unit, and
never touches a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.config.base import Section
from rlhf_cluster.config.stage_sections import StageSectionBase
from rlhf_cluster.data.pairs import opening, parse_pair, parse_ranking
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import DataError
from rlhf_cluster.learning.packing import value_sequence
from rlhf_cluster.objectives.ranking import (
    bradley_terry_loss,
    pair_score_metrics,
    plackett_luce_loss,
    ranking_score_metrics,
)
from rlhf_cluster.objectives.report import validation_report
from rlhf_cluster.stages.answers import cut_prompt, encode_answers
from rlhf_cluster.stages.base import Passes, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.learning.passes import TrainedValues, ValueLoss


class BradleyTerry(Section):
    """Pairs: the chosen response's score is to lead."""

    type: Literal["bradley_terry"] = "bradley_terry"
    margins: bool = True
    """Where a row has a `margin`, the better response is to lead by as much."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs held to be labelled the wrong way round."""
    centring: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's scores, which keeps their mean at 0."""


class PlackettLuce(Section):
    """Rankings: the likelihood of the whole order."""

    type: Literal["plackett_luce"] = "plackett_luce"
    max_responses: int = Field(default=8, ge=2)
    """Responses of a row, at most; a longer ranking is refused."""


class RewardModelStageConfig(StageSectionBase):
    """A reward model from preferences."""

    model_kind: ClassVar[Literal["policy", "value"]] = "value"
    num_values: ClassVar[int] = 1

    type: Literal["reward_model"] = "reward_model"
    loss: Annotated[BradleyTerry | PlackettLuce, Field(discriminator="type")] = BradleyTerry()
    """What the scores are fitted to, and its keys."""

    @property
    def max_unit_size(self) -> int:
        return 2 if isinstance(self.loss, BradleyTerry) else self.loss.max_responses


class RewardModelStage(Stage[RewardModelStageConfig]):
    headline = "ranking/accuracy"
    lower_is_better = False

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        where, loss = f"{name}, {row.place}", self.section.loss
        if isinstance(loss, BradleyTerry):
            found = parse_pair(row.columns, where)
            answers, margin = (found.chosen, found.rejected), found.margin or 0.0
        else:
            found = parse_ranking(row.columns, where)
            answers, margin = found.responses, 0.0
            if len(answers) > loss.max_responses:
                raise DataError(
                    f"{where}: {len(answers)} responses, over stage.loss.max_responses = "
                    f"{loss.max_responses}. Raise it, or shorten the ranking"
                )
        prompt_ids, ids = encode_answers(found.prompt, answers, where, self.context, self.tokenizer)
        return [
            Unit(
                sequences=tuple(value_sequence(np.concatenate([prompt_ids, a])) for a in ids),
                key=opening(found.prompt),
                content=repr(found),
                place=where,
                values={"margin": margin, "prompt_tokens": float(len(prompt_ids))},
            )
        ]

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        prompt_ids, answers = _apart(unit)
        cut = cut_prompt(prompt_ids, max(map(len, answers)), max_tokens)
        if cut is None:
            return None
        return replace(
            unit,
            sequences=tuple(value_sequence(np.concatenate([cut, a])) for a in answers),
            values={**unit.values, "prompt_tokens": float(len(cut))},
        )

    def loss(self, units: Sequence[Unit], passes: Passes) -> ValueLoss:
        loss = self.section.loss
        if isinstance(loss, BradleyTerry):
            return _pair_loss(loss, [unit.values["margin"] for unit in units])
        return _ranking_loss(loss, len(units))

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        found = passes.values(units)
        scores = np.array([[float(own[0][-1]), float(own[-1][-1])] for own in found])
        lengths = np.array([[len(a) for a in (_apart(u)[1][0], _apart(u)[1][-1])] for u in units])
        report = validation_report(scores[:, 0], scores[:, 1], lengths[:, 0], lengths[:, 1])
        return report.as_dict()


def _pair_loss(loss: BradleyTerry, margins: Sequence[float]) -> ValueLoss:
    def share(found: TrainedValues) -> tuple[Tensor, Sums]:
        scores = found.sums(found.values)  # of one value a sequence
        chosen, rejected = scores[0::2], scores[1::2]
        wanted = [margins[i // 2] if loss.margins else 0.0 for i in found.members[0::2]]
        losses = bradley_terry_loss(
            chosen, rejected, scores.new_tensor(wanted), loss.label_smoothing, loss.centring
        )
        return losses.sum() / len(margins), pair_score_metrics(losses, chosen, rejected)

    return share


def _ranking_loss(loss: PlackettLuce, num_rankings: int) -> ValueLoss:
    def share(found: TrainedValues) -> tuple[Tensor, Sums]:
        scores = found.sums(found.values)
        sizes = scores.new_tensor(found.unit_sizes).long()
        places = scores.new_tensor(range(loss.max_responses)).long()
        mask = places < sizes[:, None]
        table = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        losses = plackett_luce_loss(table, mask)
        return losses.sum() / num_rankings, ranking_score_metrics(losses, table, mask)

    return share


def _apart(unit: Unit) -> tuple[np.ndarray, list[np.ndarray]]:
    """The prompt's ids and the answers' of a unit."""
    size = int(unit.values["prompt_tokens"])
    tokens = [sequence.prompt_ids for sequence in unit.sequences]
    return tokens[0][:size], [ids[size:] for ids in tokens]
