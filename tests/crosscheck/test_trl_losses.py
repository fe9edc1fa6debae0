"""The losses of TRL's own trainers against ours: same logits, same batch, value and gradient.

TRL is not a dependency of the project: `make crosscheck` installs it beside the environment. Its
trainers are not built (that takes a data set and a model): their loss methods are called as they
are, on a stand-in that carries the settings that they read.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_cluster.algorithms import ALGORITHMS, build_algorithm
from rlhf_cluster.algorithms.policy_losses import token_weights
from rlhf_cluster.config import RunConfig, validate
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import loss_inputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.trainer import grpo_trainer, rloo_trainer
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

LENGTHS, WIDTH, VOCABULARY, LIMIT = [3, 9, 1, 6], 9, 11, 12


class Batch:
    """Right-padded responses [B, T], the logits that score them, and what other policies said."""

    def __init__(self, spread: float, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (len(LENGTHS), WIDTH)
        self.logits = torch.randn(*shape, VOCABULARY, generator=draw, dtype=torch.float64)
        self.logits.requires_grad_()
        self.ids = torch.randint(0, VOCABULARY, shape, generator=draw)
        self.mask = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
        self.advantages = torch.randn(len(LENGTHS), generator=draw, dtype=torch.float64)
        scored = self.logprobs().detach()

        def near() -> torch.Tensor:
            return scored + spread * torch.randn(shape, generator=draw, dtype=torch.float64)

        self.proximal, self.sampled, self.ref = near(), near(), near()

    def logprobs(self) -> torch.Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)

    def entropy(self) -> torch.Tensor:
        logprobs = self.logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)

    def gradient_of(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = torch.autograd.grad(loss, self.logits)
        return loss.detach(), gradient


def stand_in(batch: Batch, **settings: Any) -> SimpleNamespace:
    """What TRL's `_compute_loss` reads of its trainer."""
    arguments = {
        "use_bias_correction_kl": settings.pop("use_bias_correction_kl", False),
        "delta": settings.pop("delta", None),
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "steps_per_generation": 1,
    }
    scored = selective_log_softmax(batch.logits, batch.ids)
    entropy = entropy_from_logits(batch.logits)
    defaults = {
        "_get_per_token_logps_and_entropies": lambda *a, **k: (scored, entropy, None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LIMIT,
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "_entropy_bonus_enabled": settings.get("entropy_coef", 0.0) > 0,
        "use_adaptive_entropy": False,
        "entropy_coef": 0.0,
        "_metrics": {"train": defaultdict(list)},
    }
    stand_in = SimpleNamespace(**{**defaults, **settings}, args=SimpleNamespace(**arguments))
    stand_in.accelerator.sync_gradients = True
    return stand_in


def theirs(batch: Batch, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    prompt = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    inputs: dict[str, Any] = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": batch.ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.proximal,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
        "importance_sampling_ratio": settings.pop("importance_sampling_ratio", None),
    }
    trainer = stand_in(batch, **settings)
    return batch.gradient_of(grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs))


def ours(batch: Batch, name: str, **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tree = tiny_tree(scoring={"reference": True})
    tree["algorithm"] = {"type": name, "group_size": 4, "correction": {"type": "none"}, **keys}
    algorithm = build_algorithm(validate(RunConfig, tree, source="test").algorithm, LIMIT)
    inputs = loss_inputs(
        batch.logprobs()[batch.mask],
        batch.sampled[batch.mask],
        batch.advantages[:, None].expand(-1, WIDTH)[batch.mask],
        proximal=batch.proximal[batch.mask],
        ref=batch.ref[batch.mask],
        entropy=batch.entropy()[batch.mask],
        lengths=LENGTHS,
    )
    losses, _ = algorithm.loss(inputs)
    weights = torch.tensor(
        token_weights(LENGTHS, algorithm.aggregation, LIMIT), dtype=torch.float64
    )
    return batch.gradient_of((losses * weights[inputs.sequence]).sum())


SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {"aggregation": "sequence_mean"}, {"loss_type": "grpo"}),
    "grpo, token mean": ("grpo", {}, {"loss_type": "bnpo"}),
    "grpo, KL as published": (
        "grpo",
        {"aggregation": "sequence_mean", "kl_coef": 0.3, "kl_estimator": "k3_direct"},
        {"loss_type": "grpo", "beta": 0.3},
    ),
    "grpo, dual clip": (
        "grpo",
        {"aggregation": "sequence_mean", "dual_clip": 1.6},
        {"loss_type": "grpo", "delta": 1.6},
    ),
    "grpo, entropy bonus": (
        "grpo",
        {"entropy_coef": 0.05},
        {"loss_type": "bnpo", "entropy_coef": 0.05},
    ),
    "dr_grpo": ("dr_grpo", {"clip_high": 0.28}, {"loss_type": "dr_grpo"}),
    "dapo": ("dapo", {}, {"loss_type": "dapo"}),
    "gspo": (
        "gspo",
        {},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "gspo, bounds that do not bite": (
        "gspo",
        {"clip_low": 0.9, "clip_high": 9.0},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.9,
            "epsilon_high": 9.0,
        },
    ),
    "sapo": ("sapo", {"aggregation": "sequence_mean"}, {"loss_type": "sapo"}),
    "cispo": ("cispo", {"clip_high": 0.4}, {"loss_type": "cispo", "epsilon_high": 1.4}),
}


