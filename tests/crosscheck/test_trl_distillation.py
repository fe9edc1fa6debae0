"""Distillation in TRL's GKD and on-policy trainers against ours: value and gradient."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlhf_cluster.algorithms.on_policy_distillation import (
    OnPolicyDistillation,
    OnPolicyDistillationConfig,
)
from rlhf_cluster.models.divergence import Divergence
from rlhf_cluster.models.logprobs import linear_logprobs
from tests.support.builders.tiny_learner import loss_inputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.iw_opd import iw_opd_trainer

ROWS, WIDTH, VOCABULARY = 2, 7, 11


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("divergence", "beta"),
    [
        (Divergence(kind="forward_kl"), 0.0),
        (Divergence(kind="js", alpha=0.1), 0.1),
        (Divergence(kind="js"), 0.5),
        (Divergence(kind="reverse_kl"), 1.0),
    ],
    ids=["forward_kl", "js 0.1", "js", "reverse_kl"],
)
def test_the_divergence_is_that_of_trl(
    divergence: Divergence, beta: float, temperature: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(ROWS, WIDTH, VOCABULARY, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    student.requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=draw)
    masked = labels.masked_fill(torch.rand(ROWS, WIDTH, generator=draw) < 0.4, -100)
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, masked, beta, temperature)
    kept, logits = masked != -100, torch.eye(VOCABULARY, dtype=torch.float64)
    found = linear_logprobs(
        student[kept],
        logits,
        labels[kept],
        temperature,
        3,
        reference=(teacher[kept], logits),
        divergence=divergence,
    )[2].mean()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3


def test_on_policy_distillation_has_the_gradient_of_trl_where_every_token_weighs_the_same() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, WIDTH, VOCABULARY, generator=draw, dtype=torch.float64)
    teacher = -3 * torch.rand(ROWS, WIDTH, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=draw)
    mask = torch.arange(WIDTH) < torch.tensor([[WIDTH], [3]])
    logits.requires_grad_()
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=0.0,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    theirs = iw_opd_trainer.IWOPDTrainer._compute_iw_opd_loss(
        trainer, logits, ids, ids.masked_fill(~mask, -100), teacher
    )
    own = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)[mask]
    inputs = loss_inputs(own, own.detach(), torch.zeros_like(own).detach(), lengths=[WIDTH, 3])
    losses, _ = OnPolicyDistillation(OnPolicyDistillationConfig()).loss(
        replace(inputs, teacher_logprobs=teacher[mask])
    )
    found, expected = (torch.autograd.grad(loss, logits)[0] for loss in (losses.mean(), theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.abs().max() > 1e-2
