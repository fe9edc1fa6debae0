"""Checks of the inputs of a run or an offline stage, before a process starts.

No file is touched before them. They cover model, draft model, tokenizer, data set and rewards.

- A model made from numbers is written to a scratch folder, so a run that is refused leaves nothing
  behind, and an earlier run of the same name is not deleted for it.
- Rules and user functions are built (functions are imported in their child process), and rules
  score one made-up answer, so a missing column shows before minutes of generation are spent.
- The folders of reward models must exist. The run loads the models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlhf_cluster.config import RunConfig, StageConfig
from rlhf_cluster.data.prompts import PromptSource, SftExample, check_overlap, set_prompts
from rlhf_cluster.data.tokenizer import (
    check_same_tokens,
    check_template,
    end_token_ids,
    load_tokenizer,
)
from rlhf_cluster.data.units import (
    Unit,
    UnitStream,
    load_units,
)
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.make_model import (
    check_fit,
    check_positions,
    make_model,
)
from rlhf_cluster.models.model_folder import (
    checkpoint_shapes,
    refuse_other_draft,
)
from rlhf_cluster.observe.sinks import check_sinks
from rlhf_cluster.offline import build_stage
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.records import FinishReason, Prompt, Rollout
from rlhf_cluster.rewards import RewardConfig, build_rewards
from rlhf_cluster.rewards.reward import Reward
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection, open_reasoning
from rlhf_cluster.weights.manifest import ITEM_BYTES

RULES = ("exact_match", "numeric")

_ENDING_TOKENS = 256
"""Length of the end of a prompt that is searched for an opening tag of reasoning."""


def try_rewards(configs: Sequence[RewardConfig], tokenizer_dir: str, prompt: Prompt) -> None:
    """Build all rewards, and let rules score a made-up answer to `prompt`.

    Raises `ConfigError` with the name of a reward that cannot score it.
    """
    for config in configs:
        name = config.name or config.type
        if config.model_paths:
            for path in map(Path, config.model_paths):
                if path.is_absolute() and not path.is_dir():
                    raise ConfigError(f"reward {name!r}: {path}: no such folder. Correct its path")
            continue
        reward, _ = build_rewards([config], tokenizer_dir, "cpu")[name]
        try:
            if config.type in RULES:
                cast(Reward, reward).score(prompt, [_made_up(prompt)], ["0"])
        except RewardFailure as failure:
            raise ConfigError(f"reward {name!r} cannot score this data set: {failure}") from failure
        finally:
            reward.close()


def check_reasoning(configs: Sequence[RewardConfig], ending: str) -> None:
    """Raise `ConfigError` where a reward expects another `ending` of the rendered prompts.

    Otherwise every completion that lacks a closing tag would score 0, or a guess within reasoning that
    was cut off would be scored.
    """
    for config in configs:
        if not isinstance(config, ReasoningSection):
            continue
        begun = open_reasoning(ending, config.reasoning_tags)
        takes_open = config.prompt_opens_reasoning
        if begun is None and takes_open:
            found = "leaves no tag of reasoning open"
            instead = "false, or name the tags in reasoning_tags"
        elif begun is not None and not begun.strip() and not takes_open:
            found, instead = "ends in an open tag of reasoning", "true"
        else:
            continue
        raise ConfigError(
            f"reward {config.name or config.type!r}: prompt_opens_reasoning = "
            f"{str(takes_open).lower()}, and the first prompt {found}: it ends in {ending[-40:]!r}. "
            f"Set prompt_opens_reasoning = {instead}"
        )


def _made_up(prompt: Prompt) -> Rollout:
    return Rollout(
        rollout_id="trial",
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        response_ids=np.zeros(1, dtype=np.int32),
        sampled_logprobs=np.zeros(1, dtype=np.float32),
        versions=np.zeros(1, dtype=np.int32),
        response_mask=np.ones(1, dtype=bool),
        finish_reason=FinishReason.STOP,
        temperature=1.0,
        worker="trial",
        started_s=0.0,
        finished_s=0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Checked inputs of a run. `model_dir` is below the scratch folder for a made model."""

    model_dir: Path
    prompts: PromptSource
    evaluation_prompts: Mapping[str, Sequence[Prompt]]  # by the name of the set, in order
    warmup: list[SftExample]
    warmup_batch_size: int
    weights_bytes: int  # of a published version

    def warmup_batches(self) -> Iterator[list[SftExample]]:
        examples = iter(self.warmup)
        while batch := list(islice(examples, self.warmup_batch_size)):
            yield batch


