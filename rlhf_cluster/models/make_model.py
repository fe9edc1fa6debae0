"""Small causal LMs made from a configuration: random weights and a tokenizer, no download.

The folder has the files that transformers and vLLM load: config, generation config, float32
safetensors, tokenizer. There are two tokenizers:

- characters (the default): one token for each printable ASCII character and the newline. Text is
  encoded as `<bos>` and its characters, and decoded without separators. A character outside the
  alphabet becomes `<unk>`; it is never dropped.
- byte pairs, learned from the texts of a data file, with a chat template. Text is encoded as
  `<bos>` and its tokens, without loss, since all 256 bytes are tokens. A chat is rendered as

    <bos> <system>...<eos> <user>...<eos> <assistant>...<eos> ...

Every turn of a chat ends with the end token, at which generation stops. Other roles are refused. The
assistant's words and their end token are marked for `return_assistant_tokens_mask`.

Promises:
- equal `ModelInit` and seed give equal bytes;
- the folder appears complete, by a rename, or not at all;
- an equal file and section give an equal byte-pair tokenizer, byte for byte, on any number of
  threads.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cluster.data.rows import expand, read_rows, texts
from rlhf_cluster.errors import DataError
from rlhf_cluster.sections.every_run import (
    BpeTokenizer,
    ModelInit,
)
from rlhf_cluster.util.durable_files import apply_umask, make_whole_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"

SPECIAL_TOKENS = (PAD, EOS, BOS, UNK)

_ROLE_TOKENS = ["<system>", "<user>", "<assistant>"]

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('no such role: ' ~ message['role']) }}"
    "{%- endif %}"
    "{{- '<' ~ message['role'] ~ '>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] ~ eos_token }}{%- endgeneration %}"
    "{%- else %}"
    "{{- message['content'] ~ eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)


def make_bpe(section: BpeTokenizer) -> PreTrainedTokenizerFast:
    """Learn a byte-pair tokenizer and wrap it for transformers. Raises `DataError`, see `learn_bpe`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=learn_bpe(section),
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        additional_special_tokens=_ROLE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def learn_bpe(section: BpeTokenizer) -> Tokenizer:
    """Learn a byte-pair tokenizer. Raises `DataError`: a file that cannot be read, or without text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    path = expand(section.path)
    found = [text for row in read_rows(path, section.limit) for text in texts(row.columns)]
    if not found:
        raise DataError(
            f"{path}: no column holds text to learn a tokenizer from. Give another file"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *_ROLE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(found, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
    )
    return tokenizer


ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of an attention head that vLLM's paged attention supports on every device."""

FLAT_CONFIGS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose config.json has all values that `check_fit` needs."""


def make_model(init: ModelInit, out_dir: str | Path, seed: int) -> Path:
    """Write the model into the new folder `out_dir` and return it.

    Raises `DataError`: the engine cannot run the head size, `out_dir` exists, or the tokenizer's data
    file cannot be used.
    """
    import torch
    from transformers import AutoModelForCausalLM

    out_dir = Path(out_dir)
    if out_dir.exists():
        raise DataError(
            f"{out_dir}: already exists; a made model never overwrites. Remove it first"
        )
    tokenizer = make_bpe(init.tokenizer) if init.tokenizer.type == "bpe" else make_tokenizer()
    config = _model_config(init, len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        with make_whole_folder(out_dir) as partial:
            _save(model, partial)
            tokenizer.save_pretrained(partial)
    except OSError as error:
        raise DataError(f"{out_dir}: cannot write the model ({error})") from error
    return out_dir


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Write the files that `save_pretrained` writes for a small model.

    `save_pretrained` itself imports every installed training library to look for its wrappers, which
    takes seconds.
    """
    from safetensors.torch import save_file

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    apply_umask(folder / "model.safetensors")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the character tokenizer."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *ALPHABET])}
    # Byte pair encoding without a single merge: every character stays a token.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def check_fit(
    model_dir: str | Path,
    max_sequence_tokens: int,
    tokenizer_dir: str | Path | None = None,
    settings: str = "data.max_prompt_tokens or generation.max_response_tokens",
) -> None:
    """Raise `DataError` unless model and tokenizer fit each other and the lengths of the run.

    `tokenizer_dir` defaults to the model's own folder, `settings` name the lengths. Reads
    configurations, never the weights.
    """
    from rlhf_cluster.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir or model_dir)
    num_embedded = text_config(model_dir)["vocab_size"]
    if len(tokenizer) > num_embedded:
        raise DataError(
            f"{model_dir}: the tokenizer has {len(tokenizer)} tokens, the model embeds "
            f"{num_embedded}: some prompts would index past the embedding. Use the model's "
            "own tokenizer, or resize the embedding"
        )
    check_positions(model_dir, max_sequence_tokens, settings)


