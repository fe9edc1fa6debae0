"""Learner ranks as processes: the same batch must train the same weights, however it is divided.

One pair of processes runs every two-rank case in turn, each with a group of its own; one process
runs the single-rank cases.
"""

from __future__ import annotations

import multiprocessing as mp
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learning_cases import free_address, learner_config, random_groups, save_llama

DEADLINE_S = 240
NUM_STEPS = 3

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "packed": {},
    "padded": {"learner": {"batching": "padded"}},
    "small micro-batches": {"learner": {"tokens_per_micro_batch": 70}},
    "padded, one row a pass": {"learner": {"batching": "padded", "tokens_per_micro_batch": 32}},
    "checkpointed": {"learner": {"gradient_checkpointing": True}},
    "with reference": {
        "algorithm": {"kl_coef": 0.1, "type": "grpo"},
        "scoring": {"reference": True, "rewards": [{"type": "exact_match"}]},
    },
}
ADVERSARIAL = [24, *[1] * 15]
"""One long response and fifteen single tokens: the ranks need very different numbers of passes."""


def _run_rank(rank: int, model_dir: str, jobs: list[Any], results: Any) -> None:
    """Train every job and put (rank, key, metrics of each step, this rank's shards)."""
    from rlhf_cluster.learning.learner import LearnerRank

    try:
        for key, world_size, address, sections, batches in jobs:
            config = learner_config(model_dir, **sections)
            learner = LearnerRank(config, model_dir, rank, world_size, address)
            learner.setup()
            metrics = [dict(learner.train_step(groups).metrics) for groups in batches]
            learner.snapshot()
            assert learner._snapshot is not None
            shards = {
                p.name: (p.shape, p.offset, p.tensor.numpy().copy()) for p in learner._snapshot[1]
            }
            full = {
                n: p.full_tensor().detach().numpy().copy()  # type: ignore[attr-defined]
                for n, p in learner.policy.named_parameters()
            }
            learner.close()
            results.put((rank, key, metrics, shards, full))
        results.put((rank, None, None, None, None))
    except BaseException as error:
        results.put((rank, None, f"{type(error).__name__}: {error}", None, None))
        raise


def _run(world_size: int, model_dir: str, jobs: list[tuple[str, Any, Any]]) -> dict[str, list[Any]]:
    """{key: [result of rank 0, of rank 1...]} of every job, or fail with the rank's error."""
    context = mp.get_context("spawn")
    results = context.Queue()
    addressed = [(k, world_size, free_address(), s, b) for k, s, b in jobs]
    processes = [
        context.Process(target=_run_rank, args=(r, model_dir, addressed, results), daemon=True)
        for r in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[str, list[Any]] = {key: [None] * world_size for key, _, _ in jobs}
    running = world_size
    try:
        while running:
            rank, key, metrics, shards, full = results.get(timeout=DEADLINE_S)
            if key is None:
                assert metrics is None, f"rank {rank}: {metrics}"
                running -= 1
            else:
                found[key][rank] = (metrics, shards, full)
    finally:
        for process in processes:
            process.kill() if running else process.join(30)
    return found


def _batches(lengths: list[int] | None = None) -> list[Any]:
    return [
        random_groups(s, lengths=lengths, version=s, with_reference=True) for s in range(NUM_STEPS)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Any]]:
    """Results by (number of ranks, case)."""
    model_dir = save_llama(tmp_path_factory.mktemp("model"))
    jobs = [(name, sections, _batches()) for name, sections in CASES.items()]
    jobs.append(("adversarial", {"learner": {"tokens_per_micro_batch": 32}}, _batches(ADVERSARIAL)))
    found = {(2, k): v for k, v in _run(2, model_dir, jobs).items()}
    return found | {(1, k): v for k, v in _run(1, model_dir, jobs).items()}


def _comparable(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith("_s")}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", [c for c in CASES if c != "with reference"])
def test_s2_s14_ranks_and_batching_do_not_change_the_trained_weights(
    trained: dict[tuple[int, str], list[Any]], ranks: int, case: str
) -> None:
    expected_metrics, _, expected = trained[1, "packed"][0]
    metrics, _, weights = trained[ranks, case][0]
    for name, values in expected.items():
        np.testing.assert_allclose(weights[name], values, atol=1e-5, rtol=0, err_msg=name)
    for found, wanted in zip(metrics, expected_metrics, strict=True):
        # the gradient norm shows a wrong scale, which AdamW would hide from the weights
        assert _comparable(found) == pytest.approx(_comparable(wanted), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", ["with reference", "adversarial"])
def test_s2_two_ranks_train_as_one_with_a_reference_and_with_adversarial_lengths(
    trained: dict[tuple[int, str], list[Any]], case: str
) -> None:
    wanted_metrics, _, wanted = trained[1, case][0]
    metrics, _, weights = trained[2, case][0]
    for name, values in wanted.items():
        np.testing.assert_allclose(weights[name], values, atol=1e-5, rtol=0, err_msg=name)
    for found, expected in zip(metrics, wanted_metrics, strict=True):
        assert _comparable(found) == pytest.approx(_comparable(expected), rel=1e-4, abs=1e-6)


def test_the_weights_moved_far_more_than_the_tolerance(
    trained: dict[tuple[int, str], list[Any]], tmp_path: Path
) -> None:
    from tests.learning_cases import build_llama

    start = dict(build_llama().named_parameters())
    _, _, weights = trained[2, "packed"][0]
    moved = [np.abs(weights[f"lm.{n}"] - p.detach().numpy()).max() for n, p in start.items()]
    assert min(moved) > 1e-4


def test_s3_ranks_hold_equal_weights_and_report_equal_metrics(
    trained: dict[tuple[int, str], list[Any]],
) -> None:
    for case in (*CASES, "adversarial"):
        (metrics_0, _, full_0), (metrics_1, _, full_1) = trained[2, case]
        for name, values in full_0.items():
            np.testing.assert_array_equal(full_1[name], values, err_msg=f"{case}: {name}")
        assert list(map(_comparable, metrics_0)) == list(map(_comparable, metrics_1))


def test_shards_of_all_ranks_make_up_each_checkpoint_tensor_exactly_once(
    trained: dict[tuple[int, str], list[Any]],
) -> None:
    from tests.learning_cases import build_llama

    names = {n for n, _ in build_llama().named_parameters()}  # tied: no lm_head
    (_, shards_0, full), (_, shards_1, _) = trained[2, "packed"]
    assert set(shards_0) == set(shards_1) == names
    for name in names:
        merged = np.full(full[f"lm.{name}"].size, np.nan, np.float32)
        for shape, offset, values in (shards_0[name], shards_1[name]):
            assert shape == full[f"lm.{name}"].shape
            assert np.isnan(merged[offset : offset + values.size]).all()
            merged[offset : offset + values.size] = values
        np.testing.assert_array_equal(merged, full[f"lm.{name}"].reshape(-1))
