"""`proximal = "bypass"`: the surrogate decides by the true ratio, a token rule bounds the weight."""

import math
from typing import Any

import pytest
import torch

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from tests.support.builders.reference_objectives import (
    POLICY_GRADIENTS,
    random_case,
    slow_gradient,
    slow_losses,
    tensors,
)
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import loss_inputs

RATIOS = [1e-6, 0.1, 0.5, 0.9, 1.1, 1.9, 2.1, 3.0, 6.0, 50.0]
CAP = 2.0


def build(name: str, **keys: Any) -> PolicyGradient[Any]:
    tree = tiny_tree()
    tree["algorithm"] = {"type": name, "group_size": 4, "proximal": "bypass", **keys}
    config = validate(RunConfig, tree, source="test").algorithm
    found = ALGORITHMS[name](config, 64)
    assert isinstance(found, PolicyGradient)
    return found


def force(algorithm: PolicyGradient[Any], ratio: float, advantage: float) -> float:
    """How far a step raises the log-probability of one token, in units of |A| = 1."""
    learner = torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True)
    sampled = learner.detach() - math.log(ratio)
    inputs = loss_inputs(learner, sampled, torch.tensor([advantage], dtype=torch.float64))
    losses, _ = algorithm.loss(inputs)
    (gradient,) = torch.autograd.grad(losses.sum(), learner)
    return -gradient.item()


def gate(ratio: float, tau: float) -> float:
    """The slope of SAPO's f."""
    open_share = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return 4 * open_share * (1 - open_share)


def bounded(ratio: float) -> float:
    return min(ratio, CAP)


EXPECTED: dict[str, tuple[str, dict[str, Any], Any]] = {
    "reinforce": ("reinforce", {}, lambda r, a: bounded(r) * a),
    "grpo": (
        "grpo",
        {"clip_low": 0.2, "clip_high": 0.28},
        lambda r, a: 0.0 if (r > 1.28 and a > 0) or (r < 0.8 and a < 0) else bounded(r) * a,
    ),
    "a clip wider than the cap": (
        "grpo",
        {"clip_low": 0.9, "clip_high": 4.0},
        lambda r, a: 0.0 if (r > 5 and a > 0) or (r < 0.1 and a < 0) else bounded(r) * a,
    ),
    "a dual clip over the cap": (
        "grpo",
        {"dual_clip": 4.0, "clip_high": 100.0},
        lambda r, a: 0.0 if a < 0 and (r > 4 or r < 0.8) else bounded(r) * a,
    ),
    "a dual clip under the cap": (
        "grpo",
        {"dual_clip": 1.5, "clip_high": 100.0},
        lambda r, a: 0.0 if a < 0 and (r > 1.5 or r < 0.8) else bounded(r) * a,
    ),
    "sapo": ("sapo", {}, lambda r, a: gate(r, 1.0 if a > 0 else 1.05) * bounded(r) * a),
}


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", EXPECTED)
def test_l02_the_surrogate_sees_the_true_ratio_and_the_cap_bounds_what_it_lets_through(
    case: str, ratio: float, advantage: float
) -> None:
    name, keys, expected = EXPECTED[case]
    found = force(build(name, **keys), ratio, advantage)
    assert found == pytest.approx(expected(ratio, advantage), rel=1e-9, abs=1e-15)


def test_l02_a_lower_bound_raises_the_weight_of_what_the_clip_lets_through() -> None:
    rule = {"type": "custom", "level": "token", "action": "truncate", "low": 0.7, "high": 1.4}
    algorithm = build("grpo", correction=rule)
    assert force(algorithm, 0.1, 1.0) == pytest.approx(0.7)
    assert force(algorithm, 0.1, -1.0) == 0, "the clip at 0.8 has stopped it"
    assert force(algorithm, 0.9, -1.0) == pytest.approx(-0.9)


