"""Engine mismatch and staleness effect: told apart, from the definition to the learner's report."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms.off_policy_distance import (
    derive_effects,
    effect_sums,
)
from rlhf_cluster.errors import RecordError
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.learner.step.training_batch import training_batch
from rlhf_cluster.observe.metric_table import find
from rlhf_cluster.records import ExperienceGroup
from rlhf_cluster.scoring.exact_logprobs import ExactLogprobs
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.weights import store
from tests.support.builders.reduced_metrics import reduced
from tests.support.builders.tiny_learner import random_groups

ROUNDING = 1e-5  # nats: passes of one model in float32, rows laid out differently


def _reduced(batches: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    return reduced(*(effect_sums(*batch) for batch in batches))


def test_each_effect_is_its_distance_to_the_exact_value() -> None:
    sampled = torch.tensor([-1.0, -2.0, -3.0])
    exact = torch.tensor([-1.25, -2.0, -2.0])
    proximal = torch.tensor([-1.25, -4.0, -2.5])
    means = _reduced([(sampled, proximal, exact)])
    assert means["importance/engine_mismatch_mean"] == pytest.approx((0.25 + 0 + 1.0) / 3)
    assert means["importance/engine_mismatch_max"] == 1.0
    assert means["importance/staleness_effect_mean"] == pytest.approx((0 + 2.0 + 0.5) / 3)
    assert means["importance/staleness_effect_max"] == 2.0


def test_no_gradient_flows_through_what_is_reported() -> None:
    proximal = torch.tensor([-1.0], requires_grad=True)
    sums = effect_sums(torch.tensor([-2.0]), proximal, torch.tensor([-3.0]))
    assert not any(total.requires_grad for total, _ in sums.values())


def test_s39_effects_do_not_depend_on_micro_batches_and_the_percentile_is_within_its_bin() -> None:
    draw = torch.Generator().manual_seed(0)
    sampled, proximal, exact = (torch.randn(3000, generator=draw) for _ in range(3))
    proximal = exact + 1e-3 * proximal
    whole = _reduced([(sampled, proximal, exact)])
    cuts = [0, 1, 1, 700, 3000]  # one of them without a token
    parts = _reduced([(sampled[a:b], proximal[a:b], exact[a:b]) for a, b in pairwise(cuts)])
    assert parts == pytest.approx(whole)
    derived = derive_effects(parts)
    for name, one in (("engine_mismatch", sampled), ("staleness_effect", proximal)):
        expected = np.quantile((one - exact).abs().numpy(), 0.95)
        ratio = derived[f"importance/{name}_p95"] / expected
        assert 1 / 1.34 < ratio < 1.34, "a bin is a factor of 10 ** (1 / 8)"
        find(f"importance/{name}_p95")
    assert derive_effects({}) == {}


def _with_exact(groups: list[ExperienceGroup], values: Any) -> list[ExperienceGroup]:
    return [
        replace(
            group,
            scored=tuple(replace(s, exact_logprobs=values(s.rollout)) for s in group.scored),
        )
        for group in groups
    ]


def test_exact_logprobs_are_a_stream_and_for_some_rollouts_only_refused() -> None:
    groups = random_groups(0, num_groups=2)
    advantages = [
        [np.ones(len(s.rollout.response_ids), np.float32) for s in group.scored] for group in groups
    ]
    scored = _with_exact(groups, lambda rollout: rollout.sampled_logprobs - 1)
    batch = training_batch(scored, advantages, version=0, drop_zero_advantages=True)
    assert batch.streams[-1] == "exact_logprobs"
    for sequence, rollout in zip(
        batch.sequences, (s.rollout for g in groups for s in g.scored), strict=True
    ):
        assert sequence is not None
        np.testing.assert_array_equal(
            sequence.streams["exact_logprobs"], rollout.sampled_logprobs - 1
        )
    with pytest.raises(RecordError, match="has no exact_logprobs, others of the batch have"):
        training_batch([scored[0], groups[1]], advantages, 0, drop_zero_advantages=True)


def _publish(learner: LearnerRank, root: Path) -> None:
    version = learner.snapshot()
    report = learner.write_snapshot(str(root))
    store.commit(root, version, [report], keep=3, expected_names=learner.tensor_shapes())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learner_reports_no_staleness_effect_on_policy_and_one_when_stale(
    start_learner: Any, tiny_model_dir: str, tmp_path: Path, dtype: str
) -> None:
    """The whole way: published by the learner, scored from the store, trained on.

    In bfloat16 the rows of a batch change how sums are rounded, by up to 2 ** -8 of a logit.
    """
    learner = start_learner(
        learner={"dtype": dtype, "learning_rate": 1e-2},
        generation={"dtype": dtype},
        staleness={"max_staleness": 1},
    )
    rounding = ROUNDING if dtype == "float32" else 0.1
    _publish(learner, tmp_path)
    model = FrozenPolicy("exact", tiny_model_dir, dtype, "cpu", 4096)  # type: ignore[arg-type]
    exact = ExactLogprobs(model, tmp_path, cached_versions=2)
    groups = _with_exact(random_groups(0), lambda rollout: exact.logprobs([rollout])[0])
    metrics = learner.train_step(groups).metrics
    assert 0 <= metrics["importance/staleness_effect_max"] < rounding
    distances = np.concatenate(
        [
            np.abs(s.rollout.sampled_logprobs - s.exact_logprobs)[s.rollout.response_mask]
            for group in groups
            for s in group.scored
        ]
    )
    assert metrics["importance/engine_mismatch_mean"] == pytest.approx(distances.mean(), rel=1e-5)
    assert metrics["importance/engine_mismatch_max"] == pytest.approx(distances.max(), rel=1e-5)
    again = learner.train_step(groups).metrics
    assert again["importance/engine_mismatch_mean"] == pytest.approx(distances.mean(), rel=1e-5)
    assert again["importance/staleness_effect_mean"] > 0.25
    for name in again:
        find(name)
