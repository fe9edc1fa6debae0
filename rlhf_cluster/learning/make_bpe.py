"""A byte-pair tokenizer learned from the texts of a data file, with a chat template.

Promises: the same file and section give the same tokenizer, byte for byte, on any number of threads;
every text is encoded without loss, since all 256 bytes are tokens; text is encoded as `<bos>` and its
tokens. A chat is rendered as

    <bos> <system>...<eos> <user>...<eos> <assistant>...<eos> ...

so every turn ends with the end token, which is where generation stops. A role of another name is
refused. The assistant's words and their end token are marked for `return_assistant_tokens_mask`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.tokenizers import BpeTokenizer
from rlhf_cluster.data.rows import expand, read_rows
from rlhf_cluster.data.texts import texts
from rlhf_cluster.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

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
    """The tokenizer as transformers has it. Raises `DataError`, see `learn`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=learn(section),
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        additional_special_tokens=_ROLE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def learn(section: BpeTokenizer) -> Tokenizer:
    """Raises `DataError`: a file that cannot be read, or without any text."""
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
