import pickle
from pathlib import Path

import pytest

from rlhf_cluster.config import RunConfig, load_run, validate
from rlhf_cluster.config.check_scoring import kl_notes
from rlhf_cluster.config.load import load_all
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.sections.section import Problems, check_all
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)

CONFIGS = sorted(Path("configs").glob("*.toml"))


def refused(**sections) -> str:
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tiny_tree(**sections), source="run.toml")
    return str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid(path):
    for config in load_all(path):
        assert config.run_dir.name == config.run.name
        again = type(config).model_validate_json(config.model_dump_json())
        assert again == config, "what a run directory keeps of it is read again"


def test_the_promised_configurations_are_there():
    on_cpu = {"quickstart.toml", "gsm8k_cpu.toml", "sft_cpu.toml"}
    on_gpus = {"qwen3_8b_8gpu.toml", "qwen3_0.6b_1gpu.toml"}
    assert on_cpu | on_gpus <= {p.name for p in CONFIGS}


def test_an_unknown_key_gets_a_suggestion():
    message = refused(staleness={"max_stalenes": 2})
    assert message.startswith("run.toml: 1 problem")
    assert "staleness.max_stalenes: unknown key; did you mean 'max_staleness'?" in message


def test_an_unknown_key_of_a_reward_gets_a_suggestion():
    message = refused(scoring={"rewards": [{"type": "exact_match", "weigth": 2}]})
    assert "weigth: unknown key; did you mean 'weight'?" in message


def test_a_wrong_type_names_key_and_value():
    message = refused(learner={"learning_rate": "fast"})
    assert "learner.learning_rate" in message
    assert "found 'fast'" in message


