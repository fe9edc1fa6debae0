"""Which stored groups are used again, and which files go."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster.buffer.group_recovery import (
    TRAINED,
    made_by,
    read_trained,
    recovery_of,
    store_of,
)
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import StoreError
from rlhf_cluster.records import StoredGroup, Ticket
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.stored_groups import (
    recovery,
    run_steps,
    write,
)
from tests.support.fakes.services import make_prompt


def test_a_group_of_the_ticket_and_its_versions_is_finished_at_once(tmp_path):
    found = recovery(tmp_path, step=4)
    write(ExperienceStore(tmp_path / "experience"), 7, version=3)
    handle, summary = found.recover(Ticket(number=7, version=2), make_prompt(7))
    assert handle == StoredGroup(7)
    assert (summary.group_id, summary.oldest_version) == ("g00000007", 3)
    assert summary.rewards == (1.0, 0.0)


@pytest.mark.parametrize(
    "case", ["no file", "older", "newer", "reference", "id", "tokens", "settings", "no checkpoint"]
)
def test_any_other_group_is_generated_again(tmp_path, case):
    store = ExperienceStore(tmp_path / "experience")
    ticket, prompt, step = Ticket(number=7, version=2), make_prompt(7), 4
    if case != "no file":
        versions = {"older": 1, "newer": 5}
        write(store, 7, versions.get(case, 4), reference=5 if case == "reference" else 4)
    if case == "id":
        prompt = dataclasses.replace(prompt, prompt_id="p8")
    if case == "tokens":
        prompt = dataclasses.replace(prompt, token_ids=np.array([1, 2], dtype=np.int32))
    if case == "settings":
        store = ExperienceStore(store.root, made_by="1" * 32)
    checkpoint = None if case == "no checkpoint" else step
    assert recovery(tmp_path, step=checkpoint, store=store).recover(ticket, prompt) is None


def test_a_damaged_file_is_told_and_its_group_generated_again(tmp_path):
    told: list[str] = []
    store = ExperienceStore(tmp_path / "experience")
    write(store, 7, version=4)
    store.path(7).write_bytes(store.path(7).read_bytes()[:-1])
    again = recovery(tmp_path, step=4, tell=told.append)
    again.rewind()
    assert again.recover(Ticket(number=7, version=2), make_prompt(7)) is None
    assert len(told) == 1
    assert "g00000007 is generated again" in told[0]
    assert str(store.path(7)) in told[0]


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"attempt": "x"}', b"[]", None])
def test_an_attempt_that_cannot_be_read_is_an_error_and_costs_no_group(tmp_path, damage):
    store = ExperienceStore(tmp_path / "experience")
    recovery(tmp_path, step=4).rewind()
    recovery(tmp_path, step=4).rewind()
    write(store, 7, version=4, attempt=1)
    path = store.root / "attempt.json"
    path.unlink()
    path.mkdir() if damage is None else path.write_bytes(damage)
    with pytest.raises(
        StoreError, match=r"attempt\.json: the number of the attempt .*may be replaced by"
    ):
        recovery(tmp_path, step=4)
    assert store.path(7, 1).exists()


def test_damaged_notes_of_what_was_trained_are_told_and_the_run_goes_on(tmp_path):
    told: list[str] = []
    store = ExperienceStore(tmp_path / "experience")
    write(store, 7, version=4)
    (store.root / "trained.json").write_text('{"7": 3}')
    with pytest.raises(StoreError, match=r"trained\.json: which groups are trained cannot be read"):
        read_trained(store.root)
    again = recovery(tmp_path, step=4, tell=told.append)
    assert "continues without what it said" in told[0]
    again.rewind()
    assert again.recover(Ticket(number=7, version=2), make_prompt(7)) is not None
    again.record_trained(5, [7])
    assert read_trained(store.root) == {7: (5,)}


@pytest.mark.parametrize("fsync", ["never", "group"])
def test_notes_are_synced_with_the_groups(tmp_path, fsync, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    store = ExperienceStore(tmp_path / "experience", fsync=fsync)
    recovery(tmp_path, step=4, store=store).rewind()
    assert bool(synced) == (fsync == "group")


def test_a_rewound_timeline_leaves_nothing_that_a_later_one_could_take(tmp_path):
    """Version 5 of the first attempt is not version 5 of the second."""
    store = ExperienceStore(tmp_path / "experience")
    write(store, 7, version=4)
    write(store, 8, version=5)
    write(store, 9, version=4, reference=5)
    (store.root / ".g00000010.x.partial").write_bytes(b"half")
    recovery(tmp_path, step=4).rewind()
    assert [p.name for p in sorted(store.root.glob("*g0*"))] == ["g00000007.arrow"]
    third = recovery(tmp_path, step=6)
    third.rewind()
    assert third.recover(Ticket(number=8, version=2), make_prompt(8)) is None
    recovery(tmp_path, step=None).rewind()
    assert store.numbers() == []


def test_what_a_call_of_an_abandoned_attempt_leaves_late_is_never_used_and_goes(tmp_path):
    """Versions 3 and 4 of attempt 0 are not those of attempt 1; its file is not overwritten either."""
    late = ExperienceStore(tmp_path / "experience")
    recovery(tmp_path, step=2).rewind()
    write(late, 7, version=2)
    second = recovery(tmp_path, step=2)
    second.rewind()
    assert second.attempt == 1
    store = ExperienceStore(late.root)
    write(late, 8, version=3, attempt=0)
    write(late, 7, version=4, attempt=0)
    write(store, 9, version=4, attempt=1)
    for number in (8, 9):
        ticket = Ticket(number=number, version=0, attempt=1)
        assert second.recover(ticket, make_prompt(number)) is None, "late, and newer than step 2"
    found = second.recover(Ticket(number=7, version=0, attempt=1), make_prompt(7))
    assert found is not None
    assert found[1].oldest_version == 2
    assert store.read(7).summary().oldest_version == 2, "what a learner reads that lost the object"
    assert store.numbers() == [7, 9]
    third = recovery(tmp_path, step=4)
    third.rewind()
    assert ExperienceStore(late.root).files() == [(7, 2), (9, 2)]
    assert third.recover(Ticket(number=8, version=0), make_prompt(8)) is None
    assert third.recover(Ticket(number=9, version=0), make_prompt(9)) is not None


class DyingStore(ExperienceStore):
    """Every change of a file may be the last."""

    left = 0

    def _change(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1

    def remove(self, numbers: Iterable[int], attempt: int | None = None) -> None:
        self._change()
        super().remove(numbers, attempt)

    def adopt(self, number: int, attempt: int) -> None:
        self._change()
        super().adopt(number, attempt)


@pytest.mark.parametrize("changes", range(5))
def test_a_rewind_that_dies_anywhere_loses_nothing_that_the_next_one_keeps(tmp_path, changes):
    store = ExperienceStore(tmp_path / "experience")
    recovery(tmp_path, step=2).rewind()
    recovery(tmp_path, step=2).rewind()
    for number in range(4):
        write(store, number, version=number, attempt=1)
    write(store, 9, version=1, attempt=0)
    dying = DyingStore(store.root)
    dying.left = changes
    with contextlib.suppress(KeyboardInterrupt):
        recovery(tmp_path, step=2, store=dying).rewind()
    recovery(tmp_path, step=2).rewind()
    found = ExperienceStore(store.root)
    assert found.numbers() == [0, 1, 2]
    assert [number for number, _ in found.files()] == [0, 1, 2]


def test_a_rewind_goes_on_when_a_late_call_of_the_attempt_before_deletes_a_file(tmp_path):
    store = ExperienceStore(tmp_path / "experience")
    recovery(tmp_path, step=2).rewind()
    for number in range(3):
        write(store, number, version=number)
    again = recovery(tmp_path, step=2, store=store)
    files = again.files_to_settle()
    store.remove([1], attempt=0)
    again.settle(files)
    again.commit_rewind()
    assert ExperienceStore(store.root).files() == [(0, 1), (2, 1)]
    assert again.recover(Ticket(number=1, version=0), make_prompt(1)) is None


def test_steps_after_the_checkpoint_are_forgotten(tmp_path):
    store = ExperienceStore(tmp_path / "experience")
    for number in range(4):
        write(store, number)
    run = recovery(tmp_path, keep_steps=9)
    run.record_trained(1, [0, 1])
    run.record_trained(2, [2, 3])
    assert read_trained(store.root) == {0: (1,), 1: (1,), 2: (2,), 3: (2,)}
    recovery(tmp_path, step=1).rewind()
    assert read_trained(store.root) == {0: (1,), 1: (1,)}
    assert store.numbers() == [0, 1, 2, 3]


def test_without_checkpoints_the_last_steps_and_all_open_groups_stay(tmp_path):
    there = run_steps(tmp_path, recovery(tmp_path, keep_steps=2), 5)
    assert there[-1] == list(range(6, 14))
    there = run_steps(tmp_path / "x", recovery(tmp_path / "x", keep_steps=0), 5)
    assert there[-1] == list(range(10, 14))


@pytest.mark.parametrize("name", ["step-000002", "step-000002.partial"])
def test_what_a_checkpoint_on_disk_may_ask_for_stays_until_it_goes(tmp_path, name):
    run = recovery(tmp_path, span=2)
    folder = tmp_path / "checkpoints" / name
    folder.mkdir(parents=True)
    there = run_steps(tmp_path, run, 7)
    assert there[-1] == [4, 5, 6, 7, *range(12, 18)], "trained at steps 3 and 4, at 7, and open"
    folder.rmdir()
    run.record_trained(8, [14, 15])
    assert ExperienceStore(tmp_path / "experience").numbers() == [14, 15, 16, 17]


def test_what_a_checkpoint_that_may_be_under_way_may_ask_for_stays(tmp_path):
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    there = run_steps(tmp_path, recovery(tmp_path, every=2, span=1, keep_steps=0), 6)
    kept = [4, 5]  # trained at step 3, for checkpoint 2
    assert there[4] == [*kept, 8, 9, *range(10, 14)], "trained at step 5, for checkpoint 4"
    assert there[5] == [*kept, *range(12, 16)], "checkpoint 4 was not written"


def test_discarded_groups_go_and_those_in_the_look_ahead_window_stay(tmp_path):
    store = ExperienceStore(tmp_path / "experience")
    for number in range(8):
        write(store, number)
    run = recovery(tmp_path, look_ahead=3, keep_steps=0)
    run.record_trained(1, [0, 4])
    assert store.numbers() == [2, 3, 5, 6, 7], "1 was discarded; 2 and 3 may be open"
    run.record_trained(2, [3, 6])
    assert store.numbers() == [5, 7]


def test_the_numbers_of_earlier_attempts_go_as_well(tmp_path):
    store = ExperienceStore(tmp_path / "experience")
    for number in range(6):
        write(store, number)
    (store.root / TRAINED).write_text("{torn")
    run = recovery(tmp_path, step=2, keep_steps=1)
    run.rewind()
    run.record_trained(3, [4, 5])
    run.record_trained(4, [6, 7])
    assert store.numbers() == []
    assert read_trained(store.root) == {}


def test_a_folder_that_cannot_be_used_is_an_error_with_its_cure(tmp_path):
    (tmp_path / "trained.json").mkdir()
    run = recovery(tmp_path, store=ExperienceStore(tmp_path))
    with pytest.raises(
        StoreError, match=r"trained\.json: .* Free space .* buffer\.durable = false"
    ):
        run.record_trained(1, [0])
    (tmp_path / "experience").write_text("a file")
    with pytest.raises(
        StoreError, match=r"experience/x/attempt\.json: .* Not a directory.*that disk"
    ):
        ExperienceStore(tmp_path / "experience" / "x", sleep=lambda seconds: None).path(0)
    gone = ExperienceStore(tmp_path / "experience" / "x", attempt=0)
    with pytest.raises(StoreError, match="experience/x: cannot be listed"):
        gone.numbers()


def test_settings_decide_what_groups_are_comparable():
    config = tiny_config()
    other_rewards = {"rewards": [{"type": "exact_match", "weight": 2.0}]}
    for sections in (
        {"scoring": other_rewards},
        {"generation": {"temperature": 0.5}},
        {"run": {"seed": 1}},
        {"algorithm": {"type": "grpo", "group_size": 2}},
        {"data": {"limit": 10}},
    ):
        assert made_by(tiny_config(**sections)) != made_by(config), sections
    for sections in (
        {"generation": {"workers": 3, "request_timeout_s": 5.0}},
        {"scoring": {"num_cpus": 2.0}},
        {"learner": {"learning_rate": 1e-5}},
        {"run": {"steps": 9}},
    ):
        assert made_by(tiny_config(**sections)) == made_by(config), sections


def test_a_run_has_a_store_unless_it_is_turned_off(tmp_path):
    run = {"root": str(tmp_path)}
    off = tiny_config(run=run, buffer={"durable": False})
    assert store_of(off) is None
    assert recovery_of(off, None, print) is None
    config = tiny_config(run=run)
    store = store_of(config)
    assert store is not None
    assert store.root == tmp_path / "tiny" / "experience"
    found = recovery_of(config, 3, print)
    assert found is not None
    write(store, 5, version=3)
    assert found.recover(Ticket(number=5, version=3), make_prompt(5)) is not None
    assert json.loads(json.dumps(read_trained(store.root))) == {}


def test_d02_notes_that_cannot_be_read_for_now_are_an_error_and_are_not_written_anew(tmp_path):
    """A file that is damaged for good is told, and the run continues without it."""
    store = ExperienceStore(tmp_path / "experience")
    store.root.mkdir()
    notes = store.root / "trained.json"
    notes.symlink_to("/proc/self/mem")  # reading gives EIO
    with pytest.raises(StoreError, match="Input/output error"):
        recovery(tmp_path, store=store)
    assert notes.is_symlink()
    notes.unlink()
    notes.write_text("{")
    told: list[str] = []
    recovery(tmp_path, store=store, tell=told.append).rewind()
    assert "continues without" in told[0]


@pytest.mark.parametrize("passes", [True, False])
def test_d02_a_group_is_read_again_after_an_io_error_that_passes(tmp_path, passes):
    paused: list[float] = []

    def sleep(seconds: float) -> None:
        paused.append(seconds)
        if passes:
            path.unlink()
            path.write_bytes(data)

    store = ExperienceStore(tmp_path / "experience", sleep=sleep)
    write(store, 7)
    path = store.path(7)
    data = path.read_bytes()
    path.unlink()
    path.symlink_to("/proc/self/mem")
    if passes:
        assert store.read(7).ticket.number == 7
        assert len(paused) == 1
        return
    with pytest.raises(StoreError, match="Input/output error"):
        store.read(7)
    assert len(paused) == 3


class SlowStore(ExperienceStore):
    """Each look at a file takes `took_s`, and counts those that are under way."""

    took_s, at_once, most = 0.001, 0, 0

    def header(self, number, attempt=None):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(self.took_s)
        self.at_once -= 1
        return super().header(number, attempt)


async def test_a_store_with_many_groups_is_rewound_in_parts_each_with_its_own_deadline(tmp_path):
    store = SlowStore(tmp_path / "experience")
    write(store, 0, version=1)
    image = store.path(0).read_bytes()
    for number in range(1, 500):
        store.path(number).write_bytes(image)
    write(store, 500, version=9)  # after the checkpoint's step
    (store.root / "attempt.json").write_text('{"attempt": 0}')
    calls: list[float] = []

    async def on_disk(call, *arguments):
        calls.append(len(arguments[0]) if arguments else 0)
        return await asyncio.to_thread(call, *arguments)

    resumed = recovery(tmp_path, step=4, store=store)
    await resumed.rewind_aside(on_disk)
    assert resumed.attempt == 1
    assert store.numbers() == list(range(500))
    assert store.files() == [(number, 1) for number in range(500)]
    assert max(calls) <= 32, "a deadline is for so many files"
    assert store.most > 1, "the storage is asked by several threads at once"
    again = recovery(tmp_path, step=4)
    again.rewind()
    assert again.attempt == 2


def test_d15_a_store_that_only_writes_never_asks_for_the_attempt(tmp_path):
    root = tmp_path / "experience"
    root.mkdir()
    (root / "attempt.json").write_text("{torn")
    store = ExperienceStore(root, sleep=lambda seconds: None)
    write(store, 3, attempt=2)
    assert [path.name for path in root.glob("*.arrow")] == ["g00000003.a2.arrow"]
    with pytest.raises(StoreError, match=r"attempt\.json: the number of the attempt cannot be"):
        store.read(3)


def test_d15_an_error_of_the_storage_that_passes_costs_no_step(tmp_path, monkeypatch):
    write(ExperienceStore(tmp_path), 3, attempt=2)
    (tmp_path / "attempt.json").write_text('{"attempt": 2}')
    read, errors = Path.read_bytes, [OSError(errno.EIO, "no answer"), OSError(errno.ESTALE, "x")]

    def failing(path):
        if path.name == "attempt.json" and errors:
            raise errors.pop()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    pauses: list[float] = []
    assert ExperienceStore(tmp_path, sleep=pauses.append).read(3).ticket.number == 3
    assert pauses == [0.5, 1.0]
