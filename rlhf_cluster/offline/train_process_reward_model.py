"""Process reward models: the chance that each reasoning step of a response is right.

A row is a response with labelled steps (`data.reasoning_steps`). A step's logit is the value
after its last token. That token is found as in reinforcement learning (`data.reasoning_steps`): among
the ids of the whole response, by the text that they decode to. The last step ends with the end token.
A token that ends several steps has the lowest of their labels. The head has no bias and starts at 0.
The exported model loads as the reward `process_reward_model`.

Promises:
- the loss is the mean over the labelled steps of the batch, whatever the ranks, micro-batches and
  packing; a step without a label is context;
- truncation drops the oldest tokens of the prompt and never touches a response.

Shapes: L tokens of prompt and response, A of the response, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.data.packing import TokenSequence, value_sequence
from rlhf_cluster.data.preferences import split_key
from rlhf_cluster.data.reasoning_steps import parse_steps, step_ends, step_spans
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import DataError
from rlhf_cluster.offline.reward_model_losses import process_report, step_loss, step_metrics
from rlhf_cluster.offline.stage import Passes, Stage, cut_prompt, encode_answers
from rlhf_cluster.sections.offline_stage import StageSectionBase

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.algorithms.micro_batch_loss import TrainedValues, ValueLoss


class ProcessRewardModelStageConfig(StageSectionBase):
    """A model of reasoning steps, trained on a label per step."""

    model_kind: ClassVar[Literal["policy", "value"]] = "value"
    num_values: ClassVar[int] = 1

    type: Literal["process_reward_model"] = "process_reward_model"
    step_separator: str = Field(default="\n", min_length=1)
    """Text that separates the steps of a response; blank segments do not count.

    It should equal `scoring.step_separator` of the runs that will use the model.
    """
    targets: Literal["soft", "hard"] = "soft"
    """Targets of the model.

    `soft`: the labels as they are. `hard`: 1 where a label is at least `threshold`, else 0.
    """
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Least label of a step that is treated as right, in accuracies and hard targets.

    With the share of right completions as labels, a number close to 0 means: any completion was right.
    """


class ProcessRewardModelStage(Stage[ProcessRewardModelStageConfig]):
    headline = "process/loss"
    streams = ("label",)

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        where, separator = f"{name}, {row.place}", self.section.step_separator
        found = parse_steps(row.columns, where, separator)
        prompt_ids, [ids] = encode_answers(
            found.prompt, [found.completion], where, self.context, self.tokenizer
        )
        text = self._text(ids.tolist())
        spans = step_spans(text, separator)
        if len(spans) != len(found.labels):
            raise DataError(
                f"{where}: {len(found.labels)} steps, and {len(spans)} after the chat template and the "
                "tokenizer. Use another separator, or data.template = 'none'"
            )
        silent = frozenset(self.tokenizer.all_special_ids)
        ends = step_ends(self._text, ids.tolist(), silent, text, spans)
        labels = np.full(len(ids), np.nan, dtype=np.float32)
        for end, label in zip(ends, found.labels, strict=True):
            if label is not None:
                labels[end] = np.fmin(labels[end], label)
        is_end = np.zeros(len(ids), dtype=np.float32)
        is_end[ends] = 1
        return [
            Unit(
                sequences=(_sequence(prompt_ids, ids, labels, is_end),),
                key=split_key(found.prompt),
                content=repr(found),
                place=where,
                values={"prompt_tokens": float(len(prompt_ids))},
            )
        ]

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        size, [whole] = int(unit.values["prompt_tokens"]), unit.sequences
        ids = np.concatenate([whole.prompt_ids, whole.target_ids[:-1]])
        cut = cut_prompt(ids[:size], len(ids) - size, max_tokens)
        if cut is None:
            return None
        labels, is_end = (whole.streams[name][size:] for name in ("label", "is_end"))
        return replace(
            unit,
            sequences=(_sequence(cut, ids[size:], labels, is_end),),
            values={**unit.values, "prompt_tokens": float(len(cut))},
        )

    def loss(self, units: Sequence[Unit], passes: Passes) -> ValueLoss:
        num_steps = sum(unit.num_trained for unit in units)
        section = self.section

        def share(found: TrainedValues) -> tuple[Tensor, Sums]:
            labels = found.streams["label"]
            targets = (labels >= section.threshold).to(labels.dtype)
            if section.targets == "soft":
                targets = labels
            losses = step_loss(found.values, targets)
            metrics = step_metrics(losses, found.values, labels, section.threshold)
            return losses.sum() / num_steps, metrics

        return share

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        """Return `offline.reward_model_losses.process_report` of the held-out units."""
        scores, labels = [], []
        for unit, (values,) in zip(units, passes.values(units), strict=True):
            streams = unit.sequences[0].streams
            at = streams["is_end"] > 0
            scores.append(1 / (1 + np.exp(-values[at].astype(np.float64))))
            labels.append(streams["label"][at].astype(np.float64))
        return process_report(scores, labels, self.section.threshold)

    def _text(self, ids: Sequence[int]) -> str:
        """Decode ids with the settings of the scoring pool."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _sequence(
    prompt_ids: np.ndarray, ids: np.ndarray, labels: np.ndarray, is_end: np.ndarray
) -> TokenSequence:
    """Build the sequence of a response. Values are read where `labels` [A] has a number.

    `is_end` [A] is 1 where a step ends.
    """
    before = np.zeros(len(prompt_ids), dtype=np.float32)
    streams = {
        "label": np.concatenate([before + np.nan, labels]).astype(np.float32),
        "is_end": np.concatenate([before, is_end]),
    }
    at = np.flatnonzero(~np.isnan(streams["label"]))
    return value_sequence(np.concatenate([prompt_ids, ids]), at, streams)
