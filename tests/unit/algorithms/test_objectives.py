"""Every algorithm's loss against a slow loop of floats, and what all of them must (not) do."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.algorithms.algorithm import LossInputs
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError, RecordError
from tests.support.builders.reduced_metrics import reduced
from tests.support.builders.reference_objectives import (
    POLICY_GRADIENTS,
    Case,
    random_case,
    slow_gradient,
    slow_losses,
    tensors,
)
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import loss_inputs

LENGTHS = [1, 5, 8, 3]
NAMES = POLICY_GRADIENTS
SURROGATES = ["cispo", "grpo", "gspo", "reinforce", "sapo"]
"""One algorithm of each surrogate; the others are met with their own defaults."""
PROXIMALS = ["recompute", "interpolate", "bypass"]
CORRECTIONS: list[dict[str, Any]] = [
    {"type": "none"},
    {"type": "token_tis", "cap": 1.5},
    {"type": "token_tis", "cap": 5.5},
    {"type": "sequence_tis"},
    {"type": "geometric_tis", "cap": 1.1},
    {"type": "icepop", "low": 0.7, "high": 1.6},
    {"type": "sequence_mis", "low": 0.2, "high": 5.0},
    {"type": "geometric_mask", "low": 0.85, "high": 1.2},
    {"type": "custom", "level": "token", "action": "truncate", "low": 0.7, "high": 1.4},
    {"type": "custom", "level": "token", "action": "truncate", "low": 0.0, "high": 6.0},
    {"type": "custom", "level": "token", "action": "mask", "low": 0.5, "high": 2, "keep": "one"},
    {"type": "token_tis_geometric_mask", "cap": 1.5, "low": 0.85, "high": 1.2},
    {
        "type": "combined",
        "parts": [
            {"type": "icepop", "low": 0.7, "high": 1.6},
            {"type": "sequence_mask", "low": 0.2, "high": 5.0},
        ],
    },
]


def configured(name: str, **keys: Any) -> Any:
    """The section as a run file makes it. Raises `ConfigError`."""
    tree = tiny_tree(scoring={"reference": True})
    tree["algorithm"] = {"type": name, "group_size": 4, **keys}
    return validate(RunConfig, tree, source="test").algorithm


def build(name: str, **keys: Any) -> PolicyGradient[Any]:
    built = ALGORITHMS[name](configured(name, **keys), 64)
    assert isinstance(built, PolicyGradient)
    return built


def allowed(name: str, **keys: Any) -> bool:
    try:
        configured(name, **keys)
    except ConfigError:
        return False
    return True


COMBINATIONS = [
    pytest.param(name, proximal, correction, id=f"{name}-{proximal}-{correction['type']}")
    for name in NAMES
    for proximal in PROXIMALS
    for correction in CORRECTIONS
    if name in SURROGATES or correction in CORRECTIONS[1:3]
    if allowed(name, proximal=proximal, correction=correction)
]


def outer_weights(num: int) -> torch.Tensor:
    return torch.rand(num, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5


@pytest.mark.parametrize(("name", "proximal", "correction"), COMBINATIONS)
def test_loss_and_gradient_match_the_slow_loop(name: str, proximal: str, correction: Any) -> None:
    algorithm = build(name, proximal=proximal, correction=correction)
    case = random_case(1, LENGTHS)
    if proximal == "interpolate":  # the pass that would tell them apart is not made
        case = replace(case, proximal=case.learner)
    inputs = tensors(case)
    losses, _ = algorithm.loss(inputs)
    expected = torch.tensor(slow_losses(algorithm.config, case), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    outer = outer_weights(len(case.learner))
    (losses * outer).sum().backward()
    slow = torch.tensor(slow_gradient(algorithm.config, case, outer.tolist()), dtype=torch.float64)
    found = inputs.learner_logprobs.grad
    assert found is not None
    torch.testing.assert_close(found, slow, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kl_to", ["reference", "sampler"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_direct", None])
@pytest.mark.parametrize("correction", ["none", "token_tis", "sequence_mis"])
def test_the_kl_term_matches_the_slow_loop(estimator: Any, kl_to: str, correction: str) -> None:
    algorithm = build(
        "grpo",
        kl_coef=0.3,
        kl_estimator=estimator,
        kl_to=kl_to,
        correction={"type": correction},
        entropy_coef=0.01,
    )
    case = random_case(2, LENGTHS)
    inputs = tensors(case)
    losses, _ = algorithm.loss(inputs)
    expected = torch.tensor(slow_losses(algorithm.config, case), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    outer = outer_weights(len(case.learner))
    (losses * outer).sum().backward()
    slow = torch.tensor(slow_gradient(algorithm.config, case, outer.tolist()), dtype=torch.float64)
    assert inputs.learner_logprobs.grad is not None
    torch.testing.assert_close(inputs.learner_logprobs.grad, slow, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(inputs.entropy.grad, -0.01 * outer)


@pytest.mark.parametrize("dual_clip", [1.5, 3.0])
def test_the_dual_clip_matches_the_slow_loop(dual_clip: float) -> None:
    algorithm = build("grpo", dual_clip=dual_clip, correction={"type": "none"})
    case = random_case(3, LENGTHS, spread=1.5)
    losses, sums = algorithm.loss(tensors(case))
    expected = torch.tensor(slow_losses(algorithm.config, case), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    bound = [dual_clip * -a for a in case.advantages if a < 0]
    assert sum(math.isclose(v, b) for v in losses.tolist() for b in bound) > 0, "the case bites"
    assert sums["learner/clip_fraction"][0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_into_anything_frozen(name: str) -> None:
    algorithm = build(name, kl_coef=0.1, entropy_coef=0.1)
    inputs = tensors(random_case(4, LENGTHS))
    frozen = {
        "sampled": inputs.sampled_logprobs,
        "proximal": inputs.proximal_logprobs,
        "reference": inputs.ref_logprobs,
        "advantages": inputs.advantages,
    }
    for tensor in frozen.values():
        assert tensor is not None
        tensor.requires_grad_()
    algorithm.loss(inputs)[0].sum().backward()
    assert {n: t.grad for n, t in frozen.items() if t is not None} == dict.fromkeys(frozen)
    assert inputs.learner_logprobs.grad is not None
    assert inputs.learner_logprobs.grad.abs().sum() > 0


@pytest.mark.parametrize("rule", ["icepop", "sequence_mis", "geometric_mask"])
@pytest.mark.parametrize("proximal", ["recompute", "bypass"])
def test_what_is_masked_has_neither_loss_nor_gradient(rule: str, proximal: str) -> None:
    algorithm = build("grpo", correction={"type": rule}, proximal=proximal)
    inputs = tensors(random_case(5, LENGTHS, spread=0.9))
    losses, sums = algorithm.loss(inputs)
    losses.sum().backward()
    masked = sums["importance/masked_fraction"][0]
    assert 0 < masked <= len(losses)
    assert inputs.learner_logprobs.grad is not None
    silent = (losses == 0) & (inputs.learner_logprobs.grad == 0)
    assert silent.sum() >= masked
    assert (losses == 0).sum() == masked


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("correction", ["sequence_tis", "geometric_mask", "none"])
def test_s1_micro_batches_of_whole_rollouts_change_nothing(name: str, correction: str) -> None:
    algorithm = build(name, correction={"type": correction}, kl_coef=0.1)
    case = random_case(6, LENGTHS)
    expected, expected_sums = algorithm.loss(tensors(case))
    parts = [algorithm.loss(tensors(one)) for one in rollouts_of(case)]
    torch.testing.assert_close(torch.cat([p for p, _ in parts]), expected)
    whole = reduced(expected_sums)
    assert reduced(*(sums for _, sums in parts)) == pytest.approx(whole, rel=1e-5, abs=1e-9)


def rollouts_of(case: Case) -> list[Case]:
    found, start = [], 0
    for length in case.lengths:
        cut = slice(start, start + length)
        parts = {n: v[cut] for n, v in vars(case).items() if n != "lengths"}
        found.append(Case(**parts, lengths=[length]))
        start += length
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_tokens_has_loss_zero_and_the_same_metrics(name: str) -> None:
    algorithm = build(name, kl_coef=0.1)
    nothing = torch.zeros(0, requires_grad=True)
    empty = loss_inputs(nothing, torch.zeros(0), torch.zeros(0), ref=torch.zeros(0))
    losses, sums = algorithm.loss(replace(empty, num_sequences=0))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert reduced(sums) == {}
    assert set(sums) == set(algorithm.loss(tensors(random_case(0, LENGTHS)))[1])


@pytest.mark.parametrize("proximal", PROXIMALS)
@pytest.mark.parametrize("name", NAMES)
def test_s9_one_step_raises_good_actions_and_lowers_bad_ones(name: str, proximal: str) -> None:
    own_rule = name in ("cispo", "gspo") and proximal == "bypass"  # the default is refused there
    keys = {"correction": {"type": "none"}} if own_rule else {}
    algorithm = build(name, proximal=proximal, **keys)
    logits = torch.zeros(5, requires_grad=True)
    start = torch.full((2,), math.log(0.2))
    inputs = loss_inputs(
        logits.log_softmax(0)[torch.tensor([3, 1])],
        start,
        torch.tensor([1.0, -1.0]),
        proximal=start,
        lengths=[1, 1],
    )
    algorithm.loss(inputs)[0].sum().backward()
    assert logits.grad is not None
    after = (logits - 0.1 * logits.grad).softmax(0)
    assert after[3] > 0.2 > after[1]


@pytest.mark.parametrize("name", NAMES)
def test_s7_an_unchanged_policy_has_ratio_one_everywhere(name: str) -> None:
    case = random_case(7, LENGTHS)
    same = replace(case, learner=case.sampled, proximal=case.sampled)
    algorithm = build(name)
    losses, sums = algorithm.loss(tensors(same))
    reported = algorithm.derive(reduced(sums))
    assert reported["importance/ratio_mean"] == 1
    assert reported["importance/effective_sample_size"] == 1
    assert reported["importance/chi_squared"] == 0
    if name not in ("sapo", "cispo"):
        torch.testing.assert_close(losses, -torch.tensor(case.advantages, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_s11_a_column_against_a_row_is_refused(name: str) -> None:
    good = tensors(random_case(8, [2]))
    for field in ("sampled_logprobs", "advantages"):
        column = {field: getattr(good, field)[:, None]}
        with pytest.raises(RecordError, match=r"\[N\]"):
            build(name).loss(replace(good, **column))


def test_s35_each_ratio_has_the_denominator_of_its_own_policy() -> None:
    # a token's probability under each version of the weights: 0.2, 0.3, 0.45
    by_version = [math.log(0.2), math.log(0.3), math.log(0.45)]
    inputs = loss_inputs(
        torch.tensor([by_version[2]], dtype=torch.float64, requires_grad=True),
        torch.tensor([by_version[0]], dtype=torch.float64),
        torch.tensor([1.0], dtype=torch.float64),
        proximal=torch.tensor([by_version[1]], dtype=torch.float64),
        staleness=torch.tensor([2.0]),
    )
    wide = {"clip_high": 9.0, "correction": {"type": "token_tis", "cap": 9.0}}
    # ratio to the start of the step times weight to the sampler is the ratio to the sampler
    for proximal in ("recompute", "bypass"):
        loss, _ = build("grpo", proximal=proximal, **wide).loss(inputs)
        assert loss.item() == pytest.approx(-0.45 / 0.2)
    narrow = {"clip_high": 0.2, "correction": {"type": "token_tis", "cap": 9.0}}
    clipped = {p: build("grpo", proximal=p, **narrow).loss(inputs)[0].item() for p in PROXIMALS}
    # 0.45 / 0.3 is clipped to 1.2, weight 1.5;  0.45 / 0.2 is clipped to 1.2
    assert clipped["recompute"] == pytest.approx(-1.2 * 1.5)
    assert clipped["bypass"] == pytest.approx(-1.2)


def test_s35_staler_tokens_have_their_trust_region_nearer_to_the_learner() -> None:
    learner = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    inputs = loss_inputs(
        learner,
        torch.full((5,), -1.0, dtype=torch.float64),
        torch.ones(5, dtype=torch.float64),
        staleness=torch.tensor([0.0, 1.0, 2.0, 4.0, 10.0]),
    )
    wide = {"clip_high": 9.0, "correction": {"type": "none"}}
    losses, _ = build("grpo", proximal="interpolate", **wide).loss(inputs)
    # log prox = -alpha, alpha = 1, 1, 1/2, 1/4, 1/10; the ratio is exp(alpha)
    expected = [-math.exp(alpha) for alpha in (1, 1, 0.5, 0.25, 0.1)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_b10_an_interpolated_centre_clips_fresh_tokens_too() -> None:
    # a later optimizer step of a batch: the policy has moved by 0.5 since it sampled
    learner = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sampled = torch.full((1,), -0.5, dtype=torch.float64)
    inputs = loss_inputs(learner, sampled, torch.ones(1, dtype=torch.float64))
    algorithm = build("grpo", proximal="interpolate", correction={"type": "none"})
    losses, sums = algorithm.loss(inputs)
    losses.sum().backward()
    assert sums["learner/clip_fraction"][0] == 1
    assert learner.grad is not None
    assert learner.grad.item() == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("distance", [-3.0, -0.1, 0.1, 3.0, 25.0])
def test_b2_reinforce_trains_a_token_over_the_cap_with_the_cap(
    distance: float, advantage: float
) -> None:
    """-min(pi / mu, cap) A grad log pi, as verl and prime-rl have it: no token loses its gradient."""
    learner = torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True)
    inputs = loss_inputs(
        learner, learner.detach() - distance, torch.tensor([advantage], dtype=torch.float64)
    )
    losses, _ = build("reinforce", proximal="bypass").loss(inputs)
    losses.sum().backward()
    weight = min(math.exp(distance), 2.0)
    assert losses.item() == pytest.approx(-weight * advantage)
    assert learner.grad is not None
    assert learner.grad.item() == pytest.approx(-weight * advantage)


LOGPROB = st.floats(min_value=-1e4, max_value=0.0, width=32)


@given(
    length=st.integers(min_value=1, max_value=4096),
    extremes=st.lists(LOGPROB, min_size=4, max_size=12),
    advantage=st.floats(min_value=-1e3, max_value=1e3, width=32),
    name=st.sampled_from(NAMES),
    correction=st.sampled_from(
        [
            "none",
            "token_tis",
            "sequence_tis",
            "icepop",
            "geometric_mask",
            "token_tis_geometric_mask",
        ]
    ),
    proximal=st.sampled_from(PROXIMALS),
)
@settings(max_examples=80)
def test_s10_everything_is_finite_for_any_length_and_logprobs(
    length: int,
    extremes: list[float],
    advantage: float,
    name: str,
    correction: str,
    proximal: str,
) -> None:
    keys = {"correction": {"type": correction}, "proximal": proximal}
    keys |= {"kl_coef": 0.1, "kl_estimator": "k3"}
    if not allowed(name, **keys):
        return
    algorithm = build(name, **keys)

    def logprobs(shift: int) -> torch.Tensor:
        values = extremes[shift:] + extremes[:shift]
        return torch.tensor(values).repeat(length // len(values) + 1)[:length]

    inputs = LossInputs(
        learner_logprobs=logprobs(0).requires_grad_(),
        proximal_logprobs=logprobs(1),
        sampled_logprobs=logprobs(2),
        ref_logprobs=logprobs(3),
        advantages=torch.full((length,), advantage),
        entropy=torch.zeros(length),
        staleness=torch.arange(length).float() % 7,
        sequence=torch.zeros(length, dtype=torch.int64),
        num_sequences=1,
    )
    losses, sums = algorithm.loss(inputs)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert inputs.learner_logprobs.grad is not None
    assert torch.isfinite(inputs.learner_logprobs.grad).all()
    assert all(math.isfinite(v) for v in algorithm.derive(reduced(sums)).values())
