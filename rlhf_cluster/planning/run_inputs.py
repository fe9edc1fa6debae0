"""Checks of the inputs of a run or an offline stage, before a process starts.

No file is touched before them. They cover model, draft model, tokenizer, data set and rewards.

- A model made from numbers is written to a scratch folder, so a run that is refused leaves nothing
  behind, and an earlier run of the same name is not deleted for it.
- Checks that do not depend on each other are all made, and their problems raised together.
- Rules and user functions are built (functions are imported in their child process), and rules
  score one made-up answer, so a missing column shows before minutes of generation are spent.
- The folders of reward models must exist. The run loads the models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from rlhf_cluster.config import RunConfig, StageConfig
from rlhf_cluster.data.prompts import PromptSource, SftExample, check_overlap, set_prompts
from rlhf_cluster.data.rows import expand, read_rows
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
from rlhf_cluster.errors import ConfigError, Gathered
from rlhf_cluster.models.make_model import (
    check_fit,
    check_positions,
    make_model,
)
from rlhf_cluster.models.model_folder import (
    Shapes,
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = ("exact_match", "numeric")

_ENDING_TOKENS = 256
"""Length of the end of a prompt that is searched for an opening tag of reasoning."""


def try_rewards(
    configs: Sequence[RewardConfig], tokenizer_dir: str, prompts: Iterable[tuple[str, Prompt]]
) -> None:
    """Build all rewards, and let rules score a made-up answer to each of `prompts`.

    A prompt comes with its file and line. Raises `ConfigError` with the name of a reward that cannot
    score one, or several problems of several rewards.
    """
    gathered, tried = Gathered(), list(prompts)
    for config in configs:
        gathered.attempt(_try_reward, config, tokenizer_dir, tried)
    gathered.refuse()


def _try_reward(
    config: RewardConfig, tokenizer_dir: str, prompts: Sequence[tuple[str, Prompt]]
) -> None:
    name = config.name or config.type
    if config.model_paths:
        for path in map(Path, config.model_paths):
            if path.is_absolute() and not path.is_dir():
                raise ConfigError(f"reward {name!r}: {path}: no such folder. Correct its path")
        return
    reward, _ = build_rewards([config], tokenizer_dir, "cpu")[name]
    try:
        for place, prompt in prompts if config.type in RULES else ():
            try:
                cast(Reward, reward).score(prompt, [_made_up(prompt)], ["0"])
            except RewardFailure as failure:
                raise ConfigError(
                    f"{place}: reward {name!r} cannot score this data set: {failure}"
                ) from failure
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


def check_inputs(config: RunConfig, scratch: Path, tried_prompts: int = 1) -> Inputs:
    """Check and load the inputs of a run. A made model is written below `scratch`.

    `tried_prompts`: how many prompts the rules among the rewards are tried on.

    Raises `DataError`, `WeightError` or `ConfigError` for the only input that cannot be used, and
    `SeveralProblems` for several.
    """
    gathered = Gathered()
    gathered.attempt(check_sinks, config.observe.sinks)
    model_dir = gathered.attempt(model_dir_of, config, scratch)
    own = config.model.tokenizer or (None if model_dir is None else str(model_dir))
    tokenizer = None if own is None else gathered.attempt(load_tokenizer, own)
    shapes: Shapes = {}
    if model_dir is not None and model_dir.is_dir():
        shapes = gathered.attempt(_check_model, config, model_dir) or {}
    gathered.attempt(_check_reward_lengths, config)
    if tokenizer is None or own is None:
        own_files = [each.data.path for each in config.evaluation.sets if each.data is not None]
        gathered.attempt(_read_files, config.data.path, config.evaluation.path, *own_files)
        gathered.attempt(try_rewards, config.scoring.rewards, own or "", ())
        gathered.refuse()
    assert tokenizer is not None
    assert own is not None
    gathered.attempt(_check_teacher, config, tokenizer)
    prompts = gathered.attempt(PromptSource, config.data, tokenizer, config.run.seed)
    held_out = None
    warmup = None if prompts is None else gathered.attempt(_warmup, config, prompts)
    if prompts is not None:
        gathered.attempt(_check_first_prompt, config, tokenizer, prompts)
        held_out = gathered.attempt(_evaluation_prompts, config, prompts, tokenizer)
    tried = () if prompts is None else prompts.of_one_epoch(tried_prompts)
    gathered.attempt(try_rewards, config.scoring.rewards, own, tried)
    gathered.refuse()
    assert model_dir is not None
    assert prompts is not None
    return Inputs(
        model_dir=model_dir,
        prompts=prompts,
        evaluation_prompts=held_out or {},
        warmup=warmup or [],
        warmup_batch_size=config.sft.batch_size,
        weights_bytes=ITEM_BYTES[config.publish_dtype] * sum(map(prod, shapes.values())),
    )


def _check_model(config: RunConfig, model_dir: Path) -> Shapes:
    """Check that the model takes the run's sequences and has its draft. Return its shapes."""
    shapes = checkpoint_shapes(model_dir)
    if (draft := config.generation.draft_folder) is not None:
        refuse_other_draft(draft, checkpoint_shapes(draft), shapes)
    check_fit(model_dir, config.max_sequence_tokens, config.model.tokenizer)
    return shapes


