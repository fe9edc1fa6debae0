"""What `validate --deep` finds: tokenizers that differ, and roles that do not fit."""

import json
import shutil
from math import prod
from pathlib import Path

import pytest

from rlhf_cluster.cli import main
from rlhf_cluster.config import load_run
from rlhf_cluster.doctor import GIB
from rlhf_cluster.inputs import model_dir_of
from rlhf_cluster.learning.make_model import make_model
from rlhf_cluster.planning.deep import Need, Shape, deep, judge_memory, memory
from rlhf_cluster.weights.checkpoint import checkpoint_shapes
from tests.configs import tiny_config

QWEN3_8B = Shape(num_parameters=8_190_735_360, hidden_size=4096, num_layers=36, key_size=8 * 128)
EIGHT_GPUS = load_run("configs/qwen3_8b_8gpu.toml")


def by_role(config, shape=QWEN3_8B, frozen=None) -> dict[str, Need]:
    return {need.role: need for need in memory(config, shape, frozen or {})}


def test_the_8_gpu_configuration_is_counted_by_the_formulas():
    found = by_role(EIGHT_GPUS, frozen={"reference": QWEN3_8B.num_parameters})
    learner = found["learner rank"]
    assert learner.parts["state"] == 16 * QWEN3_8B.num_parameters / 3
    assert learner.parts["passes"] == 2 * 16384 * 4096 * 36, "bfloat16, checkpointed"
    assert learner.num_bytes < 80 * GIB
    generation = found["generation worker"]
    assert generation.parts["weights"] == 2 * QWEN3_8B.num_parameters
    assert generation.parts["KV cache"] == 2 * 2 * 36 * 1024 * (1024 + 3072)
    assert found["scoring worker"].num_bytes == 2 * QWEN3_8B.num_parameters
    assert [found[role].processes for role in found] == [3, 4, 1]


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({"ranks": 8}, 2.0),
        ({"ranks": 1, "lora": {}}, 4.0),
        ({"ranks": 1, "lora": {"quantize_base": True}}, 0.63),
    ],
)
def test_ranks_and_adapters_change_the_learners_state(settings, state):
    found = by_role(tiny_config(learner=settings, run={"groups_per_step": 8}))["learner rank"]
    assert found.parts["state"] == pytest.approx(state * QWEN3_8B.num_parameters)


def test_a_separate_critic_doubles_it_and_a_value_head_does_not():
    alone = by_role(tiny_config())["learner rank"].parts["state"]
    separate = by_role(tiny_config(algorithm={"type": "ppo"}))["learner rank"]
    head = by_role(tiny_config(algorithm={"type": "ppo"}, critic={"kind": "head"}))["learner rank"]
    assert separate.parts["state"] == 2 * alone
    assert head.parts["state"] == alone


def need(num_bytes: float, gpus: float = 1.0, processes: int = 1, role: str = "learner rank"):
    return Need(role=role, processes=processes, gpus=gpus, parts={"state": num_bytes})


@pytest.mark.parametrize(
    ("needs", "gpus", "host", "verdicts"),
    [
        ([need(70 * GIB)], [80 * GIB], 8 * GIB, ["ok"]),
        ([need(75 * GIB)], [80 * GIB], 8 * GIB, ["wrong"]),
        ([need(30 * GIB)], [80 * GIB, 24 * GIB], 8 * GIB, ["wrong"]),
        ([need(75 * GIB)], [], 8 * GIB, ["ok"]),
        ([need(3 * GIB, gpus=0, processes=2)], [], 8 * GIB, ["ok", "ok"]),
        ([need(3 * GIB, gpus=0, processes=3)], [], 8 * GIB, ["ok", "wrong"]),
        ([need(3 * GIB, gpus=0, processes=3)], [], None, ["ok"]),
    ],
)
def test_a_role_is_compared_with_the_smallest_gpu_or_all_with_the_host(needs, gpus, host, verdicts):
    found = list(judge_memory(needs, gpus, host, tiny_config()))
    assert [finding.verdict for finding in found] == verdicts
    for finding in found:
        assert bool(finding.cure) == (finding.verdict != "ok")


def test_on_a_cluster_this_host_says_nothing():
    config = tiny_config(cluster={"address": "10.0.0.1:6379"})
    found = list(judge_memory([need(30 * GIB, gpus=0)], [], 8 * GIB, config))
    assert [finding.verdict for finding in found] == ["ok"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tiny_config().model.init, tmp_path_factory.mktemp("model") / "policy", 1)


