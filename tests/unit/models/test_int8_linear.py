"""Frozen models in INT8: products by hand, what is rounded and what is not, and what it costs."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForSequenceClassification

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.int8_linear import Linear8bit, quantize_linear
from rlhf_cluster.planning.memory_needs import frozen_models
from rlhf_cluster.rewards.process_reward_model import ProcessReward, ProcessRewardConfig
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.rewards.reward_model_ensemble import Ensemble, EnsembleConfig
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_prompt, make_rollouts

RESPONSES = ([9, 8, 7, 6, 1], [9], [5, 1], [0, 0, 0], [30] * 20)
PROMPT = make_prompt(ids=[2, 3, 0, 4])
ROLLOUTS = make_rollouts(PROMPT, RESPONSES)
EVERY_LINEAR = 7 * 2


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, policy_dir: Path) -> Path:
    return _reward_folder(tmp_path_factory.mktemp("reward"), policy_dir, seed=2)


def _reward_folder(folder: Path, policy_dir: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(policy_dir, num_labels=1, pad_token_id=0)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return folder


def _layers(model: torch.nn.Module) -> list[Linear8bit]:
    return [module for module in model.modules() if isinstance(module, Linear8bit)]


def _dequantized(model: torch.nn.Module) -> Any:
    """A copy of the model with plain layers of the weights that the rounded ones stand for."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Linear8bit):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = layer.weight
            plain.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_one_of_the_rounded_weights_by_hand(
    dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 6, bias=bias, dtype=dtype)
    linear.weight.data[2] = 0
    layer = Linear8bit(linear)
    inputs = torch.randn(2, 3, 40).to(dtype)
    expected = np.zeros((2, 3, 6))
    for out, row in enumerate(linear.weight.double().tolist()):
        scale = max(abs(value) for value in row) / 127 or 1e-12
        weights = [round(value / scale) * scale for value in row]
        expected[..., out] = inputs.double().numpy() @ np.array(weights)
        expected[..., out] += linear.bias[out].item() if bias else 0.0
    found = layer(inputs)
    assert found.dtype == dtype
    # the product is rounded to the type twice: before the scale and after the bias
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1 / 4), ("bfloat16", 1 / 2)])
def test_linear_weights_take_a_byte_each_and_a_scale_a_row(
    policy_dir: Path, dtype: Any, share: float
) -> None:
    plain, rounded = (
        FrozenPolicy("m", str(policy_dir), dtype, "cpu", 4096, quantization=q)._policy
        for q in (None, "int8")
    )
    before = sum(m.weight.nbytes for m in plain.lm.base_model.modules() if _is_linear(m))
    layers = _layers(rounded)
    assert len(layers) == EVERY_LINEAR
    assert sum(layer.codes.nbytes for layer in layers) == share * before
    scales = sum(4 * layer.out_features for layer in layers)
    parts = [*rounded.parameters(), *rounded.buffers()]
    everything = sum(tensor.nbytes for tensor in [*plain.parameters(), *plain.buffers()])
    assert sum(tensor.nbytes for tensor in parts) == everything - (1 - share) * before + scales
    assert not any(_is_linear(m) for m in rounded.lm.base_model.modules())
    head = rounded.lm.get_output_embeddings()
    assert head.weight is rounded.lm.get_input_embeddings().weight
    assert head.weight.dtype == getattr(torch, dtype)


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Linear


