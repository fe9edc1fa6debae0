"""Section of held-out evaluation: sets of prompts, how they are answered, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.sections.section import Section

HELD_OUT = "held_out"
"""Name of the set that `evaluation.num_prompts` and `evaluation.path` describe."""


class HeldOutData(Section):
    """Source of held-out prompts: a built-in task, or a JSONL or Parquet file."""

    task: Literal["sort_digits"] | None = None
    """Built-in task that generates held-out prompts."""
    path: str | None = None
    """A .jsonl or .parquet file. `${NAME}` is replaced by the environment variable."""
    prompt_column: str | None = None
    """Column with the prompt. Default: `data.prompt_column`."""
    skip_rows: int = Field(default=0, ge=0)
    """Rows of the file to skip, from the first. With the file of `[data]`, give the number of
    rows that `data.limit` trains on."""

    def problems(self) -> Iterator[str]:
        if (self.task is None) == (self.path is None):
            yield (
                f"task and path: {'both' if self.path else 'neither'} given. Give path (a .jsonl or "
                ".parquet file) or task (a built-in task), not both"
            )
        if self.task is not None and self.skip_rows:
            yield "{skip_rows} with {task}: a task has no rows to skip. Remove it"


class EvaluationSet(Section):
    """A set of held-out prompts, evaluated before and after training and every `every` steps."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the set in metrics, such as "maths": lower-case letters, digits, "_" and "-"."""
    data: HeldOutData | None = None
    """Source of the prompts. Default: the run's held-out split, which is `evaluation.path` or the
    held-out prompts of `data.task`."""
    every: int = Field(default=0, ge=0)
    """Steps between two evaluations during training. 0: only before and after."""
    skip_first: bool = False
    """Whether to skip the evaluation before training."""
    num_prompts: PositiveInt | None = None
    """Largest number of prompts, from the first. Default: all of a file. Required for a task."""
    samples: PositiveInt = 1
    """Answers per prompt. Their mean reward is the prompt's."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of the answers. 0: greedy."""
    max_response_tokens: PositiveInt | None = None
    """Largest number of tokens of an answer. Default: `generation.max_response_tokens`."""
    rewards: list[str] = Field(default_factory=list)
    """Names of rewards in `scoring.rewards`, also of watched ones. Their weighted sum is the reward of
    an answer. Default: the reward that the run trains on."""

    def problems(self) -> Iterator[str]:
        if self.samples > 1 and self.temperature == 0:
            yield (
                "{samples} with {temperature}: greedy answers to one prompt are all the same. Set a "
                "temperature, or samples = 1"
            )


class Evaluation(Section):
    """Evaluation on held-out prompts, before, during and after training. `num_prompts` and `path` are
    the short form of one set: greedy answers before and after training, scored as usual."""

    num_prompts: int = Field(default=0, ge=0)
    """Held-out prompts of the set "held_out". 0: no such set."""
    path: str | None = None
    """Held-out file with the same columns as the data. A built-in task generates held-out prompts."""
    sets: list[EvaluationSet] = Field(default_factory=list)
    """[[evaluation.sets]]: further sets. The first set of all is the one of the learning curve."""
    hold_s: float = Field(default=30.0, ge=0)
    """Most seconds for which the generation workers keep a version that is being evaluated before they
    take the next one. The learner trains on meanwhile, within its staleness bound. Past it, the
    evaluation is cancelled and its point skipped. 0: workers never wait for an evaluation."""
    allow_overlap: bool = False
    """Whether a set may use rows of the file of `[data]` that are trained on."""

    def problems(self) -> Iterator[str]:
        names = [each.name for each in self.all_sets]
        for name in sorted({name for name in names if names.count(name) > 1}):
            own = " (evaluation.num_prompts makes one of that name)" if name == HELD_OUT else ""
            yield f"evaluation.sets: {names.count(name)} sets are named {name!r}{own}. Rename one"

    @property
    def all_sets(self) -> tuple[EvaluationSet, ...]:
        """Every set of the run. The first one is the set of the learning curve."""
        short = EvaluationSet(name=HELD_OUT, num_prompts=self.num_prompts or None)
        return (*([short] if self.num_prompts else []), *self.sets)
