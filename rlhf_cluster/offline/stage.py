"""Interface of an offline stage: how a row becomes a unit, the loss, and what is reported.

    rows -> read -> units -> loss of a batch -> shares of micro-batches -> one optimizer step

A stage is one file: its section of the run file, and a subclass of `Stage`. The class is built as
`cls(section, context)` in the driver, which reads, and in every rank, which trains. It holds no model
and computes through `Passes`. Stages that compare answers read rows with `encode_answers`.

Every stage must promise:
- importing its file loads no torch;
- `loss` makes the same calls on every rank;
- shares of all micro-batches and ranks add up to the loss.

Promises of encoding:
- the prompt's ids are those that generation would be asked with, and an answer's those that it would
  sample, its end token included: the border between them is the same as in generation;
- `encode_answers` shortens nothing. `cut_prompt` makes pairs shorter and never touches an answer.

Shapes: P prompt tokens, T targets of a sequence, such as the tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from rlhf_cluster.data.dialogues import Messages, render_dialogue
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit, cut_end
from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.models.divergence import REVERSE_KL, Divergence
from rlhf_cluster.sections.offline_stage import StageData, StageSectionBase

Ids = np.ndarray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.algorithms.micro_batch_loss import TokenLoss, ValueLoss

    PerUnit = list[tuple[np.ndarray, ...]]
    """One tuple per unit, with an array [T] float32 for each of its sequences in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """Settings and tokenizer of a stage. The tokenizer is None in processes that read no rows."""

    data: StageData
    tokenizer: PreTrainedTokenizerBase | None = None
    end_ids: tuple[int, ...] = ()  # that end an answer, the tokenizer's own first


class Passes(Protocol):
    """Passes without gradient over all units of a batch; every rank gets all results.

    Each is a collective: all ranks call it, with the same units. T is ALL targets of a sequence,
    including those that its mask excludes.
    """

    def logprobs(self, units: Sequence[Unit]) -> PerUnit:
        """Return log-probabilities of the targets under the current model."""
        ...

    def reference(self, units: Sequence[Unit]) -> PerUnit:
        """Return log-probabilities of the targets under the reference; `needs_reference` stages only.

        The reference is the model as the stage began, or as `Stage.reference_share` moved it.
        """
        ...

    def values(self, units: Sequence[Unit]) -> PerUnit:
        """Return the outputs of a model of values at the targets' positions, [T] or [T, K]."""
        ...


S = TypeVar("S", bound=StageSectionBase)


