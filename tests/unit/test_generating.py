"""Data sets made by the pools: the loop, the file of answers, what is selected, and the run file."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from rlhf_cluster.checkpoint import continuing
from rlhf_cluster.config import GenerateConfig, RunConfig, load_any, validate
from rlhf_cluster.config.generate import GenerateSection
from rlhf_cluster.config.pipeline import load_all, needs
from rlhf_cluster.data.pairs import parse_pair
from rlhf_cluster.data.step_rows import parse_steps
from rlhf_cluster.errors import (
    ConfigError,
    DataError,
    PoolLost,
    RecordLost,
    RlhfError,
    RunError,
    ScoringError,
    WorkerError,
)
from rlhf_cluster.generating.answers import Answer, Answers, AnswersFile, in_order, read_answers
from rlhf_cluster.generating.dataset import write_dataset
from rlhf_cluster.generating.producing import Completions, Producer, beginning
from rlhf_cluster.generating.progress import Progress
from rlhf_cluster.generating.selecting import rows_of
from rlhf_cluster.generating.shown import derived_generation, generation_ending
from rlhf_cluster.observe.metrics import find
from rlhf_cluster.planning.placement import demand
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    PartialGroup,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    ScoredRollout,
    Ticket,
)
from rlhf_cluster.rundir import RunDir
from tests.configs import tiny_tree
from tests.fakes import FakePrompts, make_prompt, make_rollout
from tests.stage_cases import stage_tree

SAMPLING = Sampling(num_samples=3, temperature=1.0, max_tokens=16)
LINE = 1


def text_of(ids: Sequence[int]) -> str:
    return "".join("\n" if i == LINE else chr(ord("a") + i) for i in ids)


def respond(rollout: Rollout, ids: Sequence[int]) -> Rollout:
    return replace(
        rollout,
        response_ids=np.array(ids, dtype=np.int32),
        sampled_logprobs=np.full(len(ids), -0.5, dtype=np.float32),
        versions=np.full(len(ids), -1, dtype=np.int32),
        response_mask=np.ones(len(ids), dtype=bool),
    )


@dataclass
class Generation:
    """Random tokens of the group's own stream; a response goes on with what it was given."""

    fail: Callable[[Ticket], RlhfError | None] = lambda ticket: None
    asked: list[tuple[int, PartialGroup | None]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        start: PartialGroup | None = None,
    ) -> RolloutGroup:
        self.asked.append((ticket.number, start))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        rng = random.Random(ticket.number)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        self.under_way -= 1
        if (error := self.fail(ticket)) is not None:
            raise error
        rollouts = []
        for index in range(sampling.num_samples):
            before = [] if start is None else start.responses[index].response_ids.tolist()
            ids = before + [rng.randrange(2, 8) for _ in range(3)]
            if start is None:
                ids += [LINE, 7, LINE, rng.randrange(2, 8)]
            rollouts.append(respond(make_rollout(ticket, prompt, index), ids))
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))


@dataclass
class Scoring:
    """The reward is 1 for an even last token. `fail` may raise instead."""

    fail: Callable[[RolloutGroup], RlhfError | None] = lambda group: None

    async def score(self, group: RolloutGroup) -> tuple[ExperienceGroup, GroupSummary]:
        if (error := self.fail(group)) is not None:
            raise error
        scored = tuple(
            ScoredRollout(
                rollout=rollout,
                reward=float(rollout.response_ids[-1] % 2 == 0),
                reward_parts={"even": 1.0},
                ref_logprobs=None,
                scorer="fake",
                watched={"nothing": float("nan")},
            )
            for rollout in group.rollouts
        )
        found = ExperienceGroup(ticket=group.ticket, prompt=group.prompt, scored=scored)
        return found, found.summary()


