"""Made models, tokenizers and tasks."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_cluster.data.tasks import (
    HELD_OUT_ONE_IN,
    TASKS,
    held_out_rows,
    is_held_out,
    train_rows,
)
from rlhf_cluster.data.tokenizer import PLAIN_CLASSES, end_token_ids, load_tokenizer
from rlhf_cluster.errors import DataError
from rlhf_cluster.models.make_model import (
    ALPHABET,
    FLAT_CONFIGS,
    check_fit,
    make_model,
    make_tokenizer,
    text_config,
)
from rlhf_cluster.sections.every_run import ModelInit


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(ModelInit(), tmp_path_factory.mktemp("models") / "made", seed=0)


# Tasks


def test_sort_digits_asks_for_the_digits_in_order() -> None:
    rows = TASKS["sort_digits"].rows(200, random.Random(0))
    for row in rows:
        assert len(row["prompt"]) == 7
        assert row["prompt"].endswith("=")
        digits = sorted(int(d) for d in row["prompt"][:-1])
        assert row["answer"] == "".join(str(d) for d in digits)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_repeat_by_seed_and_block(task: str) -> None:
    first = train_rows(task, 0, 0, 50)
    assert first == train_rows(task, 0, 0, 50)
    assert first != train_rows(task, 0, 1, 50)
    assert first != train_rows(task, 1, 0, 50)
    assert held_out_rows(task, 0, 50) == held_out_rows(task, 0, 50)
    assert held_out_rows(task, 0, 50) != held_out_rows(task, 1, 50)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_and_training_rows_never_share_a_prompt(task: str) -> None:
    train = {row["prompt"] for row in train_rows(task, 0, 0, 20_000)}
    held_out = [row["prompt"] for row in held_out_rows(task, 7, 500)]
    assert len(set(held_out)) == 500
    assert not train & set(held_out)
    drawn = TASKS[task].rows(20_000, random.Random(1))
    share = sum(is_held_out(row["prompt"]) for row in drawn) / len(drawn)
    assert 0.8 / HELD_OUT_ONE_IN < share < 1.2 / HELD_OUT_ONE_IN


def test_more_held_out_rows_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coin:
        def rows(self, num: int, rng: random.Random) -> list[dict[str, str]]:
            return [{"prompt": f"{rng.randrange(100)}", "answer": ""} for _ in range(num)]

    monkeypatch.setitem(TASKS, "coin", Coin())
    with pytest.raises(
        DataError, match=r"task 'coin': found only \d+ distinct .* 50 are asked for"
    ):
        held_out_rows("coin", 0, 50)
    with pytest.raises(DataError, match="task 'dice' is unknown; known: sort_digits, coin"):
        train_rows("dice", 0, 0, 1)


# The character tokenizer


def test_a_prompt_is_a_bos_and_one_token_a_character(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer("503917=")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 8
    assert 45 <= len(tokenizer) <= 100
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


@given(st.text(alphabet=ALPHABET, max_size=30))
@example("<eos>")
@example("1<pad><unk>")
def test_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_character_outside_the_alphabet_is_unknown_but_not_lost(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer("a\u00e9b")["input_ids"][2] == tokenizer.unk_token_id


# The made model


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_made_model_loads_with_its_sizes(tmp_path: Path, architecture, tied: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    init = ModelInit(architecture=architecture, num_kv_heads=2, tie_embeddings=tied, init_scale=0.5)
    folder = make_model(init, tmp_path / "m", seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len(model.model.layers) == init.num_layers
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (64, 128)
    std = model.model.layers[0].mlp.up_proj.weight.std().item()
    assert std == pytest.approx(0.5 / 128**0.5, rel=0.03)
    check_fit(folder, init.max_position)
    with pytest.raises(DataError, match="m: already exists"):
        make_model(init, folder, seed=0)


def test_a_made_model_depends_on_its_seed_and_leaves_the_global_one_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    folders = [make_model(ModelInit(), tmp_path / f"{n}", seed) for n, seed in enumerate([1, 1, 2])]
    assert torch.equal(torch.rand(1), expected)
    data = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert data[0] == data[1] != data[2]


def test_a_head_size_that_the_engine_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"128 / 8 = 16, the engine runs heads of 32.*hidden_size = 256"
    ):
        make_model(ModelInit(num_heads=8), tmp_path / "m", seed=0)
    assert list(tmp_path.iterdir()) == []


# Fit


def edited(model_dir: Path, target: Path, file: str, **changes) -> Path:
    shutil.copytree(model_dir, target)
    path = target / file
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return target


def test_a_model_with_too_few_positions_is_refused(model_dir: Path) -> None:
    check_fit(model_dir, 64)
    with pytest.raises(DataError, match=r"max_position_embeddings = 64, .* sequences of 65 tokens"):
        check_fit(model_dir, 65)


@pytest.mark.parametrize("kind", [*FLAT_CONFIGS, "gpt2"])
def test_sizes_are_those_of_transformers_also_where_it_is_not_asked(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    for sizes in ({}, {"vocab_size": 7, "max_position_embeddings": 9}):
        config = AutoConfig.for_model(kind, **sizes)
        config.save_pretrained(tmp_path)
        assert sizes_of(tmp_path) == (config.vocab_size, config.max_position_embeddings)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind}))
    default = AutoConfig.for_model(kind)
    assert sizes_of(tmp_path) == (default.vocab_size, default.max_position_embeddings)


def sizes_of(folder: Path) -> tuple[int, int]:
    config = text_config(folder)
    return config["vocab_size"], config["max_position_embeddings"]


def test_a_folder_without_a_configuration_has_no_sizes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model configuration can be read"):
        text_config(tmp_path)


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_b3_positions_that_depend_on_the_batch_are_refused(model_dir, tmp_path, key, name):
    def with_rope(folder: str, **rope: Any) -> Path:
        return edited(model_dir, tmp_path / folder, "config.json", **{key: rope})

    with pytest.raises(DataError, match=r"rope_type = 'dynamic' .* remove it from config.json"):
        check_fit(with_rope("dynamic", **{name: "dynamic"}, factor=2.0), 8)
    longrope = {name: "longrope", "original_max_position_embeddings": 32, **LONG}
    check_fit(with_rope("short", **longrope), 32)
    with pytest.raises(DataError, match=r"original_max_position_embeddings = 32.*allows 33 tokens"):
        check_fit(with_rope("long", **longrope), 33)
    layers = {"full_attention": longrope, "sliding_attention": {name: "default"}}
    with pytest.raises(DataError, match="allows 33 tokens"):
        check_fit(with_rope("layers", **layers), 33)
    check_fit(with_rope("linear", **{name: "linear"}, factor=2.0), 64)
    check_fit(with_rope("llama3", **{name: "llama3"}, factor=2.0), 64)


def test_b3_transformers_takes_other_factors_for_a_short_sequence_beside_a_long_one():
    """What the refusal is for. Within the original length packing changes nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_cluster.models.policy_model import PolicyLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        **LONG,
    }
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters=rope,
        initializer_range=0.25,
    )
    policy = PolicyLM(LlamaForCausalLM(config).eval())

    def logprobs(*lengths: int) -> torch.Tensor:
        """Of the first sequence of `lengths[0]` tokens, packed with others."""
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        tokens = (7 * torch.arange(positions.shape[1]) % 50)[None]
        with torch.no_grad():
            return policy(tokens, positions, tokens)[0][0, : lengths[0]]

    alone = logprobs(12)
    torch.testing.assert_close(logprobs(12, 16), alone, rtol=1e-5, atol=1e-5)
    assert (logprobs(12, 17) - alone).abs().max() > 1e-2


