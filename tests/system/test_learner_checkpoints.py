"""Checkpoints of several ranks: what one process saved, others go on from, in any number.

Every set of processes runs all of its jobs in turn; those that load are other processes than those
that saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.builders.rank_checkpoints import (
    save,
    tensors,
    train,
    whole,
)
from tests.support.builders.tiny_learner import (
    learner_config,
    save_llama,
    sft_examples,
)
from tests.support.processes.rank_processes import run_ranks

BACKENDS: dict[str, dict[str, dict[str, Any]]] = {
    "fsdp2": {"learner": {"weight_decay": 0.1}},
    "zero3": {"learner": {"weight_decay": 0.1, "backend": "zero3"}},
}
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "critic": {
        "algorithm": {"type": "ppo"},
        "learner": {"epochs": 2, "minibatches": 2},
        "critic": {"learning_rate": 1e-3},
    },
    "adapters": {"learner": {"lora": {"rank": 3, "dora": True}}},
    "bfloat16 passes": {"learner": {"dtype": "bfloat16"}},
    "bfloat16 passes, zero3": {"learner": {"dtype": "bfloat16", "backend": "zero3"}},
}
SAVED = {**BACKENDS, **FEATURES}


def _learner(rank: int, world_size: int, address: str | None, model_dir: str, case: str) -> Any:
    from rlhf_cluster.learner.learner_rank import LearnerRank

    config = learner_config(model_dir, **SAVED[case])
    learner = LearnerRank(config, model_dir, rank, world_size, address)
    learner.setup()
    return learner


def straight(rank: int, world_size: int, address: str | None, job: Any) -> Any:
    """Three steps, a checkpoint, two more: (folder, numbers, all at 3, own at 5, all at 5)."""
    model_dir, case, root = job
    learner = _learner(rank, world_size, address, model_dir, case)
    learner.sft_step(sft_examples())
    train(learner, 0, 3)
    saved = save(learner, Path(root))
    at_3 = whole(learner)
    train(learner, 3, 5)
    found = (*saved, at_3, tensors(learner), whole(learner))
    learner.close()
    return found


def resumed(rank: int, world_size: int, address: str | None, job: Any) -> Any:
    """Two steps from a checkpoint: (all at 3, own at 5, all at 5)."""
    model_dir, case, folder, state = job
    learner = _learner(rank, world_size, address, model_dir, case)
    learner.load_state(folder, state)
    at_3 = whole(learner)
    train(learner, 3, 5)
    found = (at_3, tensors(learner), whole(learner))
    learner.close()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What `straight` gave by case, and `resumed` by (ranks, saved as, loaded as); two ranks save."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model_dir = save_llama(folder / "model")
    jobs = {case: (model_dir, case, str(folder / case)) for case in SAVED}
    saved = run_ranks(straight, 2, jobs)
    again = {
        (a, b): (model_dir, b, *saved[a][0][:2])
        for a, b in [(a, b) for a in BACKENDS for b in BACKENDS] + [(f, f) for f in FEATURES]
    }
    found = {
        (n, *key): result for n in (1, 2) for key, result in run_ranks(resumed, n, again).items()
    }
    return saved, found


def _assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("case", SAVED)
def test_s31_two_ranks_go_on_as_if_nothing_had_happened(
    results: tuple[Any, Any], case: str
) -> None:
    saved, found = results
    for rank in (0, 1):
        _assert_equal(found[2, case, case][rank][1], saved[case][rank][3])
    moved = saved[case][0][2]["policy/step/" + next(iter(_names(saved[case][0][2])))]
    assert moved[0] == 3 * (4 if case == "critic" else 1)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loaded_as", BACKENDS)
@pytest.mark.parametrize("saved_as", BACKENDS)
def test_s31_any_number_of_ranks_of_either_backend_loads_it_to_the_bit_and_goes_on(
    results: tuple[Any, Any], saved_as: str, loaded_as: str, ranks: int
) -> None:
    saved, found = results
    at_3, _, at_5 = found[ranks, saved_as, loaded_as][0]
    _assert_equal(at_3, saved[saved_as][0][2])
    wanted = saved[saved_as][0][4]
    for name, values in wanted.items():
        # other ranks add gradients up in another order; steps move weights by 2e-4
        np.testing.assert_allclose(at_5[name], values, atol=1e-5, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("case", ["critic", "adapters", "bfloat16 passes"])
def test_s31_one_rank_loads_all_that_two_saved(results: tuple[Any, Any], case: str) -> None:
    saved, found = results
    _assert_equal(found[1, case, case][0][0], saved[case][0][2])
    kinds = {"/".join(name.split("/")[:2]) for name in found[1, case, case][0][0]}
    models = ["policy", "critic"] if case == "critic" else ["policy"]
    assert kinds == {
        f"{m}/{k}" for m in models for k in ("weight", "exp_avg", "exp_avg_sq", "step")
    }


def _names(tensors: dict[str, np.ndarray]) -> list[str]:
    return [name.removeprefix("policy/step/") for name in tensors if name.startswith("policy/step")]
