"""Reward models of whole responses: from pairs, from rankings, from grades.

    pairs       Bradley-Terry; a row in any layout of `data.preferences`
    rankings    Plackett-Luce; a row with responses in order
    grades      a row with a prompt, a completion, and a number in the column of each head (Wang et al.
                2023, arXiv 2311.09528: helpfulness, correctness and so on); null if it was not graded
                mse    the score is the grade; give grades a mean near 0, as there is no bias
                bce    the score is the logit of a label in [0, 1]

A response is scored by the value after the last real token of (prompt, response, end token), the
ids that reinforcement learning will show the model. The head has no bias and starts at 0. The
exported model loads as the reward `reward_model`, with `output_weights` if it has several heads.

The report (`offline.scorer_report`) is on held-out pairs; a ranking gives the pair of its best and its
worst response. It has accuracy with its interval, calibration, and the correlation of score and
length. If rows have `chosen_paraphrase` or `rejected_paraphrase`, it also has how often a verdict is
the same for paraphrases, which are scored with held-out pairs and never trained.
`offline.train_ensemble` trains several members.

Promises:
- the loss is the mean over the examples of the batch (pairs, rankings or responses), whatever the
  ranks, micro-batches and packing; a graded response's loss is the mean over its graded heads;
- truncation drops the oldest tokens of the prompt, the same ones for all of a unit, and never
  touches a response.

Shapes: N responses, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.data.packing import value_sequence
from rlhf_cluster.data.preferences import (
    Pair,
    parse_graded,
    parse_pair,
    parse_paraphrases,
    parse_ranking,
    split_key,
)
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit, is_held_out
from rlhf_cluster.errors import DataError
from rlhf_cluster.offline import train_ensemble
from rlhf_cluster.offline.reward_model_losses import (
    bradley_terry_loss,
    pair_score_metrics,
    plackett_luce_loss,
    pointwise_loss,
    ranking_score_metrics,
)
from rlhf_cluster.offline.scorer_report import Scored, graded_report
from rlhf_cluster.offline.stage import Passes, Stage, StageContext, cut_prompt, encode_answers
from rlhf_cluster.sections.offline_stage import StageSectionBase
from rlhf_cluster.sections.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.algorithms.micro_batch_loss import TrainedValues, ValueLoss


class BradleyTerry(Section):
    """Loss of pairs: the chosen response's score should be the higher one."""

    type: Literal["bradley_terry"] = "bradley_terry"
    margins: bool = True
    """Whether the better response should lead by the `margin` of a row that has one."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs held to be labelled the wrong way round."""
    centring: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's scores, which keeps their mean at 0."""


class PlackettLuce(Section):
    """Loss of rankings: the likelihood of the whole order."""

    type: Literal["plackett_luce"] = "plackett_luce"
    max_responses: int = Field(default=8, ge=2)
    """Most responses of a row; a longer ranking is refused."""


class RewardModelStageConfig(train_ensemble.EnsembleSection):
    """A reward model, or several, from preferences."""

    model_kind: ClassVar[Literal["policy", "value"]] = "value"
    num_values: ClassVar[int] = 1

    type: Literal["reward_model"] = "reward_model"
    loss: Annotated[BradleyTerry | PlackettLuce, Field(discriminator="type")] = BradleyTerry()
    """Loss that fits the scores to preferences, and its keys."""
    paraphrases: bool = False
    """Whether rows may have paraphrases (`chosen_paraphrase`, `rejected_paraphrase`); pairs only.

    The report then has how often the verdict on a held-out pair is the same for them.
    """

    @property
    def max_unit_size(self) -> int:
        if isinstance(self.loss, PlackettLuce):
            return self.loss.max_responses
        return 4 if self.paraphrases else 2

    @model_validator(mode="after")
    def _paraphrases_are_of_pairs(self) -> RewardModelStageConfig:
        if self.paraphrases and not isinstance(self.loss, BradleyTerry):
            raise ValueError(
                f"paraphrases = true with loss.type = {self.loss.type!r}: they are compared pair by "
                "pair. Take the loss 'bradley_terry', or remove paraphrases"
            )
        return self


