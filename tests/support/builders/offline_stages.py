"""Offline stages in small: run files, a tokenizer with a chat template, and ranks in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.config import StageConfig, validate
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.units import Unit
from tests.support.builders.tiny_learner import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stage_tree(model_dir: str | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    """The tree of a stage's run file. `sections` change single keys of single sections."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "steps": 4, "units_per_step": 8},
        "stage": {"type": "sft"},
        "model": {"init": {"hidden_size": 32, "num_layers": 1, "num_heads": 1}},
        "data": {"sources": [{"task": "sort_digits", "limit": 64}], "max_tokens": 32},
        "learner": {
            "learning_rate": 1e-3,
            "dtype": "float32",
            "num_cpus": 0.25,
            "logprob_chunk_tokens": 16,
        },
    }
    if model_dir is not None:
        tree["model"] = {"path": model_dir}
        tree["run"]["root"] = str(Path(model_dir).parent)
    return {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {*tree, *sections}}


def stage_config(model_dir: str | None = None, **sections: dict[str, Any]) -> StageConfig:
    return validate(StageConfig, stage_tree(model_dir, **sections), source="test")


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """One token a character, ChatML's marks and an end token that is the padding token too."""
    from rlhf_cluster.models.make_model import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template
    return tokenizer


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_unit(*sequences: TokenSequence, key: str = "", **values: float) -> Unit:
    return Unit(
        sequences=sequences, key=key, content=repr([s.target_ids for s in sequences]), place="test",
        values=values,
    )  # fmt: skip


def random_units(num: int, size: int = 1, seed: int = 0) -> list[Unit]:
    """Units of `size` random sequences each; of every target but the last some are not trained."""
    draw = np.random.default_rng(seed)

    def sequence() -> TokenSequence:
        prompt, target = draw.integers(1, 6), draw.integers(1, 12)
        mask = draw.random(target) > 0.3
        mask[-1] = True
        return TokenSequence(
            prompt_ids=draw.integers(0, VOCABULARY, prompt).astype(np.int32),
            target_ids=draw.integers(0, VOCABULARY, target).astype(np.int32),
            target_mask=mask,
        )

    return [make_unit(*(sequence() for _ in range(size)), key=str(i)) for i in range(num)]
