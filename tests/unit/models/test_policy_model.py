"""The policy scores tokens as the plain model does: alone, padded or packed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from rlhf_cluster.data.packing import (
    MicroBatch,
    TokenSequence,
    collate,
    plan,
)
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.policy_model import (
    PolicyLM,
    check_distribution,
    check_names,
    check_training_mode,
    load_policy,
)
from tests.support.builders.tiny_learner import (
    VOCABULARY,
    build_llama,
    save_llama,
)


def _sequences(seed: int = 0) -> list[TokenSequence]:
    draw = np.random.default_rng(seed)
    return [
        TokenSequence(
            prompt_ids=draw.integers(0, VOCABULARY, p).astype(np.int32),
            target_ids=draw.integers(0, VOCABULARY, t).astype(np.int32),
        )
        for p, t in [(3, 9), (1, 1), (5, 2), (2, 14), (4, 4), (1, 7)]
    ]


def _batches(sequences: list[TokenSequence], batching: str) -> list[MicroBatch]:
    lengths = [s.num_inputs for s in sequences]
    [planned] = plan(lengths, 1, 48, 24, batching)  # type: ignore[arg-type]
    return [collate(batch, sequences) for batch in planned]


def _score(policy: PolicyLM, batch: MicroBatch) -> torch.Tensor:
    arrays = (batch.input_ids, batch.position_ids, batch.labels)
    return policy(*map(torch.from_numpy, arrays), chunk_tokens=7)[0]


def _scores_and_gradients(
    policy: PolicyLM, sequences: list[TokenSequence], batching: str
) -> tuple[dict[int, np.ndarray], dict[str, torch.Tensor]]:
    policy.zero_grad()
    scores = {}
    for batch in _batches(sequences, batching):
        logprobs = _score(policy, batch)
        (logprobs * torch.from_numpy(batch.mask)).sum().backward()
        for s in batch.spans:
            scores[s.sequence] = logprobs[s.row, s.start : s.stop].detach().numpy()
    return scores, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def _plain_scores(lm: LlamaForCausalLM, sequence: TokenSequence) -> torch.Tensor:
    tokens = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids])).long()
    logits = lm(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    scores = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
    return scores[-len(sequence.target_ids) :]


@pytest.mark.parametrize("tie", [True, False])
def test_s13_s14_packed_and_padded_score_and_train_as_each_sequence_alone(tie: bool) -> None:
    sequences = _sequences()
    plain = build_llama(tie=tie)
    expected = [_plain_scores(plain, s) for s in sequences]
    torch.stack([e.sum() for e in expected]).sum().backward()
    wanted = {f"lm.{n}": p.grad for n, p in plain.named_parameters()}
    for batching in ("packed", "padded"):
        scores, gradients = _scores_and_gradients(
            PolicyLM(build_llama(tie=tie)), sequences, batching
        )
        for index, values in enumerate(expected):
            np.testing.assert_allclose(scores[index], values.detach().numpy(), atol=1e-5, rtol=0)
        assert set(gradients) == set(wanted)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-5)


def test_s13_a_model_with_absolute_positions_scores_the_same_packed_and_padded() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    policy, sequences = PolicyLM(GPT2LMHeadModel(config).eval()), _sequences()
    packed, _ = _scores_and_gradients(policy, sequences, "packed")
    padded, _ = _scores_and_gradients(policy, sequences, "padded")
    for index, sequence in enumerate(sequences):
        expected = _plain_scores(policy.lm, sequence).detach().numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(packed[index], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(padded[index], expected, atol=1e-5, rtol=0)


def test_s14_changing_one_packed_sequence_leaves_the_others_as_they_were() -> None:
    policy, sequences = PolicyLM(build_llama()), _sequences()
    before, _ = _scores_and_gradients(policy, sequences, "packed")
    changed = list(sequences)
    changed[0] = TokenSequence(
        prompt_ids=(sequences[0].prompt_ids + 1) % VOCABULARY,
        target_ids=(sequences[0].target_ids + 1) % VOCABULARY,
    )
    after, _ = _scores_and_gradients(policy, changed, "packed")
    assert np.abs(after[0] - before[0]).max() > 0.1
    for index in range(1, len(sequences)):
        np.testing.assert_array_equal(after[index], before[index])


def test_s14_a_policy_whose_cache_is_turned_on_refuses_to_score() -> None:
    policy = PolicyLM(build_llama())
    policy.config.use_cache = True
    with pytest.raises(ConfigError, match="use_cache"):
        _score(policy, _batches(_sequences(), "packed")[0])


def test_a_loaded_policy_has_the_models_weights_no_dropout_and_no_gradient_if_frozen(
    tmp_path: Path,
) -> None:
    lm = build_llama()
    lm.config.attention_dropout = 0.5
    lm.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, torch.float32, "cpu", trainable=False)
    assert not any(p.requires_grad for p in policy.parameters())
    policy.train()
    sequence = _sequences()[0]
    [batch] = _batches([sequence], "packed")
    lm.eval()
    expected = _plain_scores(lm, sequence).detach().numpy()
    np.testing.assert_allclose(_score(policy, batch)[batch.mask], expected, atol=1e-5, rtol=0)


def test_tied_embeddings_stay_one_parameter_that_gets_both_gradients(tmp_path: Path) -> None:
    policy = load_policy(save_llama(tmp_path), torch.float32, "cpu", trainable=True)
    names = [n for n, _ in policy.named_parameters()]
    assert "lm.model.embed_tokens.weight" in names
    assert "lm.lm_head.weight" not in names
    head, embedding = policy.lm.get_output_embeddings(), policy.lm.get_input_embeddings()
    assert head is not None
    assert head.weight is embedding.weight


@pytest.mark.parametrize("tie", [True, False])
def test_parameter_names_are_those_of_the_checkpoint(tmp_path: Path, tie: bool) -> None:
    folder = save_llama(tmp_path, tie=tie)
    policy = load_policy(folder, torch.float32, "cpu", trainable=True)
    check_names(policy, folder)
    policy.lm.model.extra = torch.nn.Parameter(torch.zeros(1))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"only in the model: \['model.extra'\]"):
        check_names(policy, folder)


def test_a_model_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=2.0,
        final_logit_softcapping=5.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="capped or scaled"):
        load_policy(tmp_path, torch.float32, "cpu", trainable=True)


class _Leaky(LlamaForCausalLM):
    """Attends across packed sequences: it hides the position ids from its layers."""

    def __init__(self, config: object) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        inner = self.model.forward

        def forward(**kwargs: object) -> object:
            kwargs.pop("position_ids", None)
            return inner(**kwargs)  # type: ignore[arg-type]

        self.model.forward = forward  # type: ignore[method-assign,assignment]


def test_s14_a_model_that_mixes_packed_sequences_is_refused() -> None:
    sound = build_llama()
    leaky = _Leaky(sound.config)
    leaky.load_state_dict(sound.state_dict())
    check_distribution(PolicyLM(sound), torch.float32)
    with pytest.raises(ConfigError, match="mixes packed sequences"):
        check_distribution(PolicyLM(leaky.eval()), torch.float32)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load"):
        load_policy(tmp_path, torch.float32, "cpu", trainable=True)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}


def mixture(kind: str, **keys: Any) -> PolicyLM:
    """A mixture of experts in evaluation mode, from random weights."""
    torch.manual_seed(0)
    if kind == "phimoe":
        return PolicyLM(PhimoeForCausalLM(PhimoeConfig(**SIZES, **keys))).eval()
    return PolicyLM(MixtralForCausalLM(MixtralConfig(**SIZES, **keys))).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "keys"), [("phimoe", {}), ("mixtral", {"router_jitter_noise": 0.05})]
)
def test_l12_a_router_that_draws_in_training_mode_is_refused(
    kind: str, keys: dict[str, Any], dtype: torch.dtype
) -> None:
    policy = mixture(kind, **keys)
    check_distribution(policy, dtype)  # in evaluation it is as it should be
    with pytest.raises(
        ConfigError, match=r"in training mode are .* nats from .*router_jitter_noise"
    ):
        check_training_mode(policy, dtype)


def test_l12_only_a_model_that_is_to_train_is_asked_for_its_training_mode(tmp_path: Path) -> None:
    mixture("mixtral", router_jitter_noise=0.05).lm.save_pretrained(tmp_path)
    load_policy(tmp_path, torch.float32, "cpu", trainable=False)
    with pytest.raises(ConfigError, match="draws random numbers"):
        load_policy(tmp_path, torch.float32, "cpu", trainable=True)


def test_l12_layers_that_are_left_out_while_training_are_refused() -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        init_std=0.25,
    )
    torch.manual_seed(0)
    policy = PolicyLM(OPTForCausalLM(config)).eval()
    check_training_mode(policy, torch.float32)
    policy.lm.base_model.decoder.layerdrop = 0.5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="skipped layers"):
        check_training_mode(policy, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l12_a_sound_model_passes_and_keeps_its_mode_and_the_random_numbers(
    dtype: torch.dtype,
) -> None:
    for policy in (mixture("mixtral"), PolicyLM(build_llama()).eval()):
        before = torch.random.get_rng_state()
        check_training_mode(policy, dtype)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert not any(module.training for module in policy.modules())