class RewardModelStage(Stage[RewardModelStageConfig]):
    headline = "ranking/accuracy"
    lower_is_better = False

    def __init__(self, section: RewardModelStageConfig, context: StageContext) -> None:
        """Build the stage. Raises `ConfigError` for a section of several members: `config.load`."""
        super().__init__(section, context)
        train_ensemble.check_single(section)

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        where, loss = f"{name}, {row.place}", self.section.loss
        margin = 0.0
        if isinstance(loss, BradleyTerry):
            found = parse_pair(row.columns, where)
            answers, margin = self._responses(found, row, where), found.margin or 0.0
        else:
            found = parse_ranking(row.columns, where)
            answers = found.responses
            if len(answers) > loss.max_responses:
                raise DataError(
                    f"{where}: {len(answers)} responses, over stage.loss.max_responses = "
                    f"{loss.max_responses}. Raise it, or shorten the ranking"
                )
        prompt_ids, ids = encode_answers(found.prompt, answers, where, self.context, self.tokenizer)
        return [
            Unit(
                sequences=tuple(value_sequence(np.concatenate([prompt_ids, a])) for a in ids),
                key=split_key(found.prompt),
                content=repr(found),
                place=where,
                values={"margin": margin, "prompt_tokens": float(len(prompt_ids))},
            )
        ]

    def times(self, unit: Unit) -> int:
        return train_ensemble.times(self.section, unit.key)

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
        return (
            _pair_loss(loss, units)
            if isinstance(loss, BradleyTerry)
            else _ranking_loss(loss, len(units))
        )

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        """Return the report and all scores of held-out units; `conclude` moves the scores to a file."""
        found = passes.values(units)
        pairs = isinstance(self.section.loss, BradleyTerry)
        ends = (0, 1) if pairs else (0, -1)
        scores = [[float(own[i][-1]) for i in ends] for own in found]
        lengths = [[len(_apart(unit)[1][i]) for i in ends] for unit in units]
        again = None
        if pairs and self.section.paraphrases:
            rows = [[float(v[-1]) for v in own[2:]] or [np.nan, np.nan] for own in found]
            again = np.array(rows)
        scored = Scored(scores=np.array(scores), lengths=np.array(lengths), paraphrased=again)
        return {**scored.report(), "held_out": scored.as_dict()}

    def conclude(
        self, report: dict[str, Any], units: Sequence[Unit], folder: Path
    ) -> dict[str, Any]:
        scored = Scored.from_dict(report["held_out"])
        own = {name: value for name, value in report.items() if name != "held_out"}
        together = train_ensemble.conclude(self.section, units, scored, folder)
        return own if together is None else {**own, "ensemble": together["ensemble"]}

    def _responses(self, pair: Pair, row: Row, where: str) -> tuple[str, ...]:
        """Return a pair's responses, and after them the paraphrases of a held-out pair that has any."""
        pair_of = (pair.chosen, pair.rejected)
        if not self.section.paraphrases:
            return pair_of
        others = parse_paraphrases(row.columns, pair, where)
        held_out = is_held_out(split_key(pair.prompt), self.context.data.held_out)
        return (*pair_of, *others) if others is not None and held_out else pair_of


def _pair_loss(loss: BradleyTerry, units: Sequence[Unit]) -> ValueLoss:
    places = np.cumsum([0, *(len(unit.sequences) for unit in units)]).tolist()
    # margin of a unit, by the index of its first sequence in the batch's flat list
    margins = {p: unit.values["margin"] for p, unit in zip(places, units, strict=False)}

    def share(found: TrainedValues) -> tuple[Tensor, Sums]:
        scores = found.sums(found.values)  # sums of one value per sequence
        starts = np.cumsum([0, *found.unit_sizes])[:-1]
        firsts = scores.new_tensor(starts).long()
        chosen, rejected = scores[firsts], scores[firsts + 1]
        wanted = [margins[found.members[i]] if loss.margins else 0.0 for i in starts]
        losses = bradley_terry_loss(
            chosen, rejected, scores.new_tensor(wanted), loss.label_smoothing, loss.centring
        )
        return losses.sum() / len(units), pair_score_metrics(losses, chosen, rejected)

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
    """Split a unit into its prompt's ids and the ids of each answer."""
    size = int(unit.values["prompt_tokens"])
    tokens = [sequence.prompt_ids for sequence in unit.sequences]
    return tokens[0][:size], [ids[size:] for ids in tokens]


