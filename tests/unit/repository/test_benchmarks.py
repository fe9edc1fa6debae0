"""The benchmarks' own parts, at tiny sizes: that they run, and measure what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import int8_scoring, learning_curves
from benchmarks.checks import check_equal
from benchmarks.gpu import learner as gpu_learner
from benchmarks.in_process import PlainSampler, train
from benchmarks.learner_sides import GROUP_SIZE, PROMPT_TOKENS
from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.records import FinishReason, Sampling, Ticket
from tests.support.builders.tiny_learner import (
    build_llama,
    make_prompt,
    save_llama,
)

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def test_every_case_of_the_learning_curves_is_a_valid_run() -> None:
    cases = learning_curves.cases()
    assert set(ALGORITHMS) - learning_curves.OTHERS < set(cases)
    for name, case in cases.items():
        tree = learning_curves.tree_of(case, seed=0, steps=3)
        config = validate(RunConfig, tree, source=name)
        assert config.staleness.max_staleness == case.staleness
        assert not ALGORITHMS[config.algorithm.type](config.algorithm).needs_reference


def test_figures_are_the_final_rewards_and_their_means() -> None:
    runs = {
        f"{case}/{seed}": {"case": case, "reward_after": reward}
        for case, seed, reward in (("grpo", 0, 0.5), ("grpo", 1, 1.0), ("ppo", 0, 0.25))
    }
    found = learning_curves.figures(runs)
    assert found["reward_after/grpo/mean"] == 0.75
    assert found["reward_after/grpo/1"] == 1.0
    assert found["reward_after/ppo/mean"] == 0.25


def test_the_plain_sampler_reports_the_probabilities_it_samples_with(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    sampler = PlainSampler(folder, seed=3)
    prompts = [make_prompt(0, [2, 9, 4]), make_prompt(1, [5, 7, 30])]
    tickets = [Ticket(number=n, version=0) for n in range(2)]
    sampling = Sampling(num_samples=3, temperature=0.7, max_tokens=9, greedy_baseline=True)
    groups = sampler.sample(tickets, prompts, sampling)
    lm, num_stopped = build_llama(), 0
    for group in groups:
        assert len(group.rollouts) == 3
        for rollout in (*group.rollouts, group.greedy):
            assert rollout is not None
            ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids]))
            with torch.no_grad():
                logits = lm(input_ids=ids[None].long(), use_cache=False).logits[0]
            logs = (logits / (rollout.temperature or 1.0)).log_softmax(-1)[2:-1]
            expected = logs.gather(-1, torch.from_numpy(rollout.response_ids).long()[:, None])
            found = torch.from_numpy(rollout.sampled_logprobs)
            torch.testing.assert_close(found, expected[:, 0], atol=1e-5, rtol=1e-5)
            ended = rollout.response_ids[-1] == lm.config.eos_token_id
            assert ended == (rollout.finish_reason is FinishReason.STOP)
            assert (rollout.response_ids[:-1] != lm.config.eos_token_id).all()
            assert ended or len(rollout.response_ids) == 9
            num_stopped += bool(ended)
        assert group.greedy is not None
        assert (group.greedy.response_ids[0] == logits[2].argmax()).item()
    again = sampler.sample(tickets, prompts, sampling)
    for one, other in zip(groups, again, strict=True):
        assert one.rollouts[0].response_ids.tolist() == other.rollouts[0].response_ids.tolist()


def test_a_run_in_one_process_is_as_stale_as_it_says(tmp_path: Path) -> None:
    case = learning_curves.Case(
        staleness=2, algorithm={"type": "grpo", "group_size": 4, "proximal": "bypass"}
    )
    tree = learning_curves.tree_of(case, seed=1, steps=5)
    tree["run"] |= {"root": str(tmp_path), "groups_per_step": 2}
    tree["model"] = {"init": {"hidden_size": 32, "num_heads": 1, "intermediate_size": 32}}
    tree["sft"] = {"steps": 2, "batch_size": 4}
    tree["evaluation"] = {"num_prompts": 3}
    found = train(validate(RunConfig, tree, source="test"), tmp_path / "scratch", case.staleness)
    assert found["staleness"] == [0, 1, 2, 2, 2]
    assert len(found["rewards"]) == 5
    assert 0 <= found["reward_after"] <= 1


def test_gradients_that_differ_end_a_benchmark() -> None:
    expected = {"weight": torch.tensor([1.0, -2.0])}
    check_equal({"weight": torch.tensor([1.0, -2.0001])}, expected, 1e-3)
    with pytest.raises(SystemExit, match="weight"):
        check_equal({"weight": torch.tensor([1.0, -2.01])}, expected, 1e-3)
    with pytest.raises(SystemExit, match="weight"):
        check_equal({"weight": torch.tensor([1.0, float("nan")])}, expected, 1e-3)
    with pytest.raises(SystemExit, match="parameters"):
        check_equal({}, expected, 1e-3)


def test_the_gpu_benchmark_measures_steps_of_the_learner() -> None:
    settings = {"dtype": "float32", "num_gpus": 0}
    lengths = [5, 9] * (GROUP_SIZE // 2)
    runs = gpu_learner.measure(TINY, lengths, settings, peak_flops=1e12, repeats=2)
    assert len(runs) == 2
    # matrices: embedding 64 * 32; a layer: q and o 32 * 32, k and v 16 * 32, three of the MLP
    parameters = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    positions = [PROMPT_TOKENS + n for n in lengths]
    flops = 6 * parameters * sum(positions) + 6 * 2 * 32 * sum(n * n for n in positions)
    for run in runs:
        assert run["mfu"] * run["step_s"] * 1e12 == pytest.approx(flops)
        assert run["tokens_per_s"] * run["step_s"] == pytest.approx(sum(positions))


def test_long_tailed_lengths_fill_whole_groups() -> None:
    lengths = gpu_learner.long_tailed(4096, median=100, longest=512)
    total = sum(lengths) + PROMPT_TOKENS * len(lengths)
    assert len(lengths) % GROUP_SIZE == 0
    assert 4096 <= total < 4096 + GROUP_SIZE * 512
    assert max(lengths) <= 512 - PROMPT_TOKENS


def test_rank_correlation_shares_ranks_of_equal_scores_and_order_counts_pairs() -> None:
    first = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert int8_scoring.spearman(first.ravel(), np.exp(first).ravel()) == pytest.approx(1.0)
    # ranks 1, 2, 3, 4 and 1.5, 1.5, 4, 3: covariance 3.5, variances 5 and 4.5
    second = np.array([[0.0, 0.0], [9.0, 5.0]])
    found = int8_scoring.spearman(first.ravel(), second.ravel())
    assert found == pytest.approx(3.5 / np.sqrt(5 * 4.5))
    assert int8_scoring.order_changed(first, second) == 1.0
    assert int8_scoring.order_changed(first, np.array([[1.0, 2.0], [4.0, 3.0]])) == 0.5
