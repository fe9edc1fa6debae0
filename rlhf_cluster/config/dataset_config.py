"""The run file of a stage that makes a data set: a model samples, the scoring pool scores, rows stay.

    [stage] type = "generate"        samples per prompt, and which of them become rows
    [run], [data], [generation], [scoring]       prompts and pools as in reinforcement learning

Promises: what the pools would refuse is refused here (`as_run` is what they are started with); a
setting that the selection does not read is refused. `Revise` refuses texts of requests with unknown or
missing places.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlhf_cluster.algorithms.ppo import PpoConfig
from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.config.run_config import RunConfig
from rlhf_cluster.rewards.http_client import ServerSection
from rlhf_cluster.sections.every_run import Model, RunFile, RunSection
from rlhf_cluster.sections.rl_run import Buffer, Data, Generation, Run
from rlhf_cluster.sections.section import Section, check_all, messages_of
from rlhf_cluster.sections.training import Checkpoint, Learner

CRITIQUE = """Below are a question and an answer to it.

<question>
{prompt}
</question>
<answer>
{response}
</answer>

Judge the answer by this principle: {principle}
Name what in the answer goes against the principle, and what it lacks. Do not answer the question.
"""

REVISION = """Below are a question, an answer to it, and a critique of that answer.

<question>
{prompt}
</question>
<answer>
{response}
</answer>
<critique>
{critique}
</critique>

The critique is by this principle: {principle}
Write the answer anew so that nothing of the critique holds any more. Give the new answer alone.
"""

_PLACES = {
    "critique_request": ("prompt", "response", "principle"),
    "revision_request": ("prompt", "response", "principle", "critique"),
}

_NEEDED = {
    "critique_request": ("response", "principle"),
    "revision_request": ("response", "critique"),
}


class ChatEndpoint(ServerSection):
    """An OpenAI-compatible server that criticises and revises in place of the model."""

    url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """Base URL of the endpoint, such as http://judge:8000/v1; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """Name of the model at that endpoint."""
    max_tokens: PositiveInt = 1024
    """Longest critique and longest revision, in tokens of that model."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of that model. With 0, an unusable reply mostly repeats when asked again."""
    parallel: PositiveInt = 8
    """Requests in flight at once."""


class Revise(Section):
    """Each response is criticised by a principle and revised after the critique, `rounds` times."""

    principles: tuple[str, ...] = Field(min_length=1)
    """Principles to judge by. Each round of a response uses one, chosen by `run.seed`.

    No principle repeats for a response before all were used.
    """
    rounds: PositiveInt = 1
    """Critiques, each with its revision, of one response."""
    attempts: PositiveInt = 2
    """Most requests for one critique or revision until it has text and an end."""
    critique_request: str = CRITIQUE
    """Text of the request for a critique, with {prompt}, {response} and {principle}."""
    revision_request: str = REVISION
    """Text of the request for a revision: the same places, and {critique}."""
    endpoint: ChatEndpoint | None = None
    """Server that writes critiques and revisions. Default: the model itself, in the generation pool."""

    @field_validator("principles")
    @classmethod
    def _check_principles(cls, principles: tuple[str, ...]) -> tuple[str, ...]:
        if any(not principle.strip() for principle in principles):
            raise ValueError("holds a blank text. Remove it")
        if len(set(principles)) < len(principles):
            raise ValueError("holds a principle twice. Remove one")
        return principles

    @field_validator("critique_request", "revision_request")
    @classmethod
    def _check_request(cls, text: str, info: ValidationInfo) -> str:
        name = info.field_name or ""
        known = ", ".join(f"{{{place}}}" for place in _PLACES[name])
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{error}. Write a brace that is none of {known} twice") from None
        places = [place for _, place, spec, form in parts if place is not None]
        if any(spec or form for _, _, spec, form in parts) or set(places) - {*_PLACES[name]}:
            raise ValueError(f"has a place that is none of {known}. Write other braces twice")
        missing = [place for place in _NEEDED[name] if place not in places]
        if missing:
            raise ValueError(
                f"has no {{{missing[0]}}}, so that the reply could not be about it. Add it"
            )
        return text


Select = Literal[
    "all", "best_of_n", "threshold", "pairs", "step_labels", "revisions", "revision_pairs"
]

READ_BY: dict[str, tuple[Select, ...]] = {
    "keep": ("best_of_n", "threshold", "pairs"),
    "threshold": ("best_of_n", "threshold", "step_labels"),
    "min_margin": ("pairs", "revision_pairs"),
    "completions": ("step_labels",),
    "revise": ("revisions", "revision_pairs"),
    "prefer": ("revision_pairs",),
}
"""Settings of `[stage]`, and the selections that read them."""


