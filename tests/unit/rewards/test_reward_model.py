"""A tiny reward model against the same model called on one sequence at a time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.models.make_model import check_positions
from rlhf_cluster.planning.run_inputs import check_inputs
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_prompt, make_rollouts

RESPONSES = ([9, 8, 7, 6, 1], [9], [5, 1], [5, 1, 1], [0, 0, 0], [30] * 20)
MAX_POSITION = 48


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=MAX_POSITION), folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, policy_dir) -> Path:
    """A reward model whose padding token is its end token."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    config = LlamaConfig.from_pretrained(policy_dir, num_labels=1, pad_token_id=tiny_llama.END)
    torch.manual_seed(2)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(policy_dir / name, folder / name)
    return folder


def load(model_dir, policy_dir, wait_timeout_s=30.0, **keys) -> RewardModel:
    config = RewardModelConfig(path=str(model_dir), **({"dtype": "float32"} | keys))
    context = RewardContext(tokenizer_dir=str(policy_dir), wait_timeout_s=wait_timeout_s)
    return RewardModel(config, context)


@pytest.fixture(scope="module")
def alone(model_dir):
    """The model's own forward on one sequence without padding."""
    import torch
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.config.pad_token_id = None  # then it reads the last position, whatever is there

    @torch.no_grad()
    def score(ids) -> float:
        return model(torch.tensor([list(map(int, ids))])).logits.item()

    return score


@pytest.mark.parametrize("tokens_per_batch", [48, 60, 4096])
def test_s22_the_score_is_read_at_the_last_real_token_whatever_padding_stands_behind(
    model_dir, policy_dir, alone, tokens_per_batch
):
    prompt = make_prompt(ids=[2, 3, 4])
    rollouts = make_rollouts(prompt, RESPONSES)
    reward = load(model_dir, policy_dir, tokens_per_batch=tokens_per_batch)
    found = reward.score(prompt, rollouts, [""] * len(rollouts))
    expected = [alone([2, 3, 4, *ids]) for ids in RESPONSES]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(set(np.round(expected, 3))) == len(expected)


def test_s15_an_end_token_that_is_also_the_padding_token_is_read(model_dir, policy_dir, alone):
    prompt = make_prompt(ids=[2, 3, 4])
    reward = load(model_dir, policy_dir)
    ended, cut, twice = reward.score(
        prompt, make_rollouts(prompt, [[9, 1], [9], [9, 1, 1]]), [""] * 3
    )
    np.testing.assert_allclose([ended, cut], [alone([2, 3, 4, 9, 1]), alone([2, 3, 4, 9])], 1e-4)
    assert abs(ended - cut) > 1e-2
    assert abs(twice - ended) > 1e-3


def test_its_own_tokenizer_reads_the_decoded_text(model_dir, policy_dir, alone):
    reward = load(model_dir, policy_dir, tokenizer="own")
    prompt = make_prompt("w2 w3", ids=[40, 41])
    found = reward.score(prompt, make_rollouts(prompt, [[50], [51]]), [" w5 w6", " w7"])
    np.testing.assert_allclose(found, [alone([2, 3, 5, 6]), alone([2, 3, 7])], rtol=1e-4)


def test_its_own_chat_template_renders_prompt_and_completion(
    model_dir, policy_dir, alone, tmp_path
):
    folder = tmp_path / "chat"
    shutil.copytree(model_dir, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}"
        "{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} <end> "
        "{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    reward = load(folder, policy_dir, tokenizer="own")
    expected = alone([10, 2, 1, 11, 5, 1])
    for source in ("w2", [{"role": "user", "content": "w2"}]):
        prompt = make_prompt(source)
        found = reward.score(prompt, make_rollouts(prompt, [[50]]), ["w5"])
        np.testing.assert_allclose(found, [expected], rtol=1e-4)


def test_messages_without_a_chat_template_are_an_error(model_dir, policy_dir):
    reward = load(model_dir, policy_dir, tokenizer="own")
    prompt = make_prompt([{"role": "user", "content": "w2"}])
    with pytest.raises(RewardFailure, match="no chat template"):
        reward.score(prompt, make_rollouts(prompt, [[50]]), ["w5"])


def test_in_bfloat16_the_score_head_stays_in_float32(model_dir, policy_dir, alone):
    import torch

    reward = load(model_dir, policy_dir, dtype="bfloat16")
    assert reward._model.score.weight.dtype == torch.float32
    prompt = make_prompt(ids=[2, 3, 4])
    [found] = reward.score(prompt, make_rollouts(prompt, [RESPONSES[0]]), [""])
    np.testing.assert_allclose(found, alone([2, 3, 4, *RESPONSES[0]]), rtol=0.05)
    assert found != float(torch.tensor(found, dtype=torch.bfloat16))


