"""Data sets made on real Ray, by the scripted engine: a killed maker, step labels, revisions."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.data.reasoning_steps import parse_steps, step_spans
from rlhf_cluster.data.rows import read_rows
from rlhf_cluster.synthetic_data.answers_file import read_answers
from tests.component.conftest import SCRIPTED, RunProcess, starting
from tests.support.builders.run_configs import tiny_tree

PROMPTS, SAMPLES = 160, 4
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "made", "max_in_flight_groups": 4},
    "stage": {"type": "generate", "samples": SAMPLES, "select": "best_of_n", "threshold": 1.0},
    "data": {"limit": PROMPTS},
    "generation": {"workers": 2},
}


def generate_tree(**sections: dict[str, Any]) -> dict[str, Any]:
    tree = tiny_tree(**sections)
    tree["run"] = sections["run"]
    return {name: tree[name] for name in tree if name not in ("algorithm", "learner")}


@pytest.fixture
def start_generate(ray_address: str, tmp_path: Path) -> Iterator[Callable[..., RunProcess]]:
    yield from starting(
        ray_address, tmp_path, generate_tree, "tests.support.engines.run_with_engine", SCRIPTED
    )


def test_a_killed_maker_and_the_same_command_sample_every_prompt_once(start_generate):
    killed = start_generate(**SECTIONS)
    killed.script(skill=0.5, generate_delay_s=0.4)
    groups = killed.path / "groups.jsonl"
    killed.wait_for(
        lambda s: groups.exists() and len(groups.read_bytes().splitlines()) > 20, "answers", 300
    )
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    before = {answers.number: answers for answers in read_answers(groups)}
    assert 20 <= len(before) < PROMPTS
    assert not (killed.path / "data.jsonl").exists()

    again = start_generate(**SECTIONS)
    again.script(skill=0.5, workers={"generation-0": {"crash_after_groups": 5}})
    code, output = again.finish(400)
    assert code == 0, output
    assert "prompts that were finished are not sampled again" in output
    after = {answers.number: answers for answers in read_answers(groups)}
    assert sorted(after) == list(range(PROMPTS))
    assert all(after[number] == answers for number, answers in before.items())

    report = json.loads((again.path / "report.json").read_text())
    assert (report["prompts"], report["samples"]) == (PROMPTS, PROMPTS * SAMPLES)
    assert report["discarded"] == {}
    assert 0.35 < report["reward_mean"] < 0.65
    assert report["selected_reward_mean"] == 1.0
    rows = [json.loads(line) for line in (again.path / "data.jsonl").read_text().splitlines()]
    assert len(rows) == report["rows"] == PROMPTS - report["left_out"]["no_row"]
    assert all(row["completion"] == "".join(sorted(row["prompt"].rstrip("="))) for row in rows)
    records = again.metrics()
    assert [r["generate/prompts"] for r in records] == [r["step"] for r in records]
    assert records[-1]["step"] == PROMPTS
    assert records[-1]["pool/restarts_total/generation"] >= 1, "the crash was met on the way"


def test_steps_are_completed_by_the_pool_and_a_wrong_step_is_never_completed_to_the_answer(
    start_generate,
):
    run = start_generate(
        run={"name": "labels"},
        stage={
            "type": "generate",
            "samples": 3,
            "select": "step_labels",
            "completions": 4,
            "threshold": 1.0,
        },
        data={"limit": 40},
        scoring={"step_separator": "5"},
        generation={"segment_tokens": 3},
    )
    run.script(skill=0.5)
    code, output = run.finish(400)
    assert code == 0, output
    seen: set[bool] = set()
    for group in read_answers(run.path / "groups.jsonl"):
        wanted = "".join(sorted(str(group.prompt).rstrip("=")))
        for answer in group.answers:
            assert answer.step_rewards is not None
            spans = step_spans(answer.text, "5")
            assert len(answer.step_rewards) == len(spans)
            assert answer.step_rewards[-1] == (answer.reward,)
            for (_, end), rewards in list(zip(spans, answer.step_rewards, strict=True))[:-1]:
                right = wanted.startswith(answer.text[:end])
                assert len(rewards) == 4
                assert right or max(rewards) == 0
                seen.add(right)
    assert seen == {True, False}
    rows = read_rows(run.path / "data.jsonl")
    labels = [parse_steps(row.columns, row.place, "5").labels for row in rows]
    report = json.loads((run.path / "report.json").read_text())
    assert report["labels"] == sum(map(len, labels))


def test_responses_are_criticised_and_revised_by_the_pool_and_scored_beside_their_revision(
    start_generate,
):
    principles = ["0", "99"]
    run = start_generate(
        run={"name": "revised"},
        stage={
            "type": "generate",
            "samples": 2,
            "select": "revision_pairs",
            "revise": {
                "principles": principles,
                "critique_request": "{response}{principle}=",
                "revision_request": "{response}{critique}=",
            },
        },
        data={"limit": 24, "max_prompt_tokens": 16},
        generation={"max_response_tokens": 16, "workers": 2},
    )
    code, output = run.finish(400)
    assert code == 0, output

    def replies(request: str) -> set[str]:
        """What the engine may say to digits: themselves, or in order."""
        return {request, "".join(sorted(request))}

    groups = list(read_answers(run.path / "groups.jsonl"))
    assert sorted(group.number for group in groups) == list(range(24))
    met: set[str] = set()
    for group in groups:
        assert len(group.answers) == 2
        assert group.unrevised == ()
        for answer in group.answers:
            assert answer.revised is not None
            [own] = answer.revised.rounds
            met.add(own.principle)
            assert own.critique in replies(answer.text + own.principle)
            assert own.revision in replies(answer.text + own.critique)
            assert (answer.revised.text, answer.revised.reward) == (own.revision, 0.0)
    assert met == {*principles}
    rows = [json.loads(line) for line in (run.path / "data.jsonl").read_text().splitlines()]
    report = json.loads((run.path / "report.json").read_text())
    assert report["samples"] == 48 == len(rows) + report["left_out"]["duplicates"]
    assert report["revisions"]["revised"] == 48
    assert report["revisions"]["first_reward_mean"] > 0 == report["revisions"]["reward_mean"]
    for row in rows:
        assert row["rejected"] == row["first"]
        assert row["chosen"] == row["rounds"][-1]["revision"]
    assert run.metrics()[-1]["generate/revised_reward_mean"] == 0.0
