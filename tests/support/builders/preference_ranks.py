"""Pairs of responses that a tiny model can learn to tell apart, and ranks that train on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.config.stage_config import StageConfig
from rlhf_cluster.data.packing import (
    TokenSequence,
    value_sequence,
)
from rlhf_cluster.data.units import Unit
from rlhf_cluster.models.make_model import make_bpe
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.sections.every_run import BpeTokenizer
from rlhf_cluster.sections.offline_stage import (
    Source,
    StageData,
)
from tests.support.builders.tiny_learner import VOCABULARY

if TYPE_CHECKING:
    import torch

    from rlhf_cluster.learner.offline_rank import StageRank

LAYOUTS: list[dict[str, Any]] = [
    {"batching": "packed"},
    {"batching": "packed", "tokens_per_micro_batch": 48},
    {"batching": "padded", "tokens_per_micro_batch": 100},
]

DIALOGUE = {
    "chosen": "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four",
    "rejected": "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: five",
    "margin": 0.5,
}

GOOD, BAD = 7, 9
"""Tokens of which a chosen response has more, and a rejected one."""


def stage_config(model_dir: str, stage: dict[str, Any], **sections: dict[str, Any]) -> StageConfig:
    """A float32 stage on the CPU. `sections` change single keys of single sections."""
    tree: dict[str, dict[str, Any]] = {
        "run": {
            "name": "tiny",
            "root": str(Path(model_dir).parent),
            "steps": 20,
            "units_per_step": 8,
            "start_timeout_s": 120.0,
        },
        "stage": stage,
        "model": {"path": model_dir},
        "data": {"sources": [{"task": "sort_digits", "limit": 8}], "max_tokens": 24},
        "learner": {"learning_rate": 3e-3, "dtype": "float32", "logprob_chunk_tokens": 16},
    }
    merged = {n: {**tree.get(n, {}), **sections.get(n, {})} for n in {*tree, *sections}}
    return validate(StageConfig, merged, source="test")


def random_pairs(num: int, seed: int = 0, values: bool = False, marked: bool = True) -> list[Unit]:
    """Prompts of 2 to 5 tokens with responses of 3 to 9; with `values` for a model of values.

    With `marked` the last but one token of a response tells which it is.
    """
    draw = np.random.default_rng(seed)
    units = []
    for number in range(num):
        prompt = draw.integers(10, VOCABULARY, int(draw.integers(2, 6))).astype(np.int32)
        answers = []
        for mark in (GOOD, BAD):
            answer = draw.integers(10, VOCABULARY, int(draw.integers(3, 10))).astype(np.int32)
            if marked:
                answer[-2] = mark
            answers.append(answer)
        units.append(pair_unit(number, prompt, answers, values))
    return units


def pair_unit(
    number: int, prompt: np.ndarray, answers: Sequence[np.ndarray], values: bool = False
) -> Unit:
    if values:
        made = tuple(value_sequence(np.concatenate([prompt, a])) for a in answers)
        numbers = {"margin": 0.1 * number, "prompt_tokens": float(len(prompt))}
    else:
        made = tuple(TokenSequence(prompt_ids=prompt, target_ids=a) for a in answers)
        numbers = {"desirable": float(number % 2)}
    return Unit(
        sequences=made, key=f"{number}", content=f"{number}", place=f"row {number}", values=numbers
    )


def stage_ranks(tiny_model_dir: str) -> Iterator[Any]:
    """To be a fixture: start(stage, **sections) -> a rank that is set up; the last one is closed."""
    from rlhf_cluster.learner.offline_rank import StageRank

    started: list[StageRank] = []

    def begin(stage: dict[str, Any], **sections: dict[str, Any]) -> StageRank:
        for rank in started:
            rank.close()
        config = stage_config(tiny_model_dir, stage, **sections)
        rank = StageRank(config, tiny_model_dir, 0, 1, None, num_steps=20)
        rank.setup()
        started.append(rank)
        return rank

    yield begin
    for rank in started:
        rank.close()


def gradients(rank: StageRank, units: Sequence[Unit]) -> dict[str, torch.Tensor]:
    """Of one batch, by name; they are cleared again."""
    rank._begin()
    rank._passes(units)
    found = {
        name: p.grad.full_tensor().clone()  # type: ignore[union-attr]
        for name, p in rank.model.module.named_parameters()
        if p.grad is not None
    }
    rank.model.clear_gradients()
    return found


def context(tokenizer: Any = None, **keys: Any) -> StageContext:
    data = StageData.model_validate(
        {"sources": (Source(path="x.jsonl"),), "max_tokens": 64, "template": "chat", **keys}
    )
    end_ids = () if tokenizer is None else (tokenizer.eos_token_id,)
    return StageContext(data=data, tokenizer=tokenizer, end_ids=end_ids)


def bpe_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """To be a fixture: a small tokenizer with a chat template."""
    path = tmp_path_factory.mktemp("bpe") / "data.jsonl"
    path.write_text('{"text": "one two three four five"}\n')
    return make_bpe(BpeTokenizer(path=str(path), vocab_size=512))
