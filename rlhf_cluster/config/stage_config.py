"""The run file of an offline stage, and the checks between its sections.

A file with a `[stage]` section is one of these; without, it is a run of reinforcement learning
(`rlhf_cluster.config.run_config`). Checks between sections belong here and in `config.check_*`. Each
message names both keys, their values and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pydantic import model_validator

from rlhf_cluster.config.check_training import check_checkpoint
from rlhf_cluster.offline import (
    STAGES,
    StageSection,
)
from rlhf_cluster.sections.every_run import Model, RunFile
from rlhf_cluster.sections.offline_stage import (
    StageData,
    StageRun,
)
from rlhf_cluster.sections.section import check_all
from rlhf_cluster.sections.training import (
    Checkpoint,
    Learner,
)


class StageConfig(RunFile[StageRun]):
    """One offline stage."""

    stage: StageSection
    """Kind of the stage and its settings, chosen by `type`."""
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


def _check_data(c: StageConfig) -> Iterator[str]:
    if c.run.units_per_step < c.learner.ranks:
        yield (
            "{run.units_per_step} is under {learner.ranks}: some ranks would have nothing to train on. "
            "Raise it, or lower the ranks"
        )
    init = c.model.init
    if c.data.template == "chat" and init is not None and init.tokenizer.type == "characters":
        yield (
            "{data.template} with [model.init]: the made character tokenizer has no chat template. Use "
            "data.template = 'none', model.init.tokenizer.type = 'bpe', or model.path"
        )


def _check_lengths(c: StageConfig) -> Iterator[str]:
    longest, size = c.data.max_tokens, c.stage.max_unit_size
    if c.model.init is not None and longest > c.model.init.max_position:
        yield (
            "{data.max_tokens} is over {model.init.max_position}. Lower it, or raise max_position"
        )
    if longest * size > c.tokens_per_row:
        yield (
            f"{{data.max_tokens}}, {size} times (the sequences of a unit), is over "
            "{learner.tokens_per_row}: the longest unit would fit no row. Raise tokens_per_row or "
            "lower max_tokens"
        )
    if c.tokens_per_row > c.learner.tokens_per_micro_batch:
        yield (
            f"learner.tokens_per_row = {c.tokens_per_row} (default: the longest unit) is over "
            "{learner.tokens_per_micro_batch}. Raise the latter"
        )


def _check_learner(c: StageConfig) -> Iterator[str]:
    learner = c.learner
    for key in ("epochs", "minibatches"):
        if getattr(learner, key) != 1:
            yield (
                f"{{learner.{key}}} with [stage]: a batch is one optimizer step there. Use run.epochs "
                "and run.units_per_step, and remove it"
            )
    if learner.on_loss != "restart":
        yield (
            "{learner.on_loss} with [stage]: a stage does not change its number of ranks. Remove it; "
            "after a failure the same command resumes, with any learner.ranks"
        )
    if learner.spares:
        yield (
            "{learner.spares} with [stage]: nothing waits for a stage as pools do for a run. Remove "
            "it; after a failure the ranks of a stage are started again"
        )


def _check_reference(c: StageConfig) -> Iterator[str]:
    lora, sharded = c.learner.lora, c.learner.backend == "fsdp2"
    update = getattr(c.stage, "reference_update", None)
    if update is not None and update.type != "fixed" and (lora is not None or not sharded):
        found = "[learner.lora]" if lora else "{learner.backend}"
        yield (
            f"{{stage.reference_update.type}} with {found}: only whole models under FSDP2 are mixed "
            "into the reference. Set learner.backend = 'fsdp2' without [learner.lora], or keep the "
            "reference fixed"
        )
    if STAGES[c.stage.type].needs_reference and lora is not None and not sharded:
        yield (
            "{stage.type} with [learner.lora] and {learner.backend}: adapters are exchanged for those "
            "of the reference under FSDP2 only. Set learner.backend = 'fsdp2', or remove [learner.lora]"
        )
    if c.stage.type == "distillation" and not sharded:
        yield (
            "{stage.type} with {learner.backend}: a teacher's hidden states and output projection go "
            "into the passes under FSDP2 only. Set learner.backend = 'fsdp2'"
        )


def _check_evaluation(c: StageConfig) -> Iterator[str]:
    if c.data.held_out:
        return
    if c.run.evaluate_every:
        yield (
            "{run.evaluate_every} with data.held_out = 0: there is nothing to evaluate on. Set "
            "data.held_out, or remove evaluate_every"
        )
    if c.checkpoint.keep_best:
        yield (
            "{checkpoint.keep_best} with data.held_out = 0: a stage's score is that of its held-out "
            "units. Set data.held_out, or remove keep_best"
        )


_CHECKS: Sequence[Callable[[StageConfig], Iterator[str]]] = (
    _check_data,
    _check_lengths,
    _check_learner,
    _check_reference,
    _check_evaluation,
    lambda c: check_checkpoint(c.checkpoint, c.run_dir),
)
