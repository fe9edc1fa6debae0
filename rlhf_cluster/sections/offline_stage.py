"""Sections that only a stage's run file has.

`rlhf_cluster.config.stage_config` checks what two sections must agree on. Each kind of stage keeps its
own section next to its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_cluster.sections.every_run import RunSection
from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import Dtype


class StageRun(RunSection):
    """Name, length and output of a stage."""

    steps: PositiveInt | None = None
    """Number of optimizer steps. Alternative: `epochs`."""
    epochs: PositiveInt | None = None
    """Number of passes over the data; the last batch may be smaller. Default: 1 if `steps` is not
    given."""
    units_per_step: PositiveInt
    """Units (dialogues, pairs or rankings) per optimizer step, over all ranks."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between two evaluations on held-out units. 0: only before the first and after the last."""
    export_dtype: Dtype = "float32"
    """Type of the weights in `final/`. float32 is lossless."""

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("steps") is None and tree.get("epochs") is None:
            return {**tree, "epochs": 1}
        return tree

    def problems(self) -> Iterator[str]:
        if self.steps is not None and self.epochs is not None:
            yield "run.steps and run.epochs: both given. Give one of them"


class Source(Section):
    """One file or task of `data.sources`."""

    path: str | None = None
    """A .jsonl, .jsonl.gz or .parquet file, or a folder of Hugging Face `datasets`. `${NAME}` is
    replaced by the environment variable."""
    task: Literal["sort_digits"] | None = None
    """Built-in task that generates `limit` rows."""
    weight: PositiveFloat = 1.0
    """Passes over the source per epoch. 2: twice. 0.5: one half of it, and the other half in the next
    epoch."""
    limit: PositiveInt | None = None
    """Number of rows to use, from the first. Default: all."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Mapping of the stage's column names to those in the file, such as {messages = "conversation"}."""


class StageData(Section):
    """Data of a stage, and how its rows become tokens."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Files and tasks that the units come from, at least one; see [[data.sources]]."""
    template: Literal["none", "chat"] = "none"
    """`chat` renders dialogues with the tokenizer's chat template."""
    system_prompt: str | None = None
    """System turn put before every dialogue. Only with template = "chat". A dialogue that already has a
    system turn is refused."""
    drop_system: bool = False
    """Remove the dialogues' own system turns. Only with template = "chat"."""
    max_tokens: PositiveInt
    """Largest number of tokens that the model reads of one sequence."""
    on_long: Literal["error", "skip", "truncate"] = "error"
    """Treatment of a sequence longer than `max_tokens`. `error`: refuse the data. `skip`: skip the
    unit. `truncate`: cut the sequence. The last two are counted."""
    on_unusable: Literal["error", "skip"] = "error"
    """Treatment of a row that fits its layout but has nothing to learn, such as two equal answers.
    `error`: refuse the data. `skip`: skip and count the row."""
    deduplicate: bool = True
    """Skip and count duplicates of earlier units."""
    shuffle: bool = True
    """Whether each epoch has its own random order. False: the order of the sources in every epoch."""
    held_out: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the units that is never trained on. A hash of a unit's key selects it."""
    held_out_limit: PositiveInt = 1024
    """Largest number of held-out units that an evaluation uses."""

    def problems(self) -> Iterator[str]:
        for number, source in enumerate(self.sources):
            key = f"data.sources.{number}"
            if (source.task is None) == (source.path is None):
                yield (
                    f"{key}.task and {key}.path: {'both' if source.path else 'neither'} given. Give "
                    "path (a data file) or task (a built-in task), not both"
                )
            elif source.task is not None and source.limit is None:
                yield (
                    f"{key}.task = {source.task!r} without limit: a task has no end. Give the number "
                    "of rows with limit"
                )
        if self.template != "chat" and (self.system_prompt is not None or self.drop_system):
            key = "drop_system" if self.drop_system else "system_prompt"
            yield (
                f"data.{key} needs data.template = 'chat', found {self.template!r}. Set the template, "
                f"or remove {key}"
            )


class StageSectionBase(Section):
    """Base of the section of every kind of stage."""

    model_kind: ClassVar[Literal["policy", "value"]] = "policy"
    """Kind of the trained model: of tokens (policy) or of values."""

    @property
    def max_unit_size(self) -> int:
        """Sequences of the largest unit."""
        return 1
