"""The sections that only a stage's run file has. What two sections must agree on is checked in
`rlhf_cluster.config.stage_config`; each stage keeps its own section beside its code."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_cluster.sections.every_run import RunSection
from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import Dtype


class StageRun(RunSection):
    """What is run, how long, and where it leaves its files."""

    steps: PositiveInt | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: PositiveInt | None = None
    """How often the data is gone over; the last batch is what is left. Default: once, where `steps` is
    not given."""
    units_per_step: PositiveInt
    """What one optimizer step trains on: dialogues, pairs or rankings, over all ranks."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between two evaluations on held-out units; 0: before the first and after the last only."""
    export_dtype: Dtype = "float32"
    """Type of the weights in `final/`; float32 loses nothing."""

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("steps") is None and tree.get("epochs") is None:
            return {**tree, "epochs": 1}
        return tree


class Source(Section):
    """One file or task of `data.sources`."""

    path: str | None = None
    """A .jsonl, .jsonl.gz or .parquet file, or a folder of Hugging Face `datasets`; `${NAME}` is
    replaced by the environment variable."""
    task: Literal["sort_digits"] | None = None
    """A built-in task, of which `limit` rows are made."""
    weight: PositiveFloat = 1.0
    """How often an epoch goes over the source: 2 is twice, 0.5 one half of it and the other half in the
    next epoch."""
    limit: PositiveInt | None = None
    """Use only the first `limit` rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Name that the stage knows = name in the file, such as {messages = "conversation"}."""


class StageData(Section):
    """What a stage trains on, and how rows become tokens."""

    sources: tuple[Source, ...] = Field(min_length=1)
    template: Literal["none", "chat"] = "none"
    """`chat` renders dialogues with the tokenizer's chat template."""
    system_prompt: str | None = None
    """Put before every dialogue, with template = "chat" only. One that has its own is refused."""
    drop_system: bool = False
    """Leave out the dialogues' own system turns, with template = "chat" only."""
    max_tokens: PositiveInt
    """Tokens that the model reads of one sequence."""
    on_long: Literal["error", "skip", "truncate"] = "error"
    """A sequence over `max_tokens`: refuse the data, leave the unit out, or cut it. The last two are
    counted."""
    on_unusable: Literal["error", "skip"] = "error"
    """A row that fits its layout and teaches nothing, such as two equal answers: refuse the data, or
    leave the row out and count it."""
    deduplicate: bool = True
    """Leave out, and count, what was there before."""
    shuffle: bool = True
    held_out: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the units, by a hash of their content, that is never trained on."""
    held_out_limit: PositiveInt = 1024
    """Held-out units that an evaluation uses, at most."""


class StageSectionBase(Section):
    """What the section of every kind of stage has."""

    model_kind: ClassVar[Literal["policy", "value"]] = "policy"
    """A model of tokens, or one of values."""

    @property
    def max_unit_size(self) -> int:
        """Sequences of the largest unit."""
        return 1