def _check_teacher(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if (teacher := config.scoring.teacher) is not None:
        check_same_tokens("scoring.teacher", teacher, tokenizer)
        check_fit(teacher, config.max_sequence_tokens)


def _check_reward_lengths(config: RunConfig) -> None:
    for reward in config.scoring.rewards:
        if getattr(reward, "tokenizer", "shared") == "shared":  # it reads the policy's tokens
            for path in filter(os.path.isdir, reward.model_paths):
                check_positions(path, config.max_sequence_tokens)


def _warmup(config: RunConfig, prompts: PromptSource) -> list[SftExample]:
    """Return the examples of the warm-up, and move `prompts` behind them."""
    num = config.sft.steps * config.sft.batch_size
    longest = config.generation.max_response_tokens
    examples = list(prompts.sft_examples(num, config.sft.target_column, longest))
    prompts.seek(num)
    return examples


def _check_first_prompt(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: PromptSource
) -> None:
    first, cursor = prompts.next(), prompts.cursor
    prompts.seek(cursor - 1)
    ending = tokenizer.decode(first.token_ids[-_ENDING_TOKENS:].tolist(), skip_special_tokens=False)
    check_reasoning(config.scoring.rewards, str(ending))


def _read_files(*paths: str | None) -> None:
    """Read each data file, without a tokenizer for its prompts. Raises `DataError`."""
    gathered = Gathered()
    for path in filter(None, paths):
        gathered.attempt(lambda path=path: read_rows(expand(path)))
    gathered.refuse()


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

    Raises `DataError` or `ConfigError` for the only input that cannot be used, and `SeveralProblems`
    for several.
    """
    gathered = Gathered()
    gathered.attempt(check_sinks, config.observe.sinks)
    model_dir = gathered.attempt(model_dir_of, config, scratch)
    folder = config.model.tokenizer or model_dir
    tokenizer = None if folder is None else gathered.attempt(load_tokenizer, folder)
    length, key = config.data.max_tokens, "data.max_tokens"
    if model_dir is not None and model_dir.is_dir():
        gathered.attempt(check_fit, model_dir, length, config.model.tokenizer, key)
    if model_dir is None or tokenizer is None:
        gathered.attempt(_read_files, *(source.path for source in config.data.sources))
        gathered.refuse()
    assert model_dir is not None
    assert tokenizer is not None
    if (teacher := getattr(config.stage, "teacher", None)) is not None:
        gathered.attempt(check_same_tokens, "stage.teacher", teacher, tokenizer)
        gathered.attempt(check_fit, teacher, length, None, key)
    loaded = gathered.attempt(_load_stage, config, tokenizer, model_dir)
    gathered.refuse()
    assert loaded is not None
    stream, num_steps, end = loaded
    size = config.run.units_per_step
    return StageInputs(
        model_dir=model_dir, stream=stream, num_steps=num_steps, units_per_step=size, end=end
    )


def _load_stage(
    config: StageConfig, tokenizer: PreTrainedTokenizerBase, model_dir: Path
) -> tuple[UnitStream, int, int | None]:
    """Return the units of a stage, its number of steps, and the units after which it is over."""
    check_template(config.data, tokenizer)
    own: Any = tokenizer.eos_token_id
    others = [token for token in end_token_ids(tokenizer, model_dir) if token != own]
    context = StageContext(data=config.data, tokenizer=tokenizer, end_ids=(int(own), *others))
    stream = load_units(config.data, build_stage(config.stage, context), config.run.seed)
    size, epochs = config.run.units_per_step, config.run.epochs
    end = None if epochs is None else stream.end_of(epochs)
    num_steps = config.run.steps or math.ceil((end or 0) / size)
    _check_steps(config, num_steps)
    return stream, num_steps, end


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
