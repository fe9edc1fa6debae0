"""A whole run killed at any event and continued: nothing is trained twice, nothing is left out."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import CheckpointError, StoreError
from rlhf_cluster.run.checkpoint.checkpoint_folder import (
    check,
    newest,
)
from rlhf_cluster.sections.rl_run import Replay
from tests.support.simulation.resumable_run import (
    FIRST_PROMPT,
    Attempt,
)

STEPS, GROUPS = 5, 2
TRAINED = [n for n in range(13) if n % 5 != 3][: STEPS * GROUPS]


def attempt(root: Path, kill_at: int | None = None, every: int = 2, **settings) -> Attempt:
    gate = AdmissionGate(
        max_staleness=settings.get("max_staleness", 2),
        pipeline_depth=settings.get("pipeline_depth", settings.get("max_staleness", 2)),
        groups_per_step=GROUPS,
        num_steps=STEPS,
    )
    return Attempt(
        root=root,
        gate=gate,
        every=every,
        discarded=lambda number: number % 5 == 3,
        kill_at=kill_at,
        written=settings.get("written", {}),
        group_size=2 if "replay" in settings else 1,
        replay=settings.get("replay"),
    )


def assert_no_stored_group_is_missing(run: Attempt) -> None:
    """For every checkpoint on disk: what was finished and a run going on from there may ask for."""
    for path in run.root.glob("step-??????"):
        state = check(path).state
        open_then = {ticket.number for ticket in state.buffer.open}
        for number, (_, newest_version) in run.written.items():
            asked = number in open_then or number >= state.buffer.admitted
            if asked and newest_version <= state.step:
                assert run.store.has(number), (state.step, number)
        assert all(map(run.store.has, state.buffer.replayable)), state.step


def assert_nothing_was_generated_again(run: Attempt) -> None:
    for ticket in run.generation.requested:
        oldest, _ = run.stored_before.get(ticket.number, (-1, -1))
        assert oldest < ticket.version, ticket


def to_the_end(root: Path, **settings) -> Attempt:
    last = attempt(root, **settings)
    assert last.run()
    return last


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_s29_s30_killed_at_any_event_trains_the_prompts_of_an_uninterrupted_run(
    tmp_path, max_staleness
):
    straight = to_the_end(tmp_path / "straight", max_staleness=max_staleness)
    expected = sorted((number, prompt) for _, number, prompt, _ in straight.learner.ledger)
    assert expected == [(n, f"p{FIRST_PROMPT + n}") for n in TRAINED]
    resumed_from, num_recovered = set(), 0
    for kill_at in range(1, straight.fuse.events + 1, 3 if max_staleness else 7):
        root, written = tmp_path / f"{kill_at}", {}
        killed = attempt(root, kill_at, max_staleness=max_staleness, written=written)
        killed.run()
        assert_no_stored_group_is_missing(killed)
        last = to_the_end(root, max_staleness=max_staleness, written=written)
        assert_nothing_was_generated_again(last)
        num_recovered += len(last.observer.recovered)
        ledger = last.learner.ledger
        assert sorted((number, prompt) for _, number, prompt, _ in ledger) == expected, kill_at
        assert [step for step, *_ in ledger] == [s for s in range(STEPS) for _ in range(GROUPS)]
        assert all(0 <= staleness <= max_staleness for *_, staleness in ledger)
        resumed_from.add(last.state.step if last.state else 0)
    assert resumed_from >= {0, 2, 4}, "attempts went on from every checkpoint"
    assert num_recovered > 0


@pytest.mark.parametrize("max_staleness", [2, STEPS + 1])
@pytest.mark.parametrize(("priority", "max_uses"), [("uniform", 2), ("reward_spread", 3)])
def test_a_run_that_replays_killed_at_any_event_trains_the_same_groups_in_the_same_steps(
    tmp_path, max_staleness, priority, max_uses
):
    """With the larger bound no group gets too old, so that the choice follows from the tickets alone.
    With the smaller one it follows from what a resumed run generates again, too."""
    replay = Replay(priority=priority, max_uses=max_uses)
    settings = {"max_staleness": max_staleness, "pipeline_depth": 1, "replay": replay}
    straight = to_the_end(tmp_path / "straight", **settings)
    expected = trained(straight)
    assert len(expected) > STEPS * GROUPS + 3
    resumed_from = set()
    for kill_at in range(1, straight.fuse.events + 1, 11):
        root, written = tmp_path / f"{kill_at}", {}
        killed = attempt(root, kill_at, written=written, **settings)
        killed.run()
        assert_no_stored_group_is_missing(killed)
        last = to_the_end(root, written=written, **settings)
        assert not any("not replayed" in event for event in last.observer.events)
        if max_staleness > STEPS:
            assert trained(last) == expected, kill_at
        ledger = last.learner.ledger
        assert sorted({number for _, number, *_ in ledger}) == TRAINED
        assert 1 < max(Counter(number for _, number, *_ in ledger).values()) <= max_uses
        assert len(set(trained(last))) == len(ledger), "no group twice in a step"
        assert all(0 <= staleness <= max_staleness for *_, staleness in ledger)
        resumed_from.add(last.state.step if last.state else 0)
    assert resumed_from >= {0, 2, 4}, "attempts went on from every checkpoint"


def trained(run: Attempt) -> list[tuple[int, int]]:
    """The multiset of what was trained: groups and steps."""
    return sorted((number, step) for step, number, *_ in run.learner.ledger)


def test_a_replayed_group_whose_file_is_damaged_is_told_and_not_trained_again(tmp_path):
    replay = Replay(max_uses=9)
    settings = {"max_staleness": STEPS + 1, "pipeline_depth": 1, "replay": replay}
    killed = attempt(tmp_path, 150, **settings)
    assert not killed.run()
    state = newest(tmp_path).checkpoint.state
    assert state.step >= 2
    number = state.buffer.replayable[0]
    path = killed.store.path(number)
    path.write_bytes(path.read_bytes()[:-1])
    last = to_the_end(tmp_path, **settings)
    assert f"group {number} is not replayed" in last.observer.events[0]
    later = [n for step, n, *_ in last.learner.ledger if step >= state.step]
    assert number not in later
    assert sorted({n for _, n, *_ in last.learner.ledger}) == TRAINED


def test_a_run_killed_again_and_again_ends_as_well(tmp_path):
    written: dict[int, tuple[int, int]] = {}
    for kill_at in range(60, 200, 7):
        run = attempt(tmp_path, kill_at, written=written)
        run.run()
        assert_no_stored_group_is_missing(run)
        assert_nothing_was_generated_again(run)
    last = to_the_end(tmp_path, written=written)
    assert [n for _, n, *_ in last.learner.ledger] == TRAINED


def test_every_attempt_writes_under_a_number_of_its_own(tmp_path):
    """So that what a call of an earlier one leaves late can be told from it."""
    for number in range(3):
        run = attempt(tmp_path, 60)
        run.run()
        assert run.recovery.attempt == number
        assert {attempt for _, attempt in run.store.files()} <= {number}
        assert run.store.numbers()


async def test_a_stop_ends_the_run_while_the_learner_waits_for_groups(tmp_path):
    run = attempt(tmp_path, every=0)
    pipeline = await run.build()
    generate, waiting, never = pipeline.generation.generate, asyncio.Event(), asyncio.Event()

    async def hang_late(ticket, *arguments):
        if ticket.number > 5:
            waiting.set()
            await never.wait()
        return await generate(ticket, *arguments)

    pipeline.generation.generate = hang_late
    running = asyncio.create_task(pipeline.run())
    async with asyncio.timeout(20):
        await waiting.wait()
        await pipeline.stop()
        done = await running
        await run.checkpoints.save_now(done, 10)
    assert 0 < done < STEPS
    state = newest(tmp_path).checkpoint.state
    assert (state.step, state.buffer.taken) == (done, done * GROUPS)
    assert run.checkpoints.stats.last == done
    again = attempt(tmp_path, every=0)
    assert await again._run()
    assert [n for _, n, *_ in again.learner.ledger] == TRAINED
    assert newest(tmp_path).checkpoint.state.step == done, "every = 0 writes none by itself"


async def test_a_checkpoint_that_cannot_be_written_costs_the_checkpoint_and_is_told(tmp_path):
    run = attempt(tmp_path)
    pipeline = await run.build()
    write, failures = run.learner.write_state, [CheckpointError("disk full")]

    async def write_state(folder):
        if failures:
            raise failures.pop()
        await write(folder)

    run.learner.write_state = write_state
    assert await pipeline.run() == STEPS
    stats = run.checkpoints.stats
    assert (stats.failed, stats.last) == (1, STEPS)
    assert run.observer.events[0] == "no checkpoint of step 2; the last is none: disk full"
    assert newest(tmp_path).checkpoint.state.step == STEPS


async def test_a_group_that_cannot_be_stored_ends_the_run_and_is_no_discard(tmp_path):
    run, num_calls = attempt(tmp_path), 0
    pipeline = await run.build()

    def fill_up(fd: int, data: memoryview) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data)

    run.scoring.store = ExperienceStore(run.store.root, write_file=fill_up)
    with pytest.raises(StoreError, match=r"experience/g\d+\.arrow: \d+ bytes .* Free space"):
        await pipeline.run()
    stats = await run.buffer.stats()
    assert stats.finished < 5
    assert "StoreError" not in stats.discarded


async def test_one_checkpoint_is_written_at_a_time_and_no_step_waits_for_it(tmp_path):
    run = attempt(tmp_path, every=1)
    run.slow_steps = False
    pipeline = await run.build()
    write, train, started = run.learner.write_state, run.learner.train_step, []
    trained = asyncio.Event()

    async def write_state(folder):
        started.append(folder)
        if len(started) == 1:
            await trained.wait()
        await write(folder)

    async def train_step(groups):
        report = await train(groups)
        if report.step == STEPS:
            trained.set()
        return report

    run.learner.write_state, run.learner.train_step = write_state, train_step
    async with asyncio.timeout(20):
        assert await pipeline.run() == STEPS
    assert run.checkpoints.stats.skipped == STEPS - 2
    assert newest(tmp_path).checkpoint.state.step == STEPS, "the last one is never left out"
