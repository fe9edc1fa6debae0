"""Reasoning steps: where they are in the text, and at which sampled tokens they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlhf_cluster.data.reasoning_steps import (
    step_ends,
    step_spans,
)

Decode = Callable[[Sequence[int]], str]

PIECES = [
    "a",
    "bc",
    " d",
    "\n",
    "\n\n",
    "e\nf",
    "x\ny\nz",
    "}\n",
    " ",
    "\u20ac",
    "\u4e2d\u6587",
    "1",
]
END = "<end>"


def _bytewise() -> tuple[Decode, dict[str, list[int]], frozenset[int]]:
    """As GPT-2 and Qwen: every byte is a token; some pieces are one token too."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joined = ["".join(p for p, _ in of_byte.pre_tokenize_str(piece)) for piece in PIECES]
    whole = [piece for piece in joined if len(piece) > 1]
    vocabulary = {token: i for i, token in enumerate([*letters, *whole])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    ids = {
        piece: [vocabulary[text]] if piece.isascii() else [vocabulary[c] for c in text]
        for piece, text in zip(PIECES, joined, strict=True)
    }
    return _decoding(tokenizer, ids)


def _with_spaces() -> tuple[Decode, dict[str, list[int]], frozenset[int]]:
    """As Llama 2: the first space is dropped, and characters out of the vocabulary are bytes."""
    known = [p.replace(" ", "\u2581") for p in PIECES if p.isascii()]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    vocabulary = {token: i for i, token in enumerate([*bytes_, *known])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([END])
    ids = {
        p: [vocabulary[p.replace(" ", "\u2581")]] if p.isascii() else list(p.encode())
        for p in PIECES
    }
    return _decoding(tokenizer, ids)


def _words() -> tuple[Decode, dict[str, list[int]], frozenset[int]]:
    """A token a word, joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(PIECES)}, unk_token="a"))
    tokenizer.add_special_tokens([END])
    return _decoding(tokenizer, {piece: [i] for i, piece in enumerate(PIECES)})


def _decoding(
    tokenizer: Tokenizer, ids: dict[str, list[int]]
) -> tuple[Decode, dict[str, list[int]], frozenset[int]]:
    end = tokenizer.token_to_id(END)
    return lambda own: tokenizer.decode(list(own)), {**ids, END: [end]}, frozenset([end])


KINDS = {"bytewise": _bytewise(), "with spaces": _with_spaces(), "words": _words()}
responses = st.lists(st.sampled_from([*PIECES, END]), min_size=1, max_size=24)


def _ends(kind: str, pieces: Sequence[str], separator: str = "\n") -> tuple[list[int], list[str]]:
    decode, ids_of, silent = KINDS[kind]
    ids = [i for piece in pieces for i in ids_of[piece]]
    text = decode(ids)
    spans = step_spans(text, separator)
    ends = step_ends(decode, ids, silent, text, spans)
    assert ends.dtype == np.int32
    return ends.tolist(), [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(pieces=responses)
def test_a_step_ends_at_the_first_token_whose_prefix_has_its_text(
    kind: str, pieces: list[str]
) -> None:
    decode, ids_of, _ = KINDS[kind]
    ids = [i for piece in pieces for i in ids_of[piece]]
    text, (ends, _) = decode(ids), _ends(kind, pieces)
    spans = step_spans(text, "\n")
    for (_, stop), end in zip(spans[:-1], ends[:-1], strict=True):
        complete = [decode(ids[: i + 1]).rstrip("\ufffd") for i in range(len(ids))]
        assert end == next(i for i, prefix in enumerate(complete) if len(prefix) >= stop)
    assert ends[-1] == len(ids) - 1


@pytest.mark.parametrize("kind", ["bytewise", "with spaces"])
@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bytes_that_are_no_text_still_have_steps_inside_the_response(
    kind: str, ids: list[int]
) -> None:
    decode, ids_of, silent = KINDS[kind]
    ids = [*ids, *ids_of["\n"], *ids]
    text = decode(ids)
    ends = step_ends(decode, ids, silent, text, step_spans(text, "\n"))
    assert (np.diff(ends) >= 0).all()
    assert ends[0] >= 0
    assert ends[-1] == len(ids) - 1


def test_steps_and_their_tokens_by_hand() -> None:
    # tokens:        0    1    2(2,3,4)  5     6       7    8     9
    ends, steps = _ends("bytewise", ["a", "bc", "\u20ac", "\n", "\n\n", "1", " d", END])
    assert (steps, ends) == (["abc\u20ac", "1 d"], [4, 9])
    # one token holds the end of one step, a whole second one and the start of the third
    ends, steps = _ends("bytewise", ["a", "x\ny\nz", "1"])
    assert (steps, ends) == (["ax", "y", "z1"], [1, 1, 2])


def test_a_character_counts_with_the_token_that_completes_it() -> None:
    ends, steps = _ends("with spaces", ["\u4e2d\u6587", "\n", "1"])
    assert (steps, ends) == (["\u4e2d\u6587", "1"], [5, 7])


def test_blank_segments_are_no_steps_and_no_text_is_one() -> None:
    assert step_spans("\n \na\n\n b\n", "\n") == [(3, 4), (6, 8)]
    assert step_spans("", "\n") == [(0, 0)]
    assert step_spans(" \n", "\n") == [(0, 2)]
    assert step_spans("a; b;c", "; ") == [(0, 1), (3, 6)]
    assert _ends("words", [END, END]) == ([1], [""])


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_given_a_few_tokens_a_time(kind: str) -> None:
    decode, ids_of, silent = KINDS[kind]
    pieces = ["a", "bc", "\u20ac", "\n", END, END, END, END, END, END, END, END, END, END] * 100
    ids = [i for piece in pieces for i in ids_of[piece]]
    given_tokens = 0

    def counting(own: Sequence[int]) -> str:
        nonlocal given_tokens
        given_tokens += len(own)
        return decode(own)

    text = decode(ids)
    assert len(step_ends(counting, ids, silent, text, step_spans(text, "\n"))) == 100
    assert given_tokens < 10 * len(ids)


def test_a_decoder_whose_pieces_do_not_add_up_is_asked_for_prefixes() -> None:
    def late(ids: Sequence[int]) -> str:
        """Spaces after the third token of a call on, which no window of two shows."""
        return "".join(str(i) for i in ids[:3]) + "".join(f" {i}" if i else "\n" for i in ids[3:])

    ids = [1, 2, 3, 4, 0, 5, 6, 0, 7, 8]
    text = late(ids)
    assert text == "123 4\n 5 6\n 7 8"
    ends = step_ends(late, ids, frozenset(), text, step_spans(text, "\n"))
    assert ends.tolist() == [3, 6, 9]