def test_all_problems_are_reported_at_once():
    message = refused(run={"steps": 0}, learner={"ranks": -1})
    assert message.startswith("run.toml: 2 problems")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"path": "some/model"}}, ["model.path and model.init: both", "not both"]),
        (
            {"learner": {"ranks": 2, "on_loss": "shrink", "min_ranks": 3}},
            ["learner.min_ranks = 3 is over learner.ranks = 2"],
        ),
        (
            {"learner": {"ranks": 2, "min_ranks": 2}},
            ["learner.min_ranks = 2", "on_loss = 'restart'", "set on_loss = 'shrink'"],
        ),
        ({"learner": {"spares": 2}}, ["learner.spares = 2 is over learner.ranks = 1", "Lower it"]),
        (
            {"generation": {"workers": 2, "min_workers": 3}},
            ["generation.min_workers = 3 is over generation.workers = 2", "would never start"],
        ),
        (
            {"learner": {"spares": 1, "max_restarts": 0}},
            ["learner.spares = 1 with learner.max_restarts = 0", "raise learner.max_restarts"],
        ),
        ({"weights": {"transport": "ray"}}, ["'ray' does not exist", "Set 'relay'"]),
        ({"weights": {"transport": "gloo"}}, ["'gloo' does not exist", "Set 'relay'"]),
        ({"weights": {"transport": "nccl"}}, ["'nccl' does not exist", "Set 'relay'"]),
        ({"weights": {"transport": "ipc"}}, ["'ipc' does not exist", "under /dev/shm"]),
        (
            {"weights": {"transport": "files", "mirror": "/a/b"}},
            ["weights.mirror = '/a/b' with weights.transport = 'files'", "transport = 'relay'"],
        ),
        (
            {"weights": {"transport": "relay", "root": "/dev/shm/weights"}},
            ["weights.mirror = '/dev/shm' and weights.root = '/dev/shm/weights'"],
        ),
        (
            {"weights": {"mirror": "/a/b", "root": "/a/b"}},
            ["weights.mirror = '/a/b' and weights.root = '/a/b'", "a separate folder"],
        ),
        (
            {"weights": {"mirror": "/a", "root": "/a/b"}},
            ["weights.mirror = '/a' and weights.root = '/a/b'"],
        ),
        (
            {"weights": {"mirror": "/a/b"}, "run": {"root": "/a"}},
            ["weights.mirror = '/a/b' and run.root = '/a'"],
        ),
        ({"data": {"path": "x.jsonl"}}, ["data.task and data.path: both"]),
        (
            {"generation": {"max_response_tokens": 60}},
            ["8 + 60 = 68", "model.init.max_position = 64"],
        ),
        (
            {"weights": {"publish_every": 4}},
            ["weights.publish_every = 4", "staleness.max_staleness + 1 = 2"],
        ),
        (
            {"generation": {"max_response_tokens": 8, "segment_tokens": 8}},
            ["generation.segment_tokens = 8", "generation.max_response_tokens = 8"],
        ),
        ({"algorithm": {"kl_coef": 0.1}}, ["kl_coef = 0.1", "scoring.reference = true"]),
        (
            {"scoring": {"reference_update": {"type": "ema"}}},
            ["scoring.reference_update.type = 'ema'", "scoring.reference = false", "to move"],
        ),
        (
            {"algorithm": {"sampler": "exact"}},
            ["algorithm.sampler = 'exact'", "scoring.exact_logprobs = false", "no worker"],
        ),
        (
            {"generation": {"num_gpus": 2}},
            ["generation.num_gpus = 2", "tensor_parallel_size = 1"],
        ),
        (
            {"generation": {"num_gpus": 0.5, "kv_cache_bytes": None}},
            ["generation.num_gpus = 0.5", "Set generation.kv_cache_bytes"],
        ),
        (
            {"generation": {"num_gpus": 0.5, "tensor_parallel_size": 2}},
            ["generation.num_gpus = 0.5", "tensor_parallel_size = 2"],
        ),
        ({"learner": {"num_gpus": 2}}, ["learner.num_gpus = 2", "Set learner.ranks"]),
        (
            {"learner": {"num_gpus": 0.5, "ranks": 2}},
            ["learner.num_gpus = 0.5 with learner.ranks = 2", "NCCL"],
        ),
        ({"scoring": {"num_gpus": 1.5}}, ["scoring.num_gpus = 1.5", "Round it"]),
        ({"generation": {"engine_args": {"top_p": 0.9}}}, ["engine_args.top_p", "replayed"]),
        (
            {"generation": {"engine_args": {"max_model_len": 99}}},
            ["engine_args.max_model_len", "set by the run"],
        ),
        (
            {"learner": {"ranks": 99}},
            ["learner.ranks * learner.minibatches = 99", "nothing to train on"],
        ),
        (
            {"learner": {"schedule": "wsd"}},
            ["learner.schedule = 'wsd' with learner.decay_steps = None", "Set both, or neither"],
        ),
        (
            {"learner": {"decay_steps": 2}},
            ["learner.schedule = 'constant' with learner.decay_steps = 2"],
        ),
        (
            {"learner": {"schedule": "wsd", "decay_steps": 2, "warmup_steps": 2}},
            ["warmup_steps + learner.decay_steps = 2 + 2", "= 3 optimizer steps"],
        ),
        (
            {"weights": {"format": "adapter"}},
            ["weights.format = 'adapter' without [learner.lora]", "'delta'"],
        ),
        (
            {"weights": {"rounding": "stochastic"}},
            ["weights.rounding = 'stochastic' without [learner.lora]", "add the section"],
        ),
        (
            {
                "learner": {"lora": {}},
                "weights": {"rounding": "stochastic", "dtype": "float32"},
            },
            ["weights.rounding = 'stochastic' with versions in float32", "weights.dtype"],
        ),
        (
            {"learner": {"lora": {}}, "algorithm": {"type": "ppo"}},
            ["[learner.lora] with algorithm.type = 'ppo'", "critic"],
        ),
        ({"learner": {"tokens_per_row": 10}}, ["learner.tokens_per_row = 10", "8 + 8 = 16"]),
        ({"data": {"system_prompt": "hi"}}, ["data.system_prompt", "template = 'chat'"]),
        ({"data": {"template": "chat"}}, ["[model.init]", "no chat template"]),
        (
            {"scoring": {"rewards": [{"type": "exact_match"}, {"type": "exact_match"}]}},
            ["'exact_match' appears 2 times"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_combinations_name_keys_values_and_cure(sections, words):
    message = refused(**sections)
    for word in words:
        assert word in message


def test_overrides_are_toml_values_and_bare_words_are_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(Path("configs/quickstart.toml").read_text())
    config = load_run(path, ["run.steps=7", "run.name=other", "learner.learning_rate=2e-4"])
    assert (config.run.steps, config.run.name) == (7, "other")
    assert config.learner.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("override", "words"),
    [("steps", "expected section.key=value"), ("run.name.x=1", "'name' is a value")],
)
def test_bad_overrides_are_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        load_run("configs/quickstart.toml", [override])


def test_a_missing_file_and_broken_toml_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: cannot read.*No such file"):
        load_run(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nname=3")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML.*line 1"):
        load_run(broken)


def test_the_resolved_configuration_reads_back_equal():
    config = tiny_config()
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_n02_folders_of_a_run_are_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(weights={"root": "store", "mirror": "copies"}).with_absolute_paths()
    assert config.weights.root == str(tmp_path / "store")
    assert config.weights.mirror == str(tmp_path / "copies")


@pytest.mark.parametrize(
    ("scoring", "learner", "algorithm", "told"),
    [
        ("bfloat16", "float32", {"kl_coef": 0.1}, True),
        ("float32", "bfloat16", {"kl_coef": 0.1}, True),
        ("float32", "bfloat16", {"kl_control": {"type": "linear", "final": 0.1, "steps": 5}}, True),
        ("float32", "bfloat16", {"type": "online_dpo", "group_size": 2}, True),
        ("float32", "float32", {"kl_coef": 0.1}, False),
        ("float32", "bfloat16", {"kl_coef": 0.0}, False),
        ("float32", "bfloat16", {"kl_coef": 0.1, "kl_to": "sampler"}, False),
        ("float32", "bfloat16", {"kl_coef": 0.1, "kl_estimator": "full"}, False),
    ],
)
def test_l13_a_reference_of_another_type_than_the_learner_is_told_of(
    scoring, learner, algorithm, told
):
    config = tiny_config(
        scoring={"dtype": scoring, "reference": True},
        learner={"dtype": learner},
        algorithm=algorithm,
    )
    notes = kl_notes(config)
    assert len(notes) == told
    if told:
        assert f"scoring.dtype = {scoring!r}" in notes[0]
        assert f"learner.dtype = {learner!r}" in notes[0]


def test_l13_the_type_is_that_of_the_pool_that_serves_the_reference():
    pool = {"serves": ["reference"], "dtype": "bfloat16"}
    keys = {"learner": {"dtype": "float32"}, "algorithm": {"kl_coef": 0.1}}
    alone = {"dtype": "float32", "reference": True, "pools": {"frozen": pool}}
    assert len(kl_notes(tiny_config(scoring=alone, **keys))) == 1


def test_problems_of_several_sections_are_reported_at_once():
    with pytest.raises(ConfigError) as raised:
        tiny_config(
            data={"system_prompt": "Be brief."},
            learner={"min_ranks": 3},
            weights={"format": "adapter"},
            staleness={"max_staleness": 1, "look_ahead": 40},
        )
    message = str(raised.value)
    assert message.startswith("test: 4 problems\n")
    for key in (
        "data.system_prompt",
        "learner.min_ranks",
        "weights.format",
        "staleness.look_ahead",
    ):
        assert message.count(f"  - {key}") == 1


def test_a_check_that_stumbles_over_what_another_refused_adds_nothing_and_alone_is_an_error_of_ours():
    def refuses(config: object) -> list[str]:
        return ["no model"]

    def stumbles(config: object) -> list[str]:
        raise AttributeError("'NoneType' object has no attribute 'path'")

    with pytest.raises(Problems) as raised:
        check_all(None, [refuses, stumbles])
    assert raised.value.args == ("no model",)
    with pytest.raises(AttributeError):
        check_all(None, [stumbles])
    assert pickle.loads(pickle.dumps(raised.value)).args == ("no model",)