class PointwiseRewardModelConfig(StageSectionBase):
    """A reward model from grades of single responses."""

    model_kind: ClassVar[Literal["policy", "value"]] = "value"

    type: Literal["pointwise_reward_model"] = "pointwise_reward_model"
    kind: Literal["mse", "bce"] = "mse"
    """Meaning of a score: `mse`, the grade as it is; `bce`, the logit of a label in [0, 1]."""
    heads: tuple[str, ...] = Field(default=("score",), min_length=1)
    """Columns of the grades, one output of the model each."""

    @property
    def num_values(self) -> int:
        return len(self.heads)


class PointwiseRewardModelStage(Stage[PointwiseRewardModelConfig]):
    headline = "grading/loss"

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        where, section = f"{name}, {row.place}", self.section
        found = parse_graded(row.columns, where, section.heads)
        for head, grade in zip(section.heads, found.grades, strict=True):
            if section.kind == "bce" and grade is not None and not 0 <= grade <= 1:
                raise DataError(
                    f"{where}, column {head!r}: {grade:g} is not a label in [0, 1]. Set stage.kind = "
                    "'mse', or correct the row"
                )
        prompt_ids, [ids] = encode_answers(
            found.prompt, [found.completion], where, self.context, self.tokenizer
        )
        grades = {f"grade/{i}": g for i, g in enumerate(found.grades) if g is not None}
        return [
            Unit(
                sequences=(value_sequence(np.concatenate([prompt_ids, ids])),),
                key=split_key(found.prompt),
                content=repr(found),
                place=where,
                values={"prompt_tokens": float(len(prompt_ids)), **grades},
            )
        ]

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        size, ids = int(unit.values["prompt_tokens"]), unit.sequences[0].prompt_ids
        cut = cut_prompt(ids[:size], len(ids) - size, max_tokens)
        if cut is None:
            return None
        return replace(
            unit,
            sequences=(value_sequence(np.concatenate([cut, ids[size:]])),),
            values={**unit.values, "prompt_tokens": float(len(cut))},
        )

    def loss(self, units: Sequence[Unit], passes: Passes) -> ValueLoss:
        grades, kind = self._grades(units), self.section.kind

        def share(found: TrainedValues) -> tuple[Tensor, Sums]:
            width = grades.shape[1]
            values = found.values.reshape(-1, width)
            scores = values.new_zeros(found.num_sequences, width).index_add(
                0, found.sequence, values
            )
            own = scores.new_tensor(grades[list(found.members)]).reshape(-1, width)
            there = ~own.isnan()
            losses = pointwise_loss(scores, own, kind, there)
            said = scores.detach().sigmoid() if kind == "bce" else scores.detach()
            errors = (said - own)[there].abs()
            return losses.sum() / len(units), {
                "grading/loss": (losses.sum(), losses.new_tensor(losses.numel())),
                "grading/error": (errors.sum(), losses.new_tensor(errors.numel())),
            }

        return share

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        """Return `offline.scorer_report.graded_report` of each head, and the warnings of all."""
        scores = np.array([np.reshape(own[0][-1], -1) for own in passes.values(units)], np.float64)
        if self.section.kind == "bce":
            scores = 1 / (1 + np.exp(-scores))
        sizes = [len(u.sequences[0].prompt_ids) - u.values["prompt_tokens"] for u in units]
        grades, lengths = self._grades(units), np.array(sizes)
        heads = {
            head: graded_report(scores[:, i], grades[:, i], lengths)
            for i, head in enumerate(self.section.heads)
        }
        warnings = [f"{head}: {text}" for head, own in heads.items() for text in own["warnings"]]
        return {"heads": heads, "warnings": warnings}

    def _grades(self, units: Sequence[Unit]) -> np.ndarray:
        """Return the grades of units, [N, H], NaN where a response has none."""
        heads = range(self.section.num_values)
        rows = [[unit.values.get(f"grade/{i}", math.nan) for i in heads] for unit in units]
        return np.array(rows, dtype=np.float64)
