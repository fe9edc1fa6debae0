"""What `validate --deep` finds: tokenizers that differ, and roles that do not fit."""

import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from rlhf_cluster.cli.commands import main
from rlhf_cluster.config import load_run
from rlhf_cluster.config.load import load_all
from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.models.model_folder import checkpoint_shapes
from rlhf_cluster.planning.deep_validation import deep
from rlhf_cluster.planning.doctor import GIB
from rlhf_cluster.planning.memory_needs import (
    Need,
    Shape,
    judge,
    of_run,
    of_stage,
)
from rlhf_cluster.planning.run_inputs import model_dir_of
from tests.support.builders.offline_stages import stage_config
from tests.support.builders.run_configs import tiny_config

QWEN3_8B = Shape(num_parameters=8_190_735_360, hidden_size=4096, num_layers=36, key_size=8 * 128)
QWEN3_06B = Shape(num_parameters=596_049_920, hidden_size=1024, num_layers=28, key_size=8 * 128)
EIGHT_GPUS = load_run("configs/qwen3_8b_8gpu.toml")
ONE_GPU = load_run("configs/qwen3_0.6b_1gpu.toml")


def by_role(config, shape=QWEN3_8B, frozen=None) -> dict[str, Need]:
    return {need.role: need for need in of_run(config, shape, frozen or {})}


def test_the_8_gpu_configuration_is_counted_by_the_formulas():
    found = by_role(EIGHT_GPUS, frozen={"reference": 2.0 * QWEN3_8B.num_parameters})
    learner = found["learner rank"]
    assert learner.parts["state"] == 16 * QWEN3_8B.num_parameters / 3
    assert learner.parts["passes"] == 2 * 16384 * 4096 * 36, "bfloat16, checkpointed"
    assert learner.num_bytes < 80 * GIB
    generation = found["generation worker"]
    assert generation.parts["weights"] == 2 * QWEN3_8B.num_parameters
    assert generation.parts["KV cache"] == 2 * 2 * 36 * 1024 * (1024 + 3072)
    assert found["scoring worker"].num_bytes == 2 * QWEN3_8B.num_parameters
    assert [found[role].processes for role in found] == [3, 4, 1]


def test_the_pools_of_the_1_gpu_configuration_fit_their_shares_of_24_gib_and_not_of_16():
    found = of_run(ONE_GPU, QWEN3_06B, {"reference": 2.0 * QWEN3_06B.num_parameters})
    assert sum(need.gpus * need.processes for need in found) == pytest.approx(1.0)
    assert [f.verdict for f in judge(found, [24 * GIB], None, alone=True)] == ["ok"] * 3
    wrong = {f.name: f for f in judge(found, [16 * GIB], None, alone=True) if f.verdict == "wrong"}
    assert set(wrong) == {"memory, learner rank", "memory, generation worker"}
    assert wrong["memory, learner rank"].cure.startswith("0.55 of 16 GiB on a GPU here.")


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


LLAMA_70B = Shape(num_parameters=70_553_706_496, hidden_size=8192, num_layers=80, key_size=1024)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({}, False),
        ({"lora": {}}, False),
        ({"lora": {"quantize_base": True}}, False),
        ({"backend": "zero3"}, True),
    ],
)
def test_a_learner_that_loads_the_whole_model_on_each_device_is_refused_by_that_phase(
    settings, whole
):
    learner = {"ranks": 64, "num_gpus": 1, "gradient_checkpointing": True, **settings}
    config = tiny_config(learner=learner, run={"groups_per_step": 16})
    need = by_role(config, LLAMA_70B)["learner rank"]
    assert need.is_load_worst == whole
    finding = next(judge([need], [80 * GIB], None, alone=False))
    assert finding.verdict == ("wrong" if whole else "ok")
    if whole:
        assert "while it loads: the whole model in float32 263 GiB" in finding.value
        assert "learner.backend = 'fsdp2'" in finding.cure
    else:
        assert need.num_bytes < 25 * GIB


def test_a_rounded_frozen_model_needs_its_full_width_while_it_loads():
    scoring = {"quantization": "int8", "dtype": "bfloat16", "reference": True}
    need = by_role(tiny_config(scoring=scoring), frozen={"reference": 8.0 * GIB})["scoring worker"]
    assert sum(need.parts.values()) == 8 * GIB
    assert need.num_bytes == 16 * GIB
    plain = scoring | {"quantization": None}
    need = by_role(tiny_config(scoring=plain), frozen={"reference": 8.0 * GIB})["scoring worker"]
    assert need.num_bytes == 8 * GIB
    assert not need.is_load_worst


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
        ([need(35 * GIB, gpus=0.5)], [80 * GIB], 8 * GIB, ["ok"]),
        ([need(37 * GIB, gpus=0.5)], [80 * GIB], 8 * GIB, ["wrong"]),
        ([need(70 * GIB, gpus=2)], [80 * GIB], 8 * GIB, ["ok"]),
        ([need(75 * GIB)], [], 8 * GIB, ["ok"]),
        ([need(3 * GIB, gpus=0, processes=2)], [], 8 * GIB, ["ok", "ok"]),
        ([need(3 * GIB, gpus=0, processes=3)], [], 8 * GIB, ["ok", "wrong"]),
        ([need(3 * GIB, gpus=0, processes=3)], [], None, ["ok"]),
    ],
)
def test_a_role_is_compared_with_the_smallest_gpu_or_all_with_the_host(needs, gpus, host, verdicts):
    found = list(judge(needs, gpus, host, alone=True))
    assert [finding.verdict for finding in found] == verdicts
    for finding in found:
        assert bool(finding.cure) == (finding.verdict != "ok")


