"""The command line, run in this process and in children."""

import json
import os

import pytest

from rlhf_cluster import __version__
from rlhf_cluster.cli.commands import main
from rlhf_cluster.cli.run_control import parse_sizes, stop_run
from rlhf_cluster.errors import ConfigError, RunError
from rlhf_cluster.planning.placement import demand, derived, total_resources
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot
from tests.support.builders.run_configs import tiny_config

TOML = """
[run]
name = "tiny"
steps = 3
groups_per_step = 4
[model.init]
hidden_size = 128
num_layers = 1
[data]
task = "sort_digits"
max_prompt_tokens = 8
[algorithm]
type = "grpo"
group_size = 4
[generation]
max_response_tokens = 8
num_cpus = 0.25
[scoring]
num_cpus = 0.5
rewards = [{type = "exact_match"}]
[learner]
learning_rate = 1e-3
ranks = 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder with a run file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path


@pytest.fixture
def finished(here):
    """A run directory below ./runs that its run has left."""
    with RunDir.create(here / "runs" / "tiny", tiny_config()) as run:
        run.write_status(
            Snapshot(run="tiny", state="finished", step=3, num_steps=3, time_s=1.0, reward=0.5)
        )
        (run.logs / "learner-0.log").write_text("1 first\n3 third\n")
        (run.logs / "scoring-0.log").write_text("2 second\n")
    return run


def test_every_command_has_help(capsys):
    for command in (
        *("run", "validate", "plan", "submit", "status", "logs", "inspect", "stop", "scale"),
        *("report", "trace", "doctor"),
    ):
        assert main([command, "--help"]) == 0
        assert f"rlhf-cluster {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["run"], ["run", "a.toml", "--sett", "x"], ["logs", "x", "--tail", "0"]],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.err
    assert captured.out == ""


def test_an_error_is_one_message_and_exit_code_1(here, capsys):
    assert main(["plan", "absent.toml"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: absent.toml: cannot read the configuration")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_traceback_is_shown_on_request(here, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_DEBUG", "1")
    assert main(["plan", "absent.toml"]) == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert "error: absent.toml" in captured


def test_a_misspelt_override_is_explained(here, capsys):
    assert main(["plan", "run.toml", "--set", "run.stepz=3"]) == 1
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_plan_lists_one_line_a_bundle_and_the_total(here, capsys):
    assert main(["plan", "run.toml", "--set", "generation.workers=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in lines] == [
        *("generation-0", "generation-1", "scoring-0", "learner-0", "learner-1", "buffer"),
        "total",
    ]
    assert lines[0].split()[1:] == ["0.25", "CPU"]
    assert lines[-1].split(maxsplit=1)[1] == "3.1 CPU in 6 bundles"


def test_derived_numbers_follow_from_the_settings():
    config = tiny_config(learner={"ranks": 2, "num_gpus": 1.0}, generation={"workers": 3})
    numbers = derived(config)
    assert numbers["prompts"] == "12 (4 a step)"
    assert numbers["samples a step"] == "16 (4 prompts x 4)"
    assert numbers["response tokens a step"] == "at most 128"
    assert numbers["generation demand"] == "0.75 CPU"
    assert numbers["learner demand"] == "0.5 CPU, 2 GPU"
    assert numbers["total demand"] == total_resources(demand(config)) == "1.6 CPU, 2 GPU"


def test_status_shows_the_last_snapshot(finished, capsys):
    for name in ("tiny", str(finished.path)):
        assert main(["status", name]) == 0
        captured = capsys.readouterr()
        assert "step 3 of 3" in captured.out
        assert "crashed" not in captured.err


def test_status_as_json_can_be_read_back(finished, capsys):
    assert main(["status", "tiny", "--json"]) == 0
    assert Snapshot.from_json(capsys.readouterr().out) == finished.read_status()


def test_status_of_a_killed_run_says_that_it_crashed(finished, capsys):
    finished.write_status(
        Snapshot(run="tiny", state="running", step=1, num_steps=3, time_s=1.0, reward=0.5)
    )
    assert main(["status", "tiny"]) == 0
    assert f"process {os.getpid()}" in (err := capsys.readouterr().err)
    assert "crashed" in err


def test_status_of_no_run_lists_the_runs_there_are(finished, capsys):
    assert main(["status", "tinny"]) == 1
    assert "Runs in runs: tiny" in capsys.readouterr().err


def test_logs_are_merged_or_of_one_process(finished, capsys):
    assert main(["logs", "tiny"]) == 0
    assert capsys.readouterr().out.split() == ["1", "first", "2", "second", "3", "third"]
    assert main(["logs", "tiny", "--actor", "learner-0", "--tail", "1"]) == 0
    assert capsys.readouterr().out == "3 third\n"
    assert main(["logs", "tiny", "--actor", "lerner-0"]) == 1
    assert "did you mean 'learner-0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("generation", "expected POOL=WORKERS"),
        ("generation=two", "found 'two'"),
        ("generation=0", "at least 1, found '0'"),
        ("generation=-1", "at least 1, found '-1'"),
        ("generation=1.5", "found '1.5'"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(argument, message, capsys):
    assert main(["scale", "tiny", argument]) == 1
    assert message in capsys.readouterr().err


def test_sizes_are_numbers_by_pool():
    assert parse_sizes(["generation=3", "scoring=2"]) == {"generation": 3, "scoring": 2}
    with pytest.raises(ConfigError, match="given twice"):
        parse_sizes(["scoring=3", "scoring=2"])


def test_a_run_on_another_machine_is_not_signalled(here):
    with RunDir.create(here / "runs" / "tiny", tiny_config()) as run:
        owner = run.path / "run.lock"
        owner.write_text('{"host": "elsewhere", "pid": 1, "started": "2026"}')
        with pytest.raises(RunError, match="Stop it there"):
            stop_run(run, timeout_s=0.2)


def test_validate_checks_all_inputs_and_leaves_nothing_behind(here, capsys):
    assert main(["validate", "run.toml"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("run.toml: valid\n")
    assert "12 (4 a step)" in captured.out
    assert [p.name for p in here.iterdir()] == ["run.toml"]


def test_validate_says_that_a_run_directory_is_taken(finished, capsys):
    assert main(["validate", "run.toml"]) == 0
    assert "note: runs/tiny exists" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_prompt_tokens=3"], "longer than data.max_prompt_tokens = 3"),
        (["scoring.rewards=[{type='exact_match', target_column='gold'}]"], "no column 'gold'"),
        (["scoring.rewards=[{type='python', function='absent_module:f'}]"], "absent_module"),
        (
            ["scoring.rewards=[{type='reward_model', path='/absent', tokenizer='shared'}]"],
            "/absent",
        ),
    ],
)
def test_validate_refuses_inputs_that_would_fail_the_run(here, capsys, overrides, message):
    words = [word for override in overrides for word in ("--set", override)]
    assert main(["validate", "run.toml", *words]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in here.iterdir()] == ["run.toml"]


def test_validate_reports_all_problems_at_once(here, capsys):
    changes = [
        *("--set", "scoring.rewards=[{type='exact_match', target_column='gold'}]"),
        *("--set", "evaluation.num_prompts=2", "--set", "evaluation.path='absent.jsonl'"),
        *("--set", "generation.quantization='mxfp8'"),
    ]
    assert main(["validate", "run.toml", *changes]) == 1
    captured = capsys.readouterr()
    assert "valid" not in captured.out
    heading, *problems = captured.err.splitlines()
    assert heading == "error: run.toml: 3 problems"
    for problem, words in zip(problems, ("mxfp8", "absent.jsonl", "no column 'gold'"), strict=True):
        assert problem.startswith("  - ")
        assert words in problem


def test_a_prompt_that_no_rule_can_score_is_named_by_file_and_line(here, capsys):
    rows = [{"prompt": "1 2", "answer": "1"}, {"prompt": "2 1"}]
    (here / "rows.jsonl").write_text("\n".join(["", *map(json.dumps, rows)]))
    text = TOML.replace('task = "sort_digits"', 'path = "rows.jsonl"')
    (here / "run.toml").write_text(text)
    target = "scoring.rewards=[{type='exact_match', target_column='answer'}]"
    assert main(["validate", "run.toml", "--set", target]) == 1
    assert "rows.jsonl, line 3: reward 'exact_match'" in capsys.readouterr().err


def printed_json(capsys, *words: str, code: int = 0) -> dict:
    """Run a command with --json. Return the object that it printed, and nothing else."""
    assert main([*words, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_validate_as_json_has_facts_and_problems(here, capsys):
    found = printed_json(capsys, "validate", "run.toml")
    assert found["file"] == "run.toml"
    assert found["problems"] == []
    [run] = found["runs"]
    assert run["valid"] is True
    assert run["facts"]["prompts"] == "12 (4 a step)"
    target = "scoring.rewards=[{type='exact_match', target_column='gold'}]"
    found = printed_json(capsys, "validate", "run.toml", "--set", target, code=1)
    assert found["runs"][0]["valid"] is False
    assert "no column 'gold'" in found["problems"][0]


def test_a_run_file_of_unknown_keys_is_json_with_each_problem(here, capsys):
    changes = ["--set", "run.stepz=3", "--set", "learner.lr=1"]
    found = printed_json(capsys, "validate", "run.toml", *changes, code=1)
    assert sorted(text.partition(":")[0] for text in found["problems"]) == [
        "learner.lr",
        "run.stepz",
    ]
    assert found["error"].startswith("run.toml: 2 problems")
    found = printed_json(capsys, "status", "nothing", code=1)
    assert found["problems"] == [found["error"]]
    assert "Runs in runs" in found["error"] or "no run" in found["error"]


def test_plan_as_json_has_the_bundles_and_the_total(here, capsys):
    found = printed_json(capsys, "plan", "run.toml")
    [run] = found["runs"]
    assert run["bundles"][0] == {"owner": "generation-0", "resources": {"CPU": 0.25}}
    assert main(["plan", "run.toml"]) == 0
    assert f"{run['total']} in {len(run['bundles'])} bundles" in capsys.readouterr().out


def test_status_of_a_finished_run_says_what_was_reached(finished, capsys):
    finished.write_summary(
        {
            "run": "tiny",
            "run_dir": str(finished.path),
            "steps": 3,
            "total_s": 75.2,
            "reward_before": 0.25,
            "reward_after": None,
            "final_model": str(finished.path / "final"),
        }
    )
    assert main(["status", "tiny"]) == 0
    text = capsys.readouterr().out
    rows = dict(line.split(None, 1) for line in text.splitlines()[1:])
    assert rows["steps"] == "3 in 1 min 15 s"
    assert rows["reward"] == "0.500 at the end"
    assert rows["held"] == "out       0.250 before, not known after"
    assert rows["model"] == "runs/tiny/final"
    assert "workers" not in text
    found = printed_json(capsys, "status", "tiny")
    assert found["summary"]["reward_before"] == 0.25
    assert found["state"] == "finished"
    assert found["crashed"] is False


def test_the_version_is_printed_alone(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf-cluster {__version__}\n"


def test_a_shell_can_complete_commands(capsys, monkeypatch):
    monkeypatch.setenv("_RLHF_CLUSTER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "rlhf-cluster val")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert main([]) == 0
    assert capsys.readouterr().out.split() == ["validate"]


def test_validate_answers_a_hub_id_with_the_command_that_fetches_it(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = TOML.replace(
        "[model.init]\nhidden_size = 128\nnum_layers = 1", "[model]\npath = 'no-such/model'"
    )
    (here / "run.toml").write_text(text)
    assert main(["validate", "run.toml"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: run.toml: 1 problem\n")
    assert "hf download no-such/model --local-dir models/model" in error