def test_a_sequence_beyond_the_models_positions_or_vocabulary_is_an_error(model_dir, policy_dir):
    reward = load(model_dir, policy_dir)
    prompt = make_prompt(ids=[2, 3, 4])
    with pytest.raises(RewardFailure, match=r"49 tokens, the reward model takes 1 to 48"):
        reward.score(prompt, make_rollouts(prompt, [[5] * (MAX_POSITION - 2)]), [""])
    with pytest.raises(RewardFailure, match=r"token 64, the reward model embeds 64"):
        reward.score(prompt, make_rollouts(prompt, [[64]]), [""])


def test_a_base_model_is_refused_because_its_score_head_would_be_random(policy_dir, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(policy_dir, folder)
    settings = json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="num_labels = 1"):
        load(folder, policy_dir)
    settings["id2label"], settings["label2id"] = {"0": "score"}, {"score": 0}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        load(folder, policy_dir)


def test_another_vocabulary_than_the_policys_is_refused_when_ids_are_shared(
    model_dir, policy_dir, tmp_path
):
    folder = tmp_path / "other"
    shutil.copytree(model_dir, folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w9"', '"other"'))
    with pytest.raises(ConfigError, match="differs from the policy's"):
        load(folder, policy_dir)
    load(folder, policy_dir, tokenizer="own")


def test_a_missing_folder_is_a_configuration_error(policy_dir, tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tmp_path / "absent", policy_dir)


def test_a_group_that_finds_the_model_busy_fails_by_its_deadline(model_dir, policy_dir):
    reward = load(model_dir, policy_dir, wait_timeout_s=0.05)
    prompt = make_prompt(ids=[2, 3, 4])
    reward._together._is_busy = True  # another group is served
    with pytest.raises(RewardFailure, match=r"busy for 0\.05 s"):
        reward.score(prompt, make_rollouts(prompt, [[5]]), [""])
    reward._together._end_round([])
    assert len(reward.score(prompt, make_rollouts(prompt, [[5]]), [""])) == 1


def rotating(model_dir: Path, folder: Path, **rope: object) -> Path:
    shutil.copytree(model_dir, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    return folder


def longrope(model_dir: Path, folder: Path, original: int) -> Path:
    config = json.loads((model_dir / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"] // 2
    return rotating(
        model_dir,
        folder,
        rope_type="longrope",
        rope_theta=10_000.0,
        factor=4.0,
        original_max_position_embeddings=original,
        short_factor=[1.0] * width,
        long_factor=[8.0] * width,
    )


def test_l12_positions_that_always_follow_the_batch_are_refused(model_dir, policy_dir, tmp_path):
    folder = rotating(
        model_dir, tmp_path / "model", rope_type="dynamic", rope_theta=10_000.0, factor=2.0
    )
    with pytest.raises(DataError, match="reward model .*rope_type = 'dynamic'"):
        load(folder, policy_dir)


def test_l12_a_score_is_the_same_alone_and_beside_a_longer_response(
    model_dir, policy_dir, tmp_path
):
    reward = load(longrope(model_dir, tmp_path / "model", original=12), policy_dir)
    prompt = make_prompt(ids=[2, 3, 4])
    short, longest, over = [9, 8, 7], [30] * 9, [30] * 10
    [alone] = reward.score(prompt, make_rollouts(prompt, [short]), [""])
    beside = reward.score(prompt, make_rollouts(prompt, [short, longest]), [""] * 2)
    assert beside[0] == pytest.approx(alone, rel=1e-5)
    with pytest.raises(
        RewardFailure, match=r"has 13 tokens, the reward model takes 1 to 12.*longrope"
    ):
        reward.score(prompt, make_rollouts(prompt, [short, over]), [""] * 2)


def test_l12_lengths_of_the_run_that_a_reward_model_cannot_place_are_refused_before_it_starts(
    model_dir, tmp_path
):
    folder = longrope(model_dir, tmp_path / "model", original=12)
    check_positions(folder, 12)
    reward = {"type": "reward_model", "path": str(folder)}
    for kind in (reward, {"type": "ensemble", "paths": [str(folder), str(model_dir)]}):
        config = tiny_config(scoring={"rewards": [kind]})
        with pytest.raises(DataError, match=r"model: rope_type = 'longrope'.*allows 16 tokens"):
            check_inputs(config, tmp_path / str(kind["type"]))
