"""INT8 weights: the rounding against a loop, the folder an engine starts from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.vllm.vllm_arguments import engine_arguments
from rlhf_cluster.errors import ConfigError, WeightError
from rlhf_cluster.weights.formats.int8 import (
    linear_weights,
    quantized,
    write_start_folder,
)
from tests.support.builders.run_configs import tiny_config


def slow_quantized(weight: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    rows, scales = [], []
    for row in weight.double().tolist():
        scale = max(abs(value) for value in row) / 127
        rows.append([round(value / scale) if scale else 0 for value in row])
        scales.append(scale)
    return rows, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_rounded_row_by_row(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1] = 0
    weight[2] *= 1e-20
    (name, rounded), (scale_name, scale) = quantized(
        [("a.weight", weight)], frozenset(["a.weight"])
    )
    rows, scales = slow_quantized(weight)
    rows[2], scales[2] = [0] * 40, 1e-12  # under the smallest scale
    scales[1] = 1e-12
    assert (name, scale_name) == ("a.weight", "a.weight_scale")
    assert (rounded.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (tuple(rounded.shape), tuple(scale.shape)) == ((5, 40), (5, 1))
    assert rounded.tolist() == rows
    assert scale[:, 0].tolist() == pytest.approx(scales, rel=1e-6)
    assert rounded.abs().amax(dim=1)[[0, 3, 4]].tolist() == [127] * 3


def test_rounding_moves_a_weight_by_at_most_half_a_step() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    (_, rounded), (_, scale) = quantized([("w", weight)], frozenset(["w"]))
    error = (rounded.float() * scale - weight).abs()
    assert bool((error <= scale * 0.5001).all())
    assert float(error.max()) > 0


def test_other_tensors_pass_unchanged() -> None:
    norm = torch.ones(4)
    assert [(n, t is norm) for n, t in quantized([("norm", norm)], frozenset())] == [("norm", True)]


def test_the_linear_weights_are_all_but_the_outputs(tiny_model_dir: str) -> None:
    names = linear_weights(tiny_model_dir)
    layers = json.loads((Path(tiny_model_dir) / "config.json").read_text())["num_hidden_layers"]
    assert len(names) == 7 * layers  # query, key, value, output, gate, up, down
    assert not any("lm_head" in name or "embed" in name or "norm" in name for name in names)
    assert "model.layers.0.mlp.down_proj.weight" in names


def test_a_start_folder_holds_the_quantised_model_and_what_stands_beside_it(
    tiny_model_dir: str, tmp_path: Path
) -> None:
    folder = write_start_folder(tiny_model_dir, tmp_path / "int8")
    source, found = (load_file(Path(d) / "model.safetensors") for d in (tiny_model_dir, folder))
    linear = linear_weights(tiny_model_dir)
    assert found.keys() == source.keys() | {f"{name}_scale" for name in linear}
    assert {name for name, t in found.items() if t.dtype == torch.int8} == linear
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["hidden_size"] > 0
    assert (folder / "generation_config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_a_start_folder_that_is_there_is_left_alone(tiny_model_dir: str, tmp_path: Path) -> None:
    (tmp_path / "int8").mkdir()
    write_start_folder(tiny_model_dir, tmp_path / "int8")
    assert list((tmp_path / "int8").iterdir()) == []


def test_a_sharded_checkpoint_keeps_its_files_and_gets_a_new_index(
    tiny_model_dir: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(
        sharded, max_shard_size="20KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 1
    folder = write_start_folder(sharded, tmp_path / "int8")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: p.name for p in folder.glob("*.safetensors") for name in load_file(p)}
    assert index == held
    assert any(name.endswith("_scale") for name in index)


def test_a_folder_without_the_linear_weights_is_refused_and_leaves_nothing(
    tiny_model_dir: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    config = (Path(tiny_model_dir) / "config.json").read_text()
    (bare / "config.json").write_text(config)
    with pytest.raises(WeightError, match=r"bare: no .safetensors file has model\.layers\.0"):
        write_start_folder(bare, tmp_path / "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_an_int8_engine_starts_from_the_folder_in_its_run() -> None:
    config = tiny_config(generation={"quantization": "int8", "dtype": "bfloat16"})
    arguments = engine_arguments(config, "folder", "generation-0")
    assert arguments["model"] == str(config.run_dir.absolute() / "engine-int8")
    assert "quantization" not in arguments


def test_int8_in_float32_is_refused_with_the_cure() -> None:
    config = tiny_config(generation={"quantization": "int8", "dtype": "float32"})
    with pytest.raises(ConfigError, match="generation.dtype = 'float32'.*Set generation.dtype"):
        engine_arguments(config, "folder", "generation-0")
