"""Rows and reports of revised answers, and the run files that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlhf_cluster.cli.summaries import derived_generation, generation_ending
from rlhf_cluster.config import GenerateConfig, validate
from rlhf_cluster.config.dataset_config import GenerateSection, Revise
from rlhf_cluster.data.preferences import parse_pair
from rlhf_cluster.errors import ConfigError, DataError, RunError
from rlhf_cluster.observe.metric_table import find
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.synthetic_data.answers_file import (
    Answer,
    Answers,
    AnswersFile,
    Progress,
    Revised,
    Round,
    Unrevised,
    in_order,
)
from rlhf_cluster.synthetic_data.dataset import rows_of, write_dataset
from tests.support.builders.run_configs import tiny_tree

PRINCIPLES = ("be kind", "be brief", "be honest")


def section(select: str = "revisions", **changes: Any) -> GenerateSection:
    revise = {"principles": PRINCIPLES}
    return GenerateSection.model_validate(
        {"samples": 2, "select": select, "revise": revise, **changes}
    )


def answers(*pairs: tuple[str, float, str, float], unrevised: Sequence[Unrevised] = ()) -> Answers:
    """(response, reward, revision, reward)"""
    rounds = (Round(principle="be kind", critique="rude", revision="as it is"),)
    return Answers(
        number=0,
        prompt_id="p0",
        prompt="why?",
        unrevised=tuple(unrevised),
        answers=tuple(
            Answer(
                text=first,
                reward=reward,
                parts={},
                num_tokens=len(first),
                cut=False,
                revised=Revised(
                    text=last, reward=last_reward, parts={}, num_tokens=len(last), rounds=rounds,
                    unusable={"cut_critique": 1},
                ),
            )
            for first, reward, last, last_reward in pairs
        ),
    )  # fmt: skip


LOST = Unrevised(text="x", num_tokens=1, problem="cut_critique", rounds=(), unusable={})


def test_the_last_revision_becomes_a_row_that_sft_reads_with_all_texts_of_its_making():
    group = answers(("no!", 0.0, "no, sorry", 1.0), ("go", 0.0, "no, sorry", 1.0), unrevised=[LOST])
    rows, taken, left = rows_of(group, section())
    [row] = rows
    assert row == {
        "prompt": "why?",
        "completion": "no, sorry",
        "reward": 1.0,
        "first": "no!",
        "first_reward": 0.0,
        "rounds": [{"principle": "be kind", "critique": "rude", "revision": "as it is"}],
        "prompt_id": "p0",
    }
    assert [(answer.text, answer.reward) for answer in taken] == [("no, sorry", 1.0)]
    assert +left == {"unrevised": 1, "duplicates": 1}
    assert len(rows_of(group, section(deduplicate=False))[0]) == 2


def test_a_pair_is_the_revision_over_its_response_or_by_reward_where_that_is_preferred():
    group = answers(("a", 1.0, "b", 0.5), ("c", 0.25, "d", 1.0), ("e", 0.0, "e", 0.0))
    rows, taken, left = rows_of(group, section("revision_pairs"))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "a"), ("d", "c")]
    assert [parse_pair(row, "f").margin for row in rows] == [None, None]
    assert [(row["chosen_reward"], row["rejected_reward"]) for row in rows] == [
        (0.5, 1.0),
        (1.0, 0.25),
    ]
    assert len(taken) == 4
    assert +left == {"unchanged": 1}

    rows, _, _ = rows_of(group, section("revision_pairs", prefer="reward"))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("a", "b"), ("d", "c")]
    assert [parse_pair(row, "f").margin for row in rows] == [0.5, 0.75]
    assert all(row["first"] in ("a", "c") and row["rounds"] for row in rows)
    by_reward = section("revision_pairs", prefer="reward", min_margin=0.6)
    rows, _, left = rows_of(group, by_reward)
    assert [row["chosen"] for row in rows] == ["d"]
    assert +left == {"unchanged": 1, "undecided": 1}
    tied = answers(("a", 1.0, "b", 1.0))
    assert +rows_of(tied, section("revision_pairs", prefer="reward"))[2] == {
        "undecided": 1,
        "no_row": 1,
    }


def test_a_response_that_was_cut_is_no_half_of_a_pair_and_may_still_be_revised():
    group = answers(("a", 0.0, "b", 1.0))
    cut = replace(group, answers=(replace(group.answers[0], cut=True),))
    assert +rows_of(cut, section("revision_pairs"))[2] == {"cut": 1, "no_row": 1}
    assert len(rows_of(cut, section("revision_pairs", cut="keep"))[0]) == 1
    [row] = rows_of(cut, section())[0]
    assert row["completion"] == "b"


def test_the_report_accounts_for_every_response_and_says_whether_revisions_are_better(tmp_path):
    groups = [
        answers(("a", 1.0, "b", 0.5), ("c", 0.0, "d", 1.0), unrevised=[LOST]),
        replace(answers(unrevised=[LOST, LOST]), number=1),
        replace(answers(("e", 1.0, "e", 1.0)), number=2),
    ]
    file = AnswersFile(tmp_path / "groups.jsonl")
    for group in groups[::-1]:
        file.append(group)
    file.close()
    assert list(in_order(file.path)) == groups
    report = write_dataset(file.path, tmp_path / "data.jsonl", section(), {})
    assert report["samples"] == 6 == report["rows"] + report["left_out"]["unrevised"]
    assert report["left_out"]["no_row"] == 1
    assert report["revisions"] == {
        "revised": 3,
        "first_reward_mean": pytest.approx(2 / 3),
        "reward_mean": pytest.approx(2.5 / 3),
        "better_fraction": 0.5,
        "unchanged": 1,
        "unrevised": {"cut_critique": 3},
        "unusable_replies": {"cut_critique": 3},
    }
    assert report["reward_mean"] == pytest.approx(2 / 3)
    assert report["selected_reward_mean"] == pytest.approx(2.5 / 3)
    summary = {
        "run": "made", "stage": "generate", "run_dir": str(tmp_path), "total_s": 3.0,
        "report": report, "data_file": str(tmp_path / "data.jsonl"),
    }  # fmt: skip
    lines = "\n".join(generation_ending(summary, "rlhf-cluster", tmp_path.parent))
    assert "3, better than their response: 0.5" in lines
    assert "3 responses without a last revision" in lines
    assert "3 without a revision: the critique reached the limit of tokens" in lines
    file = AnswersFile(tmp_path / "none.jsonl")
    file.append(groups[1])
    with pytest.raises(DataError, match="2 responses without a last revision"):
        write_dataset(file.path, tmp_path / "data.jsonl", section(), {})


def test_answers_that_were_made_without_revisions_are_not_selected_as_if_they_had_them():
    plain = answers(("a", 0.0, "b", 1.0))
    plain = replace(plain, answers=(replace(plain.answers[0], revised=None),))
    with pytest.raises(DataError, match="were made without"):
        rows_of(plain, section())


def test_progress_tells_of_replies_that_were_no_use_and_of_prompts_without_any_score():
    progress = Progress(2, 0, 2)
    progress.begin(0.0)
    progress.add(answers(unrevised=[LOST, replace(LOST, unusable={"cut_critique": 2})]))
    found = progress.take(1.0)
    for name in found:
        find(name)
    assert found["generate/unrevised_total/cut_critique"] == 2
    assert found["generate/unusable_replies_total/cut_critique"] == 2
    assert "generate/reward_mean" not in found
    progress.add(answers(("a", 1.0, "b", 0.5), ("c", 0.0, "d", 1.0)))
    found = progress.take(2.0)
    assert found["generate/unusable_replies_total/cut_critique"] == 4, "totals"
    assert (found["generate/reward_mean"], found["generate/revised_reward_mean"]) == (0.5, 0.75)


# Run files


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"select": "revisions"}, "select = 'revisions' without revise"),
        ({"revise": {"principles": ["x"]}}, "revise = a section with select = 'all'"),
        ({"prefer": "reward"}, "prefer = 'reward' with select = 'all'"),
        (
            {"select": "revision_pairs", "revise": {"principles": ["x"]}, "min_margin": 0.1},
            "min_margin = 0.1 with select = 'revision_pairs', whose pairs are not by reward",
        ),
        ({"select": "revisions", "revise": {"principles": []}}, "stage.revise.principles"),
        ({"select": "revisions", "revise": {"principles": ["x", " "]}}, "holds a blank text"),
        ({"select": "revisions", "revise": {"principles": ["x", "x"]}}, "holds a principle twice"),
    ]
    + [
        ({"select": "revisions", "revise": {"principles": ["x"], **request}}, words)
        for request, words in (
            ({"critique_request": "{response}"}, "critique_request: has no {principle}"),
            ({"revision_request": "{response}"}, "revision_request: has no {critique}"),
            ({"critique_request": "{response}{principle}{critique}"}, "has a place that is none"),
            ({"critique_request": "{response}{principle}{}"}, "has a place that is none"),
            ({"critique_request": "{response!r}{principle}"}, "has a place that is none"),
            ({"critique_request": "{response}{principle"}, "Write a brace that is none"),
        )
    ],
)
def test_run_files_that_cannot_work_are_refused(stage: dict[str, Any], words: str):
    tree = {"samples": 4, "select": "all", **stage}
    with pytest.raises(ConfigError) as error:
        validate(GenerateConfig, _file(tree), "test")
    assert words in str(error.value)


def test_braces_that_are_none_are_written_twice_and_responses_may_hold_any():
    request = "{{json}}: {response} by {principle}"
    own = Revise(principles=PRINCIPLES, critique_request=request)
    text = own.critique_request.format(prompt="", response="{x}", principle="{y}")
    assert text == "{json}: {x} by {y}"


def test_what_was_asked_cannot_change_under_its_answers_and_the_choice_of_pairs_can(tmp_path):
    def config(**stage: Any) -> GenerateConfig:
        own = {"samples": 1, "select": "revisions", "revise": {"principles": ["x"]}, **stage}
        tree = _file(own) | {"run": {"name": "made", "root": str(tmp_path)}}
        return validate(GenerateConfig, tree, "test")

    with RunDir.create(config().run_dir, config()):
        pass
    rundir = RunDir.open(config().run_dir)
    assert derived_generation(config(), 8)["revisions"] == "1 of each sample; principles: 1"
    pairs = config(select="revision_pairs", prefer="reward")
    assert resume.look(rundir, pairs, True).kept
    for other in ({"principles": ["y"]}, {"principles": ["x"], "rounds": 2}):
        with pytest.raises(RunError, match="cannot change"):
            resume.look(rundir, config(revise=other), True)
    with pytest.raises(RunError, match="cannot change"):
        resume.look(rundir, config(select="all", revise=None), True)


def _file(stage: dict[str, Any]) -> dict[str, Any]:
    tree = {name: tiny_tree()[name] for name in ("model", "generation", "scoring")}
    data = {"task": "sort_digits", "limit": 8, "max_prompt_tokens": 8}
    return tree | {"run": {"name": "made"}, "stage": {"type": "generate", **stage}, "data": data}
