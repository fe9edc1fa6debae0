"""Whole runs of what the quick start leaves off: each setting reaches every service it concerns.

PPO with a learned critic on two ranks, several optimizer steps a batch, versions stored as
differences, and the log-probabilities of the version that sampled; then adapters on ZeRO-3, with
INT8 weights in the engine.
"""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cluster.weights import store
from rlhf_cluster.weights.read_version import open_version
from tests.support.builders.finished_run import (
    COMMON,
    FLOOR,
    FinishedRun,
    load_policy,
    logprobs_of,
    run_to_the_end,
)

SHORT = [
    *COMMON,
    "run.groups_per_step=8",
    "evaluation.num_prompts=0",
    "learner.ranks=2",
    "staleness.max_staleness=1",
]
CRITIC = [
    *SHORT,
    "run.name=critic",
    "run.steps=5",
    "algorithm.type=ppo",
    "algorithm.proximal=recompute",
    "algorithm.sampler=exact",
    "learner.minibatches=2",
    "scoring.reference=false",
    "scoring.exact_logprobs=true",
    "critic.learning_rate=1e-3",
    "weights.format=delta",
    "weights.anchor_every=3",
]
ADAPTERS = [
    *SHORT,
    "run.name=adapters",
    "run.steps=4",
    "learner.backend=zero3",
    "learner.lora.rank=8",
    "generation.quantization=int8",
    "generation.dtype=bfloat16",
    "weights.dtype=float32",
    "weights.format=adapter",
    "scoring.rewards=[{type='python', function='closeness:reward'}]",
]
CLOSENESS = """
def reward(prompts, completions, answer, **columns):
    return [sum(a == b for a, b in zip(c, w)) / 6 for c, w in zip(completions, answer)]
"""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def critic(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return run_to_the_end(tmp_path_factory.mktemp("critic"), CRITIC)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("adapters")
    (root / "closeness.py").write_text(CLOSENESS)
    return run_to_the_end(root, ADAPTERS)


def test_a_critic_learns_beside_the_policy(critic: FinishedRun) -> None:
    assert len(critic.steps) == 5
    values = [step["critic/value_mean"] for step in critic.steps]
    assert values[0] == 0
    returns = critic.steps[-1]["critic/return_mean"]
    assert abs(values[-1] - returns) < abs(values[0] - returns)


def test_exact_logprobs_tell_the_engine_from_staleness(critic: FinishedRun) -> None:
    for step in critic.steps:
        assert step["importance/engine_mismatch_mean"] < FLOOR
    fresh, stale = critic.steps[0], critic.steps[-1]
    assert fresh["staleness/max"] == 0
    assert fresh["importance/staleness_effect_mean"] < FLOOR
    assert stale["staleness/max"] == 1
    assert stale["importance/staleness_effect_mean"] > 10 * FLOOR


def test_differences_lead_to_the_weights_that_sampled(critic: FinishedRun) -> None:
    root = critic.config.weights_dir
    formats = {open_version(root / f"v{v:06d}").format for v in store.versions(root)}
    assert formats == {"full", "delta"}
    rows = [r for r in critic.samples[-1] if r["version_min"] == r["version_max"]]
    for version in {r["version_min"] for r in rows}:
        own = [r for r in rows if r["version_min"] == version]
        for row, expected in zip(own, logprobs_of(load_policy(critic, version), own), strict=True):
            assert np.abs(np.float32(row["sampled_logprobs"]) - expected).max() < FLOOR


def test_adapters_alone_are_trained_and_reach_the_engine(adapters: FinishedRun) -> None:
    import torch
    from safetensors.torch import load_file

    start = load_file(adapters.path / "model" / "model.safetensors")
    final = load_file(adapters.final / "model.safetensors")
    assert final.keys() == start.keys()
    changed = {name for name in final if not torch.equal(final[name], start[name])}
    assert changed == {name for name in final if "_proj" in name}
    assert adapters.steps[-1]["learner/kl_ref"] > 0


def test_what_int8_adds_is_seen_in_the_correction(adapters: FinishedRun) -> None:
    fresh = [s for s in adapters.steps if s["staleness/max"] == 0]
    assert fresh
    for step in fresh:
        assert 10 * FLOOR < step["importance/logprob_diff_mean"] < 0.5
