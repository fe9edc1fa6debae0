"""A reference that follows the policy against TRL's `sync_ref_model`: same steps, same weights."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.builders.preference_ranks import (
    random_pairs,
    stage_ranks,
)
from tests.support.builders.tiny_learner import build_llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from trl.trainer.callbacks import SyncRefModelCallback

start_stage = pytest.fixture(stage_ranks)


@pytest.mark.parametrize(("every", "alpha"), [(1, 0.6), (2, 0.25), (3, 1.0)])
def test_the_reference_is_where_trl_would_have_it(
    start_stage: Any, every: int, alpha: float
) -> None:
    update: dict[str, Any] = {"type": "ema", "every": every, "decay": 1 - alpha}
    if alpha == 1:
        update = {"type": "periodic", "every": every}
    stage = {"type": "preference", "loss": {"type": "dpo"}, "reference_update": update}
    rank = start_stage(stage, learner={"learning_rate": 1e-2})
    Accelerator(cpu=True)
    policy, reference = build_llama(), build_llama()
    callback = SyncRefModelCallback(reference, None)
    settings: Any = SimpleNamespace(ref_model_sync_steps=every, ref_model_mixup_alpha=alpha)
    for step in range(1, 6):
        rank.train(random_pairs(4, seed=step))
        trained = {part.name.removeprefix("lm."): part for part in rank.model.shards()}
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                weight.copy_(trained[name].tensor.view(weight.shape))
        state: Any = SimpleNamespace(global_step=step)
        callback.on_step_end(settings, state, None, model=policy)
    start = dict(build_llama().named_parameters())
    wanted = dict(reference.named_parameters())
    found = {part.name.removeprefix("lm."): part.tensor for part in rank._reference.shards()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.view(wanted[name].shape), wanted[name].data)
    assert any((wanted[name] - start[name]).abs().max() > 1e-3 for name in wanted)
