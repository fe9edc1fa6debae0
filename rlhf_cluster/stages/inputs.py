"""All about a stage's inputs that can be checked before a process starts: model, tokenizer, data.

A model made from numbers is written to a scratch folder, as for a run (`rlhf_cluster.inputs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.config.stage import StageConfig
from rlhf_cluster.data.render import check_template
from rlhf_cluster.data.tokenizer import end_token_ids, load_tokenizer, refuse_other_tokens
from rlhf_cluster.data.unit_stream import UnitStream, load_units
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.inputs import model_dir_of
from rlhf_cluster.learning.make_model import check_fit
from rlhf_cluster.observe.sinks import check_sinks
from rlhf_cluster.stages import build_stage
from rlhf_cluster.stages.base import StageContext


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """Checked inputs of a stage. `model_dir` is below the scratch folder for a made model."""

    model_dir: Path
    stream: UnitStream
    num_steps: int
    units_per_step: int
    end: int | None  # units after which the last epoch is over

    def batch(self, step: int) -> list[Unit]:
        """The units of step `step`, from 0."""
        return self.stream.batch(step, self.units_per_step, self.end)

    @property
    def notes(self) -> list[str]:
        """For people: what of the data is not trained as it stands there."""
        return [f"data: {note}" for note in self.stream.counts.notes]


def check_stage_inputs(config: StageConfig, scratch: Path) -> StageInputs:
    """Raises `DataError` or `ConfigError` for the first input that cannot be used."""
    check_sinks(config.observe.sinks)
    model_dir = model_dir_of(config, scratch)
    tokenizer = load_tokenizer(config.model.tokenizer or str(model_dir))
    check_fit(model_dir, config.data.max_tokens, config.model.tokenizer, "data.max_tokens")
    check_template(config.data, tokenizer)
    if (teacher := getattr(config.stage, "teacher", None)) is not None:
        refuse_other_tokens("stage.teacher", teacher, tokenizer)
        check_fit(teacher, config.data.max_tokens, None, "data.max_tokens")
    own: Any = tokenizer.eos_token_id
    others = [token for token in end_token_ids(tokenizer, model_dir) if token != own]
    context = StageContext(data=config.data, tokenizer=tokenizer, end_ids=(int(own), *others))
    stream = load_units(config.data, build_stage(config.stage, context), config.run.seed)
    size, epochs = config.run.units_per_step, config.run.epochs
    end = None if epochs is None else stream.end_of(epochs)
    num_steps = config.run.steps or math.ceil((end or 0) / size)
    _check_steps(config, num_steps)
    return StageInputs(
        model_dir=model_dir, stream=stream, num_steps=num_steps, units_per_step=size, end=end
    )


def _check_steps(config: StageConfig, num_steps: int) -> None:
    learner = config.learner
    if num_steps < 1:
        raise ConfigError(
            f"run.epochs = {config.run.epochs} of the sources' weights has no unit. Raise it, or the "
            "weights"
        )
    if learner.decay_steps is not None and learner.warmup_steps + learner.decay_steps > num_steps:
        raise ConfigError(
            f"learner.warmup_steps + learner.decay_steps = {learner.warmup_steps} + "
            f"{learner.decay_steps} are over the stage's {num_steps} optimizer steps. Lower them, or "
            "train longer"
        )
