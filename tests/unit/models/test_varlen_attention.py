"""Variable-length attention against the mask-based attention of the same model."""

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models import varlen_attention
from rlhf_cluster.models.policy_model import (
    PolicyLM,
    check_distribution,
)
from tests.support.builders.tiny_learner import (
    VOCABULARY,
    build_llama,
)

LENGTHS = ((5, 1, 7), (9, 2))  # of the sequences in two rows; the second has two of padding


def _policy(attention: str) -> PolicyLM:
    varlen_attention.register()
    lm = build_llama()
    lm.set_attn_implementation(attention)
    return PolicyLM(lm)


def _rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (2, 13), generator=draw)
    positions = torch.zeros(2, 13, dtype=torch.long)
    for row, lengths in enumerate(LENGTHS):
        starts = torch.cat([torch.arange(n) for n in lengths])
        positions[row, : len(starts)] = starts
    return ids, positions, torch.randint(0, VOCABULARY, (2, 13), generator=draw)


def test_values_and_gradients_are_those_of_attention_with_a_mask() -> None:
    found = []
    for attention in ("sdpa", varlen_attention.NAME):
        policy = _policy(attention)
        logprobs, entropy = policy(*_rows())
        (logprobs * torch.linspace(-1, 2, 26).view(2, 13)).sum().backward()
        found.append((logprobs, entropy, [p.grad for p in policy.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_s14_a_sequence_does_not_see_the_others_of_its_row() -> None:
    policy, (ids, positions, labels) = _policy(varlen_attention.NAME), _rows()
    before = policy(ids, positions, labels)[0]
    ids[0, 2] = (ids[0, 2] + 1) % VOCABULARY
    after = policy(ids, positions, labels)[0]
    changed = (before != after).nonzero().tolist()
    assert changed
    assert all(row == 0 and 2 <= place < 5 for row, place in changed)


def test_gradient_checkpointing_keeps_the_bounds() -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = _policy(varlen_attention.NAME).train()
        if checkpointing:
            policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy(*_rows())[0].sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_at_load_passes_and_finds_lost_bounds(dtype: torch.dtype) -> None:
    check_distribution(_policy(varlen_attention.NAME), dtype)
    policy = _policy(varlen_attention.NAME)
    drop = {"cu_seq_lens_q": None, "max_length_q": None}
    policy.lm.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **drop}), with_kwargs=True
    )
    with pytest.raises(ConfigError, match="packed"):
        check_distribution(policy, dtype)


def test_bounds_begin_at_every_position_zero() -> None:
    found = varlen_attention.bounds(torch.tensor([[0, 1, 2, 0, 0, 1, 0, 0]]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 7, 8]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == 3


def test_scaling_and_shared_key_heads_match_the_plain_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 6, 8, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 6, 8, generator=draw, dtype=torch.float64)
    edges = torch.tensor([0, 4, 6], dtype=torch.int32)
    found, _ = varlen_attention.attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        cu_seq_lens_q=edges,
        max_length_q=4,
    )
    for head in range(4):
        for place in range(6):
            first = 0 if place < 4 else 4
            seen = slice(first, place + 1)
            scores = 0.3 * key[0, head // 2, seen] @ query[0, head, place]
            expected = scores.softmax(0) @ value[0, head // 2, seen]
            torch.testing.assert_close(found[0, place, head], expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("attention_mask", {"attention_mask": torch.ones(1, 3)}),
        ("dropout", {"dropout": 0.1}),
        ("sliding_window", {"sliding_window": 2}),
        ("softcap", {"softcap": 30.0}),
    ],
)
def test_what_the_kernel_does_not_know_is_refused(name: str, arguments: dict) -> None:
    heads = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ConfigError, match=name):
        varlen_attention.attention(
            torch.nn.Identity(), heads, heads, heads, **{"attention_mask": None, **arguments}
        )


def test_the_probe_says_no_where_there_is_no_kernel() -> None:
    assert not varlen_attention.available(torch.device("cpu"), torch.bfloat16)


def test_models_that_need_more_than_the_kernel_knows_are_told_apart() -> None:
    assert varlen_attention.supports(LlamaConfig())
    assert varlen_attention.supports(Qwen3Config())  # its window is off
    assert not varlen_attention.supports(MistralConfig(sliding_window=4096))
    assert not varlen_attention.supports(Gemma2Config())
