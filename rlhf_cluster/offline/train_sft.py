"""Supervised fine-tuning: the mean negative log-likelihood of what the assistant says.

A row is a dialogue (`messages`: a list of {role, content}, or one text as in hh-rlhf), or a `prompt`
and its `completion`. Every assistant turn of a dialogue is trained, its end token included
(`data.dialogues`). Without a chat template a completion is appended to its prompt unchanged, and
the end token after it.

Promises:
- the loss is the mean over all trained tokens of the batch, whatever the ranks, micro-batches and
  packing;
- there is no label smoothing and no dropout;
- masks come from where text was put, never from ids, so a padding token that is also the end token is
  trained where it ends an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.data.dialogues import (
    Messages,
    encode_dialogue,
    is_dialogue,
    parse_dialogue,
    parse_messages,
)
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit, make_sequence
from rlhf_cluster.errors import DataError
from rlhf_cluster.offline.stage import Passes, Stage, with_system
from rlhf_cluster.sections.offline_stage import StageSectionBase

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.algorithms.micro_batch_loss import TokenLoss, TrainedTokens


class SftConfig(StageSectionBase):
    """Supervised fine-tuning on dialogues, or on prompts and completions."""

    type: Literal["sft"] = "sft"


S = TypeVar("S", bound=StageSectionBase)


class DialogueStage(Stage[S]):
    """A stage that reads dialogues, or prompts and completions, one sequence each."""

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        where = f"{name}, {row.place}"
        columns = row.columns
        if columns.get("messages") is not None:
            return [self._dialogue(_messages(columns["messages"], where, "messages"), where)]
        if columns.get("prompt") is None or columns.get("completion") is None:
            raise DataError(
                f"{where}: expected the column messages, or prompt and completion; found "
                f"{', '.join(map(repr, columns))}. Name them with the source's columns"
            )
        prompt, completion = columns["prompt"], columns["completion"]
        if self.context.data.template == "none":
            return [self._plain(prompt, completion, where)]
        asked = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else _messages(prompt, where, "prompt")
        )
        answer = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else _messages(completion, where, "completion")
        )
        return [self._dialogue([*asked, *answer], where)]

    def _dialogue(self, messages: Messages, where: str) -> Unit:
        data = self.context.data
        if data.template != "chat":
            raise DataError(
                f"{where}: found messages, but data.template = {data.template!r}. Set data.template = "
                "'chat'"
            )
        messages = with_system(messages, data.system_prompt, data.drop_system, where)
        ids, trained = encode_dialogue(messages, where, self.tokenizer, self.context.end_ids)
        sequence = make_sequence(ids, trained)
        if sequence is None:
            raise UnusableRow(f"{where}: a response has no text. Correct or remove the row")
        asked = next((m["content"] for m in messages if m["role"] == "user"), "")
        return _unit(sequence, key=asked, content=repr(messages), where=where)

    def _plain(self, prompt: Any, completion: Any, where: str) -> Unit:
        for column, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, str):
                raise DataError(
                    f"{where}, column {column!r}: found {type(value).__name__}, expected text with "
                    "data.template = 'none'. Set data.template = 'chat', or correct the row"
                )
        if not completion.strip():
            raise UnusableRow(f"{where}: a response has no text. Correct or remove the row")
        prompt_ids = self._ids(prompt, True)
        while prompt_ids[:2] == [self.tokenizer.bos_token_id] * 2:
            del prompt_ids[0]
        target_ids = [*self._ids(completion, False), self.context.end_ids[0]]
        if not prompt_ids:
            raise DataError(f"{where}: the prompt has no tokens. Correct or remove the row")
        sequence = TokenSequence(
            prompt_ids=np.array(prompt_ids, dtype=np.int32),
            target_ids=np.array(target_ids, dtype=np.int32),
        )
        return _unit(sequence, key=prompt, content=repr((prompt, completion)), where=where)

    def _ids(self, text: str, special: bool) -> list[int]:
        found: Any = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return list(found)


class SftStage(DialogueStage[SftConfig]):
    headline = "sft/loss"

    def loss(self, units: Sequence[Unit], passes: Passes) -> TokenLoss:
        num_tokens = sum(unit.num_trained for unit in units)

        def share(tokens: TrainedTokens) -> tuple[Tensor, Sums]:
            total = -tokens.logprobs.sum()
            count = total.new_tensor(tokens.logprobs.numel())
            sums = {"sft/loss": (total, count), "sft/entropy": (tokens.entropy.sum(), count)}
            return total / num_tokens, sums

        return share

    def metrics(self, units: Sequence[Unit]) -> Mapping[str, float]:
        return {"sft/tokens": float(sum(unit.num_trained for unit in units))}


def _messages(value: Any, where: str, column: str) -> Messages:
    where = f"{where}, column {column!r}"
    if isinstance(value, str) and is_dialogue(value):
        return parse_dialogue(value, where)
    return parse_messages(value, where)


def _unit(sequence: TokenSequence, key: str, content: str, where: str) -> Unit:
    return Unit(sequences=(sequence,), key=key, content=content, place=where)
