"""The learner's numbers on a CUDA device against those on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_cluster.models import varlen_attention
from rlhf_cluster.models.logprobs import linear_logprobs
from rlhf_cluster.models.policy_model import load_policy
from tests.support.builders.tiny_learner import save_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LLAMA_3_VOCABULARY = 128_256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "chunk_tokens"), [(1000, 64), (LLAMA_3_VOCABULARY, 128)])
def test_chunked_logprobs_and_gradients_agree_with_the_cpu(
    dtype: torch.dtype, vocabulary: int, chunk_tokens: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=draw).to(dtype)
    weight = (0.1 * torch.randn(vocabulary, 64, generator=draw)).to(dtype)
    labels = torch.randint(0, vocabulary, (300,), generator=draw)

    def run(device: str) -> tuple[torch.Tensor, ...]:
        kind = torch.float32 if device == "cpu" else dtype
        h = hidden.to(device, kind).requires_grad_()
        w = weight.to(device, kind).requires_grad_()
        logprobs, entropy = linear_logprobs(h, w, labels.to(device), 0.7, chunk_tokens)
        gradients = torch.autograd.grad(logprobs.sum(), (h, w))
        return tuple(t.detach().cpu().float() for t in (logprobs, entropy, *gradients))

    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    )
    for found, expected in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def test_chunked_logprobs_at_128k_hold_a_chunk_of_logits_at_most() -> None:
    num_tokens, size, chunk_tokens = 4096, 256, 256
    hidden = torch.randn(num_tokens, size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(LLAMA_3_VOCABULARY, size, device="cuda", dtype=torch.bfloat16)
    weight = (0.1 * weight).requires_grad_()
    labels = torch.randint(0, LLAMA_3_VOCABULARY, (num_tokens,), device="cuda")

    def peak(run: Callable[[], torch.Tensor]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(run(), (hidden, weight))
        return torch.cuda.max_memory_allocated() - before

    chunked = peak(lambda: linear_logprobs(hidden, weight, labels, 1.0, chunk_tokens)[0].sum())
    full = peak(
        lambda: (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None]).sum()
    )
    # float32: a chunk's logits and their exponentials, and the weight's gradient; bfloat16: the
    # product of a chunk, two more of the weight's size, and 64 MiB for everything small
    logits, gradient = chunk_tokens * LLAMA_3_VOCABULARY, weight.numel()
    assert chunked < 10 * logits + 8 * gradient + (64 << 20)
    assert chunked < full / 3


def _heads(
    lengths: tuple[int, ...], query_heads: int, key_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(lengths), 64) for n in (query_heads, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, generator=draw) for shape in shapes)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", [(300,), (1, 1, 7), (128, 5, 1, 200, 66)])
def test_the_varlen_kernel_agrees_with_one_call_a_sequence_on_the_cpu(
    lengths: tuple[int, ...], query_heads: int, key_heads: int
) -> None:
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        inputs = [
            t.to(device, dtype).requires_grad_() for t in _heads(lengths, query_heads, key_heads)
        ]
        mixed, _ = varlen_attention.attention(
            torch.nn.Identity(),
            *inputs,
            None,
            cu_seq_lens_q=edges.to(device),
            max_length_q=max(lengths),
        )
        outer = torch.linspace(-1, 1, mixed.numel(), device=device).view(mixed.shape)
        gradients = torch.autograd.grad((mixed.float() * outer).sum(), inputs)
        results.append([t.detach().cpu().float() for t in (mixed, *gradients)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_the_probe_finds_the_varlen_kernel() -> None:
    assert varlen_attention.available(torch.device("cuda"), torch.bfloat16)
    assert not varlen_attention.available(torch.device("cuda"), torch.float32)


def test_a_policy_on_the_gpu_scores_packed_rows_like_the_cpu(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    ids = torch.arange(18).view(2, 9) % 48
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 0]])
    found = []
    for device, compute in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        policy = load_policy(folder, torch.float32, device, True, compute)  # proves the packing
        half = compute == torch.bfloat16
        with torch.autocast(device, compute, enabled=half), torch.no_grad():
            logprobs, _ = policy(*(t.to(device) for t in (ids, positions, ids.roll(-1, 1))))
        found.append(logprobs.cpu())
    assert (found[0] - found[1]).abs().mean() < 0.1