def check_inputs(config: RunConfig, scratch: Path) -> Inputs:
    """Check and load the inputs of a run. A made model is written below `scratch`.

    Raises `DataError`, `WeightError` or `ConfigError` for the first input that cannot be used.
    """
    check_sinks(config.observe.sinks)
    model_dir = model_dir_of(config, scratch)
    if (draft := config.generation.draft_folder) is not None:
        refuse_other_draft(draft, checkpoint_shapes(draft), checkpoint_shapes(model_dir))
    tokenizer_dir = config.model.tokenizer or str(model_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    check_fit(model_dir, config.max_sequence_tokens, config.model.tokenizer)
    if (teacher := config.scoring.teacher) is not None:
        check_same_tokens("scoring.teacher", teacher, tokenizer)
        check_fit(teacher, config.max_sequence_tokens)
    prompts = PromptSource(config.data, tokenizer, config.run.seed)
    num_warmup = config.sft.steps * config.sft.batch_size
    max_target_tokens = config.generation.max_response_tokens
    warmup = list(prompts.sft_examples(num_warmup, config.sft.target_column, max_target_tokens))
    prompts.seek(num_warmup)
    for reward in config.scoring.rewards:
        if getattr(reward, "tokenizer", "shared") == "shared":  # it reads the policy's tokens
            for path in filter(os.path.isdir, reward.model_paths):
                check_positions(path, config.max_sequence_tokens)
    first = prompts.next()
    ending = tokenizer.decode(first.token_ids[-_ENDING_TOKENS:].tolist(), skip_special_tokens=False)
    check_reasoning(config.scoring.rewards, str(ending))
    try_rewards(config.scoring.rewards, tokenizer_dir, first)
    prompts.seek(num_warmup)
    return Inputs(
        model_dir=model_dir,
        prompts=prompts,
        evaluation_prompts=_evaluation_prompts(config, prompts, tokenizer),
        warmup=warmup,
        warmup_batch_size=config.sft.batch_size,
        weights_bytes=ITEM_BYTES[config.publish_dtype]
        * sum(prod(shape) for shape in checkpoint_shapes(model_dir).values()),
    )


def _evaluation_prompts(
    config: RunConfig, source: PromptSource, tokenizer: Any
) -> dict[str, list[Prompt]]:
    data, evaluation, found = config.data, config.evaluation, {}
    for each in evaluation.all_sets:
        prompts = set_prompts(data, evaluation, each, config.run.seed, tokenizer)
        check_overlap(data, source, evaluation, each, prompts)
        found[each.name] = prompts
    return found


def model_dir_of(config: RunConfig | StageConfig, scratch: Path) -> Path:
    """Return the model's folder. A made model is written to `scratch`. Raises `DataError`."""
    if config.model.init is not None:
        return make_model(config.model.init, scratch / "model", config.run.seed)
    assert config.model.path is not None
    return Path(config.model.path).absolute()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """Checked inputs of a stage. `model_dir` is below the scratch folder for a made model."""

    model_dir: Path
    stream: UnitStream
    num_steps: int
    units_per_step: int
    end: int | None  # units after which the last epoch is over

    def batch(self, step: int) -> list[Unit]:
        """Return the units of step `step`, from 0."""
        return self.stream.batch(step, self.units_per_step, self.end)

    @property
    def notes(self) -> list[str]:
        """Notes for the user on data that is skipped or changed before training."""
        return [f"data: {note}" for note in self.stream.counts.notes]


def check_stage_inputs(config: StageConfig, scratch: Path) -> StageInputs:
    """Check and load the inputs of an offline stage. A made model is written below `scratch`.

    Raises `DataError` or `ConfigError` for the first input that cannot be used.
    """
    check_sinks(config.observe.sinks)
    model_dir = model_dir_of(config, scratch)
    tokenizer = load_tokenizer(config.model.tokenizer or str(model_dir))
    check_fit(model_dir, config.data.max_tokens, config.model.tokenizer, "data.max_tokens")
    check_template(config.data, tokenizer)
    if (teacher := getattr(config.stage, "teacher", None)) is not None:
        check_same_tokens("stage.teacher", teacher, tokenizer)
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