@pytest.mark.parametrize("name", ["grpo", "sapo", "reinforce"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_l02_a_lower_bound_lifts_the_gradient_and_not_the_value_of_the_loss(
    name: str, advantage: float
) -> None:
    rule = {"type": "custom", "level": "token", "action": "truncate", "low": 0.5, "high": 2.0}
    algorithm = build(name, correction=rule)
    plain = build(name, correction={"type": "none"})
    learner = torch.tensor([-19.0, -2.5, -1.0], dtype=torch.float64, requires_grad=True)
    sampled = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    inputs = loss_inputs(learner, sampled, torch.full((3,), advantage, dtype=torch.float64))
    losses, _ = algorithm.loss(inputs)
    torch.testing.assert_close(losses, plain.loss(inputs)[0], rtol=1e-12, atol=0)
    (lifted,) = torch.autograd.grad(losses.sum(), learner)
    if name == "reinforce":
        expected = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
        torch.testing.assert_close(lifted, -advantage * expected)


@pytest.mark.parametrize("high", [5.0, 7.0])
@pytest.mark.parametrize("ratio", [*RATIOS, 4.9, 5.1, 1e6])
def test_l02_cispo_truncates_by_itself(ratio: float, high: float) -> None:
    for correction in ({"type": "none"}, {"type": "token_tis", "cap": high}):
        found = force(build("cispo", correction=correction), ratio, 1.0)
        assert found == pytest.approx(min(ratio, 5.0))


@pytest.mark.parametrize(
    "correction",
    [
        None,
        {"type": "token_tis", "cap": 4.9},
        {"type": "token_tis_geometric_mask"},
        {"type": "custom", "level": "token", "action": "truncate", "low": 0.1, "high": 9.0},
        [{"type": "sequence_mask"}, {"type": "token_tis"}],
    ],
)
def test_l02_a_bound_under_that_of_cispo_is_refused_and_not_taken_for_it(correction: Any) -> None:
    keys = {} if correction is None else {"correction": correction}
    with pytest.raises(ConfigError, match="bound the same weight.*Use correction"):
        build("cispo", **keys)


@pytest.mark.parametrize("name", ["gspo", "cispo"])
@pytest.mark.parametrize(
    "rule", [{"type": "sequence_mis"}, {"type": "sequence_mask"}, {"type": "geometric_mask"}]
)
def test_l02_a_mask_bounds_no_weight(name: str, rule: dict[str, Any]) -> None:
    algorithm = build(name, correction={**rule, "low": 0.5, "high": 3.0}, clip_low=0.9, clip_high=9)
    assert force(algorithm, 2.9, 1.0) == pytest.approx(2.9)
    assert force(algorithm, 3.1, 1.0) == 0
    assert force(algorithm, 0.4, 1.0) == 0


@pytest.mark.parametrize("spread", [0.2, 1.5, 4.0])
@pytest.mark.parametrize("correction", [CAP, 30.0, (0.3, 3.0)])
@pytest.mark.parametrize("name", [n for n in POLICY_GRADIENTS if n not in ("cispo", "gspo")])
def test_l02_far_from_the_sampler_loss_and_gradient_are_those_of_the_slow_loop(
    name: str, correction: Any, spread: float
) -> None:
    rule = (
        {"type": "token_tis", "cap": correction}
        if isinstance(correction, float)
        else dict(zip(("low", "high"), correction, strict=True))
        | {"type": "custom", "level": "token", "action": "truncate"}
    )
    keys = {} if name in ("sapo", "reinforce") else {"dual_clip": 2.5, "clip_high": 3.0}
    algorithm = build(name, correction=rule, **keys)
    case = random_case(11, [4, 9, 2], spread=spread)
    inputs = tensors(case)
    losses, _ = algorithm.loss(inputs)
    expected = torch.tensor(slow_losses(algorithm.config, case), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    (found,) = torch.autograd.grad(losses.sum(), inputs.learner_logprobs)
    slow = slow_gradient(algorithm.config, case, [1.0] * len(case.learner))
    low = rule["low"] if isinstance(rule.get("low"), float) else 0.0
    lifted = low * (inputs.sampled_logprobs - inputs.learner_logprobs).detach().exp().max().item()
    # digits that differences of large sums, or of what a weight low / r lifts, lose
    lost = 1e-9 * max(expected.abs().max().item(), lifted)
    torch.testing.assert_close(found, torch.tensor(slow).double(), rtol=1e-5, atol=1e-7 + lost)


@pytest.mark.parametrize("name", ["grpo", "sapo", "reinforce"])
def test_l02_the_weight_of_a_sample_is_the_bounded_ratio(name: str) -> None:
    inputs = tensors(random_case(12, [6, 6], spread=1.5))
    ratios = (inputs.learner_logprobs - inputs.sampled_logprobs).detach().exp()
    assert (ratios > CAP).any()
    found = build(name).correction_weights(inputs)
    torch.testing.assert_close(found, ratios.clamp(max=CAP))
    wide = build("cispo", correction={"type": "token_tis", "cap": 6.0})
    torch.testing.assert_close(wide.correction_weights(inputs), ratios.clamp(max=6.0))


@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_l02_a_refused_default_is_called_one_and_what_the_message_asks_for_is_taken(
    name: str,
) -> None:
    with pytest.raises(ConfigError, match=r"\(the default\).*correction = \{ type = 'none' \}"):
        build(name)
    build(name, correction={"type": "none"})
    written = {"type": "sequence_tis"} if name == "gspo" else {"type": "token_tis"}
    with pytest.raises(
        ConfigError, match=f"correction.type = '{written['type']}' (?!.the default)"
    ):
        build(name, correction=written)
