"""The ZeRO-3 backend on one rank; two ranks and equality with FSDP2 are in test_learner_backends."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cluster.errors import ConfigError, DivergenceError
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.sharding.sharded_model import assert_float32
from rlhf_cluster.learner.sharding.zero3 import (
    Zero3Model,
    partition,
)
from rlhf_cluster.weights.read_version import read
from rlhf_cluster.weights.store import commit
from tests.support.builders.tiny_learner import (
    build_llama,
    check_changed_share,
    full_parameters,
    learner_config,
    random_groups,
    save_llama,
    sft_examples,
)

ZERO3 = {"backend": "zero3"}


class EngineThatDivides:
    """What DeepSpeed does by default: it divides a loss by its own accumulation steps too."""

    gradient_accumulation_steps = 4

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        (loss / self.gradient_accumulation_steps if scale_wrt_gas else loss).backward()


@pytest.mark.parametrize("num_passes", [1, 4])
def test_s5_the_engine_does_not_divide_by_its_accumulation_steps(
    start_learner: Any, num_passes: int
) -> None:
    start_learner()  # a process group
    weight = torch.ones(8, requires_grad=True)
    model = Zero3Model(EngineThatDivides())
    for part in weight.chunk(num_passes):
        model.backward((part * 3).sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 8


def test_s5_one_pass_and_many_give_the_gradient_of_fsdp2(start_learner: Any) -> None:
    groups, norms = random_groups(3), []
    for settings in (
        {"tokens_per_micro_batch": 16384},
        ZERO3 | {"tokens_per_micro_batch": 16384},
        ZERO3 | {"tokens_per_micro_batch": 32},
    ):
        metrics = start_learner(learner=settings).train_step(groups).metrics
        norms.append({k: v for k, v in metrics.items() if "grad_norm" in k})
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert norms[2] == pytest.approx(norms[0], rel=1e-5)


def test_s26_what_is_published_is_the_whole_model_and_outlives_the_next_step(
    start_learner: Any, tmp_path: Path
) -> None:
    learner = start_learner(learner=ZERO3)
    learner.train_step(random_groups(0))
    wanted = full_parameters(learner.policy)
    # a partitioned parameter looks empty: copying it would publish nothing
    assert {p.numel() for p in learner.policy.parameters()} == {0}
    learner.snapshot()
    learner.train_step(random_groups(1, version=1))
    report = learner.write_snapshot(str(tmp_path))
    version = commit(tmp_path, 1, [report], keep=1, expected_names=learner.tensor_shapes())
    assert version.num_bytes == sum(4 * w.numel() for w in wanted.values())
    for name, tensor in read(version.path):
        torch.testing.assert_close(tensor, wanted.pop(f"lm.{name}"), atol=0, rtol=0)
    assert not wanted


def test_the_number_of_parameters_is_that_of_the_model(tiny_model_dir: str) -> None:
    config = learner_config(tiny_model_dir, learner=ZERO3)
    learner = LearnerRank(config, tiny_model_dir, 0, 1, None)
    facts = learner.setup()
    learner.close()
    learner.close()
    assert facts["num_parameters"] == sum(p.numel() for p in build_llama().parameters())


def _poison(learner: LearnerRank, value: float) -> None:
    parameter: Any = learner.policy.lm.base_model.norm.weight
    parameter.ds_tensor.fill_(value)


def test_gradients_that_are_not_finite_change_nothing_and_raise_after_five_in_a_row(
    start_learner: Any,
) -> None:
    learner = start_learner(learner=ZERO3, staleness={"max_staleness": 20})
    learner.train_step(random_groups(0))
    before = full_parameters(learner.policy)
    _poison(learner, math.nan)
    for number in range(1, 5):
        metrics = learner.train_step(random_groups(0)).metrics
        assert metrics["learner/skipped_steps"] == number
    _poison(learner, before["lm.model.norm.weight"][0].item())
    found = full_parameters(learner.policy)
    others = [n for n in found if n != "lm.model.norm.weight"]
    assert all(torch.equal(found[n], before[n]) for n in others)
    learner.train_step(random_groups(0))  # a good step starts the count again
    found = full_parameters(learner.policy)
    assert all(torch.isfinite(w).all() for w in found.values())
    assert not any(torch.equal(found[n], before[n]) for n in others)
    _poison(learner, math.nan)
    for _ in range(4):
        learner.train_step(random_groups(0))
    with pytest.raises(DivergenceError, match="5 steps in a row"):
        learner.train_step(random_groups(0))


def test_skipped_gradients_do_not_reach_the_next_step(start_learner: Any) -> None:
    """A step after a skipped one trains as if the skipped one had not been."""
    learner = start_learner(learner=ZERO3)
    start = full_parameters(learner.policy)["lm.model.norm.weight"][0].item()
    _poison(learner, math.inf)
    learner.train_step(random_groups(7))
    _poison(learner, start)
    learner.train_step(random_groups(0))
    after_a_skip = full_parameters(learner.policy)
    learner = start_learner(learner=ZERO3)
    learner.train_step(random_groups(0))
    for name, weight in full_parameters(learner.policy).items():
        torch.testing.assert_close(after_a_skip[name], weight, atol=1e-7, rtol=0)


def test_s33_bfloat16_passes_leave_masters_gradients_and_moments_in_float32(
    start_learner: Any,
) -> None:
    learner = start_learner(learner=ZERO3 | {"dtype": "bfloat16"})
    loaded = dict(build_llama().named_parameters())
    for part in learner.model.shards():
        # not one of them rounded to bfloat16 on the way
        assert torch.equal(part.tensor, loaded[part.name.removeprefix("lm.")].detach().view(-1))
    gradients = {}
    step = learner.model.step

    def keep(rate: float) -> None:
        gradients.update({n: g.dtype for n, g in learner.model.gradients()})
        step(rate)

    learner.model.step = keep
    learner.train_step(random_groups(0))
    assert set(gradients.values()) == {torch.float32}
    assert {p.dtype for p in full_parameters(learner.policy).values()} == {torch.bfloat16}
    [norm] = [p.tensor for p in learner.model.shards() if p.name == "lm.model.norm.weight"]
    # an update of 1e-4 on a weight of 1 is lost in bfloat16
    assert 0 < (norm - 1).abs().max().item() < 1.1e-4
    assert_float32(learner.model)
    state = next(iter(learner.model.optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"exp_avg is torch\.bfloat16"):
        assert_float32(learner.model)


def test_frozen_weights_stay_what_was_loaded_also_with_bfloat16_passes(
    start_learner: Any, tmp_path: Path
) -> None:
    learner = start_learner(learner=ZERO3 | {"dtype": "bfloat16", "lora": {"rank": 4}})
    learner.snapshot()
    report = learner.write_snapshot(str(tmp_path))
    version = commit(tmp_path, 0, [report], keep=1, expected_names=learner.tensor_shapes())
    loaded = dict(build_llama().named_parameters())
    for name, tensor in read(version.path):
        # the adapters start at 0
        assert torch.equal(tensor, loaded.pop(name).detach())
    assert not loaded
    assert_float32(learner.model)
    learner.train_step(random_groups(0))
    moved = {p.name for p in learner.model.shards() if "lora_B" in p.name and p.tensor.any()}
    assert len(moved) == 7 * 2


def test_with_bfloat16_passes_the_critic_starts_at_0_and_trains_as_with_fsdp2(
    start_learner: Any,
) -> None:
    found = []
    for settings in ({}, ZERO3):
        learner = start_learner(
            algorithm={"type": "ppo"},
            critic={"learning_rate": 1e-3},
            learner=settings | {"dtype": "bfloat16"},
        )
        first = learner.train_step(random_groups(0)).metrics
        assert first["critic/value_mean"] == 0
        found.append(learner.train_step(random_groups(1, version=1)).metrics)
        [bias] = [p for p in learner._value_model.shards() if p.name == "value_head.bias"]
        # a bfloat16 master would lose what AdamW's second step adds to the first
        assert bias.tensor.item() != bias.tensor.bfloat16().item()
    for key in ("critic/loss", "critic/grad_norm", "critic/value_mean"):
        assert found[1][key] == pytest.approx(found[0][key], rel=0.05), key


def test_reinforcement_learning_starts_with_a_fresh_optimizer_after_supervised_steps(
    start_learner: Any,
) -> None:
    learner = start_learner(learner=ZERO3)
    for _ in range(3):
        learner.sft_step(sft_examples())
    learner.train_step(random_groups(0))
    assert {s["step"].item() for s in learner.model.optimizer.state.values()} == {1}


@pytest.mark.parametrize("tie", [True, False])
def test_tied_and_untied_heads_train_as_with_fsdp2(
    start_learner: Any, tmp_path: Path, tie: bool
) -> None:
    folder = save_llama(tmp_path / "model", tie=tie)
    trained = []
    for settings in ({}, ZERO3):
        learner = start_learner(folder, learner=settings)
        learner.train_step(random_groups(0))
        trained.append(full_parameters(learner.policy))
    assert set(trained[0]) == set(trained[1])
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, atol=1e-6, rtol=0)


def test_without_deepspeed_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cluster.learner.sharding.sharded_model import AdamWSettings

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    settings = AdamWSettings(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    with pytest.raises(ConfigError, match="learner.backend = 'zero3' needs deepspeed"):
        partition(torch.nn.Linear(2, 2), settings, torch.device("cpu"), torch.float32, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_changed_share_is_that_of_the_step_between_two_snapshots(
    start_learner: Any, dtype: str
) -> None:
    check_changed_share(start_learner(weights={"dtype": dtype}, learner={"backend": "zero3"}))
