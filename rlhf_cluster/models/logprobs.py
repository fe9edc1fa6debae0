"""Log-probabilities of chosen tokens from hidden states, without the logits of all tokens.

    logprobs[n] = log softmax(hidden[n] @ weight.T / temperature)[labels[n]]
    entropy[n]  = entropy of that same distribution
    kl[n]       = sum over the vocabulary of p (log p - log q), q the distribution of a reference,
                  or another divergence of the two (`divergence`)

Promises:
- at most `chunk_tokens` rows of logits (of each model) exist at once, forward and backward, in memory
  that all chunks share;
- logits are divided by the temperature BEFORE the softmax, so `logprobs` are of the distribution that
  is sampled at that temperature;
- results are at least float32 whatever the inputs are, and finite for any finite logits;
- gradients flow to `hidden` and `weight`, through `entropy` only with `entropy_gradient`, and never to
  a reference;
- with `float32_logits` the products of 16-bit hidden states and weights are not rounded to 16 bits.
  Rounding would change logits of 20, and with them log-probabilities, by up to 0.06;
- if the reference's hidden states and weight equal the policy's, `kl` and its gradient are exactly 0;
- under autocast the products are computed in its type.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_cluster.errors import ConfigError, RecordError
from rlhf_cluster.models.divergence import (
    REVERSE_KL,
    Divergence,
)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    entropy_gradient: bool = False,
    reference: tuple[Tensor, Tensor] | None = None,
    divergence: Divergence = REVERSE_KL,
    float32_logits: bool = True,
) -> tuple[Tensor, ...]:
    """Compute each label's log-probability, its distribution's entropy, and the KL, in nats.

    Args:
        hidden: [N, H].
        weight: [V, H], the output projection (no bias).
        labels: [N] int64, each in [0, V).
        temperature: greater than 0.
        chunk_tokens: rows of logits that exist at once.
        entropy_gradient: whether the entropy carries a gradient.
        reference: hidden states [N, G] and output projection [V, G] of another model, for the KL.
        divergence: divergence that is computed as the KL.
        float32_logits: whether logits are at least float32 whatever the inputs are; else they have
            the type of the inputs, like the output of a linear layer.

    Returns:
        (logprobs [N], entropy [N]), with a reference (logprobs [N], entropy [N], kl [N]); float32
        (float64 for float64 inputs).

    Raises:
        ConfigError: a temperature or chunk that is not positive.
        RecordError: shapes that do not fit.
    """
    if not temperature > 0:
        raise ConfigError(
            f"temperature = {temperature} must be greater than 0; greedy has no distribution"
        )
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens = {chunk_tokens} must be at least 1")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise RecordError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, H] and [V, H]"
        )
    if labels.shape != hidden.shape[:1]:
        raise RecordError(
            f"labels {list(labels.shape)} must have one entry per row of hidden {list(hidden.shape)}"
        )
    tensors = [hidden, weight, *(reference or ())]
    if reference is not None:
        _check_reference(hidden, weight, *reference)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        tensors = [tensor.to(dtype) for tensor in tensors]
    chunks = _Chunks(float(temperature), int(chunk_tokens), float32_logits)
    found = _LinearLogprobs.apply(labels, chunks, entropy_gradient, divergence, *tensors)
    return found if reference is not None else found[:2]


def _check_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> None:
    fits = ref_hidden.ndim == ref_weight.ndim == 2 and ref_hidden.shape[1] == ref_weight.shape[1]
    if not fits or (len(ref_hidden), len(ref_weight)) != (len(hidden), len(weight)):
        raise RecordError(
            f"the reference's hidden {list(ref_hidden.shape)} and weight {list(ref_weight.shape)} "
            f"must have the rows of hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        )


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


class _Chunks(NamedTuple):
    temperature: float
    size: int  # rows
    float32_logits: bool


class _Logits:
    """Logits of consecutive chunks, divided by the temperature, in memory that is reused.

    Fresh memory for each chunk would be freed and mapped again, which on a CPU costs as much as the
    arithmetic.
    """

    def __init__(self, chunks: _Chunks, hidden: Tensor, weight: Tensor) -> None:
        shape = (min(chunks.size, hidden.shape[0]), weight.shape[0])
        self._hidden, self._weight, self._temperature = hidden, weight, chunks.temperature
        self._product = hidden.new_empty(shape)
        wide = _accumulation_dtype(hidden)
        self._wide = self._product if hidden.dtype == wide else hidden.new_empty(shape, dtype=wide)
        self._unrounded = chunks.float32_logits and self._wide is not self._product
        # a GPU accumulates the products in float32 anyway; only the sum must not be rounded
        widen = self._unrounded and not hidden.is_cuda
        self._wide_weight = weight.to(wide) if widen else None

    def of(self, rows: slice) -> Tensor:
        """Compute logits [n, V], at least float32.

        The caller may change them. The next call overwrites them.
        """
        hidden = self._hidden[rows]
        wide = self._wide[: len(hidden)]
        if self._wide_weight is not None:
            logits = torch.mm(hidden.to(wide.dtype), self._wide_weight.t(), out=wide)
        elif self._unrounded:
            logits = torch.mm(hidden, self._weight.t(), out_dtype=wide.dtype, out=wide)
        else:
            logits = torch.mm(hidden, self._weight.t(), out=self._product[: len(hidden)])
            if self._wide is not self._product:
                logits = wide.copy_(logits)
        return logits if self._temperature == 1 else logits.div_(self._temperature)

    def narrow(self, values: Tensor) -> Tensor:
        """Convert `values` [n, V] to the type of the hidden states, in the memory of the product."""
        if self._wide is self._product:
            return values
        return self._product[: len(values)].copy_(values)


def _shift(logits: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the maximum of each row of logits, in place.

    Returns the exponentials, in the memory of `scratch`, their sums per row, and the maxima.
    """
    largest = logits.amax(-1, keepdim=True)
    logits -= largest
    powers = torch.exp(logits, out=scratch[: len(logits)])
    return powers, powers.sum(-1), largest.squeeze(-1)


