"""Everything about a run's inputs that can be checked before a process starts or a file is touched:
model, draft model, tokenizer, data set, rewards.

A model made from numbers is written to a scratch folder, so that a run which is refused leaves
nothing behind and an earlier run of the same name is not deleted for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

from rlhf_cluster.config import RunConfig, StageConfig
from rlhf_cluster.data.examples import SftExample
from rlhf_cluster.data.prompts import PromptSource, evaluation_prompts
from rlhf_cluster.data.tokenizer import load_tokenizer, refuse_other_tokens
from rlhf_cluster.learning.make_model import check_fit, make_model
from rlhf_cluster.observe.sinks import check_sinks
from rlhf_cluster.planning.trial import try_rewards
from rlhf_cluster.records import Prompt
from rlhf_cluster.weights.checkpoint import checkpoint_shapes, refuse_other_draft
from rlhf_cluster.weights.manifest import ITEM_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Checked inputs of a run. `model_dir` is below the scratch folder for a made model."""

    model_dir: Path
    prompts: PromptSource
    evaluation_prompts: list[Prompt]
    warmup: list[SftExample]
    warmup_batch_size: int
    weights_bytes: int  # of a published version

    def warmup_batches(self) -> Iterator[list[SftExample]]:
        examples = iter(self.warmup)
        while batch := list(islice(examples, self.warmup_batch_size)):
            yield batch


def check_inputs(config: RunConfig, scratch: Path) -> Inputs:
    """Raises `DataError`, `WeightError` or `ConfigError` for the first input that cannot be used."""
    check_sinks(config.observe.sinks)
    model_dir = model_dir_of(config, scratch)
    if (draft := config.generation.draft_folder) is not None:
        refuse_other_draft(draft, checkpoint_shapes(draft), checkpoint_shapes(model_dir))
    tokenizer_dir = config.model.tokenizer or str(model_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    check_fit(model_dir, config.max_sequence_tokens, config.model.tokenizer)
    if (teacher := config.scoring.teacher) is not None:
        refuse_other_tokens("scoring.teacher", teacher, tokenizer)
        check_fit(teacher, config.max_sequence_tokens)
    prompts = PromptSource(config.data, tokenizer, config.run.seed)
    num_warmup = config.sft.steps * config.sft.batch_size
    max_target_tokens = config.generation.max_response_tokens
    warmup = list(prompts.sft_examples(num_warmup, config.sft.target_column, max_target_tokens))
    prompts.seek(num_warmup)
    try_rewards(config.scoring.rewards, tokenizer_dir, prompts.next())
    prompts.seek(num_warmup)
    return Inputs(
        model_dir=model_dir,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts(config, tokenizer, config.evaluation.num_prompts),
        warmup=warmup,
        warmup_batch_size=config.sft.batch_size,
        weights_bytes=ITEM_BYTES[config.publish_dtype]
        * sum(prod(shape) for shape in checkpoint_shapes(model_dir).values()),
    )


def model_dir_of(config: RunConfig | StageConfig, scratch: Path) -> Path:
    """The model's folder; one made from numbers is made in `scratch`. Raises `DataError`."""
    if config.model.init is not None:
        return make_model(config.model.init, scratch / "model", config.run.seed)
    assert config.model.path is not None
    return Path(config.model.path).absolute()