class GenerateSection(Section):
    """Number of samples per prompt, and which of them become rows of the data set."""

    type: Literal["generate"] = "generate"
    samples: PositiveInt
    """Responses to each prompt."""
    select: Select
    """Rule by which samples become rows.

    `all`: every response. `best_of_n`: the `keep` responses of highest reward. `threshold`: the
    responses whose reward is at least `threshold`. `pairs`: better responses against worse ones.
    `step_labels`: how often `completions` from the end of each reasoning step reach `threshold`.
    `revisions`: each response after critique and revision. `revision_pairs`: the revision against the
    response.
    """
    keep: PositiveInt | None = None
    """Most rows per prompt. Default: 1; with select = "threshold", all."""
    threshold: float | None = None
    """Least reward of a response that is kept, or treated as right. Optional with `best_of_n`."""
    min_margin: PositiveFloat | None = None
    """Least difference of the rewards of a pair, for pairs by reward. Default: any above 0."""
    completions: PositiveInt | None = None
    """Completions from the end of each step; with select = "step_labels"."""
    revise: Revise | None = None
    """Principles of critique and revision, and the model that writes them."""
    prefer: Literal["revision", "reward"] | None = None
    """Chosen side of a pair with select = "revision_pairs".

    `revision` (default): the revision. `reward`: the one of higher reward.
    """
    cut: Literal["skip", "keep"] = "skip"
    """Treatment of a response that reached `generation.max_response_tokens` without its end.

    `skip`: it is not used, and counted. `keep`: it is used as it is.
    """
    deduplicate: bool = True
    """Whether only the first of equal responses to one prompt becomes a row; the others are counted."""

    @property
    def rows_per_prompt(self) -> int:
        """Most rows that one prompt yields."""
        if self.keep is not None:
            return self.keep
        return 1 if self.select in ("best_of_n", "pairs") else self.samples

    @model_validator(mode="after")
    def _check(self) -> GenerateSection:
        for name, selections in READ_BY.items():
            value = getattr(self, name)
            if value is not None and self.select not in selections:
                shown = "a section" if isinstance(value, Section) else repr(value)
                raise ValueError(
                    f"{name} = {shown} with select = {self.select!r}, which does not read it. Remove "
                    f"it, or use {' or '.join(map(repr, selections))}"
                )
        if self.select == "revision_pairs" and self.min_margin and self.prefer != "reward":
            raise ValueError(
                f"min_margin = {self.min_margin:g} with select = 'revision_pairs', whose pairs are not "
                "by reward. Remove it, or set prefer = 'reward'"
            )
        needed = {"threshold": ("threshold",), "step_labels": ("threshold", "completions")}
        needed |= dict.fromkeys(READ_BY["revise"], ("revise",))
        for name in needed.get(self.select, ()):
            if getattr(self, name) is None:
                raise ValueError(f"select = {self.select!r} without {name}. Set stage.{name}")
        least = {"pairs": 2 * self.rows_per_prompt, "best_of_n": self.rows_per_prompt}
        if self.samples < (bound := least.get(self.select, 1)):
            raise ValueError(
                f"samples = {self.samples} with select = {self.select!r} and keep = "
                f"{self.rows_per_prompt}: {bound} samples are needed. Raise samples, or lower keep"
            )
        return self


class GenerateRun(RunSection):
    """Run directory and pace of a stage that makes a data set."""

    max_in_flight_groups: PositiveInt = 64
    """Prompts being sampled or scored at once."""
    record_every: PositiveInt = 16
    """Finished prompts from one line of metrics.jsonl to the next."""
    stall_timeout_s: PositiveFloat = 300.0
    """The stage fails when a pool had no live worker for this long."""


class GenerateConfig(RunFile[GenerateRun]):
    """One stage that makes a data set."""

    stage: GenerateSection
    model: Model
    data: Data
    generation: Generation
    scoring: Scoring

    @property
    def data_file(self) -> Path:
        """JSONL file of the data set. It exists, complete, once all prompts are done."""
        return self.run_dir / "data.jsonl"

    @property
    def checkpoint(self) -> Checkpoint:
        """Settings that switch checkpoints off: finished prompts are in the run directory."""
        return Checkpoint(every=0)

    @property
    def as_run(self) -> RunConfig:
        """Configuration that the pools are started with: a run that trains nothing.

        Raises `ValueError`.
        """
        longest = self.data.max_prompt_tokens + self.generation.max_response_tokens
        return RunConfig(
            run=Run(
                steps=1,
                groups_per_step=1,
                **self.run.model_dump(exclude={"max_in_flight_groups", "record_every"}),
            ),
            model=self.model,
            data=self.data,
            algorithm=PpoConfig(group_size=self.stage.samples),
            generation=self.generation,
            scoring=self.scoring,
            learner=Learner(learning_rate=1e-6, tokens_per_micro_batch=max(16384, longest)),
            buffer=Buffer(durable=False),
            checkpoint=self.checkpoint,
            cluster=self.cluster,
            observe=self.observe,
        )

    @model_validator(mode="after")
    def _sections_agree(self) -> GenerateConfig:
        check_all(self, (_check_frozen, _check_number_of_prompts, _check_pools))
        return self


def _check_frozen(c: GenerateConfig) -> Iterator[str]:
    for name, off in (("reference", False), ("exact_logprobs", False), ("teacher", None)):
        if getattr(c.scoring, name) != off:
            yield (
                f"{{scoring.{name}}} with {{stage.type}}: nothing is trained, and its "
                "log-probabilities would not be read. Remove it"
            )
    if c.generation.quantization == "int8":
        yield (
            "{generation.quantization} with {stage.type}: that form is made of published versions, and "
            "none is published. Remove it, or use one of vLLM's own"
        )


def _check_number_of_prompts(c: GenerateConfig) -> Iterator[str]:
    if c.data.task is not None and c.data.limit is None:
        yield (
            "{data.task} without data.limit: a task has no end. Give the number of prompts with "
            "data.limit"
        )


def _check_pools(c: GenerateConfig) -> Iterator[str]:
    try:
        _ = c.as_run
    except ValidationError as error:
        yield from messages_of(RunConfig, error)
