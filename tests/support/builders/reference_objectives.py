"""The policy-gradient objective a second time: a slow loop of plain floats, for tests.

Nothing is shared with `rlhf_cluster.algorithms` but the configuration classes. `live` are the
learner's log-probabilities where the gradient flows, `frozen` the same numbers where it is stopped:
finite differences that move `live` alone are the gradient that the loss must have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.algorithms.algorithm import LossInputs
from tests.support.builders.tiny_learner import loss_inputs

POLICY_GRADIENTS = sorted(set(ALGORITHMS) - {"online_dpo", "on_policy_distillation"})
"""Those with nothing but the shared keys and rewards; the others have tests of their own."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Plain numbers of N tokens; `lengths` cuts them into rollouts."""

    learner: list[float]
    proximal: list[float]
    sampled: list[float]
    ref: list[float]
    advantages: list[float]
    entropy: list[float]
    staleness: list[int]
    lengths: list[int]

    @property
    def sequence(self) -> list[int]:
        return [i for i, n in enumerate(self.lengths) for _ in range(n)]


def random_case(seed: int, lengths: Sequence[int], spread: float = 0.6) -> Case:
    """The policies differ by about `spread` nats a token."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(total, generator=draw, dtype=torch.float64)

    sampled = -2 + noise(0.7)
    proximal = sampled + noise(spread)
    return Case(
        learner=(proximal + noise(spread)).tolist(),
        proximal=proximal.tolist(),
        sampled=sampled.tolist(),
        ref=(sampled + noise(spread)).tolist(),
        advantages=noise(1.0).tolist(),
        entropy=noise(0.5).abs().tolist(),
        staleness=torch.randint(0, 8, (total,), generator=draw).tolist(),
        lengths=list(lengths),
    )


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> LossInputs:
    def of(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    return loss_inputs(
        of(case.learner).requires_grad_(),
        of(case.sampled),
        of(case.advantages),
        proximal=of(case.proximal),
        ref=of(case.ref),
        entropy=of(case.entropy).requires_grad_(),
        staleness=of(case.staleness),
        lengths=case.lengths,
    )


def slow_losses(config: Any, case: Case, live: Sequence[float] | None = None) -> list[float]:
    """The loss of each token."""
    live = case.learner if live is None else live
    proximal = [_proximal(config, case, t) for t in range(len(live))]
    target = case.learner if config.proximal == "bypass" else proximal
    weights = _weights(config, case, target)
    ratios = [math.exp(own - prox) for own, prox in zip(live, proximal, strict=True)]
    frozen = [math.exp(own - prox) for own, prox in zip(case.learner, proximal, strict=True)]
    if config.type == "gspo":
        ratios = _geometric_means(ratios, case.sequence)
    found = []
    for t, advantage in enumerate(case.advantages):
        loss = _surrogate(config, ratios[t], frozen[t], live[t], advantage)
        if config.proximal == "bypass" and weights[t] > 1:  # lifts the slope, and not the value
            start = _surrogate(config, frozen[t], frozen[t], case.learner[t], advantage)
            loss = start + weights[t] * (loss - start)
        else:
            loss *= weights[t]
        if config.kl_coef and config.kl_in == "loss":
            loss += config.kl_coef * _kl(config, case, live[t], t)
        found.append(loss - config.entropy_coef * case.entropy[t])
    return found


def slow_gradient(config: Any, case: Case, outer: Sequence[float]) -> list[float]:
    """Central differences of sum(outer * losses) at each token's live log-probability."""
    found, step = [], 1e-6
    for t in range(len(case.learner)):
        ends = []
        for sign in (1, -1):
            moved = list(case.learner)
            moved[t] += sign * step
            losses = slow_losses(config, case, moved)
            ends.append(math.fsum(o * v for o, v in zip(outer, losses, strict=True)))
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


def _proximal(config: Any, case: Case, t: int) -> float:
    if config.proximal == "bypass":
        return case.sampled[t]
    if config.proximal == "interpolate":
        alpha = 1 / max(case.staleness[t], 1)
        # the policy that stands for the learner is the one given as proximal, or the learner
        return alpha * case.sampled[t] + (1 - alpha) * case.learner[t]
    return case.proximal[t]


def _geometric_means(ratios: Sequence[float], sequence: Sequence[int]) -> list[float]:
    found = []
    for own in sequence:
        logs = [math.log(r) for r, s in zip(ratios, sequence, strict=True) if s == own]
        found.append(math.exp(math.fsum(logs) / len(logs)))
    return found


def _weights(config: Any, case: Case, target: Sequence[float]) -> list[float]:
    found = [1.0] * len(target)
    for rule in config.correction.rules():
        weights = _rule_weights(config, rule, case, target)
        found = [a * b for a, b in zip(found, weights, strict=True)]
    return found


def _rule_weights(config: Any, rule: Any, case: Case, target: Sequence[float]) -> list[float]:
    sequence, logs = case.sequence, [a - b for a, b in zip(target, case.sampled, strict=True)]
    found = []
    for t, own in enumerate(sequence):
        members = [v for v, s in zip(logs, sequence, strict=True) if s == own]
        exponent = {
            "token": logs[t],
            "sequence": math.fsum(members),
            "geometric": math.fsum(members) / len(members),
        }[rule.level]
        ratio = math.exp(min(max(exponent, -20.0), 20.0))
        inside = rule.low <= ratio <= rule.high
        weight = min(max(ratio, rule.low), rule.high) if rule.action == "truncate" else inside * 1.0
        if rule.action == "mask" and rule.keep_ratio and config.proximal != "bypass":
            weight *= ratio
        if rule.action == "truncate" and config.proximal == "bypass":
            # the surrogate has the ratio already, and CISPO has bounded it itself
            weight = 1.0 if config.type == "cispo" else weight / ratio
        found.append(weight)
    return found


def _surrogate(config: Any, ratio: float, frozen: float, live: float, advantage: float) -> float:
    if config.type == "reinforce":
        return -ratio * advantage
    if config.type == "sapo":
        tau = config.positive_temperature if advantage > 0 else config.negative_temperature
        return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    if config.type == "cispo":
        weight = min(max(frozen, 1 - config.clip_low), 1 + config.clip_high)
        return -weight * advantage * live
    bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    objective = min(ratio * advantage, bounded * advantage)
    if config.dual_clip is not None and advantage < 0:
        objective = max(objective, config.dual_clip * advantage)
    return -objective


def _kl(config: Any, case: Case, live: float, t: int) -> float:
    frozen, other = case.learner[t], case.sampled[t] if config.kl_to == "sampler" else case.ref[t]
    weight, rules = 1.0, config.correction.rules()
    if rules:
        caps = [rule.high for rule in rules if rule.level == "token"] or [2.0]
        weight = min(math.exp(frozen - case.sampled[t]), *caps)
    difference = live - other
    k3 = math.exp(-difference) - 1 + difference
    estimator = config.kl_estimator or "k2"
    if estimator == "k1":
        return weight * math.exp(live - frozen) * difference
    if estimator == "k2":
        return weight * difference**2 / 2
    return weight * k3 * (math.exp(live - frozen) if estimator == "k3" else 1.0)
