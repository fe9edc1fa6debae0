"""What ranks hold while they load: their shards and a layer, and not the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.builders.sized_llama import save_sized_llama
from tests.support.builders.tiny_learner import learner_config, save_llama
from tests.support.processes.peak_memory import PeakMemory
from tests.support.processes.rank_processes import run_ranks

RANKS = 2


def load(rank: int, world_size: int, address: str | None, job: Any) -> dict[str, Any]:
    """Peak bytes of a rank's setup, and a digest of its shards; `whole`: the model is loaded first."""
    import hashlib

    from rlhf_cluster.learner import training_rank
    from rlhf_cluster.learner.learner_rank import LearnerRank

    folder, whole = job
    training_rank.warm(learner_config(folder).learner, folder)
    if whole:
        training_rank.outline_policy = lambda *_: None  # type: ignore[assignment]
    learner = LearnerRank(learner_config(folder), folder, rank, world_size, address)
    with PeakMemory() as memory:
        learner.setup()
    digest = hashlib.sha256()
    for part in learner.model.shards():
        digest.update(part.tensor.numpy().tobytes())
    learner.close()
    return {"peak": memory.peak, "digest": digest.hexdigest()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("sized")
    total, largest = save_sized_llama(folder / "sized", hidden=512, layers=48, vocabulary=2048)
    # The first model of a process imports what it needs, which stays.
    jobs = {"imports": (save_llama(folder / "tiny"), False)}
    jobs |= {"sharded": (str(folder / "sized"), False), "whole": (str(folder / "sized"), True)}
    return {"found": run_ranks(load, RANKS, jobs), "alive": total / RANKS + largest}


def test_a_rank_holds_its_shards_and_a_layer_while_it_loads(loaded):
    peaks = [rank["peak"] / loaded["alive"] for rank in loaded["found"]["sharded"]]
    # FSDP2 gathers the next layer while one computes, each in two copies on a CPU.
    assert max(peaks) <= 1.5


def test_loading_the_whole_model_first_would_be_seen(loaded):
    peaks = [rank["peak"] / loaded["alive"] for rank in loaded["found"]["whole"]]
    assert min(peaks) >= 1.8


def test_the_shards_are_the_same_either_way(loaded):
    found = loaded["found"]
    for one, other in zip(found["sharded"], found["whole"], strict=True):
        assert one["digest"] == other["digest"]