def test_a_rank_of_a_relayed_run_lends_a_copy_of_its_shard_from_the_hosts_memory():
    weights = {"transport": "relay", "dtype": "bfloat16"}
    run = {"weights": weights, "learner": {"ranks": 4, "num_gpus": 1}}
    need = by_role(tiny_config(**run))["learner rank"]
    assert need.host_parts == {"lent shard": 2 * QWEN3_8B.num_parameters / 4}
    without = by_role(tiny_config(**{**run, "weights": {"transport": "files"}}))["learner rank"]
    assert without.host_parts == {}
    assert need.parts == without.parts, "nothing of it is on the GPU"
    on_cpu = by_role(tiny_config(weights=weights, learner={"ranks": 4}))["learner rank"]
    assert on_cpu.host_parts == need.host_parts


def test_what_ranks_on_gpus_lend_is_compared_with_the_host():
    lends = replace(need(70 * GIB, processes=4), host_parts={"lent shard": 4.0 * GIB})
    role, host = judge([lends], [80 * GIB], 15 * GIB, alone=True)
    assert "in host memory 4 GiB (lent shard 4 GiB)" in role.value
    assert (role.verdict, host.verdict) == ("ok", "wrong")
    assert "16 GiB of 15 GiB" in host.value
    assert "weights.transport = 'files'" in host.cure
    on_cpu = replace(lends, gpus=0.0)
    assert "296 GiB of 15 GiB" in list(judge([on_cpu], [], 15 * GIB, alone=True))[1].value
    assert [f.verdict for f in judge([lends], [80 * GIB], 17 * GIB, alone=True)] == ["ok", "ok"]


def test_the_transport_that_a_run_chooses_decides_what_is_lent(model, tmp_path):
    large = {"transport": "auto", "relay_above_bytes": 1, "dtype": "float32"}
    found = {}
    for transport in ("auto", "files"):
        config = tiny_config(
            model={"path": str(model), "init": None},
            weights=large | {"transport": transport},
            generation={"workers": 2},
            run={"root": "/somewhere"},
        )
        report = {f.name: f.value for f in deep(config, tmp_path / transport)}
        found[transport] = "lent shard" in report["memory, learner rank"]
    assert found == {"auto": True, "files": False}


def test_on_a_cluster_this_host_says_nothing():
    found = list(judge([need(30 * GIB, gpus=0)], [], 8 * GIB, alone=False))
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


def stage_state(shape=QWEN3_8B, teacher=0, **sections):
    config = stage_config(**sections)
    [rank] = of_stage(config, shape, teacher)
    assert (rank.role, rank.processes) == ("learner rank", config.learner.ranks)
    return {name: size / QWEN3_8B.num_parameters for name, size in rank.parts.items()}


def test_a_stage_is_counted_by_the_same_formulas():
    sft = stage_state(learner={"ranks": 2})
    assert sft["state"] == 8.0
    assert sft["passes"] * QWEN3_8B.num_parameters == 34 * 2 * (8 * 32) * 4096 * 36
    assert sft.keys() == {"state", "passes"}
    pairs = stage_state(stage={"type": "reward_model"})
    assert pairs["passes"] == 2 * sft["passes"], "a unit is a pair"


@pytest.mark.parametrize(
    ("stage", "learner", "reference"),
    [
        ({}, {}, 4.0),
        ({}, {"ranks": 2}, 2.0),
        ({}, {"dtype": "bfloat16"}, 2.0),
        ({"reference_update": {"type": "ema", "every": 1}}, {"dtype": "bfloat16"}, 4.0),
        ({}, {"lora": {}}, None),
        ({"loss": {"type": "simpo"}}, {}, None),
    ],
)
def test_a_stages_reference_is_a_second_model_where_it_needs_one(stage, learner, reference):
    found = stage_state(stage={"type": "preference", **stage}, learner=learner)
    assert found.get("reference") == reference


def test_a_teacher_is_counted_with_its_own_parameters(tmp_path):
    found = stage_state(
        teacher=2 * QWEN3_8B.num_parameters,
        stage={"type": "distillation", "teacher": str(tmp_path)},
    )
    assert found["teacher"] == 8.0