def rewritten(model: Path, folder: Path, name: str, change) -> str:
    """A copy of `model` in which one JSON file is changed."""
    shutil.copytree(model, folder)
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    change(found)
    path.write_text(json.dumps(found))
    return str(folder)


def other_tokens(tree) -> None:
    vocabulary = tree["model"]["vocab"]
    first, second = sorted(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def findings(tmp_path, model, **sections) -> dict:
    config = tiny_config(model={"init": None, "path": str(model)}, **sections)
    return {f.name: f for f in deep(config, tmp_path / "scratch")}


def reward(path, **more):
    return {"rewards": [{"type": "reward_model", "path": path, "name": "rm", **more}]}


def test_a_run_whose_models_agree_has_nothing_wrong(tmp_path, model):
    found = findings(tmp_path, model, scoring={**reward(str(model)), "reference": True})
    assert {f.verdict for f in found.values()} == {"ok"}
    assert found["tokenizer of rm"].value == "the policy's"
    assert "reference" in found["memory, scoring worker"].value
    assert "rm" in found["memory, scoring worker"].value


def test_a_reward_model_with_other_tokens_is_wrong_unless_it_reads_the_text(tmp_path, model):
    other = rewritten(model, tmp_path / "other", "tokenizer.json", other_tokens)
    found = findings(tmp_path, model, scoring=reward(other))["tokenizer of rm"]
    assert found.verdict == "wrong"
    assert found.value.startswith("2 tokens differ")
    own = findings(tmp_path, model, scoring=reward(other, tokenizer="own"))
    assert "tokenizer of rm" not in own


def test_another_chat_template_is_noted(tmp_path, model):
    other = rewritten(
        model,
        tmp_path / "other",
        "tokenizer_config.json",
        lambda tree: tree.update(chat_template="{{ messages }}"),
    )
    found = findings(tmp_path, model, scoring=reward(other))["tokenizer of rm"]
    assert (found.verdict, found.value) == ("note", "the policy's tokens, another chat template")
    plain = findings(tmp_path, other)["chat template"]
    assert plain.verdict == "note"
    assert "data.template = 'chat'" in plain.cure


def test_a_tokenizer_that_is_not_the_models_own_is_compared_with_it(tmp_path, model):
    other = rewritten(model, tmp_path / "other", "tokenizer.json", other_tokens)
    config = tiny_config(model={"init": None, "path": str(model), "tokenizer": other})
    found = {f.name: f for f in deep(config, tmp_path)}
    assert found[f"tokenizer of {model}"].verdict == "wrong"


def test_an_end_token_that_is_none_is_wrong(tmp_path, model):
    other = rewritten(
        model,
        tmp_path / "other",
        "generation_config.json",
        lambda tree: tree.update(eos_token_id=[1, 999_999]),
    )
    found = findings(tmp_path, other)["end tokens"]
    assert found.verdict == "wrong"
    assert "[999999] are no tokens" in found.cure


def test_parameters_are_those_of_the_files(tmp_path, model):
    config = tiny_config()
    made = model_dir_of(config, tmp_path)
    number = sum(int(prod(shape)) for shape in checkpoint_shapes(made).values())
    found = {f.name: f for f in deep(config, tmp_path / "again")}
    state = 16 * number / GIB
    assert f"state {state:.3g} GiB" in found["memory, learner rank"].value


def test_validate_deep_prints_them_and_refuses_what_is_wrong(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toml = f"""
[run]
name = "tiny"
steps = 3
groups_per_step = 4
[model]
path = "{model}"
[data]
task = "sort_digits"
max_prompt_tokens = 8
[algorithm]
group_size = 4
[generation]
max_response_tokens = 8
dtype = "float32"
[scoring]
rewards = [{{type = "exact_match"}}]
[learner]
learning_rate = 1e-3
"""
    (tmp_path / "run.toml").write_text(toml)
    assert main(["validate", "run.toml", "--deep"]) == 0
    printed = capsys.readouterr().out
    assert "run.toml: valid" in printed
    assert "memory, learner rank" in printed
    other = rewritten(model, tmp_path / "other", "tokenizer.json", other_tokens)
    wrong = f'scoring.rewards=[{{type="reward_model", path="{other}"}}]'
    assert main(["validate", "run.toml", "--deep", "--set", wrong]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: tokenizer of reward_model: not as a run needs it")
