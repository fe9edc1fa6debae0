"""`generation.lora = "served"`: what is refused, and what the engine is given."""

from typing import Any

import pytest

from actors.vllm.vllm_arguments import MAX_ADAPTERS, engine_arguments
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from tests.support.builders.run_configs import tiny_config, tiny_tree

SERVED: dict[str, dict[str, Any]] = {
    "generation": {"lora": "served"},
    "weights": {"format": "adapter"},
    "learner": {"lora": {"rank": 5}},
}


def sections(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = {*SERVED, *changes}
    return {name: {**SERVED.get(name, {}), **changes.get(name, {})} for name in names}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learner": {"lora": None}, "weights": {"format": "full"}}, "without [learner.lora]"),
        ({"weights": {"format": "delta"}}, "weights.format = 'delta'"),
        ({"learner": {"lora": {"dora": True}}}, "vLLM serves LoRA alone"),
        ({"learner": {"lora": {"quantize_base": True}}}, "rounded to 4 bits"),
        ({"learner": {"lora": {"rank": 513}}}, "ranks up to 512"),
        (
            {"generation": {"quantization": "int8", "dtype": "bfloat16"}},
            "generation.quantization = 'int8'",
        ),
        (
            {"generation": {"speculative": {"method": "ngram", "num_speculative_tokens": 2}}},
            "would never follow the adapter",
        ),
        ({"generation": {"cache_on_update": "keep"}}, "cache_on_update = 'keep'"),
        ({"generation": {"cache_on_update": "salt"}}, "cache_on_update = 'salt'"),
        ({"generation": {"engine_args": {"max_lora_rank": 64}}}, "engine_args.max_lora_rank"),
        ({"generation": {"engine_args": {"enable_lora": True}}}, "Set generation.lora instead"),
        (
            {
                "generation": {
                    "tensor_parallel_size": 3,
                    "engine_args": {"fully_sharded_loras": True},
                }
            },
            "max_lora_rank = 8",
        ),
        (
            {"generation": {"dtype": "bfloat16"}, "scoring": {"exact_logprobs": True}},
            "Set weights.dtype = 'float32'",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_cure(changes, words):
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tiny_tree(**sections(**changes)), source="run.toml")
    assert words in str(error.value)


def test_exact_logprobs_of_versions_that_are_not_rounded_hold():
    changes = {"generation": {"dtype": "bfloat16"}, "scoring": {"exact_logprobs": True}}
    config = tiny_config(**sections(**changes, weights={"dtype": "float32"}))
    assert (config.scoring.exact_logprobs, config.weights.dtype) == (True, "float32")


def test_the_engine_is_given_room_for_the_adapters_and_replaces_no_weights():
    staleness = {"max_staleness": 1, "pipeline_depth": 1}
    given = engine_arguments(tiny_config(**sections(staleness=staleness)), "folder", "w")
    assert (given["enable_lora"], given["max_lora_rank"]) == (True, 8)
    assert (given["max_loras"], given["max_cpu_loras"]) == (3, 4)
    assert not {"weight_transfer_config", "worker_extension_cls", "lora_target_modules"} & set(
        given
    )
    staleness = {"max_staleness": 9, "pipeline_depth": 1}
    many = tiny_config(**sections(staleness=staleness, learner={"lora": {"targets": ["q_proj"]}}))
    given = engine_arguments(many, "folder", "w")
    assert (given["max_loras"], given["lora_target_modules"]) == (MAX_ADAPTERS, ["q_proj"])


def test_merged_adapters_need_nothing_of_the_engine():
    given = engine_arguments(tiny_config(learner={"lora": {}}), "folder", "w")
    assert "enable_lora" not in given
    assert "weight_transfer_config" in given
