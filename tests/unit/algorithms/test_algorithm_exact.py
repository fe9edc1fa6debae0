"""The exact log-probabilities as the sampler of a loss: every algorithm, every proximal policy."""

from dataclasses import replace

import pytest
import torch

from rlhf_cluster.algorithms import build_algorithm
from rlhf_cluster.algorithms.algorithm import LossInputs
from rlhf_cluster.errors import RecordError
from tests.support.builders.reference_objectives import POLICY_GRADIENTS
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import loss_inputs

KINDS = POLICY_GRADIENTS
EXACT = {"scoring": {"rewards": [{"type": "exact_match"}], "exact_logprobs": True}}
LENGTHS = (30, 1, 29)


def inputs() -> LossInputs:
    draw = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)

    def logprobs() -> torch.Tensor:
        return -2 + 0.3 * torch.randn(n, generator=draw, dtype=torch.float64)

    given = loss_inputs(
        logprobs().requires_grad_(),
        logprobs(),
        torch.randn(n, generator=draw, dtype=torch.float64),
        proximal=logprobs(),
        staleness=torch.randint(0, 4, (n,), generator=draw).double(),
        lengths=LENGTHS,
    )
    return replace(given, exact_logprobs=logprobs())


def algorithm(**keys):
    return build_algorithm(tiny_config(algorithm=keys, **EXACT).algorithm, sum(LENGTHS))


def settings(kind: str, proximal: str) -> dict:
    keys = {"type": kind, "proximal": proximal}
    if proximal == "bypass" and kind in ("cispo", "gspo"):  # the default is refused there
        keys["correction"] = {"type": "none"}
    return keys


def loss_and_gradient(built, given: LossInputs):
    losses, sums = built.loss(given)
    [gradient] = torch.autograd.grad(losses.sum(), given.learner_logprobs)
    return losses.detach(), gradient, sums


@pytest.mark.parametrize("proximal", ["recompute", "interpolate", "bypass"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_sampler_takes_the_place_of_the_engine_in_every_ratio(kind, proximal):
    """The loss is that of a record whose engine had said what is exact, and not its own."""
    given = inputs()
    as_if = replace(given, sampled_logprobs=given.exact_logprobs)
    keys = settings(kind, proximal)
    exact, engine = algorithm(**keys, sampler="exact"), algorithm(**keys)
    found = loss_and_gradient(exact, given)
    expected = loss_and_gradient(engine, as_if)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    assert not torch.equal(found[0], loss_and_gradient(engine, given)[0])
    own = engine.loss(given)[1]
    for name in ("importance/ratio_mean", "importance/logprob_diff_mean"):
        assert found[2][name][0] == own[name][0], "the report is of the engine's distance still"


@pytest.mark.parametrize("proximal", ["recompute", "bypass"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_into_the_exact_logprobs(kind, proximal):
    given = replace(inputs(), exact_logprobs=inputs().exact_logprobs.requires_grad_())
    losses, _ = algorithm(**settings(kind, proximal), sampler="exact").loss(given)
    losses.sum().backward()
    assert given.exact_logprobs.grad is None


def test_experience_without_exact_logprobs_is_refused_with_the_cure():
    given = replace(inputs(), exact_logprobs=None)
    with pytest.raises(RecordError, match=r"Set scoring\.exact_logprobs = true"):
        algorithm(type="grpo", sampler="exact").loss(given)
