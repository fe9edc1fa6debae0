"""Chunked log-probabilities against the plain formula, values and gradients."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_cluster.errors import ConfigError, RecordError
from rlhf_cluster.learning.logprobs import linear_logprobs

N, H, V = 37, 8, 48


def _case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=draw, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=draw)


def _plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = ((hidden @ weight.T) / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, labels[:, None]).squeeze(-1), entropy


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 1000])
def test_values_and_gradients_match_the_plain_formula(
    temperature: float, chunk_tokens: int
) -> None:
    hidden, weight, labels = _case()
    outer = torch.linspace(-1, 2, N, dtype=torch.float64)
    found, entropy = linear_logprobs(hidden, weight, labels, temperature, chunk_tokens)
    (found * outer).sum().backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected, expected_entropy = _plain(hidden, weight, labels, temperature)
    (expected * outer).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad))


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, labels = _case()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, 0.7, 5)[0], (hidden, weight)
    )


def test_s6_temperature_divides_the_logits_before_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    hidden, weight = torch.ones(4, 1), logits[:, None]
    found, entropy = linear_logprobs(hidden, weight, torch.arange(4), temperature=0.6)
    expected = torch.tensor([-0.2081, -1.8747, -3.5414, -5.2081])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    # the entropy is that of the scaled distribution too
    torch.testing.assert_close(entropy[0], -(expected.exp() * expected).sum(), atol=1e-3, rtol=0)


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients() -> None:
    hidden, weight, labels = _case(torch.bfloat16)
    found, entropy = linear_logprobs(hidden, weight, labels)
    found.sum().backward()
    assert found.dtype == entropy.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    expected, _ = _plain(hidden.float(), weight.float(), labels, 1.0)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_no_gradient_flows_through_the_entropy() -> None:
    assert not linear_logprobs(*_case())[1].requires_grad


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned at once."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_logits_of_all_tokens_never_exist_at_once() -> None:
    hidden, weight, labels = _case()
    with _LargestTensor() as chunked:
        linear_logprobs(hidden, weight, labels, chunk_tokens=4)[0].sum().backward()
    assert chunked.largest == V * H  # the weight's gradient; the logits of a chunk are 4 * V
    with _LargestTensor() as plain:
        _plain(hidden, weight, labels, 1.0)
    assert plain.largest == N * V


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight, _ = _case()
    linear_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long))[0].sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        linear_logprobs(*_case(), temperature=temperature)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, labels = _case()
    with pytest.raises(RecordError, match="labels"):
        linear_logprobs(hidden, weight, labels[:-1])
    with pytest.raises(RecordError, match="hidden"):
        linear_logprobs(hidden[:, :-1], weight, labels)