def check_positions(
    model_dir: str | Path,
    max_sequence_tokens: int,
    settings: str = "data.max_prompt_tokens or generation.max_response_tokens",
) -> None:
    """Raise `DataError` unless the model has positions for sequences of the run's lengths.

    Positions must not depend on the other sequences of a batch. `settings` name the lengths.
    """
    config = text_config(model_dir)
    max_positions = config["max_position_embeddings"]
    if max_positions is not None and max_positions < max_sequence_tokens:
        raise DataError(
            f"{model_dir}: max_position_embeddings = {max_positions}, the run allows sequences of "
            f"{max_sequence_tokens} tokens. Lower {settings}, or take a model with more positions"
        )
    _check_rope(model_dir, config, max_sequence_tokens, settings)


def _check_rope(
    model_dir: str | Path, config: Mapping[str, Any], max_sequence_tokens: int, settings: str
) -> None:
    """Raise `DataError` if rotary positions depend on the batch for some length of the run."""
    longest = longest_alone(model_dir, config)
    if longest is not None and max_sequence_tokens > longest:
        raise DataError(
            f"{model_dir}: rope_type = 'longrope' has other factors for sequences longer than "
            f"original_max_position_embeddings = {longest}, by the longest of a batch; the run allows "
            f"{max_sequence_tokens} tokens. Lower {settings} to {longest} in all, or take another model"
        )


def longest_alone(model_dir: str | Path, config: Mapping[str, Any]) -> int | None:
    """Return the length up to which rotary positions do not depend on the batch; None: any length.

    transformers chooses the factors by the longest sequence of each batch. vLLM chooses them once: for
    `longrope` by the longest sequence that it admits, for `dynamic` always the same. So a packed
    learner and the engine would compute different distributions for the same tokens.

    Raises:
        DataError: the positions depend on the batch at any length.
    """
    limits = []
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    for part in nested or [rope]:
        kind = str(part.get("rope_type", part.get("type", "default")))
        if "dynamic" in kind:
            raise DataError(
                f"{model_dir}: rope_type = {kind!r} scales positions by the longest sequence of a "
                "batch, so that its probabilities depend on what is packed with it. Where the run's "
                "sequences fit without it, remove it from config.json; else take another model"
            )
        known = ("original_max_position_embeddings", "max_position_embeddings")
        found = [part.get(known[0]), *(config.get(name) for name in known)]
        original = next((int(value) for value in found if value), None)
        if kind == "longrope" and original is not None:
            limits.append(original)
    return min(limits, default=None)


def text_config(model_dir: str | Path) -> dict[str, Any]:
    """Return the configuration of the language model. Raises `DataError`.

    It has `vocab_size`, `max_position_embeddings` (None without a limit) and the rotary settings.
    Transformers takes seconds to import, so it is used only if config.json does not have the values.
    """
    try:
        told = json.loads((Path(model_dir) / "config.json").read_bytes())
        if told["model_type"] in FLAT_CONFIGS:
            sizes = ("vocab_size", "max_position_embeddings")
            return {**told, **{name: int(told[name]) for name in sizes}}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a hub id, a damaged file, or values that only transformers knows
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{model_dir}: no model configuration can be read ({error})") from error
    config = found.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return {
        **config.to_dict(),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": positions,
    }


def _model_config(init: ModelInit, vocab_size: int) -> PretrainedConfig:
    from transformers import LlamaConfig, Qwen3Config

    head_size, rest = divmod(init.hidden_size, init.num_heads)
    if rest or head_size not in HEAD_SIZES:
        raise DataError(
            f"model.init: hidden_size / num_heads = {init.hidden_size} / {init.num_heads} = "
            f"{init.hidden_size / init.num_heads:g}, the engine runs heads of "
            f"{', '.join(map(str, HEAD_SIZES))}. For {init.num_heads} heads take hidden_size = "
            f"{init.num_heads * HEAD_SIZES[0]} or {init.num_heads * HEAD_SIZES[1]}"
        )
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[init.architecture]
    token_ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    return config_class(
        vocab_size=vocab_size,
        hidden_size=init.hidden_size,
        intermediate_size=init.intermediate_size,
        num_hidden_layers=init.num_layers,
        num_attention_heads=init.num_heads,
        num_key_value_heads=init.num_kv_heads or init.num_heads,
        head_dim=head_size,
        max_position_embeddings=init.max_position,
        tie_word_embeddings=init.tie_embeddings,
        initializer_range=init.init_scale / math.sqrt(init.hidden_size),
        pad_token_id=token_ids[PAD],
        eos_token_id=token_ids[EOS],
        bos_token_id=token_ids[BOS],
    )
