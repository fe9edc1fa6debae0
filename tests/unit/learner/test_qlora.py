"""QLoRA on one rank: adapters on weights in 4 bits; several ranks are in the system tests."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.sharding.lora import is_adapter
from rlhf_cluster.learner.sharding.qlora import Linear4bit
from rlhf_cluster.learner.step.passes import score
from rlhf_cluster.models.policy_model import load_policy
from rlhf_cluster.weights.read_version import read
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    build_llama,
    full_parameters,
    random_groups,
    sft_examples,
)
from tests.unit.learner.test_lora import (
    _publish,
    _with_reference,
)

QLORA = {"lora": {"rank": 4, "alpha": 8.0, "quantize_base": True}}
QDORA = {"lora": {**QLORA["lora"], "dora": True}}
EVERY_LINEAR = 7 * 2


def _layers(learner: Any) -> dict[str, Linear4bit]:
    return {n: m for n, m in learner.policy.named_modules() if isinstance(m, Linear4bit)}


@pytest.mark.parametrize("columns", [32, 40, 64, 128])
def test_bytes_stand_for_weights_near_those_they_were_made_from(columns: int) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(columns, 48)
    torch.nn.init.normal_(plain.weight)
    layer = Linear4bit(plain)
    assert layer.packed.dtype == torch.uint8
    assert layer.packed.numel() == plain.weight.numel() / 2
    # a block's largest weight is a level of its own, and the levels are 0.3 apart at most
    blocks, found = plain.weight.detach().view(-1, 64), layer.weight.view(-1, 64)
    assert ((found - blocks).abs().amax(1) < 0.17 * blocks.abs().amax(1)).all()
    assert 0.05 < (found - blocks).norm() / blocks.norm() < 0.11
    assert max(len(block.unique()) for block in found) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_weights_in_the_inputs_type(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    layer = Linear4bit(torch.nn.Linear(32, 48)).requires_grad_(False).eval()
    plain = torch.nn.Linear(32, 48, dtype=dtype)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    inputs = torch.randn(2, 5, 32, dtype=dtype)
    before = layer.packed.clone()
    with torch.no_grad():
        # a pass without gradients is as one with them, and repacks nothing
        torch.testing.assert_close(layer(inputs), plain(inputs))
        assert torch.equal(layer(inputs), layer(inputs.clone()))
    assert torch.equal(layer.packed, before)
    found, wanted = (inputs.clone().requires_grad_() for _ in range(2))
    output = layer(found)
    assert output.dtype == dtype
    (output**2).sum().backward()
    (plain(wanted) ** 2).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def test_any_run_of_the_bytes_is_unpacked_without_the_others() -> None:
    torch.manual_seed(0)
    layer = Linear4bit(torch.nn.Linear(40, 24))
    packed, whole = layer.packed.view(-1), layer.weight.view(-1)
    for start, stop in ((0, 480), (0, 7), (31, 33), (100, 100), (45, 450), (470, 480)):
        found = layer.unpack_run(packed[start:stop], start)
        assert torch.equal(found, whole[2 * start : 2 * stop])


@pytest.mark.parametrize("settings", [QLORA, QDORA], ids=["lora", "dora"])
def test_the_adapters_lower_the_loss_on_frozen_bytes_and_what_is_published_is_their_sum(
    start_learner: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    learner = start_learner(learner=settings | {"learning_rate": 3e-3, "weight_decay": 0.1})
    before = full_parameters(learner.policy)
    assert sum(n.endswith(".packed") for n in before) == EVERY_LINEAR
    losses = [
        learner.train_step(random_groups(0, version=v)).metrics["learner/loss"] for v in range(3)
    ]
    assert losses[-1] < losses[0]
    after = full_parameters(learner.policy)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != is_adapter(name), name
    published = dict(read(_publish(learner, tmp_path).path))
    assert {n: w.shape for n, w in published.items()} == {
        n: p.shape for n, p in build_llama().named_parameters()
    }
    for name, layer in _layers(learner).items():
        prefix = name.removesuffix(".base_layer")
        down, up = (after[f"{prefix}.lora_{m}.default.weight"] for m in "AB")
        wanted = layer.unpack(after[f"{name}.packed"]) + 2 * up @ down
        if settings is QDORA:
            magnitude = after[f"{prefix}.lora_magnitude_vector.default.weight"]
            wanted *= (magnitude / wanted.norm(dim=1))[:, None]
        found = published[f"{prefix.removeprefix('lm.')}.weight"]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def _served(learner: Any, folder: Path) -> tuple[Any, str]:
    """The published version as an engine holds it, and its folder."""
    lm = build_llama()
    version = _publish(learner, folder / "own")
    lm.load_state_dict(dict(read(version.path)), strict=False)
    lm.save_pretrained(folder / "engine")
    return load_policy(folder / "engine", torch.float32, "cpu", False), str(folder / "engine")


@pytest.mark.parametrize("settings", [QLORA, QDORA], ids=["lora", "dora"])
def test_an_engine_samples_from_what_the_learner_computes_with(
    start_learner: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    learner = start_learner(learner=settings | {"learning_rate": 1e-2})
    for version in range(2):
        learner.train_step(random_groups(version, version=version))
    sequences = [
        TokenSequence(prompt_ids=e.prompt_ids, target_ids=e.target_ids) for e in sft_examples()
    ]
    engine, _ = _served(learner, tmp_path)
    own, served = (score(m, sequences, 1.0, learner._layout) for m in (learner.model, engine))
    assert max(abs(own[i] - served[i]).max() for i in own) < 1e-4


def test_s38_the_reference_is_version_0_and_not_the_folder(
    start_learner: Any, tiny_model_dir: str, tmp_path: Path
) -> None:
    # as the scoring pool lays its batches: a row a sequence
    same = {"batching": "padded", "logprob_chunk_tokens": 1024}
    reference = {"reference": True, "rewards": [{"type": "exact_match"}]}
    learner = start_learner(learner=QLORA | same)
    _, first = _served(learner, tmp_path)
    groups = _with_reference(first, random_groups(0, num_groups=1, group_size=4))
    assert learner.train_step(groups).metrics["learner/kl_ref"] == 0
    learner = start_learner(learner=QLORA | same)
    wrong = _with_reference(tiny_model_dir, groups)
    assert learner.train_step(wrong).metrics["learner/kl_ref"] > 1e-3
    for settings, stored in ((QLORA, True), ({"lora": {}}, False)):
        config = tiny_config(learner=settings, scoring=reference)
        assert config.stored_reference == stored


def test_without_bitsandbytes_the_cure_is_named(
    start_learner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="quantize_base = true needs bitsandbytes"):
        start_learner(learner=QLORA)
