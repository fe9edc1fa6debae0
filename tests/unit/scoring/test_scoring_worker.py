"""Which groups a scoring worker stores, and when."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import StoreError
from rlhf_cluster.records import RolloutGroup, WeightVersion
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_group, make_prompt, make_rollouts

CONFIG = {"rewards": [{"type": "exact_match"}], "dtype": "float32"}
APART = {"pools": {"policies": {"serves": ["reference"], "dtype": "float32"}}}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture
def worker(model_dir: Path) -> Callable[..., ScoringWorker]:
    def build(
        root: Path, pool: str = "scoring", write_file: Any = os.write, **scoring: Any
    ) -> ScoringWorker:
        store = ExperienceStore(root, write_file=write_file)
        config = tiny_config(scoring={**CONFIG, **scoring})
        made = ScoringWorker(config, str(model_dir), "scoring-0", store, pool)
        made.start()
        return made

    return build


@pytest.fixture
def reference(tmp_path: Path) -> WeightVersion:
    tensors = tiny_llama.checkpoint_tensors(tiny_llama.build(seed=2, max_position=48))
    return tiny_llama.publish(tmp_path / "reference", 6, tensors)


def group(purpose: Any = "train") -> RolloutGroup:
    prompt = make_prompt("w2 w3", {"answer": "w5"}, ids=[2, 3])
    (rollout,) = make_rollouts(prompt, [[5, 1]])
    rollout = replace(rollout, versions=np.full(2, 3, np.int32))
    return make_group(prompt, [rollout], 4, purpose)


def test_a_group_is_on_disk_before_its_answer(tmp_path, worker):
    summary, experience = worker(tmp_path).score(group())
    assert ExperienceStore(tmp_path).read(4).summary() == summary == experience.summary()
    assert ExperienceStore(tmp_path).header(4).newest_version == 3


def test_the_file_says_with_which_reference_it_was_scored(tmp_path, worker, reference):
    scoring = worker(tmp_path, reference=True)
    scoring.load_reference(reference)
    scoring.score(group())
    assert ExperienceStore(tmp_path).header(4).newest_version == 6


def test_a_part_is_not_stored_and_takes_its_reference_along(tmp_path, worker, reference):
    other, own = (
        worker(tmp_path / "x", "policies", reference=True, **APART),
        worker(tmp_path, reference=True, **APART),
    )
    other.load_reference(reference)
    number, part = other.score_part(group())
    assert (number, part.reference_version) == (1, 6)
    assert not (tmp_path / "x").exists()
    own.join(group(), own.score_part(group())[1], part)
    assert ExperienceStore(tmp_path).header(4).newest_version == 6


def test_held_out_groups_are_not_stored(tmp_path, worker):
    worker(tmp_path / "x").score(group("evaluate"))
    assert not (tmp_path / "x").exists()


def test_a_group_that_cannot_be_stored_is_no_answer(tmp_path, worker):
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    scoring = worker(tmp_path, write_file=full)
    with pytest.raises(StoreError, match=r"g00000004\.arrow: \d+ bytes .* No space left"):
        scoring.score(group())
    assert scoring.health()["num_in_flight"] == 0