def producer(folder: Path, num_prompts: int = 10, **changes: Any) -> Producer:
    async def fetch(handle: Any) -> ExperienceGroup:
        return handle

    settings: dict[str, Any] = {
        "generation": Generation(),
        "scoring": Scoring(),
        "fetch": fetch,
        "decode": text_of,
        "prompts": FakePrompts(),
        "num_prompts": num_prompts,
        "sampling": SAMPLING,
        "completions": None,
        "revisions": None,
        "file": AnswersFile(folder / "groups.jsonl"),
        "max_in_flight": 3,
        "max_error_rate": 0.5,
        "finished": lambda answers: None,
        "discarded": lambda number, error: None,
    }
    return Producer(**settings | changes)


def run(work: Producer) -> list[Answers]:
    asyncio.run(work.run())
    work.file.close()
    return list(in_order(work.file.path))


def only(*numbers: int) -> Callable[[Ticket], RlhfError | None]:
    return lambda ticket: WorkerError("broken") if ticket.number in numbers else None


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


@pytest.mark.parametrize("error", [PoolLost("all gone"), DataError("other")])
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


def answers(*rewards: float, texts: Sequence[str] | None = None, **changes: Any) -> Answers:
    texts = texts or [f"answer {i}" for i in range(len(rewards))]
    return Answers(
        number=0,
        prompt_id="p0",
        prompt="why?",
        answers=tuple(
            Answer(text=t, reward=r, parts={}, num_tokens=len(t), cut=False, **changes)
            for t, r in zip(texts, rewards, strict=True)
        ),
    )


def section(select: str, samples: int = 4, **changes: Any) -> GenerateSection:
    return GenerateSection.model_validate({"samples": samples, "select": select, **changes})


def completions_of(group: Answers, how: GenerateSection) -> list[str]:
    return [row["completion"] for row in rows_of(group, how)[0]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (section("all"), ["answer 0", "answer 1", "answer 2", "answer 3"]),
        (section("best_of_n"), ["answer 1"]),
        (section("best_of_n", keep=3), ["answer 1", "answer 3", "answer 2"]),
        (section("best_of_n", threshold=0.95), []),
        (section("threshold", threshold=0.5), ["answer 1", "answer 2", "answer 3"]),
        (section("threshold", threshold=0.5, keep=1), ["answer 1"]),
    ],
)
def test_what_is_selected_follows_from_rewards_and_of_equal_ones_the_earlier_is_better(
    how, expected
):
    assert completions_of(answers(0.1, 0.9, 0.5, 0.9), how) == expected


def test_responses_that_teach_nothing_are_left_out_and_counted():
    group = answers(1.0, 1.0, 1.0, 1.0, texts=["a", "a", " ", "b"])
    cut = replace(group, answers=(*group.answers[:3], replace(group.answers[3], cut=True)))
    rows, taken, left = rows_of(cut, section("all"))
    assert [row["completion"] for row in rows] == ["a"]
    assert len(taken) == 1
    assert +left == {"duplicates": 1, "empty": 1, "cut": 1}
    assert completions_of(cut, section("all", cut="keep", deduplicate=False)) == ["a", "a", "b"]


def test_pairs_go_from_the_outside_in_and_ties_make_none():
    rows, taken, _ = rows_of(answers(0.2, 0.9, 0.4, 0.4), section("pairs", keep=2))
    assert [(r["chosen"], r["rejected"]) for r in rows] == [("answer 1", "answer 0")]
    assert rows[0]["margin"] == pytest.approx(0.7)
    assert len(taken) == 2
    pair = parse_pair(rows[0], "test")
    assert (pair.prompt, pair.chosen, pair.margin) == ("why?", "answer 1", rows[0]["margin"])
    rows, _, left = rows_of(answers(0.5, 0.5), section("pairs", 2))
    assert not rows
    assert +left == {"ties": 1, "not_selected": 2, "no_row": 1}
    _, _, left = rows_of(answers(0.5, 0.6), section("pairs", 2, min_margin=0.2))
    assert +left == {"close": 1, "not_selected": 2, "no_row": 1}
    rows, _, _ = rows_of(answers(4, 1, 3, 2), section("pairs", keep=2))
    assert [(r["chosen_reward"], r["rejected_reward"]) for r in rows] == [(4, 1), (3, 2)]


