"""Checks of `validate` for one run or stage: inputs as `run` checks them, and the resulting numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlhf_cluster.cli.summaries import derived_generation, derived_stage
from rlhf_cluster.config import GenerateConfig, StageConfig
from rlhf_cluster.config.check_scoring import kl_notes
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.planning.placement import derived
from rlhf_cluster.planning.run_inputs import check_inputs, check_stage_inputs


def checked(config: AnyConfig) -> tuple[dict[str, str], list[str]]:
    """Check a run or stage. Return facts by name, and notes.

    Inputs are made in a folder that is deleted again.

    Raises `DataError`, `WeightError` or `ConfigError` for the first input that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-validate-") as scratch:
        facts, notes = _check(config, Path(scratch))
    if config.run_dir.exists():
        notes.append(f"{config.run_dir} exists: run continues what is there, or says why it cannot")
    return facts, notes


def _check(config: AnyConfig, scratch: Path) -> tuple[dict[str, str], list[str]]:
    if isinstance(config, StageConfig):
        inputs = check_stage_inputs(config, scratch)
        return derived_stage(config, inputs), inputs.notes
    if isinstance(config, GenerateConfig):
        prompts = check_inputs(config.as_run, scratch).prompts
        return derived_generation(config, prompts.epoch_size or 0), _note_skips(prompts.num_skipped)
    skipped = _note_skips(check_inputs(config, scratch).prompts.num_skipped)
    return derived(config), [*kl_notes(config), *skipped]


def _note_skips(skipped: int) -> list[str]:
    text = f"{skipped} prompts are over data.max_prompt_tokens and are left out"
    return [text] if skipped else []
