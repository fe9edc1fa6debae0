"""Prompts: the endless training stream, held-out prompts, and examples for the SFT warm-up.

    file:  epoch 0 | epoch 1 | ...   every row once per epoch, reshuffled by (seed, epoch)
    task:  block 0 | block 1 | ...   endless fresh rows (with data.limit: epochs over that many)

Promises:
- `cursor` is the number of prompts drawn. `seek(cursor)` continues exactly there, in constant
  time, in another process too;
- the id of a prompt names its row and its epoch, and does not depend on earlier draws;
- the whole data set is checked when the source is built; `next` cannot fail afterwards;
- prompts that are too long are refused, or skipped and counted; none is shortened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from rlhf_cluster.data.dialogues import drop_answer
from rlhf_cluster.data.rows import Row, column, expand, read_rows
from rlhf_cluster.data.tasks import held_out_rows, train_rows
from rlhf_cluster.data.tokenizer import check_template, render
from rlhf_cluster.errors import DataError, RecordError
from rlhf_cluster.records import Prompt
from rlhf_cluster.sections.evaluation import HELD_OUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.sections.evaluation import Evaluation, EvaluationSet
    from rlhf_cluster.sections.rl_run import Data


@dataclass(frozen=True, slots=True, kw_only=True)
class SftExample:
    """A prompt and the answer to learn. `target_ids` ends with the end token.

    Prompt and target are tokenized separately, so that the border is where it is in generation.
    """

    prompt_ids: np.ndarray  # [P] int32
    target_ids: np.ndarray  # [T] int32

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "target_ids"):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != np.int32 or len(array) == 0:
                raise RecordError(
                    f"SftExample.{name} must be a non-empty int32[n], found "
                    f"{array.dtype}{list(array.shape)}"
                )


_TASK_BLOCK_ROWS = 256

_NAMED_ROWS = 8  # places listed in a message
_HELD_OUT_ID = "eval-"
"""Prefix of the id of a held-out prompt, which the number of its row follows."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One usable row: its number in the data set, and the fields of its prompt except the id."""

    number: int
    place: str
    token_ids: np.ndarray  # [P] int32
    source: str | list[dict[str, str]]
    columns: dict[str, Any]

    def prompt(self, prompt_id: str) -> Prompt:
        return Prompt(
            prompt_id=prompt_id, token_ids=self.token_ids, source=self.source, columns=self.columns
        )


class _Stream(Protocol):
    name: str
    num_skipped: int
    size: int | None  # items of one epoch; None for an endless stream
    row_numbers: frozenset[int] | None  # of all items; None for an endless stream

    def at(self, cursor: int) -> tuple[_Item, int]:
        """Return the item at index `cursor` of the stream, and its epoch."""
        ...

    def rows(self) -> Sequence[_Item]:
        """Return all items of an epoch in the order of the file, or the first of an endless stream."""
        ...

    def for_sft(self) -> _Stream:
        """Return a stream of these rows in another order; of other rows for an endless task."""
        ...


class PromptSource:
    """Source of training prompts. Not safe for threads: it has one owner.

    Raises `DataError` when built from data that cannot be used.
    """

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        check_template(data, tokenizer)
        self.cursor = 0
        self._tokenizer = tokenizer
        self._stream = _make_stream(data, tokenizer, str(seed))

    @property
    def num_skipped(self) -> int:
        """Number of rows that are skipped because their prompt is too long."""
        return self._stream.num_skipped

    @property
    def epoch_size(self) -> int | None:
        """Prompts of one epoch without the skipped ones; None for a task without `data.limit`."""
        return self._stream.size

    def of_one_epoch(self, limit: int) -> Iterator[tuple[str, Prompt]]:
        """Yield the first `limit` prompts in the order of the file, with file and line of each.

        `cursor` does not change. An endless task has only its first rows.
        """
        for item in islice(self._stream.rows(), limit):
            yield f"{self._stream.name}, {item.place}", item.prompt(str(item.number))

    @property
    def row_numbers(self) -> frozenset[int] | None:
        """Numbers of the rows that are trained on; None for a task without `data.limit`."""
        return self._stream.row_numbers

    def next(self) -> Prompt:
        """Return the next prompt. The stream never ends."""
        item, epoch = self._stream.at(self.cursor)
        self.cursor += 1
        return item.prompt(f"{item.number}-e{epoch}")

    def seek(self, cursor: int) -> None:
        """Continue as if `cursor` prompts had been drawn."""
        if cursor < 0:
            raise DataError(f"cursor = {cursor}: the number of prompts drawn cannot be negative")
        self.cursor = cursor

    def sft_examples(
        self, num: int, target_column: str, max_target_tokens: int | None = None
    ) -> Iterator[SftExample]:
        """Yield `num` prompts with their targets, in a separate order. `cursor` does not change.

        Raises `DataError` while examples are drawn: no such column, a target that is not text, or one
        longer than `max_target_tokens` (end token included).
        """
        stream = self._stream.for_sft()
        for index in range(num):
            item, _ = stream.at(index)
            row = Row(item.number, item.place, item.columns)
            target = column(row, stream.name, target_column, "sft.target_column")
            where = f"{stream.name}, {item.place}, column {target_column!r}"
            target_ids = _target_ids(target, where, self._tokenizer, max_target_tokens)
            yield SftExample(prompt_ids=item.token_ids, target_ids=target_ids)


