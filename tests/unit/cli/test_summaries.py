"""The last lines of a finished run."""

import shlex
from pathlib import Path

import pytest

from rlhf_cluster.cli.summaries import ending
from rlhf_cluster.config import RunConfig, load_run

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.toml"


def lines_of(run_dir: Path, here: Path, overrides: list[str], **changes) -> list[str]:
    config: RunConfig = load_run(QUICKSTART, overrides)
    summary = {
        "run": config.run.name,
        "run_dir": str(run_dir),
        "steps": config.run.steps,
        "reward_before": 0.1234,
        "reward_after": 0.9,
        "reward_trained": 0.8126,
        "total_s": 95.4,
        "final_model": str(run_dir / "final"),
        **changes,
    }
    return ending(summary, config, Path("my configs/a.toml"), overrides, "rlhf-cluster", here)


def test_the_ending_tells_the_result_and_where_it_lies(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "runs" / "quickstart", tmp_path, ["run.steps=1200"])
    assert lines[:5] == [
        "Run quickstart finished: 1,200 steps in runs/quickstart",
        "  held-out reward  0.123 -> 0.900 on 256 held-out prompts",
        "  training reward  0.813, mean of the last 10 steps",
        "  time             1 min 35 s",
        "  trained model    runs/quickstart/final",
    ]
    assert lines[-4].endswith("rlhf-cluster status quickstart")
    elsewhere = lines_of(tmp_path / "runs" / "quickstart", tmp_path / "other", [])
    assert f"{tmp_path}/runs/quickstart" in elsewhere[0]
    assert elsewhere[-4].endswith(f"status {tmp_path}/runs/quickstart")


def test_of_one_run_among_several_nothing_is_suggested_that_names_the_others(
    tmp_path: Path,
) -> None:
    config = load_run(QUICKSTART, [])
    summary = {"run": "rl", "run_dir": str(tmp_path), "steps": 1, "total_s": 1.0}
    summary |= {"reward_before": None, "reward_after": None, "final_model": str(tmp_path)}
    lines = ending(summary, config, Path("a.toml"), [], "rlhf-cluster", tmp_path, alone=False)
    assert not [line for line in lines if "a.toml" in line]


def test_a_run_without_held_out_prompts_says_so(tmp_path: Path) -> None:
    none = ["evaluation.num_prompts=0"]
    lines = lines_of(tmp_path, tmp_path, none, reward_before=None, reward_after=None)
    assert "not measured on held-out prompts (evaluation.num_prompts = 0)" in lines[1]
    older = lines_of(tmp_path, tmp_path, none, reward_trained=None)
    assert older[2] == "  training reward  not known"


def test_a_run_whose_held_out_prompts_all_failed_says_so(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, tmp_path, [], reward_after=None)
    assert "not known: no held-out prompt could be answered after training" in lines[1]


@pytest.mark.parametrize("name", ["quickstart", "a" * 64])
def test_the_suggested_longer_run_can_be_started_as_it_stands(tmp_path: Path, name: str) -> None:
    given = [f"run.name={name}", "run.steps=50", "data.prompt_column=two words"]
    line = lines_of(tmp_path / "runs" / name, tmp_path, given)[-1]
    words = shlex.split(line.split("A longer run", 1)[1])
    assert words[:3] == ["rlhf-cluster", "run", "my configs/a.toml"]
    assert set(words[3::2]) == {"--set"}
    suggested = load_run(QUICKSTART, words[4::2])
    assert suggested.run.steps == 100
    assert suggested.run.name == f"{name[:57]}-longer"
    assert suggested.data.prompt_column == "two words"


def test_the_suggested_change_is_a_valid_configuration(tmp_path: Path) -> None:
    line = lines_of(tmp_path / "runs" / "quickstart", tmp_path, ["run.steps=50"])[-2]
    words = shlex.split(line.split("Check a change", 1)[1])
    assert words[:3] == ["rlhf-cluster", "validate", "my configs/a.toml"]
    suggested = load_run(QUICKSTART, words[4::2])
    assert (suggested.run.steps, suggested.generation.temperature) == (50, 0.8)
