"""Preference and reward-model losses of TRL's own trainers against ours: same log-probabilities, value
and gradient. As in `test_trl_losses`, their loss methods run on a stand-in for a trainer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from rlhf_cluster.algorithms import preference_losses
from rlhf_cluster.algorithms.online_dpo import (
    OnlineDpo,
    OnlineDpoConfig,
    choose_pair,
)
from rlhf_cluster.algorithms.policy_losses import token_weights
from rlhf_cluster.algorithms.preference_loss_config import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
)
from rlhf_cluster.algorithms.preference_losses import (
    Labelled,
    Pairs,
)
from rlhf_cluster.offline.reward_model_losses import bradley_terry_loss
from tests.support.builders.tiny_learner import (
    loss_inputs,
    random_groups,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import cpo_trainer
    from trl.experimental.online_dpo import online_dpo_trainer
    from trl.experimental.orpo import orpo_trainer
    from trl.trainer import dpo_trainer, kto_trainer, reward_trainer

SECTION: TypeAdapter[Any] = TypeAdapter(PreferenceLoss)
CHOSEN, REJECTED, WIDTH = [3, 9, 1, 6], [5, 2, 7, 6], 9


class Responses:
    """Log-probabilities of each token of right-padded responses [B, T], and those of a reference."""

    def __init__(self, lengths: list[int], seed: int = 0, dtype=torch.float64) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (len(lengths), WIDTH)
        self.mask = torch.arange(WIDTH)[None] < torch.tensor(lengths)[:, None]
        self.logprobs = (-0.1 - torch.rand(shape, generator=draw, dtype=torch.float64)).to(dtype)
        self.logprobs.requires_grad_()
        self.ref = (-0.1 - torch.rand(shape, generator=draw, dtype=torch.float64)).to(dtype)
        self.lengths = torch.tensor(lengths)

    def sums(self, which: str) -> torch.Tensor:
        return (getattr(self, which) * self.mask).sum(1)

    def pairs(self) -> Pairs:
        """The first half are chosen, the second rejected."""
        chosen, rejected = self.sums("logprobs").chunk(2)
        ref_chosen, ref_rejected = self.sums("ref").chunk(2)
        lengths = self.lengths.chunk(2)
        return Pairs(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=lengths[0],
            rejected_tokens=lengths[1],
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
        )

    def gradient_of(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = torch.autograd.grad(loss, self.logprobs)
        return loss.detach(), gradient


def stand_in(**settings: Any) -> SimpleNamespace:
    """What the loss methods of TRL's trainers read of their trainer."""
    same = {
        "device": torch.device("cpu"),
        "gather": lambda x: x,
        "gather_for_metrics": lambda x: x,
    }
    defaults = {
        "model": SimpleNamespace(training=False),
        "accelerator": SimpleNamespace(**same),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "ld_alpha": None,
        "use_weighting": False,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
    return SimpleNamespace(**{**defaults, **settings})


def outputs_of(found: Responses) -> SimpleNamespace:
    """What TRL's fused head returns for [prompt token, response]."""
    zeros = torch.zeros(found.mask.shape)
    return SimpleNamespace(
        log_probs=found.logprobs * found.mask,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )


def padded(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1)
    ids = torch.ones(whole.shape, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": whole.long()}


DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"type": "dpo"}, {}),
    "forward KL": (
        {"type": "dpo", "divergence": "forward_kl"},
        {"f_divergence_type": "forward_kl"},
    ),
    "JS": ({"type": "dpo", "divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": (
        {"type": "dpo", "divergence": "alpha", "alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "robust": (
        {"type": "robust_dpo", "flip_probability": 0.2},
        {"loss_types": ["robust"], "label_smoothing": 0.2},
    ),
    "ipo": ({"type": "ipo"}, {"loss_types": ["ipo"]}),
}


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(("keys", "settings"), DPO.values(), ids=DPO)
def test_losses_against_a_reference_are_those_of_trl(
    keys: dict[str, Any], settings: dict[str, Any], beta: float
) -> None:
    single = keys.get("divergence") == "alpha"  # TRL computes it in float32 alone
    batch = Responses(CHOSEN + REJECTED, dtype=torch.float32 if single else torch.float64)
    losses, _ = SECTION.validate_python({**keys, "beta": beta}).losses(batch.pairs())
    found = batch.gradient_of(losses.mean())
    ref_chosen, ref_rejected = batch.sums("ref").chunk(2)
    inputs = padded(batch.mask) | {
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    trainer = stand_in(beta=beta, **settings)
    theirs = dpo_trainer.DPOTrainer._compute_loss(
        trainer, lambda **_: outputs_of(batch), inputs, False
    )
    expected = batch.gradient_of(theirs)
    rtol = 1e-4 if single else 1e-10
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=1e-7 if single else 1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=1e-7 if single else 1e-12)
    assert found[1].abs().sum() > 0


def test_rpo_is_trls_sum_of_dpo_and_likelihood_for_responses_of_one_length() -> None:
    # TRL's likelihood is a mean over the batch's tokens, ours over each response's
    batch = Responses([6, 6, 6, 6, *REJECTED])
    losses, _ = SECTION.validate_python({"type": "dpo", "nll_coef": 0.4}).losses(batch.pairs())
    found = batch.gradient_of(losses.mean())
    ref_chosen, ref_rejected = batch.sums("ref").chunk(2)
    inputs = padded(batch.mask) | {
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    trainer = stand_in(beta=0.1, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.4])
    theirs = dpo_trainer.DPOTrainer._compute_loss(
        trainer, lambda **_: outputs_of(batch), inputs, False
    )
    expected = batch.gradient_of(theirs)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("drift", [0.3, -0.3])
def test_kto_and_its_baseline_are_those_of_trl(drift: float) -> None:
    batch, unmatched = Responses(CHOSEN), Responses(REJECTED, seed=1)
    desirable = torch.tensor([True, False, True, True])
    ref_unmatched = unmatched.sums("logprobs").detach() - drift
    baseline = preference_losses.kto_baseline(unmatched.sums("logprobs"), ref_unmatched)
    section = SECTION.validate_python(
        {"type": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    )
    labelled = Labelled(policy=batch.sums("logprobs"), ref=batch.sums("ref"), desirable=desirable)
    found = batch.gradient_of(section.losses(labelled, baseline)[0].mean())
    trainer = stand_in(
        beta=0.3,
        loss_type="kto",
        desirable_weight=1.5,
        undesirable_weight=0.5,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: unmatched.sums("logprobs"),
    )
    inputs = padded(batch.mask) | {
        "label": desirable,
        "ref_logps": batch.sums("ref"),
        "ref_KL_logps": ref_unmatched,
    }
    theirs = kto_trainer.KTOTrainer._compute_loss(
        trainer, lambda **_: outputs_of(batch), inputs, False
    )
    expected = batch.gradient_of(theirs)
    assert baseline.item() == pytest.approx(max(0.0, drift))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def online_step(batch: Responses, rewards: list[float], loss_type: str, beta: float) -> Any:
    """TRL's whole training step on two responses of each prompt; returns the loss with its graph."""
    num, losses = len(rewards) // 2, []
    policy, end = object(), torch.full((2 * num, 1), 1)
    trainer = stand_in(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        beta=beta,
        ref_model=None,
        reward_funcs=[None],
        state=SimpleNamespace(global_step=1),
        stats=defaultdict(list),
        is_vision_model=False,
        eos_token_ids=[1],
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        _generate=lambda *_: (end, end, batch.mask.long(), batch.mask.long(), None),
        _calculate_rewards_from_functions=lambda **_: torch.tensor(rewards),
        _forward=lambda model, *_: batch.ref if model is trainer.ref_model else batch.logprobs,
    )
    trainer.ref_model = object()
    trainer.accelerator.backward = lambda loss, **_: losses.append(loss)
    model = SimpleNamespace(train=lambda: policy)
    inputs = {"prompt": [""] * num}
    online_dpo_trainer.OnlineDPOTrainer.training_step(trainer, model, inputs)
    return losses[0]


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("loss", "theirs"),
    [({"type": "dpo"}, "sigmoid"), ({"type": "ipo", "per_token": False}, "ipo")],
    ids=["dpo", "ipo"],
)
def test_online_dpo_picks_and_trains_the_pairs_of_trl(
    loss: dict[str, Any], theirs: str, beta: float
) -> None:
    batch = Responses(CHOSEN + REJECTED)
    rewards = [1.0, 0.2, 0.5, 3.0, 0.0, 0.7, 0.6, -1.0]  # of first responses, then of second ones
    expected = batch.gradient_of(online_step(batch, rewards, theirs, beta))

    order = [i for pair in zip(range(4), range(4, 8), strict=True) for i in pair]
    own = [rewards[i] for i in order]
    lengths = [int(batch.lengths[i]) for i in order]
    groups = random_groups(0, group_size=2, lengths=lengths, rewards=own)
    algorithm = OnlineDpo(OnlineDpoConfig.model_validate({"loss": {**loss, "beta": beta}}))
    assert [choose_pair(group) for group in groups] == [(0, 1), (1, 0), (1, 0), (0, 1)]
    marks = torch.cat([torch.from_numpy(a) for g in algorithm.advantages(groups) for a in g])
    flat, ref = (
        torch.cat([values[i, :n] for i, n in zip(order, lengths, strict=True)])
        for values in (batch.logprobs, batch.ref)
    )
    losses, _ = algorithm.loss(
        loss_inputs(flat, flat.detach(), marks.double(), ref=ref, lengths=lengths, unit_size=2)
    )
    weights = torch.tensor(token_weights(lengths, algorithm.aggregation, WIDTH))
    total = (losses * weights.double().repeat_interleave(torch.tensor(lengths))).sum()
    found = batch.gradient_of(total)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-8)
    assert found[1].abs().sum() > 0


def means(batch: Responses) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = (batch.sums("logprobs") / batch.lengths).chunk(2)
    return chosen, rejected


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_simpo_is_that_of_trl(gamma: float) -> None:
    batch = Responses(CHOSEN + REJECTED)
    section = SECTION.validate_python({"type": "simpo", "beta": 2.5, "gamma": gamma})
    found = batch.gradient_of(section.losses(batch.pairs())[0].mean())
    trainer = stand_in(beta=2.5, simpo_gamma=gamma, loss_type="simpo", alpha=0.0)
    losses, *_ = cpo_trainer.CPOTrainer.cpo_loss(trainer, *means(batch))
    expected = batch.gradient_of(losses.mean())
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_the_odds_ratio_of_orpo_is_that_of_trl() -> None:
    batch = Responses(CHOSEN + REJECTED)
    found = batch.gradient_of(0.3 * preference_losses.odds_loss(batch.pairs()).mean())
    trainer = stand_in(beta=0.3)
    losses, *_ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, *means(batch))
    expected = batch.gradient_of(-losses.mean())  # TRL subtracts it from the likelihood
    # it computes in float32
    torch.testing.assert_close(found[0], expected[0].double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 1.5, 2.0]])
@pytest.mark.parametrize("centring", [None, 0.02])
def test_bradley_terry_is_that_of_trls_reward_trainer(
    margins: list[float] | None, centring: float | None
) -> None:
    draw = torch.Generator().manual_seed(2)
    scores = torch.randn(8, generator=draw, dtype=torch.float64).requires_grad_()
    own = None if margins is None else torch.tensor(margins, dtype=torch.float64)
    chosen, rejected = scores.chunk(2)
    losses = bradley_terry_loss(chosen, rejected, own, centring=centring or 0.0)
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=centring))
    inputs: dict[str, Any] = {} if own is None else {"margin": own}

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=scores[:, None])

    theirs = reward_trainer.RewardTrainer.compute_loss(trainer, model, inputs)
    torch.testing.assert_close(losses.mean(), theirs)
    found, expected = (torch.autograd.grad(loss, scores) for loss in (losses.mean(), theirs))
    torch.testing.assert_close(found, expected)


def test_every_preference_loss_that_trl_has_is_compared() -> None:
    compared = {keys["type"] for keys, _ in DPO.values()} | {"kto", "simpo", "orpo"}
    without = {"dpop"}  # no such loss in TRL
    assert compared | without == set(PREFERENCE_LOSSES)
