"""Chunked log-probabilities and KLs against the plain formula, values and gradients."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_cluster.errors import ConfigError, RecordError
from rlhf_cluster.models.logprobs import linear_logprobs
from rlhf_cluster.models.policy_model import LogprobHead

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


def test_the_entropys_gradient_agrees_with_finite_differences() -> None:
    hidden, weight, labels = _case()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, 0.7, 5, entropy_gradient=True), (hidden, weight)
    )


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


class _Allocations(TorchDispatchMode):
    """Counts results of at least `size` elements that are not in the memory of an argument."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
        known = {a.untyped_storage().data_ptr() for a in given}
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.count += result.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_chunks_share_their_memory(dtype: torch.dtype) -> None:
    hidden, weight, labels = _case(dtype)
    counts = []
    for num_tokens in (12, 30):  # two chunks and five
        with _Allocations(6 * V) as made:
            found, _ = linear_logprobs(hidden[:num_tokens], weight, labels[:num_tokens], 0.9, 6)
            found.sum().backward()
        counts.append(made.count)
    assert counts[0] == counts[1]


def test_a_vocabulary_of_128k_and_large_logits_keep_float32s_precision() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=draw)
    weight = torch.randn(128_256, 4, generator=draw)
    hidden[2] *= 3000  # logits of some ten thousands: their exponentials are infinite
    labels = torch.tensor([0, 77_777, 128_255])
    found, entropy = linear_logprobs(hidden, weight, labels, chunk_tokens=2)
    expected, expected_entropy = _plain(hidden.double(), weight.double(), labels, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)


def test_autocast_computes_in_its_type() -> None:
    hidden, weight, labels = _case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = linear_logprobs(hidden.bfloat16(), weight, labels)
    expected, _ = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.autograd.grad(found.sum(), weight)[0].dtype == torch.float32


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
    with pytest.raises(RecordError, match="the reference's hidden"):
        linear_logprobs(hidden, weight, labels, reference=(hidden[:-1], weight))
    with pytest.raises(RecordError, match="the reference's hidden"):
        linear_logprobs(hidden, weight, labels, reference=(hidden, weight[:-1]))


def _reference(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Of another width than the policy of `_case`."""
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, 5, generator=draw, dtype=dtype)
    return hidden.requires_grad_(), torch.randn(V, 5, generator=draw, dtype=dtype).requires_grad_()


def _slow_kl(logits: torch.Tensor, ref_logits: torch.Tensor, temperature: float) -> list[float]:
    """Row by row and token by token, in Python's floats."""

    def logs(row: list[float]) -> list[float]:
        scaled = [value / temperature for value in row]
        largest = max(scaled)
        total = largest + math.log(math.fsum(math.exp(v - largest) for v in scaled))
        return [v - total for v in scaled]

    rows = zip(logits.tolist(), ref_logits.tolist(), strict=True)
    return [
        math.fsum(math.exp(p) * (p - q) for p, q in zip(logs(a), logs(b), strict=True))
        for a, b in rows
    ]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 1000])
def test_the_kl_matches_a_slow_loop_whatever_the_chunks(
    temperature: float, chunk_tokens: int
) -> None:
    (hidden, weight, labels), reference = _case(), _reference()
    found = linear_logprobs(hidden, weight, labels, temperature, chunk_tokens, False, reference)
    slow = _slow_kl(hidden @ weight.T, reference[0] @ reference[1].T, temperature)
    torch.testing.assert_close(found[2], hidden.new_tensor(slow), rtol=0, atol=1e-12)
    # the other results and their gradients are those without a reference
    plain = linear_logprobs(hidden, weight, labels, temperature, chunk_tokens)
    for with_kl, without in zip(found[:2], plain, strict=True):
        assert torch.equal(with_kl, without)
    outer = torch.linspace(-1, 2, N, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((logprobs * outer).sum(), (hidden, weight))
        for logprobs in (found[0], plain[0])
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@given(
    shape=st.tuples(*(st.integers(min_value=1, max_value=n) for n in (9, 6, 40))),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 3e3]),
    ref_scale=st.sampled_from([1e-4, 1.0, 30.0, 3e3]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    chunk_tokens=st.integers(min_value=1, max_value=10),
    seed=st.integers(min_value=0, max_value=99),
)
@settings(max_examples=40)
def test_the_kl_is_exact_in_float32_and_finite_for_any_logits(
    shape: tuple[int, int, int],
    scale: float,
    ref_scale: float,
    temperature: float,
    chunk_tokens: int,
    seed: int,
) -> None:
    (rows, width, vocabulary), draw = shape, torch.Generator().manual_seed(seed)
    hidden, ref_hidden = (torch.randn(rows, width, generator=draw) * s for s in (scale, ref_scale))
    weight, ref_weight = (torch.randn(vocabulary, width, generator=draw) for _ in range(2))
    labels = torch.randint(0, vocabulary, (rows,), generator=draw)
    hidden.requires_grad_()
    kl = linear_logprobs(
        hidden, weight, labels, temperature, chunk_tokens, False, (ref_hidden, ref_weight)
    )[2]
    logits, ref_logits = (
        hidden.double() @ weight.double().T,
        ref_hidden.double() @ ref_weight.T.double(),
    )
    slow = torch.tensor(_slow_kl(logits, ref_logits, temperature))
    largest = max(logits.abs().max().item(), ref_logits.abs().max().item()) / temperature
    torch.testing.assert_close(kl, slow, rtol=1e-5, atol=1e-6 * max(1.0, largest))
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    assert torch.isfinite(gradient).all()


