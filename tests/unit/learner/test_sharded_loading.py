"""Weights that a rank reads into its shards equal those of the model that was loaded whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_cluster.errors import ConfigError, WeightError
from rlhf_cluster.learner import training_rank
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.sharding import sharded_loading
from rlhf_cluster.learner.sharding.fsdp2 import shard
from rlhf_cluster.learner.sharding.sharded_loading import fill, load_shards
from rlhf_cluster.learner.step.critic import load_value_model, shard_value_model
from rlhf_cluster.models.policy_model import checkpoint_name, load_policy, outline_policy
from rlhf_cluster.util.process_group import join_group
from tests.support.builders.tiny_learner import build_llama, learner_config, save_llama

CPU = torch.device("cpu")


@pytest.fixture
def mesh():
    yield join_group(None, 0, 1, "cpu", 60.0, 60.0)
    torch.distributed.destroy_process_group()


def sharded(folder: str, mesh: Any, dtype: torch.dtype = torch.float32) -> Any:
    policy = outline_policy(folder, dtype, CPU, True)
    assert policy is not None
    assert all(p.is_meta for p in policy.parameters())
    shard(policy, mesh, dtype, False)
    load_shards(policy, folder, CPU, dtype, 0)
    return policy


def full(parameter: Any) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.detach().full_tensor()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_shards_are_those_of_the_loaded_model(tmp_path: Path, mesh, tie, dtype):
    folder = save_llama(tmp_path, tie)
    whole = load_policy(folder, dtype, CPU, True)
    policy = sharded(folder, mesh, dtype)
    own = dict(policy.named_parameters())
    assert own.keys() == dict(whole.named_parameters()).keys()
    for name, expected in whole.named_parameters():
        assert own[name].dtype == dtype
        assert own[name].requires_grad
        assert torch.equal(full(own[name]), expected), name
    for (name, found), (_, expected) in zip(
        policy.named_buffers(), whole.named_buffers(), strict=True
    ):
        assert torch.equal(found, expected), name
    embedding, head = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
    assert (embedding.weight is head.weight) == tie
    row = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(policy(row, row, row)[0], whole(row, row, row)[0])


def test_a_tied_parameter_stays_one_through_a_step(tmp_path: Path, mesh):
    policy = sharded(save_llama(tmp_path, tie=True), mesh)
    row = torch.arange(9)[None]
    policy(row, row, row)[0].sum().backward()
    gradients = [p.grad for p in policy.parameters()]
    assert all(g is not None for g in gradients)
    torch.optim.SGD(policy.parameters(), lr=0.1).step()
    embedding, head = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
    assert embedding.weight is head.weight


def test_a_value_model_reads_the_decoder_and_keeps_its_head(tmp_path: Path, mesh):
    folder = save_llama(tmp_path)
    whole = load_value_model(folder, CPU, torch.float32)
    model = load_value_model(folder, CPU, torch.float32, outlined=True)
    assert next(model.lm.parameters()).is_meta
    shard_value_model(model, mesh, torch.float32, False)
    load_shards(model, folder, CPU, torch.float32, 0)
    for (name, found), (_, expected) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert torch.equal(full(found), expected), name


class ScaledConfig(LlamaConfig):
    model_type = "llama_with_persistent_buffer"


class ScaledLlama(LlamaForCausalLM):
    """Llama with state in its files that is no parameter, such as the scale of a layer."""

    config_class = ScaledConfig

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.model.register_buffer("scale", torch.tensor(1.0))
        self.model.register_buffer("table", torch.zeros(3))
        self.model.register_buffer("made", torch.zeros(3), persistent=False)


def test_persistent_buffers_are_those_of_the_files(tmp_path: Path, mesh):
    AutoConfig.register(ScaledConfig.model_type, ScaledConfig, exist_ok=True)
    AutoModelForCausalLM.register(ScaledConfig, ScaledLlama, exist_ok=True)
    settings: dict[str, Any] = build_llama().config.to_diff_dict() | {"model_type": None}
    model: Any = ScaledLlama(ScaledConfig(**settings))
    model.model.scale.fill_(2.5)
    model.model.table += torch.arange(3)
    model.save_pretrained(tmp_path)
    whole: Any = load_policy(tmp_path, torch.float32, CPU, True)
    policy: Any = sharded(str(tmp_path), mesh)
    assert whole.lm.model.scale == policy.lm.model.scale == 2.5
    assert torch.equal(policy.lm.model.table, whole.lm.model.table)
    assert torch.equal(policy.lm.model.table, torch.tensor([0.0, 1.0, 2.0]))
    value: Any = load_value_model(tmp_path, CPU, torch.float32, outlined=True)
    shard_value_model(value, mesh, torch.float32, False)
    load_shards(value, tmp_path, CPU, torch.float32, 0)
    assert value.lm.scale == 2.5


def test_rows_are_read_in_pieces_of_a_bounded_size(tmp_path: Path, mesh, monkeypatch):
    folder = save_llama(tmp_path)
    monkeypatch.setattr(sharded_loading, "CHUNK_BYTES", 4 * 32 * 5)  # 5 rows of 48 and 64
    policy = sharded(folder, mesh)
    whole = dict(load_policy(folder, torch.float32, CPU, True).named_parameters())
    for name, found in policy.named_parameters():
        assert torch.equal(full(found), whole[name]), name


def outlined(folder: str, mesh: Any) -> Any:
    policy: Any = outline_policy(folder, torch.float32, CPU, True)
    return shard(policy, mesh, torch.float32, False)


def test_an_error_names_tensor_file_and_rank(tmp_path: Path, mesh):
    folder = save_llama(tmp_path)
    policy = outlined(folder, mesh)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in kept.items() if n != lost}, file)
    with pytest.raises(WeightError, match=rf"rank 3: no file of .* has the tensor {lost}"):
        fill(policy, folder, CPU, 3, checkpoint_name)
    save_file(kept | {lost: kept[lost][:5].clone()}, file)
    policy = outlined_again(folder, kept, lost, mesh)
    with pytest.raises(
        WeightError, match=rf"rank 3: tensor {lost} of .*model.safetensors.*\[5, 32\]"
    ):
        fill(policy, folder, CPU, 3, checkpoint_name)


def outlined_again(folder: str, kept: dict[str, Any], lost: str, mesh: Any) -> Any:
    """Outline the model as it was, then damage its file as it is."""
    file = Path(folder) / "model.safetensors"
    damaged = file.read_bytes()
    save_file(kept, file)
    policy = outlined(folder, mesh)
    file.write_bytes(damaged)
    return policy


def test_a_model_whose_files_hold_other_tensors_is_left_to_the_library(tmp_path: Path):
    folder = save_llama(tmp_path)
    assert outline_policy("org/name", torch.float32, CPU, True) is None
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 65}))
    assert outline_policy(folder, torch.float32, CPU, True) is None
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert outline_policy(folder, torch.float32, CPU, True) is None
    (tmp_path / "model.safetensors").unlink()
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot load a causal LM"):
        outline_policy(folder, torch.float32, CPU, True)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 3},
        {"rank": 3, "dora": True},
        {"rank": 3, "targets": ["q_proj", "mlp.down_proj"]},
        {"rank": 3, "quantize_base": True},
    ],
    ids=["lora", "dora", "targets", "qlora"],
)
def test_adapters_that_are_added_layer_by_layer_are_those_of_the_loaded_model(
    tmp_path: Path, monkeypatch, lora
):
    folder = save_llama(tmp_path)
    whole, by_layer = [], []
    for found, outline in ((by_layer, outline_policy), (whole, lambda *_: None)):
        monkeypatch.setattr(training_rank, "outline_policy", outline)
        config = learner_config(folder, learner={"lora": lora})
        learner = LearnerRank(config, folder, 0, 1, None)
        learner.setup()
        trained = {n for n, p in learner.model.module.named_parameters() if p.requires_grad}
        found += [(p.name, p.name in trained, p.tensor.clone()) for p in learner.model.shards()]
        learner.close()
    assert sum(is_trained for _, is_trained, _ in by_layer) >= 4
    for one, other in zip(by_layer, whole, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2]), one[0]


def test_targets_that_no_layer_has_are_refused_before_weights_are_read(tmp_path: Path):
    folder = save_llama(tmp_path)
    for targets, why in (("nowhere", "nowhere"), ("embed_tokens", "not a plain linear layer")):
        config = learner_config(folder, learner={"lora": {"targets": [targets]}})
        learner = LearnerRank(config, folder, 0, 1, None)
        with pytest.raises(ConfigError, match=why):
            learner.setup()
        learner.close()
