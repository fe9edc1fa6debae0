"""Log-probabilities of chosen tokens from hidden states, without the logits of all tokens.

    logprobs[n] = log softmax(hidden[n] @ weight.T / temperature)[labels[n]]
    entropy[n]  = entropy of that same distribution

Promises: at most `chunk_tokens` rows of logits exist at once, forward and backward; logits are
divided by the temperature BEFORE the softmax, so `logprobs` are those of the distribution that is
sampled at that temperature; results are at least float32 whatever the inputs are; gradients flow
to `hidden` and `weight`, and none flows through `entropy`.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cluster.errors import ConfigError, RecordError


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and the entropy of its distribution, in nats.

    Args:
        hidden: [N, H].
        weight: [V, H], the output projection (no bias).
        labels: [N] int64, each in [0, V).
        temperature: over 0.
        chunk_tokens: rows of logits that exist at once.

    Returns:
        (logprobs [N], entropy [N] without gradient), float32 (float64 for float64 inputs).

    Raises:
        ConfigError: a temperature or chunk that is not positive.
        RecordError: shapes that do not fit.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature} must be over 0; greedy has no distribution")
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens = {chunk_tokens} must be at least 1")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise RecordError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, H] and [V, H]"
        )
    if labels.shape != hidden.shape[:1]:
        raise RecordError(
            f"labels {list(labels.shape)} must have one entry a row of hidden {list(hidden.shape)}"
        )
    return _LinearLogprobs.apply(hidden, weight, labels, float(temperature), int(chunk_tokens))


def _scaled_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.t()
    return logits.to(_accumulation_dtype(hidden)).div_(temperature)


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _LinearLogprobs(torch.autograd.Function):
    """Saves only the log-normaliser a token and computes each chunk's logits again going back."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden.shape[0]
        logprobs = hidden.new_empty(num_tokens, dtype=_accumulation_dtype(hidden))
        normaliser, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            logits = _scaled_logits(hidden[rows], weight, temperature)
            normaliser[rows] = logits.logsumexp(-1)
            chosen = logits.gather(-1, labels[rows, None]).squeeze(-1)
            logprobs[rows] = chosen - normaliser[rows]
            probabilities = (logits - normaliser[rows, None]).exp_()
            entropy[rows] = normaliser[rows] - (probabilities * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, labels, normaliser)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # d logprob / d logits = (onehot(label) - probabilities) / temperature
        hidden, weight, labels, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_logprobs = grad_outputs[0]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if needs_weight else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = _scaled_logits(hidden[rows], weight, ctx.temperature)
            grad_logits = (logits - normaliser[rows, None]).exp_().neg_()
            ones = torch.ones_like(grad_logits[:, :1])
            grad_logits.scatter_add_(1, labels[rows, None], ones)
            grad_logits.mul_(grad_logprobs[rows, None] / ctx.temperature)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None