def test_reference_logprobs_are_those_of_the_rounded_weights(
    policy_dir: Path,
) -> None:
    reference = FrozenPolicy(
        "reference", str(policy_dir), "float32", "cpu", 4096, quantization="int8"
    )
    plain = _dequantized(reference._policy.lm)
    exact = FrozenPolicy("reference", str(policy_dir), "float32", "cpu", 4096).logprobs(ROLLOUTS)
    for found, response, unrounded in zip(
        reference.logprobs(ROLLOUTS), RESPONSES, exact, strict=True
    ):
        ids = torch.tensor([[*PROMPT.token_ids.tolist(), *response]])
        hidden = plain.base_model(input_ids=ids).last_hidden_state[0]
        logits = hidden @ plain.get_input_embeddings().weight.T
        table = logits.log_softmax(-1).detach()
        wanted = [table[3 + i, token].item() for i, token in enumerate(response)]
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        assert not np.array_equal(found, unrounded)
        np.testing.assert_allclose(found, unrounded, atol=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_version_that_is_loaded_is_rounded_as_the_folder_it_came_from(
    policy_dir: Path, tmp_path: Path, dtype: Any
) -> None:
    model = tiny_llama.build(seed=2, max_position=48)
    tiny_llama.save(model, tmp_path / "other")
    version = tiny_llama.publish(tmp_path, 3, tiny_llama.checkpoint_tensors(model))
    reference = FrozenPolicy("reference", str(policy_dir), dtype, "cpu", 4096, quantization="int8")
    before = reference.logprobs(ROLLOUTS)
    reference.load(version)
    other = FrozenPolicy(
        "reference", str(tmp_path / "other"), dtype, "cpu", 4096, quantization="int8"
    )
    for old, found, wanted in zip(
        before, reference.logprobs(ROLLOUTS), other.logprobs(ROLLOUTS), strict=True
    ):
        assert np.array_equal(found, wanted)
        assert not np.array_equal(found, old)


def test_a_reward_models_score_is_the_one_of_the_rounded_weights(
    reward_dir: Path, policy_dir: Path
) -> None:
    context = RewardContext(tokenizer_dir=str(policy_dir))
    path = str(reward_dir)
    plain, rounded = (
        RewardModel(RewardModelConfig(path=path, dtype="float32", quantization=q), context)
        for q in (None, "int8")
    )
    assert len(_layers(rounded._model)) == EVERY_LINEAR
    assert rounded._model.score.weight.dtype == torch.float32
    by_hand = _dequantized(rounded._model)
    scores = rounded.score(PROMPT, ROLLOUTS, [""] * len(ROLLOUTS))
    for found, response in zip(scores, RESPONSES, strict=True):
        ids = torch.tensor([[*PROMPT.token_ids.tolist(), *response]])
        hidden = by_hand.base_model(input_ids=ids).last_hidden_state[0, -1]
        assert found == pytest.approx(by_hand.score(hidden).item(), rel=1e-4, abs=1e-5)
    assert scores != plain.score(PROMPT, ROLLOUTS, [""] * len(ROLLOUTS))
    assert rounded.version != plain.version


def test_ensembles_and_process_reward_models_hand_it_to_their_models(
    reward_dir: Path, policy_dir: Path, tmp_path: Path
) -> None:
    context = RewardContext(tokenizer_dir=str(policy_dir))
    paths = [str(reward_dir), str(_reward_folder(tmp_path, policy_dir, seed=3))]
    members = Ensemble(EnsembleConfig(paths=paths, quantization="int8"), context)._members
    steps = ProcessReward(ProcessRewardConfig(path=paths[0], quantization="int8"), context)._model
    for model in (*members, steps):
        assert len(_layers(model._model)) == EVERY_LINEAR


def test_the_scorer_rounds_reference_and_teacher_and_never_the_exact_model(
    policy_dir: Path,
) -> None:
    config = tiny_config(
        scoring={
            "reference": True,
            "exact_logprobs": True,
            "teacher": str(policy_dir),
            "quantization": "int8",
        },
        algorithm={"type": "on_policy_distillation"},
    )
    scorer = ScoringWorker(config, str(policy_dir), "scoring-0")
    scorer.start()
    try:
        assert scorer._reference is not None
        assert scorer._teacher is not None
        assert scorer._exact is not None
        assert len(_layers(scorer._reference._policy)) == EVERY_LINEAR
        assert len(_layers(scorer._teacher._policy)) == EVERY_LINEAR
        assert _layers(scorer._exact._model._policy) == []
    finally:
        scorer.close()


def test_the_plan_counts_a_byte_a_parameter_of_what_is_rounded() -> None:
    rewards = [
        {"type": "reward_model", "path": "a", "dtype": "float32", "name": "whole"},
        {"type": "reward_model", "path": "b", "quantization": "int8", "name": "rounded"},
        {"type": "ensemble", "paths": ["c", "d"], "name": "members"},
    ]
    pool = {"reference": True, "dtype": "float32", "rewards": rewards}
    widths = {"reference": 4, "whole": 4, "rounded": 1, "members": 2, "members 1": 2}
    for scoring, reference in ((pool, 4), (pool | {"quantization": "int8"}, 1)):
        found = frozen_models(tiny_config(scoring=scoring))
        assert {name: model.width for name, model in found.items()} == (
            widths | {"reference": reference}
        )


def test_what_it_would_round_has_to_be_there() -> None:
    with pytest.raises(
        ConfigError, match=r"scoring\.quantization = 'int8' with scoring\.reference"
    ):
        tiny_config(scoring={"quantization": "int8"})


def test_models_without_plain_linear_layers_are_refused() -> None:
    from transformers import GPT2Model

    small = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8))
    with pytest.raises(ConfigError, match=r"teacher: GPT2Model has no plain linear layer.*Remove"):
        quantize_linear(small, "the teacher")
    experts = torch.nn.Sequential(torch.nn.Linear(4, 4))
    experts.register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 4, 4)))
    with pytest.raises(ConfigError, match="experts of more than two dimensions"):
        quantize_linear(experts, "the teacher")
    assert type(experts[0]) is torch.nn.Linear