def sft_examples(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    num: int,
    target_column: str,
    max_target_tokens: int | None = None,
) -> Iterator[SftExample]:
    """Build a source and yield its `sft_examples`."""
    source = PromptSource(data, tokenizer, seed)
    return source.sft_examples(num, target_column, max_target_tokens)


def evaluation_prompts(
    data: Data,
    evaluation: Evaluation,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    num: int,
) -> list[Prompt]:
    """Return the first `num` held-out prompts of `evaluation.path`, or of the built-in task.

    They are always the same and in the same order. Raises `DataError`, also if there are fewer.
    """
    if num == 0:
        return []
    check_template(data, tokenizer)
    if evaluation.path is not None:
        path = expand(evaluation.path)
        rows, name = read_rows(path), str(path)
    elif data.task is not None:
        rows, name = _task_rows(held_out_rows(data.task, seed, num), 0), f"task {data.task}"
    else:
        raise DataError(
            f"evaluation.num_prompts = {num} with data.path: held-out prompts need a separate "
            "file. Set evaluation.path"
        )
    items, _ = _usable(rows, name, data, tokenizer)
    if len(items) < num:
        raise DataError(
            f"{name}: {len(items)} usable prompts, evaluation.num_prompts = {num}. Lower it, or "
            "give a larger file"
        )
    return [item.prompt(f"{_HELD_OUT_ID}{item.number}") for item in items[:num]]


def set_prompts(
    data: Data,
    evaluation: Evaluation,
    of: EvaluationSet,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Prompt]:
    """Return the prompts of an evaluation set, always the same and in the same order.

    The set of `evaluation.num_prompts` has exactly that many, every other one at most its
    `num_prompts`. Raises `DataError`, also for a set without prompts.
    """
    if of.name == HELD_OUT and evaluation.num_prompts:
        return evaluation_prompts(data, evaluation, seed, tokenizer, evaluation.num_prompts)
    check_template(data, tokenizer)
    path, skipped = held_out_path(evaluation, of), 0
    if path is not None:
        skipped = of.data.skip_rows if of.data else 0
        rows, name = read_rows(expand(path)), str(expand(path))
    else:
        task = data.task if of.data is None else of.data.task
        assert task is not None
        assert of.num_prompts is not None
        rows, name = _task_rows(held_out_rows(task, seed, of.num_prompts), 0), f"task {task}"
    if of.data is not None and of.data.prompt_column is not None:
        data = data.model_copy(update={"prompt_column": of.data.prompt_column})
    items, _ = _usable(rows[skipped:], name, data, tokenizer)
    if not items:
        raise DataError(
            f"evaluation.sets: the set {of.name!r} has no prompts: {name} has {len(rows)} rows, and "
            f"data.skip_rows = {skipped}. Lower it"
        )
    return [item.prompt(f"{_HELD_OUT_ID}{item.number}") for item in items[: of.num_prompts]]


def held_out_path(evaluation: Evaluation, of: EvaluationSet) -> str | None:
    """Return the file of an evaluation set; None for a built-in task."""
    return evaluation.path if of.data is None else of.data.path


def check_overlap(
    data: Data,
    source: PromptSource,
    evaluation: Evaluation,
    of: EvaluationSet,
    prompts: Sequence[Prompt],
) -> None:
    """Raise `DataError` if rows of the file of `[data]` are both in the set `of` and trained on."""
    path, trained = held_out_path(evaluation, of), source.row_numbers
    if evaluation.allow_overlap or path is None or data.path is None or trained is None:
        return
    if expand(path).resolve() != expand(data.path).resolve():
        return
    both = sorted(trained & {int(p.prompt_id.removeprefix(_HELD_OUT_ID)) for p in prompts})
    if both:
        raise DataError(
            f"[data] and the evaluation set {of.name!r} both read {expand(path)}, and {len(both)} of "
            f"the set's {len(prompts)} prompts are trained on (the first is row {both[0]}, from 0). "
            "Train on the first n rows with data.limit = n and give the set data.skip_rows = n, "
            "give it another file, or set evaluation.allow_overlap = true"
        )


class _Epochs:
    """Stream of a finite set of rows, reshuffled in every epoch."""

    def __init__(
        self, name: str, items: Sequence[_Item], num_skipped: int, seed: str, shuffle: bool
    ) -> None:
        self.name = name
        self.num_skipped = num_skipped
        self.size: int | None = len(items)
        self.row_numbers: frozenset[int] | None = frozenset(item.number for item in items)
        self._items = items
        self._seed = seed
        self._shuffle = shuffle
        self._order = lru_cache(maxsize=2)(self._make_order)

    def at(self, cursor: int) -> tuple[_Item, int]:
        epoch, index = divmod(cursor, len(self._items))
        return self._items[self._order(epoch)[index]], epoch

    def rows(self) -> Sequence[_Item]:
        return self._items

    def for_sft(self) -> _Epochs:
        seed = f"{self._seed}/sft"
        return _Epochs(self.name, self._items, self.num_skipped, seed, self._shuffle)

    def _make_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._items))
        seed = xxh3_64_intdigest(f"{self._seed}/{epoch}".encode())
        return np.random.default_rng(seed).permutation(len(self._items))


