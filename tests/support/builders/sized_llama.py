"""A Llama of a given size in a Hugging Face folder, in several files."""

from __future__ import annotations

from pathlib import Path


def save_sized_llama(
    folder: Path, hidden: int, layers: int, vocabulary: int, tie: bool = False
) -> tuple[int, int]:
    """Write it in bfloat16, so that reading float32 cannot share pages with the files.

    Returns the bytes in float32 of all parameters, and of the largest unit that FSDP2 gathers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="64MB")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    return 4 * total, 4 * max(layer, total - layers * layer)
