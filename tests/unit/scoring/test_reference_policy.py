"""The reference model against a plain transformers forward of one sequence at a time, and the
replacement of its weights by a version of a store."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster.errors import ScoringError, StalledError, WeightError
from rlhf_cluster.scoring import frozen_policy as frozen_module
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from tests.support.builders import tiny_llama
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)

RESPONSES = ([9, 8, 7, 6, 1], [9], [5, 1], [0, 0, 0], [30] * 20, [1, 1])
PROMPT = [2, 3, 0, 4]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture(scope="module")
def naive(model_dir):
    """Log-probabilities of the response from the logits of one unpadded sequence, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprobs(response, temperature):
        ids = torch.tensor([PROMPT + list(response)])
        table = (model(ids).logits[0] / temperature).log_softmax(-1)
        start = len(PROMPT)
        return np.array([table[start + i - 1, t].item() for i, t in enumerate(response)])

    return logprobs


def rollouts(temperature=1.0, responses=RESPONSES):
    return make_rollouts(make_prompt(ids=PROMPT), responses, temperature=temperature)


@pytest.mark.parametrize("tokens_per_batch", [24, 50, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_sequence_alone_at_its_temperature(
    model_dir, naive, tokens_per_batch, temperature
):
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", tokens_per_batch)
    found = reference.logprobs(rollouts(temperature))
    for array, response in zip(found, RESPONSES, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, naive(response, temperature), atol=2e-5)


def test_rollouts_of_several_temperatures_keep_their_order(model_dir, naive):
    temperatures = (1.0, 0.5, 1.0)
    mixed = [
        rollouts(temperature, [response])[0]
        for temperature, response in zip(temperatures, RESPONSES, strict=False)
    ]
    found = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096).logprobs(mixed)
    for array, temperature, response in zip(found, temperatures, RESPONSES, strict=False):
        np.testing.assert_allclose(array, naive(response, temperature), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_s38_a_policy_equal_to_the_reference_is_at_zero_distance(model_dir, dtype):
    """The learner's own forward of the same rows: the difference is exactly 0, token by token."""
    import torch

    from rlhf_cluster.models.policy_model import load_policy

    [found] = FrozenPolicy("reference", str(model_dir), dtype, "cpu", 4096).logprobs(rollouts()[:1])
    policy = load_policy(model_dir, getattr(torch, dtype), "cpu", trainable=True)
    tokens = torch.tensor([PROMPT + list(RESPONSES[0])])
    positions = torch.arange(tokens.shape[1] - 1)[None]
    own, _ = policy(tokens[:, :-1], positions, tokens[:, 1:])
    assert own.requires_grad
    assert np.array_equal(found, own[0, -len(RESPONSES[0]) :].detach().float().numpy())


def test_the_reference_is_frozen(model_dir):
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096)
    policy = reference._policy
    parameters = list(policy.parameters())
    assert parameters
    assert not any(p.requires_grad for p in parameters)
    assert not policy.training


def test_a_greedy_rollout_has_no_reference_distribution(model_dir):
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096)
    with pytest.raises(ScoringError, match="temperature 0"):
        reference.logprobs(rollouts(temperature=0.0))


def test_a_sequence_over_the_token_budget_is_named(model_dir):
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", tokens_per_batch=22)
    with pytest.raises(ScoringError, match=r"g0/4 has 23 positions.*tokens_per_batch = 22"):
        reference.logprobs(rollouts())


def test_a_group_that_finds_the_model_busy_fails_by_its_deadline(model_dir):
    reference = FrozenPolicy(
        "reference", str(model_dir), "float32", "cpu", 4096, wait_timeout_s=0.05
    )
    with reference.hold(), pytest.raises(StalledError, match=r"busy for 0\.05 s"):
        reference.logprobs(rollouts())
    assert len(reference.logprobs(rollouts())) == len(RESPONSES)