def test_a_label_is_the_share_of_completions_that_reach_the_threshold():
    how = section("step_labels", 1, completions=4, threshold=1.0)
    group = answers(1.0, texts=["x\n\ny"], step_rewards=((1.0, 0.0, 0.5, 1.0), (1.0,)))
    rows, _, _ = rows_of(group, how)
    assert rows[0]["labels"] == [0.5, 1.0]
    found = parse_steps(rows[0], "test", "\n")
    assert found.labels == (0.5, 1.0)
    assert found.completion == "x\n\ny", "no text is changed"
    with pytest.raises(DataError, match="without completions of their steps"):
        rows_of(answers(1.0), how)


def written(folder: Path, groups: Sequence[Answers]) -> Path:
    file = AnswersFile(folder / "groups.jsonl")
    for group in groups:
        file.append(group)
    file.close()
    return file.path


def test_the_data_set_is_in_the_order_of_prompts_and_its_report_accounts_for_all(tmp_path):
    groups = [replace(answers(0.1 * n, 0.3), number=n, prompt_id=f"p{n}") for n in range(6)]
    path, target = written(tmp_path, groups[::-1]), tmp_path / "data.jsonl"
    report = write_dataset(path, target, section("best_of_n", 2), {"WorkerError": 1})
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == [f"p{n}" for n in range(6)]
    assert report["rows"] == report["prompts"] == 6
    assert report["discarded"] == {"WorkerError": 1}
    assert report["samples"] == 12 == report["rows"] + sum(report["left_out"].values())
    assert report["reward_mean"] == pytest.approx((0.25 + 0.3) / 2)
    best = np.mean([max(0.1 * n, 0.3) for n in range(6)])
    assert report["selected_reward_mean"] == report["best_reward_mean"] == pytest.approx(best)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_data_set_without_a_row_is_refused_with_what_there_was(tmp_path):
    path, target = written(tmp_path, [answers(0.25, 0.5)]), tmp_path / "data.jsonl"
    with pytest.raises(DataError, match=r"nothing of 1 prompts \(highest reward 0.5.*accept-chang"):
        write_dataset(path, target, section("threshold", threshold=0.75), {})
    assert not target.exists()


def test_a_prompt_is_in_the_file_once_and_damage_is_named(tmp_path):
    path = written(tmp_path, [answers(1.0)])
    with pytest.raises(DataError, match="prompt 0 is there already"):
        AnswersFile(path).append(answers(0.0))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="line 2: damaged .prompt 0 for the second time"):
        AnswersFile(path)
    path.write_bytes(b'{"number": 1}\n' + path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(DataError, match="line 1: damaged"):
        list(read_answers(path))


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


def tree(**sections: Any) -> dict[str, Any]:
    own = {name: tiny_tree()[name] for name in ("model", "generation", "scoring")}
    own |= {
        "run": {"name": "made"},
        "stage": {"type": "generate", "samples": 4, "select": "best_of_n"},
        "data": {"task": "sort_digits", "limit": 8, "max_prompt_tokens": 8},
    }
    return {name: {**own.get(name, {}), **sections.get(name, {})} for name in {*own, *sections}}


def made(**sections: Any) -> GenerateConfig:
    return validate(GenerateConfig, tree(**sections), "test")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"stage": {"select": "threshold"}}, "select = 'threshold' without threshold"),
        ({"stage": {"select": "step_labels", "threshold": 1}}, "without completions"),
        ({"stage": {"completions": 4}}, "completions = 4 with select = 'best_of_n'"),
        ({"stage": {"keep": 5}}, "samples = 4 with select = 'best_of_n' and keep = 5"),
        ({"stage": {"select": "pairs", "keep": 3}}, "6 samples are needed"),
        ({"data": {"limit": None}}, "data.task = 'sort_digits' without data.limit"),
        ({"scoring": {"reference": True}}, "scoring.reference = True with stage.type"),
        ({"generation": {"quantization": "int8"}}, "quantization = 'int8' with stage.type"),
        ({"generation": {"max_response_tokens": 80}}, "is over model.init.max_position = 64"),
        ({"learner": {"ranks": 1}}, "learner: unknown key"),
    ],
)
def test_run_files_that_cannot_work_are_refused(sections, words):
    with pytest.raises(ConfigError) as error:
        made(**sections)
    assert words in str(error.value)
    assert "validation error" not in str(error.value)


