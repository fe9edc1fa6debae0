"""Attention over sequences packed end to end, without a mask: torch's variable-length kernel.

For machines without flash-attn. `register` adds it to transformers as `NAME`. A model with
that attention gets one row of tokens and the bounds of its sequences (`bounds`), computed once per
pass.

Promises:
- tokens of different sequences do not see each other, and attention within a sequence is causal;
- the work grows with the sum of the sequences' squared lengths, not with the row's squared length;
- a feature that the kernel does not have (a mask, dropout, capped scores, a sliding window, attention
  sinks) is refused, never ignored.

On a CUDA device the kernel is `torch.nn.attention.varlen.varlen_attn` (float16 and bfloat16). On other
devices one call of scaled dot product attention per sequence computes the result. Tests compare the
kernel with it.

Shapes: T tokens of all sequences, Q query heads, K key and value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cluster.errors import ConfigError

NAME = "torch_varlen"
_REFUSED = ("softcap", "sliding_window", "s_aux", "position_bias", "cache")
_UNSUITABLE = ("attn_logit_softcapping", "sliding_window", "attention_chunk_size")


def register() -> None:
    """Make the attention known to transformers. Safe to call twice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on `device`, forward and backward. Finds out by running it."""
    if device.type != "cuda":
        return False
    try:
        tokens = torch.ones(3, 2, 64, device=device, dtype=dtype, requires_grad=True)
        starts = torch.tensor([0, 2, 3], device=device, dtype=torch.int32)
        _kernel(tokens, tokens[:, :1], tokens[:, :1], starts, 2, None).sum().backward()
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return True


def supports(config: Any) -> bool:
    """Whether the kernel has every attention feature that a model's configuration asks for."""
    text = config.get_text_config()
    return all(getattr(text, name, None) is None for name in _UNSUITABLE)


def bounds(position_ids: Tensor) -> dict[str, Any]:
    """Return the bounds of the sequences in a row [1, T], as keyword arguments of the model's forward.

    A sequence begins at each position id 0, so each padding token is a separate sequence.
    """
    starts = (position_ids.reshape(-1) == 0).nonzero().reshape(-1).to(torch.int32)
    end = starts.new_tensor([position_ids.numel()])
    edges = torch.cat([starts, end])
    return {"cu_seq_lens_q": edges, "max_length_q": int(edges.diff().max())}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence. transformers calls this function.

    Args:
        query: [B, Q, S, D]; one row (B = 1) if `cu_seq_lens_q` gives its sequences.
        key, value: [B, K, S, D], K dividing Q.
        attention_mask: must be None.
        scaling: factor on the scores; default 1 / sqrt(D).
        cu_seq_lens_q: [number of sequences + 1] int32; without it every row is one sequence.
        max_length_q: length of the longest sequence.

    Returns:
        ([B, S, Q, D], None).

    Raises:
        ConfigError: an argument that asks for a feature that the kernel does not have.
    """
    found = [name for name in _REFUSED if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or found:
        names = found + ["attention_mask"] * (attention_mask is not None)
        raise ConfigError(
            f"{type(module).__name__}: variable-length attention does not support "
            f"{', '.join(names or ['dropout'])}. Install flash-attn, or use another model"
        )
    rows, num_heads, width, size = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(rows + 1, device=query.device, dtype=torch.int32) * width
        max_length_q = width
    q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], size) for t in (query, key, value))
    # under autocast, rotary embeddings leave queries and keys in a wider type than values
    q, k = q.to(v.dtype), k.to(v.dtype)
    run = _kernel if query.is_cuda else _one_by_one
    mixed = run(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    return mixed.reshape(rows, width, num_heads, size), None


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """Run torch's kernel: [T, Q, D], [T, K, D], [T, K, D] -> [T, Q, D]."""
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(
        query,
        key,
        value,
        edges,
        edges,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """Attend in one sequence after another: [T, Q, D], [T, K, D], [T, K, D] -> [T, Q, D]."""
    lengths = edges.diff().tolist()
    parts = [t.transpose(0, 1).split(lengths, 1) for t in (query, key, value)]
    mixed = [
        nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=True
        )[0]
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(mixed, 1).transpose(0, 1)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Make no mask, as bounds replace it. Return a caller's mask, which `attention` refuses."""
    return attention_mask
