"""The byte-pair tokenizer of a made model: without loss, with a chat template, the same every time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.config import validate
from rlhf_cluster.data.tokenizer import PLAIN_CLASSES, end_token_ids, load_tokenizer
from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.models.make_model import (
    check_fit,
    learn_bpe,
    make_bpe,
    make_model,
)
from rlhf_cluster.sections.every_run import (
    BpeTokenizer,
    ModelInit,
)

WORDS = ["the", "other", "mother", "was", "there", "with", "her", "brother", "and", "father"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "data.jsonl"
    rows = []
    for i in range(60):
        told = " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))
        history = f"\n\nHuman: {told}?\n\nAssistant: "
        rows.append({"chosen": f"{history}Yes, {told}.", "rejected": f"{history}no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = BpeTokenizer(path=str(data), vocab_size=512)
    return make_model(ModelInit(tokenizer=tokenizer), tmp_path_factory.mktemp("m") / "made", seed=0)


@given(text=st.text(max_size=30))
def test_every_text_survives_encoding_and_decoding(made: Path, text: str) -> None:
    tokenizer = load_tokenizer(made)
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.unk_token_id not in ids


def test_words_of_the_data_become_few_tokens_and_marks_of_dialogues_none(made: Path) -> None:
    tokenizer = load_tokenizer(made)
    text = " the mother was with her brother"
    assert len(tokenizer(text)["input_ids"]) < 10
    assert not any("Human" in token for token in tokenizer.get_vocab())
    assert len(tokenizer) <= 512
    assert type(tokenizer).__name__ in PLAIN_CLASSES
    assert end_token_ids(tokenizer, made) == (tokenizer.eos_token_id,)
    check_fit(made, ModelInit().max_position)
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id]
    config = json.loads((made / "config.json").read_text())
    assert special == [config[f"{name}_token_id"] for name in ("pad", "eos", "bos")]


def test_the_chat_template_ends_every_turn_and_marks_what_the_assistant_says(made: Path) -> None:
    tokenizer = load_tokenizer(made)
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "her?"},
        {"role": "assistant", "content": "the mother"},
        {"role": "user", "content": "and?"},
    ]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert asked[: len(ids)] == ids
    assert tokenizer.decode(asked) == (
        "<bos><system>Be kind.<eos><user>her?<eos><assistant>the mother<eos><user>and?<eos><assistant>"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    masked = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [i for i, m in zip(masked["input_ids"], masked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == "the mother<eos>"
    with pytest.raises(Exception, match="no such role: judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "x"}])


def test_the_same_file_gives_the_same_bytes_in_any_process(data: Path, made: Path) -> None:
    code = (
        "import sys\n"
        "from rlhf_cluster.sections.every_run import BpeTokenizer\n"
        "from rlhf_cluster.models.make_model import learn_bpe\n"
        "sys.stdout.write(learn_bpe(BpeTokenizer(path=sys.argv[1], vocab_size=512)).to_str())"
    )
    one_thread = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(data)], capture_output=True, text=True, env=one_thread
    )
    here = learn_bpe(BpeTokenizer(path=str(data), vocab_size=512)).to_str()
    assert done.stdout == here, done.stderr
    assert json.loads(here) == json.loads(load_tokenizer(made).backend_tokenizer.to_str())


def test_files_without_text_and_vocabularies_below_the_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(DataError, match=r"n\.jsonl: no column holds text"):
        make_bpe(BpeTokenizer(path=str(tmp_path / "n.jsonl")))
    with pytest.raises(DataError, match="absent.jsonl: no such file"):
        make_bpe(BpeTokenizer(path=str(tmp_path / "absent.jsonl")))
    tree = {"tokenizer": {"type": "bpe", "path": "x", "vocab_size": 100}}
    with pytest.raises(ConfigError, match="vocab_size"):
        validate(ModelInit, tree, source="test")
