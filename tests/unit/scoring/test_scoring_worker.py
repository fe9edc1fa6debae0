"""One scoring worker, with a scorer that is a fake."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import StoreError
from rlhf_cluster.records import ExperienceGroup, RolloutGroup, Ticket
from rlhf_cluster.scoring.score_parts import ScorePart
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import (
    make_group,
    make_prompt,
    make_rollout,
    make_version,
)


class FakeScorer:
    def part(self, group: RolloutGroup, with_logprobs: bool) -> ScorePart:
        return ScorePart(versions={"gold": group.group_id} if with_logprobs else {})

    def join(
        self, group: RolloutGroup, parts: Sequence[ScorePart], with_logprobs: bool
    ) -> ExperienceGroup:
        assert all(part.versions == {"gold": group.group_id} for part in parts) or not with_logprobs
        return make_group(group.ticket, group.prompt, [1.0], version=3)

    def load_reference(self, version: Any) -> None:
        pass


def worker(root: Path, **settings: Any) -> ScoringWorker:
    store = ExperienceStore(root, **settings)
    made = ScoringWorker(tiny_config(), "model", "scoring-0", store=store)
    made._scorer = FakeScorer()  # type: ignore[assignment]
    return made


def group(purpose: Any = "train") -> RolloutGroup:
    ticket, prompt = Ticket(number=4, version=3, purpose=purpose), make_prompt(4)
    rollout = make_rollout(ticket, prompt, version=3)
    return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=(rollout,))


def test_a_group_is_on_disk_before_its_answer(tmp_path):
    summary, experience = worker(tmp_path).score(group())
    assert ExperienceStore(tmp_path).read(4).summary() == summary == experience.summary()
    assert ExperienceStore(tmp_path).header(4).newest_version == 3


def test_the_file_says_with_which_reference_it_was_scored(tmp_path):
    scoring = worker(tmp_path)
    scoring.load_reference(make_version(6))
    scoring.score(group())
    assert ExperienceStore(tmp_path).header(4).newest_version == 6


def test_a_part_is_not_stored_and_takes_its_reference_along(tmp_path):
    other, own = worker(tmp_path / "x"), worker(tmp_path)
    other.load_reference(make_version(6))
    number, part = other.score_part(group())
    assert (number, part.reference_version) == (1, 6)
    assert not (tmp_path / "x").exists()
    own.join(group(), own.score_part(group())[1], part)
    assert ExperienceStore(tmp_path).header(4).newest_version == 6


def test_held_out_groups_are_not_stored(tmp_path):
    worker(tmp_path / "x").score(group("evaluate"))
    assert not (tmp_path / "x").exists()


def test_a_group_that_cannot_be_stored_is_no_answer(tmp_path):
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    scoring = worker(tmp_path, write_file=full)
    with pytest.raises(StoreError, match=r"g00000004\.arrow: \d+ bytes .* No space left"):
        scoring.score(group())
    assert scoring._num_in_flight == 0
