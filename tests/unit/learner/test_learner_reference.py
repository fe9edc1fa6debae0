"""The KL over the whole vocabulary on one rank: its reference, its step and what it changes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.learner_reference import (
    FrozenCopy,
    StartAdapters,
    with_reference_kl,
)
from tests.support.builders.tiny_learner import (
    build_llama,
    full_parameters,
    random_groups,
    response_logprobs,
)

LORA = {"lora": {"rank": 4, "alpha": 8.0}}
DORA = {"lora": {"rank": 4, "alpha": 8.0, "dora": True}}
EQUAL = [0.5] * 16
"""Rewards that leave no advantage: all of the loss is the KL."""


def full_kl(where: str = "loss", **keys: Any) -> dict[str, Any]:
    return {"type": "grpo", "kl_coef": 0.3, "kl_estimator": "full", "kl_in": where, **keys}


def kls(learner: LearnerRank, reference: Any, groups: Any) -> list[np.ndarray]:
    """Of every rollout, [T]."""
    found = with_reference_kl(learner.model, reference, groups, learner._layout)
    learner.model.module.reshard()  # type: ignore[operator]
    return [np.asarray(s.reference_kl) for g in found for s in g.scored]


@pytest.mark.parametrize(
    ("settings", "dtype", "where"),
    [
        pytest.param({}, "float32", "loss", id="full"),
        pytest.param({}, "bfloat16", "reward", id="full in bfloat16, in the reward"),
        pytest.param(LORA, "float32", "reward", id="lora in the reward"),
        pytest.param(LORA, "bfloat16", "loss", id="lora in bfloat16"),
        pytest.param(DORA, "bfloat16", "loss", id="dora in bfloat16"),
    ],
)
def test_s38_at_the_start_the_kl_is_exactly_zero_and_then_it_is_not(
    start_learner: Any, settings: dict[str, Any], dtype: str, where: str
) -> None:
    learner = start_learner(
        learner={**settings, "dtype": dtype, "learning_rate": 1e-2}, algorithm=full_kl(where)
    )
    first = learner.train_step(random_groups(0)).metrics
    assert first["learner/kl_ref"] == first["learner/kl_ref_response"] == 0
    assert learner.train_step(random_groups(1, version=1)).metrics["learner/kl_ref"] > 1e-3


def test_a_kl_of_zero_pulls_at_nothing(start_learner: Any) -> None:
    learner = start_learner(algorithm=full_kl())
    assert learner.train_step(random_groups(0, rewards=EQUAL)).metrics["learner/grad_norm"] == 0


def _plain_kl(lm: Any, start: Any, rollout: Any) -> torch.Tensor:
    """[T] with gradient, one rollout at a time by the models' own logits."""
    tokens = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    ids = torch.from_numpy(tokens).long()[None]
    p = lm(input_ids=ids).logits[0].log_softmax(-1)
    q = start(input_ids=ids).logits[0].detach().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[len(rollout.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("budget", [16384, 32])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_s1_the_gradient_of_the_kl_is_that_of_a_plain_loop_however_it_is_laid_out(
    start_learner: Any, batching: str, budget: int
) -> None:
    learner = start_learner(
        algorithm=full_kl(correction={"type": "none"}),
        learner={
            "learning_rate": 1e-2,
            "batching": batching,
            "tokens_per_micro_batch": budget,
            "max_grad_norm": 1e9,
        },
    )
    learner.train_step(random_groups(0))
    lm, start = build_llama(), build_llama()
    own = {n.removeprefix("lm."): w for n, w in full_parameters(learner.policy).items()}
    lm.load_state_dict(own, strict=False)
    groups = random_groups(1, version=1, rewards=EQUAL)
    rollouts = [s.rollout for g in groups for s in g.scored]
    per_token = torch.cat(
        [_plain_kl(lm, start, r)[torch.from_numpy(r.response_mask)] for r in rollouts]
    )
    (0.3 * per_token.mean()).backward()
    gradients = [p.grad for p in lm.parameters() if p.grad is not None]
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/kl_ref"] == pytest.approx(per_token.mean().item(), abs=1e-6)
    response = per_token.sum().item() / len(rollouts)
    assert metrics["learner/kl_ref_response"] == pytest.approx(response, rel=1e-5)
    norm = torch.nn.utils.get_total_norm(gradients).item()
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["learner/loss"] == pytest.approx(0.3 * per_token.mean().item(), rel=1e-5)


def test_in_the_loss_it_lowers_the_kl(start_learner: Any) -> None:
    learner = start_learner(algorithm=full_kl(), learner={"learning_rate": 1e-3})
    draw = torch.Generator().manual_seed(0)
    learner.model.assign(
        [
            replace(p, tensor=p.tensor + 0.03 * torch.randn(p.tensor.shape, generator=draw))
            for p in learner.model.shards()
        ]
    )
    found = []
    for version in range(4):
        groups = random_groups(1, version=version, rewards=EQUAL)
        found.append(learner.train_step(groups).metrics["learner/kl_ref"])
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_in_the_reward_it_is_the_kl_of_the_start_of_the_step(start_learner: Any) -> None:
    learner = start_learner(
        algorithm=full_kl("reward"), learner={"learning_rate": 1e-2, "epochs": 2, "minibatches": 2}
    )
    learner.train_step(random_groups(0))
    groups = random_groups(1, version=1)
    before = kls(learner, learner._reference, groups)
    masks = [s.rollout.response_mask for g in groups for s in g.scored]
    trained = np.concatenate([kl[mask] for kl, mask in zip(before, masks, strict=True)])
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/kl_ref"] == pytest.approx(trained.mean(), rel=1e-5)


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
def test_the_adapters_of_the_start_are_the_model_of_the_folder(
    start_learner: Any, tiny_model_dir: str, settings: dict[str, Any]
) -> None:
    learner = start_learner(
        learner={**settings, "learning_rate": 1e-2, "dtype": "float32"}, algorithm=full_kl()
    )
    for version in range(2):
        learner.train_step(random_groups(version, version=version))
    groups = random_groups(2)
    before = full_parameters(learner.policy)
    assert isinstance(learner._reference, StartAdapters)
    by_adapters = kls(learner, learner._reference, groups)
    mesh = init_device_mesh("cpu", (1,))
    copy = FrozenCopy(tiny_model_dir, mesh, torch.device("cpu"), torch.float32)
    by_copy = kls(learner, copy, groups)
    for one, other in zip(by_adapters, by_copy, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert max(kl.max() for kl in by_copy) > 1e-2
    # the policy has its own adapters back
    after = full_parameters(learner.policy)
    assert all(torch.equal(after[n], w) for n, w in before.items())


def test_the_reference_is_held_only_where_it_is_asked_for_and_never_published(
    start_learner: Any,
) -> None:
    assert start_learner(algorithm=full_kl(kl_coef=0.0))._reference is None
    assert start_learner(algorithm={"type": "grpo", "group_size": 4})._reference is None
    learner = start_learner(algorithm=full_kl())
    start = response_logprobs(learner, random_groups(0))
    copy = learner._reference
    assert isinstance(copy, FrozenCopy)
    assert not any(p.requires_grad for p in copy._policy.parameters())
    kept = full_parameters(copy._policy)
    learner.train_step(random_groups(0))
    assert all(torch.equal(full_parameters(copy._policy)[n], w) for n, w in kept.items())
    assert len(learner.tensor_shapes()) == len(kept)
    moved = response_logprobs(learner, random_groups(0))
    assert any((a != b).any() for a, b in zip(start, moved, strict=True))
