"""Learner ranks of each backend: what they publish, and in which type they reduce gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.weights.read_version import (
    open_version,
    read,
)
from rlhf_cluster.weights.store import commit, latest, write_shard
from tests.support.builders.tiny_learner import (
    full_parameters,
    learner_config,
    random_groups,
    save_llama,
)
from tests.support.processes.rank_processes import run_ranks

NO_CLIPPING = {"max_grad_norm": 1e9}  # scaled gradients would fill their last bits
QLORA = {"rank": 5, "quantize_base": True}
CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "zero3": {"backend": "zero3"},
    "fsdp2, bfloat16": {"dtype": "bfloat16"},
    "zero3, bfloat16": {"dtype": "bfloat16", "backend": "zero3"},
    "lora": {"lora": {"rank": 5}},
    "dora": {"lora": {"rank": 5, "dora": True}},
    "zero3, lora": {"lora": {"rank": 5}, "backend": "zero3"},
    "zero3, dora": {"lora": {"rank": 5, "dora": True}, "backend": "zero3"},
    "qlora": {"lora": QLORA},
    "zero3, qlora": {"lora": QLORA, "backend": "zero3"},
    "qlora, bfloat16": {"lora": QLORA, "dtype": "bfloat16"},
    "zero3, qlora, bfloat16": {"lora": QLORA, "dtype": "bfloat16", "backend": "zero3"},
}
RANKS = 3
"""No size of the model is a multiple of 3, so that shards are uneven, and padded by ZeRO-3."""
ONE_RANK = ("fsdp2", "lora", "dora", "qlora")


def train_and_write(rank: int, world_size: int, address: str | None, job: Any) -> Any:
    """(this rank's gradients of the step, its shard report, the whole parameters) after a step.

    Adapters are written as such, on an anchor, and in full beside it.
    """
    from rlhf_cluster.learner.learner_rank import LearnerRank
    from rlhf_cluster.learner.publish import (
        host_copy,
        local_parts,
    )

    model_dir, settings, root = job
    as_adapters = "lora" in settings
    weights = {"format": "adapter" if as_adapters else "full"}
    config = learner_config(model_dir, learner=settings | NO_CLIPPING, weights=weights)
    learner = LearnerRank(config, model_dir, rank, world_size, address)
    learner.setup()
    anchors = []
    if as_adapters:
        learner.snapshot()
        anchors = [learner.write_snapshot(root)]
    model: Any = learner.model
    gradients, step = {}, model.step

    def keep(rate: float) -> None:
        gradients.update({n: g.detach().reshape(-1).numpy().copy() for n, g in model.gradients()})
        step(rate)

    model.step = keep
    learner.train_step(random_groups(0))
    learner.snapshot()
    report = learner.write_snapshot(root, 0 if as_adapters else None)
    if as_adapters:
        parts = host_copy(local_parts(learner.model), torch.float32)
        anchors += [write_shard(in_full(root), 1, rank, parts)]
    full = {name: p.float().numpy() for name, p in full_parameters(learner.policy).items()}
    learner.close()
    return gradients, report, full, anchors


def in_full(root: str | Path) -> str:
    return f"{root}, in full"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def trained(root: Path) -> dict[tuple[int, str], list[Any]]:
    """Results of the ranks by (number of ranks, case)."""
    model_dir = save_llama(root / "model")
    jobs = {
        n: {name: (model_dir, CASES[name], str(root / f"{name} {n}")) for name in names}
        for n, names in ((1, ONE_RANK), (RANKS, tuple(CASES)))
    }
    return {
        (n, name): found
        for n in jobs
        for name, found in run_ranks(train_and_write, n, jobs[n]).items()
    }


@pytest.fixture(scope="module")
def published(root: Path, trained: dict[tuple[int, str], list[Any]]) -> dict[Any, dict[str, Any]]:
    """The tensors of each committed version, each verified against its hash."""
    found = {}
    for (n, name), ranks in trained.items():
        if anchors := [parts[0] for *_, parts in ranks if parts]:
            commit(root / f"{name} {n}", 0, anchors, keep=1)
            commit(in_full(root / f"{name} {n}"), 1, [parts[1] for *_, parts in ranks], keep=1)
        version = commit(root / f"{name} {n}", 1, [report for _, report, *_ in ranks], keep=1)
        found[n, name] = {name: tensor.numpy() for name, tensor in read(version.path)}
    return found


@pytest.mark.parametrize("case", ["fsdp2", "zero3"])
def test_s26_ranks_publish_the_whole_parameters_each_writing_its_own_shard(
    trained: dict[tuple[int, str], list[Any]], published: dict[Any, dict[str, Any]], case: str
) -> None:
    _, _, full, _ = trained[RANKS, case][0]
    assert {f"lm.{name}" for name in published[RANKS, case]} == set(full)
    for name, values in published[RANKS, case].items():
        np.testing.assert_array_equal(values, full[f"lm.{name}"])
    sizes = [report.num_bytes for _, report, *_ in trained[RANKS, case]]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize("case", ["lora", "dora", "zero3, dora", "qlora", "zero3, qlora"])
@pytest.mark.parametrize("ranks", [1, RANKS])
def test_adapters_of_ranks_are_merged_by_readers_to_what_these_publish_in_full(
    root: Path, published: dict[Any, dict[str, Any]], case: str, ranks: int
) -> None:
    if (ranks, case) not in published:
        pytest.skip("ZeRO-3 is one with FSDP2 on one rank")
    own, full = latest(root / f"{case} {ranks}"), latest(in_full(root / f"{case} {ranks}"))
    assert own is not None
    assert full is not None
    assert own.digest == full.digest
    assert len(published[ranks, case]) == own.num_tensors == full.num_tensors
    manifest = open_version(own.path)
    assert [link.version for link in manifest.chain] == [0]


@pytest.mark.parametrize("case", [name for name in CASES if "bfloat16" not in name])
def test_s24_ranks_publish_what_one_rank_publishes(
    published: dict[Any, dict[str, Any]], case: str
) -> None:
    alike = "fsdp2" if case == "zero3" else case.removeprefix("zero3, ")
    one, several = published[1, alike], published[RANKS, case]
    assert set(one) == set(several)
    for name, values in one.items():
        np.testing.assert_allclose(several[name], values, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("case", ["qlora, bfloat16", "zero3, qlora, bfloat16"])
def test_4_bit_weights_are_published_unrounded_also_with_bfloat16_passes(
    published: dict[Any, dict[str, Any]], case: str
) -> None:
    """The step moves them by less than 1e-3, to either side; what was loaded stays to the bit."""
    for name, values in published[1, "qlora"].items():
        found = published[RANKS, case][name]
        np.testing.assert_allclose(found, values, atol=1e-3, rtol=0, err_msg=name)
        assert "proj" in name or (found == values).all(), name


@pytest.mark.parametrize("case", ["zero3, bfloat16", "zero3"])
def test_zero3_publishes_float32_masters_also_when_it_computes_in_bfloat16(
    trained: dict[tuple[int, str], list[Any]], published: dict[Any, dict[str, Any]], case: str
) -> None:
    _, _, working, _ = trained[RANKS, case][0]
    for name, values in published[RANKS, case].items():
        rounded = _as_bf16(values) if "bfloat16" in case else values
        np.testing.assert_array_equal(rounded, working[f"lm.{name}"])


def _gradient(trained: Any, ranks: int, case: str) -> np.ndarray:
    """The whole gradient, in the order of the ranks' parts of each parameter."""
    parts = [gradients for gradients, *_ in trained[ranks, case]]
    return np.concatenate([p[name] for name in sorted(parts[0]) for p in parts])


def _as_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_bfloat16_gradients_of_several_ranks_are_reduced_in_float32(
    trained: dict[tuple[int, str], list[Any]], backend: str
) -> None:
    """Each rank's gradients have 8 significant bits; a sum in float32 keeps more, one in bfloat16
    rounds every element back to 8."""
    gradient = _gradient(trained, RANKS, f"{backend}, bfloat16")
    assert gradient.dtype == np.float32
    assert (_as_bf16(gradient) != gradient).mean() > 0.3


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_backends_give_the_same_gradient(trained: dict[tuple[int, str], list[Any]]) -> None:
    wanted = _gradient(trained, 1, "fsdp2")
    assert _relative(_gradient(trained, RANKS, "fsdp2"), wanted) < 1e-5
    assert _relative(_gradient(trained, RANKS, "zero3"), wanted) < 1e-5
    for backend in ("fsdp2", "zero3"):  # 2**-8 an operation, less where errors cancel
        assert _relative(_gradient(trained, RANKS, f"{backend}, bfloat16"), wanted) < 0.05