def test_an_algorithm_whose_kl_is_over_the_whole_vocabulary_holds_the_reference_in_the_learner():
    kl = {"kl_coef": 0.1, "kl_in": "loss"}
    alone = by_role(tiny_config(algorithm={**kl, "kl_estimator": "full"}))["learner rank"]
    assert alone.parts["reference"] == 4 * QWEN3_8B.num_parameters
    pool = by_role(tiny_config(algorithm=kl, scoring={"reference": True}))["learner rank"]
    assert "reference" not in pool.parts


def test_a_stages_teacher_with_other_tokens_is_wrong(tmp_path, model):
    other = rewritten(model, tmp_path / "other", "tokenizer.json", other_tokens)
    for teacher, verdict in ((other, "wrong"), (str(model), "ok")):
        config = stage_config(
            None,
            model={"init": None, "path": str(model)},
            stage={"type": "distillation", "teacher": teacher},
        )
        found = {f.name: f for f in deep(config, tmp_path / "scratch")}
        assert found["tokenizer of the teacher"].verdict == verdict
        assert "teacher" in found["memory, learner rank"].value


def pipeline(tmp_path, reward: str, model: str = "init = {}", template: str = "none"):
    path = tmp_path / "pipeline.toml"
    path.write_text(f"""
[pipeline]
name = "both"
root = "{tmp_path}/runs"
[stages.sft]
run = {{steps = 2, units_per_step = 4}}
stage.type = "sft"
model.{model}
data = {{sources = [{{path = "rows.jsonl"}}], max_tokens = 16, template = "{template}"}}
learner = {{learning_rate = 1e-3}}
[stages.rl]
run = {{steps = 2, groups_per_step = 4}}
model.path = "{{stages.sft.final}}"
data = {{task = "sort_digits", max_prompt_tokens = 8}}
algorithm.group_size = 4
generation.max_response_tokens = 8
learner = {{learning_rate = 1e-3}}
scoring = {{reference = true, rewards = [{reward}]}}
""")
    return load_all(path)


def test_a_stage_of_a_pipeline_is_looked_at_with_the_model_that_it_will_get(tmp_path, model):
    other = rewritten(model, tmp_path / "other", "tokenizer.json", other_tokens)
    first, second = pipeline(tmp_path, f'{{type = "reward_model", path = "{other}"}}')
    found = {f.name: f for f in deep(second, tmp_path / "scratch", [first])}
    assert found["tokenizer of reward_model"].verdict == "wrong"
    assert found["template of sft"].verdict == "ok"
    made = model_dir_of(first, tmp_path / "again")
    size = sum(int(prod(shape)) for shape in checkpoint_shapes(made).values())
    assert f"reference {2 * size / GIB:.3g} GiB" in found["memory, scoring worker"].value
    assert f"weights {2 * size / GIB:.3g} GiB" in found["memory, generation worker"].value


def test_a_stage_that_trains_in_another_layout_than_the_one_before_is_noted(tmp_path, model):
    chatty = rewritten(
        model,
        tmp_path / "chatty",
        "tokenizer_config.json",
        lambda tree: tree.update(chat_template="{{ messages }}"),
    )
    first, second = pipeline(tmp_path, '{type = "exact_match"}', f'path = "{chatty}"', "chat")
    found = {f.name: f for f in deep(second, tmp_path / "scratch", [first])}
    assert found["template of sft"].verdict == "note"
    assert found["template of sft"].value == "data.template = 'chat', here 'none'"
    assert found["chat template"].verdict == "note", "the tokenizer comes from the first stage"


def test_what_a_pipeline_has_left_is_looked_at_itself(tmp_path, model):
    first, second = pipeline(tmp_path, '{type = "exact_match"}', f'path = "{tmp_path}/gone"')
    shutil.copytree(model, first.run_dir / "final")
    found = {f.name: f for f in deep(second, tmp_path / "scratch", [first])}
    size = sum(int(prod(shape)) for shape in checkpoint_shapes(model).values())
    assert f"weights {2 * size / GIB:.3g} GiB" in found["memory, generation worker"].value


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
[cluster]
num_cpus = 8
"""
    (tmp_path / "run.toml").write_text(toml)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["validate", "run.toml", "--deep"]) == 0
    printed = capsys.readouterr().out
    assert "run.toml: valid" in printed
    assert "memory, learner rank" in printed
    assert "room for all; bundles: 4, nodes: 1" in printed
    large = ["--set", "generation.num_cpus=1000"]
    assert main(["validate", "run.toml", "--deep", *large]) == 0, "it may be meant for a cluster"
    assert "no room for generation-0 (1000 CPU). Nodes: this machine" in capsys.readouterr().out
    other = rewritten(model, tmp_path / "other", "tokenizer.json", other_tokens)
    wrong = f'scoring.rewards=[{{type="reward_model", path="{other}"}}]'
    assert main(["validate", "run.toml", "--deep", "--set", wrong]) == 1
    captured = capsys.readouterr()
    assert "- tokenizer of reward_model: " in captured.err