class _LinearLogprobs(torch.autograd.Function):
    """Autograd function that saves a few numbers per token; backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        chunks: _Chunks,
        entropy_gradient: bool,
        divergence: Divergence,
        hidden: Tensor,
        weight: Tensor,
        *reference: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # with l the logits less their maximum m, and Z = sum exp(l):
        #   logprob = l[label] - log Z,   normaliser = m + log Z,   entropy = log Z - sum(l exp(l)) / Z
        #   kl = sum(d exp(l)) / Z,       d = (l - log Z) - (l - log Z of the reference)
        num_tokens = hidden.shape[0]
        logprobs = hidden.new_empty(num_tokens, dtype=_accumulation_dtype(hidden))
        normaliser, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        kl = torch.empty_like(logprobs) if reference else logprobs.new_empty(0)
        ref_normaliser = torch.empty_like(kl)
        own = _Logits(chunks, hidden, weight)
        others = _Logits(chunks, *reference) if reference else None
        chunk = chunks.size
        scratch = logprobs.new_empty(min(chunk, num_tokens), weight.shape[0])
        for start in range(0, num_tokens, chunk):
            rows = slice(start, start + chunk)
            ref_logits = ref_log_total = None
            if others is not None:
                ref_logits = others.of(rows)
                _, ref_total, ref_largest = _shift(ref_logits, scratch)
                ref_log_total = ref_total.log()
                ref_normaliser[rows] = ref_largest + ref_log_total
            logits = own.of(rows)
            powers, total, largest = _shift(logits, scratch)
            log_total = total.log()
            chosen = logits.gather(-1, labels[rows, None]).squeeze(-1)
            logprobs[rows] = chosen - log_total
            normaliser[rows] = largest + log_total
            if ref_logits is None or ref_log_total is None:
                pass
            elif divergence != REVERSE_KL:
                other = ref_logits.sub_(ref_log_total[:, None])
                kl[rows] = divergence.values(logits - log_total[:, None], other)
            else:
                difference = ref_logits.neg_().add_(logits)
                difference.sub_((log_total - ref_log_total)[:, None])
                kl[rows] = difference.mul_(powers).sum(-1) / total
            entropy[rows] = log_total - powers.mul_(logits).sum(-1) / total
        ctx.save_for_backward(
            labels, normaliser, entropy, kl, ref_normaliser, hidden, weight, *reference
        )
        ctx.chunks, ctx.divergence = chunks, divergence
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # with p the probabilities, T the temperature, H the entropy and K the KL to q:
        #   d logprob / d logits = (onehot(label) - p) / T
        #   d H / d logits       = -p (log p + H) / T
        #   d K / d logits       =  p (log p - log q - K) / T
        labels, normaliser, entropy, kl, ref_normaliser, *tensors = ctx.saved_tensors
        hidden, weight, *reference = tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[4:6]
        grad_logprobs, grad_entropy, grad_kl = (g / ctx.chunks.temperature for g in grad_outputs)
        needs_entropy, needs_kl = bool(grad_entropy.any()), bool(grad_kl.any())
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _Accumulated(weight, normaliser.dtype) if needs_weight else None
        chunks = _Logits(ctx.chunks, hidden, weight)
        ref_chunks = _Logits(ctx.chunks, *reference) if needs_kl else None
        for start in range(0, hidden.shape[0], ctx.chunks.size):
            rows = slice(start, start + ctx.chunks.size)
            logs = chunks.of(rows).sub_(normaliser[rows, None])
            force = grad_logprobs[rows, None]
            factor, apart = -force, None
            if needs_entropy:
                own = (logs + entropy[rows, None]).mul_(-grad_entropy[rows, None])
                factor = own.add_(factor)
            if ref_chunks is not None:
                other = ref_chunks.of(rows).sub_(ref_normaliser[rows, None])
                if ctx.divergence != REVERSE_KL:
                    apart = ctx.divergence.gradient(logs, other).mul_(grad_kl[rows, None])
                else:
                    difference = other.neg_().add_(logs)
                    difference.sub_(kl[rows, None]).mul_(grad_kl[rows, None])
                    factor = difference.add_(factor)
            grad_logits = logs.exp_().mul_(factor)
            if apart is not None:
                grad_logits += apart
            grad_logits.scatter_add_(1, labels[rows, None], force)
            grad_logits = chunks.narrow(grad_logits)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.add(grad_logits, hidden[rows])
        total = None if grad_weight is None else grad_weight.total.to(weight.dtype)
        return None, None, None, None, grad_hidden, total, *(None for _ in reference)


class _Accumulated:
    """Sum of products `grad_logits.T @ hidden` [V, H], in a wider type than theirs."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.zeros_like(weight, dtype=dtype)
        self._product = None if dtype == weight.dtype else torch.empty_like(weight)

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        if self._product is None:
            self.total.addmm_(grad_logits.t(), hidden)
        else:
            self.total += torch.mm(grad_logits.t(), hidden, out=self._product)