@pytest.fixture(scope="module")
def other(model_dir, tmp_path_factory):
    """A second policy: as a folder, and as version 3 of a store."""
    folder = tmp_path_factory.mktemp("other")
    model = tiny_llama.build(seed=2, max_position=48)
    tiny_llama.save(model, folder)
    root = tmp_path_factory.mktemp("weights")
    return folder, tiny_llama.publish(root, 3, tiny_llama.checkpoint_tensors(model)), model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_s38_a_loaded_version_scores_bit_for_bit_as_the_folder_it_came_from(
    model_dir, other, dtype
):
    """The tied head follows its embeddings: it has no tensor of its own in the version."""
    folder, version, _ = other
    reference = FrozenPolicy("reference", str(model_dir), dtype, "cpu", 4096)
    before = reference.logprobs(rollouts())
    reference.load(version)
    expected = FrozenPolicy("reference", str(folder), dtype, "cpu", 4096).logprobs(rollouts())
    for old, found, wanted in zip(before, reference.logprobs(rollouts()), expected, strict=True):
        assert np.array_equal(found, wanted)
        assert not np.array_equal(found, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda t: t.update(extra=t["model.norm.weight"].clone()), "not expected: extra"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()}),
            r"model\.norm\.weight has shape \[5\], expected \[128\]",
        ),
    ],
)
def test_a_version_of_another_model_is_refused_by_name_and_changes_nothing(
    model_dir, other, tmp_path, change, message
):
    tensors = dict(tiny_llama.checkpoint_tensors(other[2]))
    change(tensors)
    version = tiny_llama.publish(tmp_path, 4, tensors)
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096)
    before = reference.logprobs(rollouts())
    with pytest.raises(WeightError, match=message):
        reference.load(version)
    for old, found in zip(before, reference.logprobs(rollouts()), strict=True):
        assert np.array_equal(found, old)


def test_a_version_that_is_not_the_announced_one_is_refused(model_dir, other):
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096)
    with pytest.raises(WeightError, match="not the version that was announced"):
        reference.load(replace(other[1], digest="0" * 32))


def test_a_reference_that_is_moved_while_a_group_holds_it_waits_for_the_group(model_dir, other):
    reference = FrozenPolicy(
        "reference", str(model_dir), "float32", "cpu", 4096, wait_timeout_s=0.05
    )
    before = reference.logprobs(rollouts())
    with reference.hold(), pytest.raises(StalledError, match=r"busy for 0\.05 s"):
        reference.load(other[1])
    assert np.array_equal(reference.logprobs(rollouts())[0], before[0])


def test_d01_a_load_that_hung_changes_nothing_once_a_later_one_was_asked_for(
    model_dir, other, monkeypatch
):
    """The driver gave it up, and asked again: two threads of one actor."""
    hangs, goes_on = threading.Event(), threading.Event()
    read = frozen_module.read

    def slow(path, **options):
        if not hangs.is_set():
            hangs.set()
            assert goes_on.wait(20)
        return read(path, **options)

    monkeypatch.setattr(frozen_module, "read", slow)
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096)
    before = reference.logprobs(rollouts())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(reference.load, other[1])
        assert hangs.wait(20)
        second = pool.submit(reference.load, replace(other[1], digest="0" * 32))
        while reference._num_asked < 2:
            pass
        goes_on.set()
        with pytest.raises(WeightError, match="another was asked for meanwhile"):
            first.result(20)
        with pytest.raises(WeightError, match="not the version that was announced"):
            second.result(20)
    assert np.array_equal(reference.logprobs(rollouts())[0], before[0])


def test_d01_a_load_behind_one_that_hangs_ends_by_its_deadline(model_dir, other):
    reference = FrozenPolicy(
        "reference", str(model_dir), "float32", "cpu", 4096, load_timeout_s=0.05
    )
    with (
        reference._loading,
        pytest.raises(StalledError, match=r"waited 0\.05 s for the load before"),
    ):
        reference.load(other[1])
