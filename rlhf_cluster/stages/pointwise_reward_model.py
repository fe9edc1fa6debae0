"""Reward models from grades: one score a response, or one for each of several attributes.

A row is a prompt, a completion, and a number in the column of each head (Wang et al. 2023, arXiv
2311.09528: helpfulness, correctness and so on); null where it was not graded. A response is scored by
the value after the last real token of (prompt, response, end token); the head has no bias and starts at
0. What is exported loads as the reward `reward_model`, with `output_weights` where it has several.

    mse    the score is the grade; give grades a mean near 0, as there is no bias
    bce    the score is the logit of a label in [0, 1]

Promises: the loss is the mean over the responses of the batch, of a response the mean over its graded
heads, whatever the ranks, micro-batches and packing. Truncation drops the oldest tokens of the prompt
and never touches a response.

Shapes: N responses, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.config.stage_sections import StageSectionBase
from rlhf_cluster.data.pairs import opening, parse_graded
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import DataError
from rlhf_cluster.learning.packing import value_sequence
from rlhf_cluster.objectives.ranking import pointwise_loss
from rlhf_cluster.objectives.report import graded_report
from rlhf_cluster.stages.answers import cut_prompt, encode_answers
from rlhf_cluster.stages.base import Passes, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.learning.passes import TrainedValues, ValueLoss


class PointwiseRewardModelConfig(StageSectionBase):
    """A reward model from grades of single responses."""

    model_kind: ClassVar[Literal["policy", "value"]] = "value"

    type: Literal["pointwise_reward_model"] = "pointwise_reward_model"
    kind: Literal["mse", "bce"] = "mse"
    """What a score is fitted to: a grade as it is, or, as a logit, a label in [0, 1]."""
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
                    f"{where}, column {head!r}: {grade:g} is no label in [0, 1]. Set stage.kind = "
                    "'mse', or correct the row"
                )
        prompt_ids, [ids] = encode_answers(
            found.prompt, [found.completion], where, self.context, self.tokenizer
        )
        grades = {f"grade/{i}": g for i, g in enumerate(found.grades) if g is not None}
        return [
            Unit(
                sequences=(value_sequence(np.concatenate([prompt_ids, ids])),),
                key=opening(found.prompt),
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
        """`heads` has a report of each, see `objectives.report.graded_report`."""
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
        """[N, H], NaN where there is none."""
        heads = range(self.section.num_values)
        rows = [[unit.values.get(f"grade/{i}", math.nan) for i in heads] for unit in units]
        return np.array(rows, dtype=np.float64)