def test_the_kls_gradient_agrees_with_finite_differences_beside_the_others() -> None:
    draw = torch.Generator().manual_seed(3)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((5, 3), (7, 3), (5, 2), (7, 2))
    )
    labels = torch.randint(0, 7, (5,), generator=draw)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, 0.7, 2, True, (ref_hidden, ref_weight)),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_s8_the_kls_gradient_is_that_of_the_reverse_kl_over_five_actions() -> None:
    logits = torch.tensor([[0.3, -0.8, 1.1, 0.0, -0.2]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[1.0, 0.2, -0.5, 0.4, 0.1]], dtype=torch.float64)
    actions, label = torch.eye(5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    kl = linear_logprobs(logits, actions, label, 0.6, reference=(other, actions))[2]
    (found,) = torch.autograd.grad(kl.sum(), logits)
    p, q = ((x / 0.6).log_softmax(-1) for x in (logits, other))
    (reverse,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((q.exp() * (q - p)).sum(), logits)
    torch.testing.assert_close(found, reverse, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found, forward, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_s38_equal_policies_have_a_kl_and_a_gradient_of_exactly_zero(
    dtype: torch.dtype, scale: float
) -> None:
    hidden, weight, labels = _case(dtype)
    hidden = (hidden.detach() * scale).requires_grad_()
    reference = hidden.detach().clone(), weight.detach().clone()
    kl = linear_logprobs(hidden, weight, labels, 0.7, 6, False, reference)[2]
    assert (kl == 0).all()
    for gradient in torch.autograd.grad(kl.sum(), (hidden, weight)):
        assert (gradient == 0).all()


def test_no_gradient_flows_to_the_reference() -> None:
    reference = _reference()
    linear_logprobs(*_case(), reference=reference)[2].sum().backward()
    assert all(tensor.grad is None for tensor in reference)


def test_the_logits_of_a_reference_never_exist_for_all_tokens_either() -> None:
    (hidden, weight, labels), reference = _case(), _reference()
    with _LargestTensor() as chunked:
        kl = linear_logprobs(hidden, weight, labels, chunk_tokens=4, reference=reference)[2]
        kl.sum().backward()
    assert chunked.largest == V * H  # the weight's gradient; the logits of a chunk are 4 * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_chunks_share_their_memory_with_a_reference_too(dtype: torch.dtype) -> None:
    (hidden, weight, labels), (other, projection) = _case(dtype), _reference(dtype)
    counts = []
    for num_tokens in (12, 30):  # two chunks and five
        rows, reference = slice(num_tokens), (other[:num_tokens], projection)
        with _Allocations(6 * V) as made:
            found = linear_logprobs(hidden[rows], weight, labels[rows], 0.9, 6, False, reference)
            (found[0] + found[2]).sum().backward()
        counts.append(made.count)
    assert counts[0] == counts[1]


def test_bfloat16_inputs_and_autocast_give_a_float32_kl() -> None:
    (hidden, weight, labels), reference = _case(torch.float32), _reference(torch.float32)
    half = [t.bfloat16() for t in (hidden, weight, *reference)]
    expected = linear_logprobs(*half[:2], labels, reference=(half[2], half[3]))[2]
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprobs(hidden, weight, labels, reference=reference)[2]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_b9_float32_logits_are_not_rounded_to_16_bits() -> None:
    """Hidden states and weights as a bfloat16 model has them, logits up to about 20."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).bfloat16()
    weight = (0.7 * torch.randn(400, 64, generator=generator)).bfloat16()
    labels = torch.randint(0, 400, (512,), generator=generator)
    logits = hidden.double() @ weight.double().T
    assert 18 < logits.abs().max() < 40
    exact = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    def error(float32_logits: bool) -> torch.Tensor:
        found = linear_logprobs(hidden, weight, labels, float32_logits=float32_logits)[0]
        return (found - exact).abs()

    assert error(True).max() < 1e-4
    assert error(False).mean() > 5e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_b9_a_heads_own_logits_and_its_logprobs_are_of_one_type(autocast: bool) -> None:
    head = LogprobHead(16, 30, bias=False, dtype=torch.float32 if autocast else torch.bfloat16)
    hidden = torch.randn(3, 5, 16, dtype=torch.float32 if autocast else torch.bfloat16)
    labels = torch.randint(0, 30, (3, 5))
    for float32_logits, bound in ((True, 1e-5), (False, 0.1)):
        head.float32_logits = float32_logits
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, found = head(hidden), head(hidden, labels)[0]
        assert logits.dtype == (torch.float32 if float32_logits else torch.bfloat16)
        expected = logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