@pytest.mark.parametrize("spread", [0.0, 0.4, 1.5])
@pytest.mark.parametrize(("name", "keys", "settings"), SAME.values(), ids=SAME)
def test_loss_and_gradient_are_those_of_trl(
    name: str, keys: dict[str, Any], settings: dict[str, Any], spread: float
) -> None:
    batch = Batch(spread)
    found, expected = ours(batch, name, **keys), theirs(batch, **settings)
    rtol = 1e-6 if name == "sapo" else 1e-10  # TRL rounds its temperatures to float32
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=1e-12)
    assert found[1].abs().sum() > 0 or name == "gspo"


def test_the_unbiased_kl_term_is_that_of_trl() -> None:
    batch = Batch(0.4)
    batch.sampled = batch.proximal  # TRL's KL is weighted by the ratio to the proximal policy
    keys = {"kl_coef": 0.3, "kl_estimator": "k3", "correction": {"type": "token_tis", "cap": 1e8}}
    found = ours(batch, "grpo", aggregation="sequence_mean", **keys)
    expected = theirs(batch, loss_type="grpo", beta=0.3, use_bias_correction_kl=True)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("mode", ["token_tis", "icepop", "sequence_tis", "sequence_mis"])
def test_off_policy_weights_stand_where_trl_has_them(mode: str) -> None:
    batch = Batch(0.3)
    logs = (batch.proximal - batch.sampled) * batch.mask
    if mode.startswith("sequence"):
        logs = logs.sum(-1, keepdim=True)
    ratio = logs.exp()
    cut = ratio.masked_fill((ratio < 0.5) | (ratio > 2.0), 0.0)
    ratio = cut if mode in ("icepop", "sequence_mis") else ratio.clamp(max=2.0)
    band = {} if mode.endswith("tis") else {"low": 0.5, "high": 2.0}
    found = ours(batch, "dapo", correction={"type": mode, **band})
    expected = theirs(
        batch,
        loss_type="dapo",
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        importance_sampling_ratio=ratio,
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_rloo_has_the_gradient_of_trl_on_policy() -> None:
    # TRL's ratio is that of a whole response, a sum over its tokens; ours is a token's: with the
    # same policy both gradients are A_i times the response's score
    batch = Batch(0.0)
    prompt = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": batch.ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantages,
        "old_logps": (batch.proximal * batch.mask).sum(1),
    }
    trainer = stand_in(batch)
    _, expected = batch.gradient_of(rloo_trainer.RLOOTrainer._compute_loss(trainer, None, inputs))
    _, found = ours(batch, "rloo", aggregation="fixed_length")
    torch.testing.assert_close(found * LIMIT, expected)


def test_every_algorithm_that_trl_has_is_compared() -> None:
    compared = {name for name, _, _ in SAME.values()} | {"rloo"}
    compared |= {"online_dpo", "on_policy_distillation"}  # in files of their own
    without = {"gdpo", "ppo", "reinforce", "reinforce_pp", "remax"}  # no such loss in TRL
    assert compared | without == set(ALGORITHMS)
