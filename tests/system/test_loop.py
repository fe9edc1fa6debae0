"""The whole loop with nothing faked: vLLM, Ray, FSDP2, the weight store, the shipped quickstart.

One run overlaps generation and training on two learner ranks; its record, its weights and its
exported model are examined from every side. A second one is synchronous, its versions travel by the
relay, and it is compared with a plain loop that has no concurrency and no store at all
(tests/support/simulation/plain_loop.py): seeds belong to groups and float32
sampling does not depend on the batch around it, so the two agree to the last bit.
"""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from rlhf_cluster.data.prompts import evaluation_prompts
from rlhf_cluster.generation.engine import Request
from rlhf_cluster.weights import store
from tests.support.builders.finished_run import (
    COMMON,
    FLOOR,
    FinishedRun,
    load_policy,
    logprobs_of,
    run_to_the_end,
)
from tests.support.engines.engine_process import EngineProcess
from tests.support.simulation import plain_loop

OVERLAPPED = [
    *COMMON,
    "run.name=overlapped",
    "run.steps=40",
    "run.groups_per_step=64",
    "learner.ranks=2",
    "staleness.max_staleness=1",
    "evaluation.num_prompts=64",
]
SYNCHRONOUS = [
    *COMMON,
    "run.name=synchronous",
    "run.steps=4",
    "run.groups_per_step=16",
    "staleness.max_staleness=0",
    "weights.transport=relay",
    "algorithm.kl_coef=0.05",
    "evaluation.num_prompts=0",
]
RISE = 0.05
"""Least rise of the mean reward from the first ten steps to the last ten."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return run_to_the_end(tmp_path_factory.mktemp("overlapped"), OVERLAPPED)


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return run_to_the_end(tmp_path_factory.mktemp("synchronous"), SYNCHRONOUS)


@pytest.fixture(scope="module")
def plain(
    synchronous: FinishedRun, tmp_path_factory: pytest.TempPathFactory
) -> plain_loop.PlainRun:
    weights = synchronous.config.weights.model_copy(update={"transport": "files"})
    config = synchronous.config.model_copy(update={"weights": weights})
    return plain_loop.train(config, tmp_path_factory.mktemp("plain"))


def test_reward_rises_over_the_run(run: FinishedRun) -> None:
    rewards = [step["reward/mean"] for step in run.steps]
    assert len(rewards) == run.config.run.steps
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + RISE


def test_every_trained_token_has_a_version_within_the_bound(run: FinishedRun) -> None:
    bound = run.config.staleness.max_staleness
    for step, rows in enumerate(run.samples, start=1):
        for row in rows:
            assert 0 <= row["version_min"] <= row["version_max"] <= step - 1
            assert row["staleness"] == step - 1 - row["version_min"] <= bound
    stalest = {max(row["staleness"] for row in rows) for rows in run.samples}
    assert stalest == {0, bound}, "the run did overlap, and began on-policy"


def test_groups_are_trained_once_each_in_admission_order(run: FinishedRun) -> None:
    section = run.config.run
    expected = [f"g{n:08d}" for n in range(section.steps * section.groups_per_step)]
    size = run.config.algorithm.group_size
    trained = [row["rollout_id"] for rows in run.samples for row in rows]
    assert trained == [f"{group}/{i}" for group in expected for i in range(size)]
    counts = [len(rows) for rows in run.samples]
    assert counts == [section.groups_per_step * size] * section.steps


def test_the_live_version_never_goes_back_and_trails_by_one_publish(run: FinishedRun) -> None:
    live = [int(step["weights/version_live"]) for step in run.steps]
    assert live == sorted(live)
    for step, version in enumerate(live, start=1):
        assert step - 2 <= version <= step, "max_staleness = 1 could not train with older weights"


def test_learner_and_engine_agree_exactly_while_they_hold_the_same_weights(
    run: FinishedRun,
) -> None:
    difference = "importance/logprob_diff_mean"  # of the steps in which some reward differed
    fresh = [s[difference] for s in run.steps if difference in s and s["staleness/max"] == 0]
    stale = [s[difference] for s in run.steps if difference in s and s["staleness/mean"] == 1]
    assert fresh
    assert max(fresh) < FLOOR
    assert stale
    assert min(stale) > 10 * FLOOR


def test_s38_the_reference_is_the_policy_that_reinforcement_learning_starts_from(
    run: FinishedRun,
) -> None:
    assert run.steps[0]["learner/kl_ref"] == pytest.approx(0, abs=1e-6)
    assert run.steps[-1]["learner/kl_ref"] > 1e-3, "the policy has moved away from it"


def test_s12_recorded_logprobs_are_those_of_the_versions_on_the_label(run: FinishedRun) -> None:
    rows = run.samples[-1]
    differences = {}
    for version in store.versions(run.config.weights_dir):
        pairs = zip(rows, logprobs_of(load_policy(run, version), rows), strict=True)
        differences[version] = [np.abs(np.float32(r["sampled_logprobs"]) - p) for r, p in pairs]
    for index, row in enumerate(rows):
        # An update in flight divides a response: its start is the older version's, its end the
        # newer one's, whose caches were computed again.
        old = differences[row["version_min"]][index]
        new = differences[row["version_max"]][index]
        worst = min(max(old[:n].max(), new[n:].max(initial=0)) for n in range(1, len(old) + 1))
        assert worst < FLOOR, row
    for version, found in differences.items():
        others = [
            difference.max()
            for difference, row in zip(found, rows, strict=True)
            if not row["version_min"] <= version <= row["version_max"]
        ]
        assert not others or max(others) > 10 * FLOOR, f"version {version} is told from the others"
    assert run.config.run.steps in differences, "which sampled none of these"


def test_s24_the_exported_weights_are_the_last_version_bit_for_bit(run: FinishedRun) -> None:
    import torch
    from safetensors.torch import load_file

    last = store.latest(run.config.weights_dir)
    assert last is not None
    assert last.version == run.config.run.steps
    published = dict(store.read(last.path, expected_digest=last.digest))
    exported = load_file(run.final / "model.safetensors")
    start = load_file(run.path / "model" / "model.safetensors")
    assert exported.keys() == published.keys() == start.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == published[name].dtype
        assert torch.equal(tensor, published[name]), name
        assert not torch.equal(tensor, start[name]), f"{name} was never trained"


def test_the_exported_model_answers_alike_in_transformers_and_vllm(run: FinishedRun) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.final)
    model = AutoModelForCausalLM.from_pretrained(run.final).eval()
    num_prompts = run.config.evaluation.num_prompts
    max_tokens = run.config.generation.max_response_tokens
    config = run.config
    prompts = evaluation_prompts(
        config.data, config.evaluation, config.run.seed, tokenizer, num_prompts
    )
    answers = []
    for prompt in prompts:
        encoded = tokenizer(prompt.source, return_tensors="pt")
        assert encoded.input_ids[0].tolist() == prompt.token_ids.tolist()
        with torch.inference_mode():
            output = model.generate(
                encoded.input_ids,
                attention_mask=encoded.attention_mask,
                do_sample=False,
                max_new_tokens=max_tokens,
            )
        answers.append(output[0, len(prompt.token_ids) :].tolist())

    async def ask(engine: EngineProcess) -> list[list[int]]:
        requests = [
            Request(
                request_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids.tolist(),
                num_samples=1,
                max_tokens=max_tokens,
                temperature=0.0,
                seed=0,
            )
            for prompt in prompts
        ]
        results = await asyncio.gather(*[engine.generate(request) for request in requests])
        return [samples[0].token_ids for samples in results]

    engine = EngineProcess(run.config, str(run.final))
    try:
        assert asyncio.run(ask(engine)) == answers
    finally:
        engine.close()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = [text == p.columns["answer"] for text, p in zip(texts, prompts, strict=True)]
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["reward_after"] == pytest.approx(np.mean(right)), "what the run itself measured"


def test_without_staleness_a_run_samples_and_scores_what_a_plain_loop_does(
    synchronous: FinishedRun, plain: plain_loop.PlainRun
) -> None:
    for version, (rows, step) in enumerate(zip(synchronous.samples, plain.steps, strict=True)):
        scored = [s for group in step.groups for s in group.scored]
        assert [r["rollout_id"] for r in rows] == [s.rollout.rollout_id for s in scored]
        for row, own in zip(rows, scored, strict=True):
            where = f"step {version + 1}, {row['rollout_id']}"
            assert (row["version_min"], row["version_max"]) == (version, version), where
            assert row["prompt_ids"] == own.rollout.prompt_ids.tolist(), where
            assert row["response_ids"] == own.rollout.response_ids.tolist(), where
            assert row["sampled_logprobs"] == own.rollout.sampled_logprobs.tolist(), where
            assert row["reward"] == own.reward, where


def test_without_staleness_a_run_learns_bit_for_bit_what_a_plain_loop_learns(
    synchronous: FinishedRun, plain: plain_loop.PlainRun
) -> None:
    assert any(step["reward/std"] > 0 for step in synchronous.steps), "there is something to learn"
    for found, step in zip(synchronous.steps, plain.steps, strict=True):
        assert found["staleness/max"] == 0
        assert found["importance/logprob_diff_mean"] < FLOOR
        same = {name for name in step.metrics if not name.endswith("_s")}
        assert same >= {"learner/loss", "learner/grad_norm", "learner/kl_ref", "learner/entropy"}
        assert {n: found[n] for n in same} == {n: step.metrics[n] for n in same}
    assert store.versions(synchronous.config.weights_dir) == [3, 4], "the last two are kept"
    last = store.latest(synchronous.config.weights_dir)
    assert last is not None
    assert (last.version, last.digest) == (plain.last.version, plain.last.digest)
