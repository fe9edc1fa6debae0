"""Learner ranks as processes: the same batch must train the same weights, however it is divided.

One pair of processes runs every two-rank case in turn, each with a group of its own; one process
runs the single-rank cases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.builders.tiny_learner import (
    full_parameters,
    learner_config,
    random_groups,
    save_llama,
    with_teacher,
)
from tests.support.processes.rank_processes import run_ranks

NUM_STEPS = 3
REFERENCE = {"reference": True, "rewards": [{"type": "exact_match"}]}
TEACHER = {"teacher": "a folder", "rewards": [{"type": "exact_match"}]}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "packed": {},
    "padded": {"learner": {"batching": "padded"}},
    "small micro-batches": {"learner": {"tokens_per_micro_batch": 70}},
    "padded, one row a pass": {"learner": {"batching": "padded", "tokens_per_micro_batch": 32}},
    "checkpointed": {"learner": {"gradient_checkpointing": True}},
    "zero3": {"learner": {"backend": "zero3"}},
    "zero3, small micro-batches": {"learner": {"backend": "zero3", "tokens_per_micro_batch": 70}},
    "zero3, checkpointed": {"learner": {"backend": "zero3", "gradient_checkpointing": True}},
}
OWN_BASELINE: dict[str, dict[str, dict[str, Any]]] = {
    "with reference": {
        "algorithm": {"kl_coef": 0.1, "type": "grpo"},
        "scoring": {"reference": True, "rewards": [{"type": "exact_match"}]},
    },
    "several updates a batch": {"learner": {"epochs": 2, "minibatches": 3}},
    "sequence mean": {"algorithm": {"type": "grpo", "aggregation": "sequence_mean"}},
    "fixed length": {"algorithm": {"type": "grpo", "aggregation": "fixed_length"}},
    "gspo, sequence weights": {
        "algorithm": {"type": "gspo", "correction": {"type": "sequence_tis", "cap": 50.0}},
    },
    "adaptive KL in the reward": {
        "algorithm": {
            "type": "grpo",
            "kl_coef": 0.1,
            "kl_in": "reward",
            "kl_control": {"type": "adaptive", "target": 1.0, "horizon": 16},
        },
        "scoring": {"reference": True, "rewards": [{"type": "exact_match"}]},
    },
    "full KL": {
        "algorithm": {"type": "grpo", "kl_coef": 0.1, "kl_estimator": "full"},
        "learner": {"epochs": 2, "tokens_per_micro_batch": 70},
    },
    "full KL in the reward": {
        "algorithm": {
            "type": "grpo",
            "kl_coef": 0.1,
            "kl_estimator": "full",
            "kl_in": "reward",
            "kl_control": {"type": "adaptive", "target": 1.0, "horizon": 16},
        },
    },
    "full KL, lora, adversarial": {
        "algorithm": {"type": "grpo", "kl_coef": 0.1, "kl_estimator": "full"},
        "learner": {"lora": {"rank": 5}, "tokens_per_micro_batch": 32},
    },
    "adversarial": {"learner": {"tokens_per_micro_batch": 32}},
    "lora": {"learner": {"lora": {"rank": 5}}},
    "dora": {"learner": {"lora": {"rank": 3, "dora": True, "targets": ["q_proj", "down_proj"]}}},
    "ppo, several updates a batch": {
        "algorithm": {"type": "ppo", "entropy_coef": 0.01},
        "learner": {"epochs": 2, "minibatches": 2},
        "critic": {"learning_rate": 1e-4},
    },
    "ppo, adversarial": {
        "algorithm": {"type": "ppo"},
        "learner": {"tokens_per_micro_batch": 32},
        "critic": {"learning_rate": 1e-4},
    },
    "ppo with a value head": {
        "algorithm": {"type": "ppo"},
        "learner": {"epochs": 2, "minibatches": 2},
        "critic": {"kind": "head", "learning_rate": 1e-3},
    },
    "ppo with a value head, adversarial": {
        "algorithm": {"type": "ppo"},
        "learner": {"tokens_per_micro_batch": 32},
        "critic": {"kind": "head", "learning_rate": 1e-3},
    },
    "online dpo": {
        "algorithm": {"type": "online_dpo", "group_size": 4},
        "learner": {"epochs": 2, "minibatches": 2},
        "scoring": REFERENCE,
    },
    "online dpo, uneven": {
        "algorithm": {"type": "online_dpo", "group_size": 4},
        "learner": {"tokens_per_micro_batch": 64},
        "scoring": REFERENCE,
    },
    "on-policy distillation": {
        "algorithm": {"type": "on_policy_distillation", "group_size": 4, "reward_coef": 0.5},
        "learner": {"epochs": 2, "minibatches": 2},
        "scoring": TEACHER,
    },
    "on-policy distillation, adversarial": {
        "algorithm": {"type": "on_policy_distillation", "group_size": 4},
        "learner": {"tokens_per_micro_batch": 32},
        "scoring": TEACHER,
    },
}
"""Compared between one rank and two, not with the packed case."""

LIKE_FSDP2: dict[str, dict[str, dict[str, Any]]] = {
    f"{name}, zero3": {
        **OWN_BASELINE[name],
        "learner": {**OWN_BASELINE[name]["learner"], "backend": "zero3"},
    }
    for name in (
        "several updates a batch",
        "adversarial",
        "lora",
        "dora",
        "ppo, several updates a batch",
        "ppo, adversarial",
    )
}
"""Compared with the case of the same name on one rank of FSDP2."""

ADVERSARIAL = [24, *[1] * 15]
"""One long response and fifteen single tokens: the ranks need very different numbers of passes."""
UNEVEN = [24, *[3] * 15]
"""The same for pairs: of two single tokens after one prompt all gradients of other tokens cancel, and
AdamW makes steps of what rounding leaves of them."""


def train(rank: int, world_size: int, address: str | None, job: Any) -> Any:
    """Trained on all batches: (metrics of each step, this rank's shards, the whole parameters, what
    each step kept of its first rollouts)."""
    from rlhf_cluster.learner.learner_rank import LearnerRank

    model_dir, sections, batches = job
    learner = LearnerRank(
        learner_config(model_dir, **sections), model_dir, rank, world_size, address
    )
    learner.setup()
    metrics, kept = [], []
    for groups in batches:
        learner.snapshot()
        metrics.append(dict(learner.train_step(groups).metrics))
        kept.append(learner.kept)
    learner.snapshot()
    assert learner._snapshot is not None
    shards = {p.name: (p.shape, p.offset, p.tensor.numpy().copy()) for p in learner._snapshot[1]}
    full = {n: p.numpy() for n, p in full_parameters(learner.policy).items()}
    if learner._value_model is not None:
        critic = full_parameters(learner._value_model.module)
        full |= {f"critic.{n}": p.numpy() for n, p in critic.items()}
    learner.close()
    return metrics, shards, full, kept


def _lengths(case: str) -> list[int] | None:
    return ADVERSARIAL if "adversarial" in case else UNEVEN if "uneven" in case else None


def _batches(lengths: list[int] | None = None) -> list[Any]:
    return [
        with_teacher(
            random_groups(s, lengths=lengths, version=s, with_reference=True), seed=NUM_STEPS + s
        )
        for s in range(NUM_STEPS)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Any]]:
    """Results by (number of ranks, case)."""
    model_dir = save_llama(tmp_path_factory.mktemp("model"))
    jobs = {
        name: (model_dir, sections, _batches(_lengths(name)))
        for name, sections in {**CASES, **OWN_BASELINE, **LIKE_FSDP2}.items()
    }
    return {(n, name): found for n in (1, 2) for name, found in run_ranks(train, n, jobs).items()}


def _comparable(metrics: dict[str, float]) -> dict[str, float]:
    """All but times, and what rounding to bfloat16 can tip over (compared apart)."""
    return {k: v for k, v in metrics.items() if not k.endswith(("_s", "_bf16"))}


def _assert_same(found: Any, wanted: Any) -> None:
    """Weights within 1e-5, where steps move them by 3e-4; metrics within a ten-thousandth."""
    for name, values in wanted[2].items():
        np.testing.assert_allclose(found[2][name], values, atol=1e-5, rtol=0, err_msg=name)
    for metrics, expected in zip(found[0], wanted[0], strict=True):
        # the gradient norm shows a wrong scale, which AdamW would hide from the weights
        assert _comparable(metrics) == pytest.approx(_comparable(expected), rel=1e-4, abs=1e-6)
    changed = "learner/params_changed_fraction_bf16"
    assert 0.01 < wanted[0][-1][changed] < 1
    assert found[0][-1][changed] == pytest.approx(wanted[0][-1][changed], abs=2e-3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_s2_s14_ranks_batching_and_backend_do_not_change_the_trained_weights(
    trained: dict[tuple[int, str], list[Any]], ranks: int, case: str
) -> None:
    _assert_same(trained[ranks, case][0], trained[1, "packed"][0])


@pytest.mark.parametrize("case", OWN_BASELINE)
def test_s2_two_ranks_train_as_one(trained: dict[tuple[int, str], list[Any]], case: str) -> None:
    _assert_same(trained[2, case][0], trained[1, case][0])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", LIKE_FSDP2)
def test_zero3_trains_as_fsdp2_however_the_passes_fall(
    trained: dict[tuple[int, str], list[Any]], case: str, ranks: int
) -> None:
    _assert_same(trained[ranks, case][0], trained[1, case.removesuffix(", zero3")][0])


def test_s21_ppo_trains_a_critic_too_and_its_values_are_those_of_one_rank(
    trained: dict[tuple[int, str], list[Any]],
) -> None:
    case = "ppo, several updates a batch"
    (metrics, _, weights, _), *_ = trained[2, case]
    (alone, _, wanted, _), *_ = trained[1, case]
    assert any(n.startswith("critic.") for n in weights)
    assert np.abs(weights["critic.value_head.weight"]).max() > 1e-4
    assert metrics[-1]["critic/value_mean"] != 0
    for found, expected in zip(metrics, alone, strict=True):
        assert found["critic/value_mean"] == pytest.approx(expected["critic/value_mean"], abs=1e-6)
    np.testing.assert_allclose(
        weights["critic.value_head.bias"], wanted["critic.value_head.bias"], atol=1e-6
    )


@pytest.mark.parametrize("case", ["online dpo", "on-policy distillation"])
def test_what_these_learn_from_reaches_every_rank(
    trained: dict[tuple[int, str], list[Any]], case: str
) -> None:
    """Two ranks train as one, so it is enough to see that one of them learnt from it."""
    [(metrics, _, weights, _)] = trained[1, case]
    _, _, plain, _ = trained[1, "several updates a batch"][0]
    if case == "online dpo":
        assert [m["preference/pairs"] for m in metrics] == [4.0] * NUM_STEPS
        assert all(m["preference/margin"] != 0 for m in metrics)
    else:
        assert all(m["distillation/teacher_gap"] != 0 for m in metrics)
    assert max(np.abs(weights[n] - plain[n]).max() for n in weights) > 1e-4


def test_the_weights_moved_far_more_than_the_tolerance(
    trained: dict[tuple[int, str], list[Any]], tmp_path: Path
) -> None:
    from tests.support.builders.tiny_learner import build_llama

    start = dict(build_llama().named_parameters())
    _, _, weights, _ = trained[2, "packed"][0]
    moved = [np.abs(weights[f"lm.{n}"] - p.detach().numpy()).max() for n, p in start.items()]
    assert min(moved) > 1e-4


def test_s3_ranks_hold_equal_weights_and_report_equal_metrics(
    trained: dict[tuple[int, str], list[Any]],
) -> None:
    for case in (*CASES, *OWN_BASELINE, *LIKE_FSDP2):
        (metrics_0, _, full_0, _), (metrics_1, _, full_1, _) = trained[2, case]
        for name, values in full_0.items():
            np.testing.assert_array_equal(full_1[name], values, err_msg=f"{case}: {name}")
        assert list(map(_comparable, metrics_0)) == list(map(_comparable, metrics_1))


def test_every_rank_has_what_all_ranks_kept_for_the_samples(
    trained: dict[tuple[int, str], list[Any]],
) -> None:
    """Log-probabilities within what the weights of earlier steps differ by."""
    for case in (*CASES, *OWN_BASELINE, *LIKE_FSDP2):
        [(*_, alone)], (*_, kept_0), (*_, kept_1) = trained[1, case], *trained[2, case]
        for wanted, *found in zip(alone, kept_0, kept_1, strict=True):
            assert wanted, case
            assert [set(kept) for kept in found] == [set(wanted)] * 2, case
            for name, one in wanted.items():
                first, second = (kept[name] for kept in found)
                for field in ("learner_logprobs", "correction_weights", "trained"):
                    values = getattr(one, field)
                    np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
                    if values is None:
                        assert (case.startswith("online dpo"), getattr(first, field)) == (
                            True,
                            None,
                        )
                    else:
                        message = f"{case}: {name}, {field}"
                        close = {"atol": 1e-3, "rtol": 1e-3, "err_msg": message}
                        np.testing.assert_allclose(getattr(first, field), values, **close)


@pytest.mark.parametrize("case", ["packed", "zero3"])
def test_shards_of_all_ranks_make_up_each_checkpoint_tensor_exactly_once(
    trained: dict[tuple[int, str], list[Any]], case: str
) -> None:
    from tests.support.builders.tiny_learner import build_llama

    names = {n for n, _ in build_llama().named_parameters()}  # tied: no lm_head
    (_, shards_0, full, _), (_, shards_1, *_) = trained[2, case]
    assert set(shards_0) == set(shards_1) == names
    for name in names:
        merged = np.full(full[f"lm.{name}"].size, np.nan, np.float32)
        for shape, offset, values in (shards_0[name], shards_1[name]):
            assert shape == full[f"lm.{name}"].shape
            assert np.isnan(merged[offset : offset + values.size]).all()
            merged[offset : offset + values.size] = values
        np.testing.assert_array_equal(merged, full[f"lm.{name}"].reshape(-1))
