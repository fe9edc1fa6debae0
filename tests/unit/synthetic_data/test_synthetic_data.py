"""Data sets made by the pools: the loop, the file of answers, what is selected, and the run file."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from rlhf_cluster.errors import (
    PoolLost,
    RecordLost,
    ScoringError,
    StalledError,
    StoreError,
    WorkerError,
)
from rlhf_cluster.observe.metric_table import find
from rlhf_cluster.records import (
    ExperienceGroup,
    Ticket,
)
from rlhf_cluster.synthetic_data.answers_file import (
    Answers,
    Progress,
    read_answers,
)
from rlhf_cluster.synthetic_data.produce import (
    Completions,
    beginning,
)
from rlhf_cluster.util.slow_disk import DiskDeadline
from tests.support.builders.dataset_runs import (
    LINE,
    Generation,
    Scoring,
    answers,
    only,
    producer,
    respond,
    run,
    text_of,
)
from tests.support.fakes.services import (
    make_prompt,
    make_rollout,
)


def test_every_prompt_is_written_once_and_no_more_groups_are_under_way_than_allowed(tmp_path):
    generation = Generation()
    found = run(producer(tmp_path, generation=generation))
    assert [group.number for group in found] == list(range(10))
    assert [group.prompt for group in found] == [make_prompt(n).source for n in range(10)]
    assert all(len(group.answers) == 3 for group in found)
    assert all(answer.parts == {"even": 1.0} for group in found for answer in group.answers)
    finished = [group.number for group in read_answers(tmp_path / "groups.jsonl")]
    assert finished != sorted(finished), "the file is in the order of finishing"
    assert generation.most == 3


def test_a_killed_stage_samples_only_what_is_missing_and_ends_with_the_same_answers(tmp_path):
    whole = run(producer(tmp_path))
    path = tmp_path / "groups.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # torn while it was written
    generation = Generation()
    again = run(producer(tmp_path, generation=generation))
    kept = {Answers.from_line(line).number for line in lines[:4]}
    assert sorted(number for number, _ in generation.asked) == sorted(set(range(10)) - kept)
    assert again == whole


def test_a_failed_prompt_is_counted_tried_again_the_next_time_and_never_half_there(tmp_path):
    told: list[int] = []
    work = producer(
        tmp_path,
        generation=Generation(fail=only(2)),
        scoring=Scoring(fail=lambda g: ScoringError("x") if g.ticket.number == 5 else None),
        discarded=lambda number, error: told.append(number),
    )
    found = run(work)
    assert [group.number for group in found] == [0, 1, 3, 4, 6, 7, 8, 9]
    assert sorted(told) == [2, 5]
    assert work.num_discarded == {"WorkerError": 1, "ScoringError": 1}
    assert producer(tmp_path).pending == [2, 5]


@pytest.mark.parametrize("error", [PoolLost("all gone"), StoreError("disk full")])
def test_without_a_pool_all_ends_with_the_first_cause(tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        run(producer(tmp_path, 2, generation=Generation(fail=lambda ticket: error)))


def test_too_many_failures_end_the_stage_and_what_was_written_stays(tmp_path):
    generation = Generation(fail=lambda t: WorkerError("broken") if t.number > 3 else None)
    with pytest.raises(WorkerError, match=r"of the last \d+ groups failed.*broken"):
        run(producer(tmp_path, num_prompts=40, generation=generation))
    assert {group.number for group in read_answers(tmp_path / "groups.jsonl")} == {0, 1, 2, 3}


def test_a_record_that_is_lost_before_it_is_here_is_made_again(tmp_path):
    losses = iter([True, False])

    async def fetch(handle: Any) -> ExperienceGroup:
        if next(losses, False):
            raise RecordLost("with its node")
        return handle

    generation = Generation()
    work = producer(tmp_path, 1, generation=generation, fetch=fetch)
    assert len(run(work)) == 1
    assert [number for number, _ in generation.asked] == [0, 0]
    assert not work.num_discarded


def test_steps_are_completed_from_their_last_tokens_and_the_last_has_its_own_reward(tmp_path):
    generation = Generation()
    how = Completions(number=4, separator="\n", silent=frozenset())
    found = run(producer(tmp_path, 2, generation=generation, completions=how))
    numbers = [number for number, _ in generation.asked]
    assert len(set(numbers)) == len(numbers) == 2 * (1 + 3 * 2), "3 steps, the last not completed"
    assert generation.most == 3, "completions take their turn too"
    starts = [start for _, start in generation.asked if start is not None]
    streams = [response.rollout_id for start in starts for response in start.responses]
    assert len(set(streams)) == len(streams) == len(starts) * 4
    for group in found:
        for answer in group.answers:
            first, second, _ = answer.text.split("\n")
            prefixes = {text_of(s.responses[0].response_ids) for s in starts}
            assert {first, f"{first}\n{second}"} <= prefixes
            assert answer.step_rewards is not None
            assert [len(each) for each in answer.step_rewards] == [4, 4, 1]
            assert answer.step_rewards[-1] == (answer.reward,)
    again = run(producer(tmp_path / "again" if (tmp_path / "again").mkdir() is None else tmp_path,
                         2, completions=how))  # fmt: skip
    assert again == found, "completions follow from seed and place"


def test_a_beginning_keeps_tokens_and_probabilities_as_they_were_sampled():
    rollout = respond(make_rollout(Ticket(number=0, version=-1), make_prompt()), [2, 3, LINE, 4])
    start = beginning(Ticket(number=77, version=-1), rollout, 2, 3)
    assert start.group_id == "g00000077"
    assert [r.response_ids.tolist() for r in start.responses] == [[2, 3]] * 3
    assert start.num_tokens == 6
    assert start.num_unfinished == 3


def test_progress_tells_of_every_prompt_once():
    progress = Progress(2, 10, 2)
    progress.begin(100.0)
    assert not progress.add(answers(0.0, 1.0))
    progress.discard(WorkerError("x"))
    assert progress.add(answers(0.0, 0.0))
    found = progress.take(104.0)
    for name in found:
        find(name)
    assert found["generate/prompts"] == 12
    assert found["generate/reward_mean"] == 0.25
    assert found["generate/best_reward_mean"] == 0.5
    assert found["generate/tokens_per_s"] == 4 * len("answer 0") / 4.0
    assert found["generate/discarded_total/WorkerError"] == 1
    assert progress.prompt_s == 2.0
    assert not progress.is_open
    assert not progress.add(answers(1.0))
    assert progress.is_open
    assert progress.take(105.0)["generate/tokens_per_s"] == len("answer 0")


async def test_n07_a_slow_disk_holds_up_no_other_prompt_and_ends_the_stage_at_its_deadline(
    tmp_path,
):
    """Nothing that the stage awaits stands still while the disk does not answer."""
    disk, begun = threading.Event(), threading.Event()
    work = producer(tmp_path, patience=DiskDeadline(limit_s=0.05, setting="a.timeout_s"))
    append = work.file._append

    def slow(answers: Answers) -> None:
        begun.set()
        assert disk.wait(30)
        append(answers)

    work.file._append = slow
    running = asyncio.create_task(work.run())
    with pytest.raises(StalledError, match=r"prompt \d in .*groups.jsonl .*a.timeout_s = 0.05 s"):
        await running
    assert begun.is_set()
    work.file.close()
    assert not work.file._file.closed, "a thread may still write to it"
    disk.set()
