"""Recovery of groups that are trained more than once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.buffer.group_recovery import (
    Recovery,
    read_trained,
)
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import RecordError
from tests.support.builders.stored_groups import (
    recovery,
    run_steps,
    write,
)


def replaying(root: Path, **settings: Any) -> Recovery:
    """Groups may be trained three times, until two steps after the first."""
    return recovery(root, **{"max_uses": 3, "reuse_steps": 2, "keep_steps": 0, **settings})


def test_a_group_that_may_be_trained_again_stays_until_it_is_too_old(tmp_path):
    there = run_steps(tmp_path, replaying(tmp_path), 5)
    open_groups = list(range(10, 14))
    assert there[-1] == [6, 7, 8, 9, *open_groups], "first trained at steps 4 and 5"


@pytest.mark.parametrize("name", ["step-000004", "step-000004.partial"])
def test_what_a_checkpoint_on_disk_may_train_again_stays_until_it_goes(tmp_path, name):
    run = replaying(tmp_path, span=1)
    folder = tmp_path / "checkpoints" / name
    folder.mkdir(parents=True)
    there = run_steps(tmp_path, run, 9)
    assert there[-1] == [4, 5, 6, 7, 8, 9, *range(14, 22)], "of steps 3 to 5; of 8 and 9; open"
    folder.rmdir()
    run.record_trained(10, [18, 19])
    assert ExperienceStore(tmp_path / "experience").numbers() == [16, 17, 18, 19, 20, 21]


def test_every_use_is_on_record_and_a_rewind_takes_the_later_ones_back(tmp_path):
    store = ExperienceStore(tmp_path / "experience")
    for number in range(4):
        write(store, number)
    run = replaying(tmp_path, keep_steps=9)
    run.record_trained(1, [0, 1])
    run.record_trained(2, [2, 0])
    run.record_trained(3, [3, 0])
    assert read_trained(store.root) == {0: (1, 2, 3), 1: (1,), 2: (2,), 3: (3,)}
    again = replaying(tmp_path, step=2, keep_steps=9)
    again.rewind()
    assert read_trained(store.root) == {0: (1, 2), 1: (1,), 2: (2,)}
    again.record_trained(3, [3, 0])
    with pytest.raises(RecordError, match=r"group 0 was trained by steps \[1, 2, 3, 4\].* 3 times"):
        again.record_trained(4, [0])


@pytest.mark.parametrize(("settings", "second"), [({}, 2), ({"max_uses": 2, "reuse_steps": 2}, 1)])
def test_a_group_that_is_trained_once_too_often_is_an_error(tmp_path, settings, second):
    """Without replay in another step; with it twice in one."""
    write(ExperienceStore(tmp_path / "experience"), 0)
    run = recovery(tmp_path, keep_steps=9, **settings)
    run.record_trained(1, [0])
    with pytest.raises(RecordError, match=rf"group 0 was trained by steps \[1, {second}\]"):
        run.record_trained(second, [0])


def test_what_cannot_be_trained_again_is_named(tmp_path):
    told: list[str] = []
    store = ExperienceStore(tmp_path / "experience")
    for number in range(3):
        write(store, number)
    write(ExperienceStore(store.root, made_by="1" * 32), 3)
    store.path(1).write_bytes(store.path(1).read_bytes()[:-1])
    run = replaying(tmp_path, step=2, tell=told.append)
    run.rewind()
    assert run.find_unusable([0, 1, 2, 3, 4]) == [1, 3, 4]
    assert [text.split(":")[0] for text in told] == [
        "group 1 is not replayed",
        "group 3 is not replayed",
        "group 4 is not replayed",
    ]
