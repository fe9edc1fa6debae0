"""A tiny sharp Llama in a Hugging Face folder, and versions of it in a weight store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.records import WeightVersion

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

VOCABULARY = 64
END = 1  # the end token's id
_EMBEDDING_STD = 0.2
_WEIGHT_STD = 0.25


def build(seed: int, max_position: int) -> LlamaForCausalLM:
    """Float32, tied embeddings, about 2 nats of entropy. The end token has logit 0: it is rare."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_position,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, _EMBEDDING_STD if "embed" in name else _WEIGHT_STD)
        model.get_input_embeddings().weight[END] = 0
    return model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model with a tokenizer of one word a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)


def checkpoint_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """What a learner publishes: the tensors of the checkpoint, the tied head left out."""
    return {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}


def publish(root: Path, version: int, tensors: Mapping[str, Tensor]) -> WeightVersion:
    from rlhf_cluster.weights import store
    from rlhf_cluster.weights.manifest import LocalPart

    parts = [
        LocalPart(name=name, shape=tuple(t.shape), offset=0, tensor=t.detach().reshape(-1))
        for name, t in tensors.items()
    ]
    report = store.write_shard(root, version, 0, parts)
    return store.commit(root, version, [report], keep=100)
