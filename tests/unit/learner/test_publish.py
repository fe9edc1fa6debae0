"""What a learner rank copies out: how much of it changed, and gradient norms by parameter group."""

import math
import threading
from typing import Any

import pytest
import torch

from rlhf_cluster.errors import StalledError
from rlhf_cluster.learner.publish import (
    ChangedShare,
    count_changed_bf16,
)
from rlhf_cluster.learner.sharding.sharded_model import (
    PARAMETER_GROUPS,
    clip_gradients,
    parameter_group,
)
from rlhf_cluster.weights.manifest import LocalPart
from tests.support.builders.tiny_learner import (
    CHANGED,
    check_changed_share,
    full_parameters,
    random_groups,
    save_llama,
)


def _part(tensor: torch.Tensor) -> LocalPart:
    return LocalPart(name="w", shape=tuple(tensor.shape), offset=0, tensor=tensor)


def test_s33_an_update_that_bfloat16_rounds_away_does_not_count_as_a_change() -> None:
    # bfloat16 has 8 significant bits: from 1 on the next number is 1 + 2**-7, ties go to even
    before = torch.tensor([1.0, 1.0, 1.0, -2.0])
    after = torch.tensor([1.0 + 2**-9, 1.0 + 2**-7, 1.0, -2.0 + 2**-10])
    assert count_changed_bf16([_part(before)], [_part(after)]) == (1, 4)
    integers = _part(torch.tensor([1, 2]))
    assert count_changed_bf16([integers], [_part(torch.tensor([3, 4]))]) == (0, 0)


def test_a_snapshot_does_not_wait_for_the_count_and_a_count_that_hangs_is_told() -> None:
    share, busy = ChangedShare(timeout_s=0.05), threading.Event()
    share._threads.submit(busy.wait, 60.0)
    cpu = torch.device("cpu")
    share.copied([_part(torch.ones(2))], 0)
    assert share.take(cpu) == {}, "of one snapshot there is nothing to tell"
    share.copied([_part(torch.ones(2))], 0)
    with pytest.raises(
        StalledError, match=r"not counted after 0.05 s, a share of learner.step_timeout_s"
    ):
        share.take(cpu)
    busy.set()
    share.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_changed_share_is_that_of_the_step_between_two_snapshots(
    start_learner: Any, dtype: str
) -> None:
    check_changed_share(start_learner(weights={"dtype": dtype}))


def test_s33_steps_too_small_for_bfloat16_show_as_a_share_near_zero(start_learner: Any) -> None:
    learner = start_learner(learner={"learning_rate": 1e-8})
    before = full_parameters(learner.policy)
    learner.snapshot()
    learner.train_step(random_groups(0))
    learner.snapshot()
    moved = [not torch.equal(w, before[n]) for n, w in full_parameters(learner.policy).items()]
    assert any(moved)
    assert learner.train_step(random_groups(1, version=1)).metrics[CHANGED] < 1e-3


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("lm.model.embed_tokens.weight", "embeddings"),
        ("lm.model.layers.0.self_attn.q_proj.weight", "attention"),
        ("lm.model.layers.0.self_attn.q_proj.lora_A.default.weight", "attention"),
        ("lm.model.layers.0.self_attn.q_norm.weight", "norms"),
        ("lm.model.layers.11.mlp.down_proj.weight", "mlp"),
        ("lm.model.layers.11.mlp.experts.3.up_proj.weight", "mlp"),
        ("lm.model.layers.0.post_attention_layernorm.weight", "norms"),
        ("lm.model.norm.weight", "norms"),
        ("lm.transformer.h.0.ln_1.bias", "norms"),
        ("lm.transformer.wte.weight", "embeddings"),
        ("lm.transformer.h.0.attn.c_attn.weight", "attention"),
        ("lm.lm_head.weight", "head"),
        ("value_head.bias", "head"),
        ("lm.model.layers.0.mixer.in_proj.weight", "other"),
    ],
)
def test_parameters_are_told_apart_by_their_names(name: str, group: str) -> None:
    assert parameter_group(name) == group
    assert group in PARAMETER_GROUPS


def test_every_parameter_of_the_models_here_has_a_group(start_learner: Any, tmp_path: Any) -> None:
    learner = start_learner(save_llama(tmp_path / "model", tie=False))
    groups = {parameter_group(n) for n, _ in learner.policy.named_parameters()}
    assert groups == {"embeddings", "attention", "mlp", "norms", "head"}


def test_norms_of_the_groups_are_those_of_their_parameters_and_make_up_the_whole(
    start_learner: Any, tmp_path: Any
) -> None:
    learner = start_learner(save_llama(tmp_path / "model", tie=False))
    gradients: dict[str, torch.Tensor] = {}
    step = learner.model.step

    def keep(rate: float) -> None:
        gradients.update({n: g.clone() for n, g in learner.model.gradients()})
        step(rate)

    learner.model.step = keep
    metrics = learner.train_step(random_groups(0)).metrics
    total = metrics["learner/grad_norm"]
    clipped = min(1.0, 1.0 / (total + 1e-6))
    for group in ("embeddings", "attention", "mlp", "norms", "head"):
        squares = sum(
            (g.double() / clipped).square().sum().item()
            for n, g in gradients.items()
            if parameter_group(n) == group
        )
        assert metrics[f"learner/grad_norm_part/{group}"] == pytest.approx(squares**0.5, rel=1e-5)
    parts = [v for n, v in metrics.items() if n.startswith("learner/grad_norm_part/")]
    assert math.hypot(*parts) == pytest.approx(total, rel=1e-9)


def test_clipping_scales_all_gradients_to_the_bound_and_leaves_smaller_ones_alone(
    start_learner: Any,
) -> None:
    start_learner()  # a process group
    big = {"a.mlp.weight": torch.tensor([3.0, 0.0]), "a.norm.weight": torch.tensor([4.0])}
    norm, parts = clip_gradients(big.items(), max_norm=1.0)
    assert (norm, parts) == (5.0, {"mlp": 3.0, "norms": 4.0})
    assert big["a.mlp.weight"].tolist() == pytest.approx([0.6, 0.0], rel=1e-6)
    assert big["a.norm.weight"].tolist() == pytest.approx([0.8], rel=1e-6)
    small = {"a.mlp.weight": torch.tensor([0.3])}
    clip_gradients(small.items(), max_norm=1.0)
    assert small["a.mlp.weight"].item() == torch.tensor(0.3).item()
    broken = {"a.mlp.weight": torch.tensor([math.nan]), "b.mlp.weight": torch.tensor([2.0])}
    norm, _ = clip_gradients(broken.items(), max_norm=1.0)
    assert math.isnan(norm)
    assert broken["b.mlp.weight"].item() == 2.0
    assert clip_gradients([], max_norm=1.0) == (0.0, {})