class _TaskBlocks:
    """Endless stream of fresh rows of a built-in task, all of epoch 0."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase, seed: str) -> None:
        self.name = f"task {data.task}"
        self.num_skipped = 0
        self.size: int | None = None
        self.row_numbers: frozenset[int] | None = None
        self._data = data
        self._tokenizer = tokenizer
        self._seed = seed
        self._block = lru_cache(maxsize=2)(self._make_block)
        self._block(0)  # raises now if the rows cannot be used

    def at(self, cursor: int) -> tuple[_Item, int]:
        block, index = divmod(cursor, _TASK_BLOCK_ROWS)
        return self._block(block)[index], 0

    def rows(self) -> Sequence[_Item]:
        return self._block(0)

    def for_sft(self) -> _TaskBlocks:
        return _TaskBlocks(self._data, self._tokenizer, f"{self._seed}/sft")

    def _make_block(self, block: int) -> Sequence[_Item]:
        assert self._data.task is not None
        rows = train_rows(self._data.task, self._seed, block, _TASK_BLOCK_ROWS)
        numbered = _task_rows(rows, block * _TASK_BLOCK_ROWS)
        data = self._data.model_copy(update={"on_long_prompt": "error"})
        return _usable(numbered, self.name, data, self._tokenizer)[0]


def _make_stream(data: Data, tokenizer: PreTrainedTokenizerBase, seed: str) -> _Stream:
    if data.path is not None:
        path = expand(data.path)
        rows, name = read_rows(path, data.limit), str(path)
    elif data.task is None:
        raise DataError("data: neither path nor task is given. Set one of them")
    elif data.limit is None:
        return _TaskBlocks(data, tokenizer, seed)
    else:
        rows = _task_rows(train_rows(data.task, seed, 0, data.limit), 0)
        name = f"task {data.task}"
    items, num_skipped = _usable(rows, name, data, tokenizer)
    return _Epochs(name, items, num_skipped, seed, data.shuffle)


def _task_rows(rows: Sequence[dict[str, str]], first: int) -> list[Row]:
    return [Row(n, f"row {n}", columns) for n, columns in enumerate(rows, start=first)]


def _usable(
    rows: Sequence[Row], name: str, data: Data, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[_Item], int]:
    """Return the rows whose prompt is short enough, and the number of skipped rows."""
    items: list[_Item] = []
    long: list[tuple[str, int]] = []
    for row in rows:
        source = column(row, name, data.prompt_column, "data.prompt_column")
        where = f"{name}, {row.place}, column {data.prompt_column!r}"
        source = drop_answer(source, where) if data.drop_answer else source
        token_ids = render(source, where, data, tokenizer)
        if len(token_ids) > data.max_prompt_tokens:
            long.append((row.place, len(token_ids)))
            continue
        token_ids.flags.writeable = False  # shared by all epochs
        others = {key: value for key, value in row.columns.items() if key != data.prompt_column}
        items.append(_Item(row.number, row.place, token_ids, source, others))
    if long and (data.on_long_prompt == "error" or not items):
        raise DataError(_explain_long(name, data, long, len(rows)))
    return items, len(long)


def _explain_long(name: str, data: Data, long: list[tuple[str, int]], num_rows: int) -> str:
    places = ", ".join(place for place, _ in long[:_NAMED_ROWS])
    more = ", ..." if len(long) > _NAMED_ROWS else ""
    cure = "Raise data.max_prompt_tokens"
    if data.on_long_prompt == "error" and len(long) < num_rows:
        cure += ", or set data.on_long_prompt = 'skip' to skip them"
    return (
        f"{name}: {len(long)} of {num_rows} prompts are longer than data.max_prompt_tokens = "
        f"{data.max_prompt_tokens} ({places}{more}; the longest has {max(n for _, n in long)} "
        f"tokens). {cure}"
    )


def _target_ids(
    target: Any, where: str, tokenizer: PreTrainedTokenizerBase, max_target_tokens: int | None
) -> np.ndarray:
    if not isinstance(target, str) or not target:
        found = f"{type(target).__name__} {target!r}"
        raise DataError(f"{where}: found {found}, expected the text to learn. Correct the row")
    ids = tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*ids, tokenizer.eos_token_id]
    if max_target_tokens is not None and len(ids) > max_target_tokens:
        raise DataError(
            f"{where}: {len(ids)} tokens with the end token, {max_target_tokens} fit. Raise "
            "generation.max_response_tokens, or shorten the target"
        )
    return np.array(ids, dtype=np.int32)
