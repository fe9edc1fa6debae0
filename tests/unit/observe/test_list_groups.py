"""The list of a run's groups, from the store and from its samples."""

from __future__ import annotations

import json

import pytest

from rlhf_cluster.buffer.group_recovery import Recovery
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.cli.commands import main
from rlhf_cluster.observe.list_groups import GroupFilter, lines_of, list_groups
from rlhf_cluster.observe.record.samples import write_samples
from rlhf_cluster.records import Ticket
from rlhf_cluster.run.run_directory import RunDir
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import (
    make_group,
    make_prompt,
)

HEADING = ("group", "prompt", "versions", "reward", "rollouts", "tokens", "step", "from")
OPTIONS = {"every": 0, "span": 1, "look_ahead": 1, "keep_steps": 1, "step": None}


def group(number: int, rewards: list[float]):
    ticket = Ticket(number=number, version=number // 2)
    return make_group(ticket, make_prompt(number), rewards, version=number // 2)


@pytest.fixture
def run(tmp_path):
    """Groups 0 to 5, of which 2 and 3 were trained at step 2; 0 is in the samples only."""
    path = tmp_path / "tiny"
    RunDir.create(path, tiny_config(run={"root": str(tmp_path)})).close()
    store = ExperienceStore(path / "experience")
    for number in range(6):
        store.write(group(number, [0.0, number / 4]))
    recovery = Recovery(store, path / "checkpoints", tell=print, **OPTIONS)
    for step in (1, 2):
        numbers = [2 * step - 2, 2 * step - 1]
        groups = [group(number, [0.0, number / 4]) for number in numbers]
        write_samples(path / "samples", step, groups, step - 1, lambda ids: "", limit=2)
        recovery.record_trained(step, numbers)
    return path


def listed(capsys, *arguments) -> list[list[str]]:
    assert main(["inspect", *map(str, arguments)]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == list(HEADING)
    return [line.split() for line in lines if line.startswith("g")]


def test_stored_and_sampled_groups_are_listed_once_each(run, capsys):
    assert listed(capsys, run) == [
        ["g00000000", "p0", "0..0", "0", "2", "7", "1", "sample"],
        ["g00000002", "p2", "1..1", "0.25", "2", "7", "2", "store"],
        ["g00000003", "p3", "1..1", "0.375", "2", "7", "2", "store"],
        ["g00000004", "p4", "2..2", "0.5", "2", "7", "open", "store"],
        ["g00000005", "p5", "2..2", "0.625", "2", "7", "open", "store"],
    ]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--prompt", "p3"], [3]),
        (["--version", 1], [2, 3]),
        (["--min-reward", 0.375], [3, 4, 5]),
        (["--max-reward", 0.25], [0, 2]),
        (["--min-reward", 0.3, "--max-reward", 0.5], [3, 4]),
        (["--step", 2], [2, 3]),
        (["--step", 1], [0]),
        (["--limit", 2], [0, 2]),
        (["--version", 2, "--limit", 1], [4]),
        (["--prompt", "nobody"], []),
    ],
)
def test_options_choose(run, capsys, options, numbers):
    assert [line[0] for line in listed(capsys, run, *options)] == [f"g{n:08d}" for n in numbers]


def test_a_group_that_was_replayed_has_the_steps_of_all_its_uses(run, capsys):
    """Group 3 is stored and was trained again at step 3; of group 0 only samples are left."""
    recorded = {str(n): [2, 3] if n == 3 else [2] for n in (2, 3)}
    (run / "experience" / "trained.json").write_text(json.dumps(recorded))
    again = [group(0, [0.0, 0.0])]
    write_samples(run / "samples", 3, again, 2, lambda ids: "", limit=2)
    rows = listed(capsys, run)
    assert [(row[0], row[6]) for row in rows[:3]] == [
        ("g00000000", "1,3"),
        ("g00000002", "2"),
        ("g00000003", "2,3"),
    ]
    assert [row[0] for row in listed(capsys, run, "--step", 3)] == ["g00000000", "g00000003"]


def test_damaged_files_are_named_and_the_others_listed(run, capsys):
    stored, sampled = (
        run / "experience" / "g00000004.arrow",
        run / "samples" / "step-000001.parquet",
    )
    stored.write_bytes(stored.read_bytes()[:-3])
    sampled.write_bytes(b"PAR1")
    assert main(["inspect", str(run), "--step", "2"]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if line[0] == "g"] == [
        "group",
        "g00000002",
        "g00000003",
    ]
    assert "error: damaged files:\n" in err
    for path in (stored, sampled):
        assert str(path) in err


def test_a_run_without_groups_is_an_empty_list(tmp_path, capsys):
    config = tiny_config(run={"root": str(tmp_path), "name": "empty"})
    RunDir.create(tmp_path / "empty", config).close()
    assert listed(capsys, tmp_path / "empty") == []


def test_the_listing_as_json_has_the_rows_of_the_table(run, capsys):
    rows = listed(capsys, run)
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] == "tiny"
    assert found["problems"] == []
    assert [group["group_id"] for group in found["groups"]] == [row[0] for row in rows]
    assert found["groups"][1]["response"] is None
    assert found["groups"][1]["reward"] == 0.25
    assert found["groups"][1]["steps"] == [2]


def test_prompt_and_response_are_shown_as_text_in_one_short_line(run):
    decoded: list[list[int]] = []

    def decode(ids):
        decoded.append(list(ids))
        return "a\x1b[2J" + "b" * 90

    listing = list_groups(run, GroupFilter(step=2), decode=decode)
    heading, first, text, *_ = lines_of(listing.rows)
    assert heading.split() == list(HEADING)
    assert first.startswith("g00000002")
    assert text.startswith('    "')
    assert ' -> "a\\\\x1b[2Jbbb' in text
    assert text.endswith('bbb..."')
    assert decoded


def test_without_the_runs_tokenizer_the_reason_is_given(run, capsys):
    assert main(["inspect", str(run)]) == 0
    captured = capsys.readouterr()
    assert "no text of stored responses: " in captured.err
    assert "no such folder" in captured.err
    assert " -> -" in captured.out
