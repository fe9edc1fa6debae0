"""Everything that can be checked before a process starts: run directory, model, tokenizer, data.

What is refused leaves nothing behind: the run directory is removed again when a later check fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.examples import SftExample
from rlhf_cluster.data.prompts import PromptSource, evaluation_prompts
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.learning.make_model import check_fit, make_model
from rlhf_cluster.records import Prompt
from rlhf_cluster.rundir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Checked inputs of a run."""

    rundir: RunDir
    model_dir: Path
    prompts: PromptSource
    evaluation_prompts: list[Prompt]
    warmup: list[SftExample]
    warmup_batch_size: int

    def warmup_batches(self) -> Iterator[list[SftExample]]:
        examples = iter(self.warmup)
        while batch := list(islice(examples, self.warmup_batch_size)):
            yield batch


@contextmanager
def prepare(config: RunConfig, argv: list[str], overwrite: bool) -> Iterator[Inputs]:
    """Claim the run directory and check all inputs. Holds the directory's lock inside the block."""
    with RunDir.create(config.run_dir, config, overwrite=overwrite, argv=argv) as rundir:
        try:
            inputs = _check(config, rundir)
        except RlhfError:
            rundir.remove()
            raise
        yield inputs


def _check(config: RunConfig, rundir: RunDir) -> Inputs:
    model_dir = _model_dir(config, rundir)
    tokenizer = load_tokenizer(config.model.tokenizer or model_dir)
    check_fit(model_dir, config.max_sequence_tokens, config.model.tokenizer)
    prompts = PromptSource(config.data, tokenizer, config.run.seed)
    num_warmup = config.sft.steps * config.sft.batch_size
    warmup = list(
        prompts.sft_examples(
            num_warmup, config.sft.target_column, config.generation.max_response_tokens
        )
    )
    prompts.seek(num_warmup)
    return Inputs(
        rundir=rundir,
        model_dir=model_dir,
        prompts=prompts,
        evaluation_prompts=evaluation_prompts(config, tokenizer, config.evaluation.num_prompts),
        warmup=warmup,
        warmup_batch_size=config.sft.batch_size,
    )


def _model_dir(config: RunConfig, rundir: RunDir) -> Path:
    if config.model.init is not None:
        return make_model(config.model.init, rundir.model, config.run.seed)
    assert config.model.path is not None
    return Path(config.model.path).absolute()