def test_a_tokenizer_larger_than_the_embedding_is_refused(model_dir: Path, tmp_path: Path) -> None:
    small = edited(model_dir, tmp_path / "small", "config.json", vocab_size=60)
    with pytest.raises(DataError, match="tokenizer has 100 tokens, the model embeds 60"):
        check_fit(small, 8)
    with pytest.raises(DataError, match="the model embeds 60"):
        check_fit(small, 8, tokenizer_dir=model_dir)


def test_a_tokenizer_without_an_end_token_is_refused(model_dir: Path, tmp_path: Path) -> None:
    endless = edited(model_dir, tmp_path / "endless", "tokenizer_config.json", eos_token=None)
    with pytest.raises(DataError, match=r"endless: the tokenizer has no end token.*Set eos_token"):
        load_tokenizer(endless)


def test_missing_and_damaged_tokenizers_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: no such folder\. Give the folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    broken = edited(model_dir, tmp_path / "broken", "config.json")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"broken: no tokenizer can be loaded.*tokenizer\.json"):
        load_tokenizer(broken)


def test_end_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(
    model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(model_dir)
    eos = tokenizer.eos_token_id
    assert end_token_ids(tokenizer, model_dir) == (eos,)
    several = edited(model_dir, tmp_path / "a", "generation_config.json", eos_token_id=[50, eos, 7])
    assert end_token_ids(tokenizer, several) == (eos, 7, 50)
    one = edited(model_dir, tmp_path / "b", "generation_config.json", eos_token_id=9)
    assert end_token_ids(tokenizer, one) == (eos, 9)
    assert end_token_ids(tokenizer, tmp_path) == (eos,)
    (one / "generation_config.json").write_text("[")
    with pytest.raises(DataError, match=r"generation_config\.json: cannot be read"):
        end_token_ids(tokenizer, one)


def test_the_plain_class_is_what_the_class_for_all_would_choose(model_dir):
    from transformers import AutoTokenizer

    found, chosen = load_tokenizer(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert type(found) is type(chosen)
    assert found.get_vocab() == chosen.get_vocab()
    assert found.init_kwargs == chosen.init_kwargs
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in PLAIN_CLASSES
