"""What is selected from sampled answers, and the data set that is written of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rlhf_cluster.config.dataset_config import GenerateSection
from rlhf_cluster.data.preferences import parse_pair
from rlhf_cluster.data.reasoning_steps import parse_steps
from rlhf_cluster.errors import DataError
from rlhf_cluster.synthetic_data.answers_file import Answers, AnswersFile, read_answers
from rlhf_cluster.synthetic_data.dataset import rows_of, write_dataset
from tests.support.builders.dataset_runs import answers, section, written


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
