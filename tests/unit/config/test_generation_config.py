"""Settings of the engine under which a run would train on something else than it believes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.vllm.vllm_arguments import engine_arguments
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.model_folder import (
    checkpoint_shapes,
    refuse_other_draft,
)
from rlhf_cluster.planning.run_inputs import check_inputs
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)

SPECULATIVE = "generation.speculative"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"generation": {"cache_on_update": "salt", "prefix_caching": False}},
            ["cache_on_update = 'salt'", "prefix_caching = false", "Use 'keep'"],
        ),
        (
            {
                "generation": {"cache_on_update": "salt"},
                "algorithm": {"sampler": "exact"},
                "scoring": {"exact_logprobs": True},
            },
            ["cache_on_update = 'salt'", "sampler = 'exact'", "Use cache_on_update = 'recompute'"],
        ),
        (
            {
                "generation": {"cache_on_update": "keep"},
                "algorithm": {"sampler": "exact"},
                "scoring": {"exact_logprobs": True},
            },
            ["cache_on_update = 'keep'", "sampler = 'exact'"],
        ),
        (
            {"generation": {"speculative": {"method": "eagle", "model": "heads"}}},
            [f"{SPECULATIVE}.method = 'eagle'", "neither trained nor published", "'ngram'"],
        ),
        (
            {"generation": {"speculative": {"num_speculative_tokens": 3}}},
            [f"{SPECULATIVE}.method = None", "'draft_model'"],
        ),
        (
            {"generation": {"speculative": {"method": "draft_model"}}},
            [f"{SPECULATIVE}.model = None", "needs a folder"],
        ),
        (
            {"generation": {"speculative": {"method": "ngram", "model": "draft"}}},
            [f"{SPECULATIVE}.method = 'ngram'", "model = 'draft'", "remove model"],
        ),
        (
            {
                "generation": {
                    "speculative": {"method": "ngram", "rejection_sample_method": "synthetic"}
                }
            },
            ["rejection_sample_method = 'synthetic'", "not the policy's", "Remove it"],
        ),
        (
            {"generation": {"engine_args": {"speculative_config": {"method": "ngram"}}}},
            ["engine_args.speculative_config", f"Set {SPECULATIVE}"],
        ),
        (
            {"generation": {"engine_args": {"quantization": "fp8"}}},
            ["engine_args.quantization = 'fp8'", "Set generation.quantization"],
        ),
    ],
)
def test_settings_under_which_an_engine_would_serve_something_else_are_refused(
    sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config(**sections)
    assert [word for word in words if word not in str(refused.value)] == []


def test_what_proposes_without_weights_is_allowed_on_a_gpu() -> None:
    for method in ("ngram", "ngram_gpu", "suffix"):
        config = tiny_config(generation={"speculative": {"method": method}, "num_gpus": 1})
        arguments = engine_arguments(config, "m", "w")
        assert arguments["speculative_config"] == {"method": method}
        assert arguments["per_request_spec_decode_metrics"] == "summary"  # what is taken is counted
        assert config.generation.draft_folder is None


@pytest.mark.parametrize("quantization", ["fp8", "fp8_per_block", "mxfp8"])
def test_fp8_that_vllm_has_no_cpu_kernel_for_is_refused_there_with_the_one_it_has(
    quantization: str,
) -> None:
    config = tiny_config(generation={"quantization": quantization})
    with pytest.raises(ConfigError, match=f"'{quantization}'.*Use one of int8, fp8_per_channel"):
        engine_arguments(config, "m", "w")
    on_gpu = tiny_config(generation={"quantization": quantization, "num_gpus": 1})
    assert engine_arguments(on_gpu, "m", "w")["quantization"] == quantization


def test_s27_a_draft_of_other_tensors_than_the_policys_is_refused_before_the_start(
    tmp_path: Path,
) -> None:
    def check(draft: str) -> None:
        speculative = {"method": "draft_model", "model": str(tmp_path / draft)}
        tree = tiny_tree(generation={"speculative": speculative, "num_gpus": 1})
        tree["model"] = {"path": str(tmp_path / "policy")}
        check_inputs(validate(RunConfig, tree, source="test"), tmp_path)

    for folder, width in (("policy", 3), ("narrow", 2), ("empty", 0)):
        (tmp_path / folder).mkdir()
        if width:
            tensors = {"embed": torch.zeros(8, 2), "up_proj": torch.zeros(width, 2)}
            save_file(tensors, tmp_path / folder / "model.safetensors")
    with pytest.raises(ConfigError) as refused:
        check("narrow")
    for words in (
        f"{SPECULATIVE}.model = '{tmp_path / 'narrow'}'",
        "up_proj has shape [2, 2] there, and the policy has shape [3, 2] (1 of 2 tensors differ)",
        "would stay as it is",
    ):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match="empty: no .safetensors file"):
        check("empty")


def test_a_draft_of_the_policys_first_layers_is_allowed() -> None:
    policy = {"embed": (8, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "norm": (4,)}
    refuse_other_draft("d", {k: v for k, v in policy.items() if "1" not in k}, policy)
    with pytest.raises(
        ConfigError, match=r"layers.2.w has shape \[4, 4\].*no such tensor \(1 of 2"
    ):
        refuse_other_draft("d", {"embed": (8, 4), "layers.2.w": (4, 4)}, policy)


def test_shapes_are_read_from_one_file_and_from_those_of_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    assert checkpoint_shapes(tmp_path) == {"a": (2, 3), "b": (4,)}
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_shapes(tmp_path) == {"a": (2, 3)}


def test_b9_the_engine_is_asked_for_float32_logits_where_its_head_is_16_bits_wide() -> None:
    def overrides(generation: dict[str, Any], **learner: Any) -> Any:
        config = tiny_config(generation=generation, learner=learner)
        return engine_arguments(config, "m", "w").get("hf_overrides")

    half = {"dtype": "bfloat16"}
    assert overrides(half) == {"head_dtype": "float32"}
    assert overrides(half, head_dtype="model") is None
    assert overrides({"dtype": "float32"}) is None
    assert overrides({**half, "quantization": "int8"}) is None
    own = {**half, "engine_args": {"hf_overrides": {"x": 1}}}
    assert overrides(own) == {"x": 1, "head_dtype": "float32"}
    other = {**half, "engine_args": {"hf_overrides": {"head_dtype": "model"}}}
    with pytest.raises(
        ConfigError, match=r"head_dtype = 'model' with learner.head_dtype = 'float32"
    ):
        overrides(other)