def test_the_pools_get_a_run_of_their_own_and_nothing_else_is_asked_for():
    config = made(generation={"workers": 2}, run={"seed": 3})
    assert isinstance(config.as_run, RunConfig)
    assert config.as_run.sampling.num_samples == 4
    assert (config.as_run.run.seed, config.as_run.run_dir) == (3, config.run_dir)
    assert not config.as_run.buffer.durable
    names = [bundle.owner for bundle in demand(config)]
    assert names == ["generation-0", "generation-1", "scoring-0"]
    assert GenerateConfig.model_validate(config.model_dump()) == config


def test_a_pipeline_takes_the_data_set_of_an_earlier_stage(tmp_path):
    stages = {
        "samples": {**tree(), "run": {}},
        "tuned": {
            **stage_tree(),
            "run": {"epochs": 1, "units_per_step": 8},
            "data": {"sources": [{"path": "{stages.samples.data}"}], "max_tokens": 32},
        },
    }
    path = tmp_path / "p.toml"
    whole = {"pipeline": {"name": "p", "root": str(tmp_path)}, "stages": stages}
    path.write_text(tomli_w.dumps(_without_none(whole)))
    samples, tuned = load_all(path)
    assert isinstance(samples, GenerateConfig)
    assert tuned.data.sources[0].path == str(samples.data_file)
    assert needs(tuned, [samples]) == ["samples"]
    samples.data_file.parent.mkdir(parents=True)
    samples.data_file.write_text("")
    assert needs(tuned, [samples]) == []
    whole["stages"]["tuned"]["data"]["sources"] = [{"path": "{stages.samples.final}"}]
    path.write_text(tomli_w.dumps(_without_none(whole)))
    with pytest.raises(ConfigError, match="known here: {stages.samples.data}"):
        load_all(path)


def test_another_selection_goes_on_with_the_same_answers_and_another_model_is_refused(tmp_path):
    config = made(run={"root": str(tmp_path)})
    with RunDir.create(config.run_dir, config):
        pass
    rundir = RunDir.open(config.run_dir)
    assert continuing.look(rundir, config, False).kept
    other = made(run={"root": str(tmp_path)}, stage={"keep": 2})
    with pytest.raises(RunError, match="stage.keep = 2"):
        continuing.look(rundir, other, False)
    rundir.write_summary({})
    assert continuing.look(rundir, config, False).finished
    again = continuing.look(rundir, other, True)
    assert again.kept
    assert not again.finished
    for sections in ({"stage": {"samples": 8}}, {"run": {"seed": 1}}):
        sections.setdefault("run", {})["root"] = str(tmp_path)
        with pytest.raises(RunError, match="cannot change"):
            continuing.look(rundir, made(**sections), True)


def test_the_last_lines_tell_of_all_that_was_left_out(tmp_path):
    path, target = written(tmp_path, [answers(0.25, 0.5, 0.5)]), tmp_path / "data.jsonl"
    report = write_dataset(path, target, section("best_of_n", 3), {"ScoringError": 2})
    summary = {
        "run": "made", "stage": "generate", "run_dir": str(tmp_path), "total_s": 3.0,
        "report": report, "data_file": str(target),
    }  # fmt: skip
    lines = "\n".join(generation_ending(summary, "rlhf-cluster", tmp_path.parent))
    for words in (
        "1 of 3 samples",
        "0.4167 of all, 0.5 of what was selected",
        "2 responses that the selection did not take",
        "2 prompts discarded by ScoringError",
        f"{tmp_path.name}/data.jsonl",
    ):
        assert words in lines
    assert derived_generation(made(), 8)["rows"] == "at most 8"


def test_a_file_is_read_by_the_type_of_its_stage(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tree()))
    assert type(load_any(path)) is GenerateConfig


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
