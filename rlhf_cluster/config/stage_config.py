"""The run file of an offline stage, and the checks between its sections.

A file with a `[stage]` section is one of these; without, it is a run of reinforcement learning
(`rlhf_cluster.config.run_config`). Cross-checks belong here and in `config.check_*`. Each message
names both keys, their values and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import model_validator

from rlhf_cluster.config.check_training import check_checkpoint, check_model, check_ranks
from rlhf_cluster.offline import (
    STAGES,
    StageSection,
)
from rlhf_cluster.sections.every_run import RunFile
from rlhf_cluster.sections.offline_stage import (
    StageData,
    StageRun,
)
from rlhf_cluster.sections.rl_run import (
    Checkpoint,
    Learner,
    Model,
)
from rlhf_cluster.sections.section import check_all


class StageConfig(RunFile[StageRun]):
    """One offline stage."""

    stage: StageSection
    model: Model
    data: StageData
    learner: Learner
    checkpoint: Checkpoint = Checkpoint()

    @property
    def tokens_per_row(self) -> int:
        """Capacity of a row in tokens: `learner.tokens_per_row`, else the longest unit of the data."""
        longest = self.data.max_tokens * self.stage.max_unit_size
        return self.learner.tokens_per_row or longest

    @model_validator(mode="after")
    def _sections_agree(self) -> StageConfig:
        check_all(self, _CHECKS)
        return self


def _check_length_of_run(c: StageConfig) -> None:
    if c.run.steps is not None and c.run.epochs is not None:
        raise ValueError("run.steps and run.epochs: both given. Give one of them")
    if c.run.units_per_step < c.learner.ranks:
        raise ValueError(
            f"run.units_per_step = {c.run.units_per_step} is under learner.ranks = {c.learner.ranks}: "
            "some ranks would have nothing to train on. Raise it, or lower the ranks"
        )


def _check_sources(c: StageConfig) -> None:
    for number, source in enumerate(c.data.sources):
        key = f"data.sources.{number}"
        if (source.task is None) == (source.path is None):
            found = "both" if source.path else "neither"
            raise ValueError(
                f"{key}.task and {key}.path: {found} given. Give path (a data file) or task (a "
                "built-in task), not both"
            )
        if source.task is not None and source.limit is None:
            raise ValueError(
                f"{key}.task = {source.task!r} without limit: a task has no end. Give the number of "
                "rows with limit"
            )


def _check_template(c: StageConfig) -> None:
    data = c.data
    if data.template != "chat" and (data.system_prompt is not None or data.drop_system):
        key = "drop_system" if data.drop_system else "system_prompt"
        raise ValueError(
            f"data.{key} needs data.template = 'chat', found {data.template!r}. Set the template, or "
            f"remove {key}"
        )
    init = c.model.init
    if data.template == "chat" and init is not None and init.tokenizer.type == "characters":
        raise ValueError(
            "data.template = 'chat' with [model.init]: the made character tokenizer has no chat "
            "template. Use data.template = 'none', model.init.tokenizer.type = 'bpe', or model.path"
        )


def _check_lengths(c: StageConfig) -> None:
    longest, size = c.data.max_tokens, c.stage.max_unit_size
    init = c.model.init
    if init is not None and longest > init.max_position:
        raise ValueError(
            f"data.max_tokens = {longest} is over model.init.max_position = {init.max_position}. Lower "
            "it, or raise max_position"
        )
    if longest * size > c.tokens_per_row:
        raise ValueError(
            f"data.max_tokens = {longest}, {size} times (the sequences of a unit), is over "
            f"learner.tokens_per_row = {c.learner.tokens_per_row}: the longest unit would fit no row. "
            "Raise tokens_per_row or lower max_tokens"
        )
    if c.tokens_per_row > c.learner.tokens_per_micro_batch:
        raise ValueError(
            f"learner.tokens_per_row = {c.tokens_per_row} (default: the longest unit) is over "
            f"learner.tokens_per_micro_batch = {c.learner.tokens_per_micro_batch}. Raise the latter"
        )


def _check_learner(c: StageConfig) -> None:
    learner = c.learner
    for key in ("epochs", "minibatches"):
        if getattr(learner, key) != 1:
            raise ValueError(
                f"learner.{key} = {getattr(learner, key)} with [stage]: a batch is one optimizer step "
                "there. Use run.epochs and run.units_per_step, and remove it"
            )
    if learner.on_loss != "restart":
        raise ValueError(
            f"learner.on_loss = {learner.on_loss!r} with [stage]: a stage does not change its number "
            "of ranks. Remove it; after a failure the same command resumes, with any learner.ranks"
        )
    if learner.spares:
        raise ValueError(
            f"learner.spares = {learner.spares} with [stage]: nothing waits for a stage as pools do "
            "for a run. Remove it; after a failure the ranks of a stage are started again"
        )
    check_ranks(learner)
    if (learner.schedule == "wsd") != (learner.decay_steps is not None):
        raise ValueError(
            f"learner.schedule = {learner.schedule!r} with learner.decay_steps = "
            f"{learner.decay_steps}: the steps of the decay belong to schedule = 'wsd', and it needs "
            "them. Set both, or neither"
        )


def _check_reference(c: StageConfig) -> None:
    learner = c.learner
    update = getattr(c.stage, "reference_update", None)
    if update is not None and update.type != "fixed":
        _check_moving_reference(c, update.type)
    if not STAGES[c.stage.type].needs_reference or learner.lora is None:
        return
    if learner.backend != "fsdp2":
        raise ValueError(
            f"stage.type = {c.stage.type!r} with [learner.lora] and learner.backend = "
            f"{learner.backend!r}: adapters are exchanged for those of the reference under FSDP2 only. "
            "Set learner.backend = 'fsdp2', or remove [learner.lora]"
        )


def _check_moving_reference(c: StageConfig, update: str) -> None:
    if c.learner.lora is None and c.learner.backend == "fsdp2":
        return
    found = "[learner.lora]" if c.learner.lora else f"learner.backend = {c.learner.backend!r}"
    raise ValueError(
        f"stage.reference_update.type = {update!r} with {found}: only whole models under FSDP2 are "
        "mixed into the reference. Set learner.backend = 'fsdp2' without [learner.lora], or keep the "
        "reference fixed"
    )


def _check_teacher(c: StageConfig) -> None:
    if c.stage.type == "distillation" and c.learner.backend != "fsdp2":
        raise ValueError(
            f"stage.type = {c.stage.type!r} with learner.backend = {c.learner.backend!r}: a teacher's "
            "hidden states and output projection go into the passes under FSDP2 only. Set "
            "learner.backend = 'fsdp2'"
        )


def _check_evaluation(c: StageConfig) -> None:
    if c.run.evaluate_every and not c.data.held_out:
        raise ValueError(
            f"run.evaluate_every = {c.run.evaluate_every} with data.held_out = 0: there is nothing to "
            "evaluate on. Set data.held_out, or remove evaluate_every"
        )
    if c.checkpoint.keep_best and not c.data.held_out:
        raise ValueError(
            f"checkpoint.keep_best = {c.checkpoint.keep_best} with data.held_out = 0: a stage's score "
            "is that of its held-out units. Set data.held_out, or remove keep_best"
        )


def _check_model(c: StageConfig) -> None:
    check_model(c.model)


def _check_checkpoint(c: StageConfig) -> None:
    check_checkpoint(c.checkpoint, c.run_dir)


_CHECKS: Sequence[Callable[[StageConfig], None]] = (
    _check_model,
    _check_length_of_run,
    _check_sources,
    _check_template,
    _check_lengths,
    _check_learner,
    _check_reference,
    _check_teacher,
    _check_evaluation,
    _check_checkpoint,
)