class Stage(Generic[S]):
    """Base class of stages, with defaults. `headline` is the metric of status, curve and summary."""

    needs_reference: bool = False
    reference_moves: bool = False  # by `reference_share`
    teacher: str | None = None  # folder of a frozen model; the loss gets `divergence` to it as kl
    divergence: Divergence = REVERSE_KL
    streams: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[str]
    lower_is_better: ClassVar[bool] = True

    def __init__(self, section: S, context: StageContext) -> None:
        self.section = section
        self.context = context

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the stage. Raises `ConfigError` in a process that reads no rows."""
        if self.context.tokenizer is None:
            raise ConfigError("this stage was built without a tokenizer; rows are read elsewhere")
        return self.context.tokenizer

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        """Return the units of a row, mostly one, of any length. `name` is the source's name.

        Raises `DataError` with name and place, and `UnusableRow` for a row that teaches nothing.
        """
        raise NotImplementedError

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        """Cut all sequences of a unit to `max_tokens`. Return None if nothing is left to train."""
        cut = [cut_end(sequence, max_tokens) for sequence in unit.sequences]
        whole = [sequence for sequence in cut if sequence is not None]
        return replace(unit, sequences=tuple(whole)) if len(whole) == len(cut) else None

    def times(self, unit: Unit) -> int:
        """Return the number of times that one pass over the data has a trained unit; 0 skips it."""
        return 1

    def loss(self, units: Sequence[Unit], passes: Passes) -> TokenLoss | ValueLoss:
        """Return a function from a micro-batch to its share of the loss of all `units` and metric sums.

        It is called on every rank with all units, before the passes of a step. It is also called
        before those of an evaluation, in which no gradient is taken.
        """
        raise NotImplementedError

    def reference_share(self, step: int) -> float:
        """Return the share of the model that is mixed into the reference after step `step`, from 1.

        0: the reference stays. 1: it becomes the model.
        """
        return 0.0

    def reference_moved(self) -> None:
        """Discard what was computed from the reference; called after each of its moves."""

    def metrics(self, units: Sequence[Unit]) -> Mapping[str, float]:
        """Return metrics that depend on the units of a step alone."""
        return {}

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        """Return further results of the trained model on all held-out units, for report.json."""
        return {}

    def conclude(
        self, report: dict[str, Any], units: Sequence[Unit], folder: Path
    ) -> dict[str, Any]:
        """Write files about a report into the run directory, and return what report.json is to hold.

        The driver calls it after `report` of the held-out `units`; `folder` is the run directory. The
        summary holds the returned values too.
        """
        return report

    def state(self) -> dict[str, float]:
        """Return the state of the stage for a checkpoint. It is the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Resume from `state()` as if there had been no interruption."""


def encode_answers(
    prompt: str | Messages,
    answers: Sequence[str],
    where: str,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Ids, list[Ids]]:
    """Encode a prompt and its answers.

    Returns:
        The prompt's ids, int32 [P], and each answer's ids, int32 [T].

    Raises:
        DataError: the row cannot be encoded; the message begins with `where`.
    """
    data = context.data
    if data.template == "chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = with_system(messages, data.system_prompt, data.drop_system, where)
        asked = render_dialogue(messages, where, tokenizer, True)
        texts = [
            _answer_text(asked, [*messages, {"role": "assistant", "content": a}], where, tokenizer)
            for a in answers
        ]
        prompt_ids = _ids(asked, tokenizer, False)
    elif isinstance(prompt, str):
        prompt_ids, texts = _ids(prompt, tokenizer, True), list(answers)
    else:
        raise DataError(
            f"{where}: found a dialogue, but data.template = {data.template!r}. Set data.template = "
            "'chat'"
        )
    while prompt_ids[:2] == [tokenizer.bos_token_id] * 2:
        del prompt_ids[0]
    if not prompt_ids:
        raise DataError(f"{where}: the prompt has no tokens. Correct or remove the row")
    ended = [_cut_after_end(_ids(text, tokenizer, False), context.end_ids) for text in texts]
    return np.array(prompt_ids, dtype=np.int32), [np.array(ids, dtype=np.int32) for ids in ended]


def cut_prompt(prompt_ids: Ids, longest_answer: int, max_tokens: int) -> Ids | None:
    """Shorten a prompt so that it and the longest answer have at most `max_tokens` tokens.

    The first token and the last ones are kept. Returns None where fewer than two tokens would be left.
    """
    room = max_tokens - longest_answer
    if room >= len(prompt_ids):
        return prompt_ids
    if room < 2:
        return None
    return np.concatenate([prompt_ids[:1], prompt_ids[len(prompt_ids) - room + 1 :]])


def _answer_text(
    asked: str, messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    whole = render_dialogue(messages, where, tokenizer, False)
    if not whole.startswith(asked):
        raise DataError(
            f"{where}: the chat template's text of the prompt is not the beginning of its text with an "
            "answer, so the two cannot be separated. Use another template"
        )
    return whole[len(asked) :]


def _cut_after_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Cut an answer after its last end token. Append one where the template has none."""
    last = max((i for i, token in enumerate(ids) if token in end_ids), default=None)
    return [*ids, end_ids[0]] if last is None else ids[: last + 1]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(found)


def with_system(messages: Messages, prompt: str | None, drop: bool, where: str) -> Messages:
    """Return the dialogue with `prompt` as its system message, if there is one.

    `drop`: remove the dialogue's system messages first. Raises `DataError` where it keeps one and
    `prompt` is set.
    """
    if drop:
        messages = [m for m in messages if m["role"] != "system"]
    if prompt is None or not messages:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(
            f"{where}: has a system message of its own, and data.system_prompt is set. Set "
            "data.drop_system = true, or remove one"
        )
    return [{"role": "system", "content": prompt}, *messages]
