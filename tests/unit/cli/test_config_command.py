"""The command `config` explains keys and sections of run files."""

import subprocess
import sys

import pytest

from rlhf_cluster.cli.commands import main
from rlhf_cluster.config.reference import sections


def printed(capsys, *words: str) -> list[str]:
    assert main(["config", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_key_shows_type_default_bounds_files_and_meaning(capsys):
    lines = printed(capsys, "staleness.max_staleness")
    assert lines[0] == "staleness.max_staleness"
    rows = dict(line.split(None, 1) for line in lines[1:])
    assert rows["type"] == "integer"
    assert rows["default"] == "1"
    assert rows["bounds"] == "at least 0"
    assert rows["run"] == "files  run"
    assert rows["meaning"].startswith("Largest learner version minus sampling version")


def test_a_key_that_differs_between_types_is_shown_for_each(capsys):
    lines = printed(capsys, "algorithm.clip_low")
    assert lines.count("algorithm.clip_low") == 3
    assert "  exists with  gspo" in lines
    assert "  default      0.0003" in lines


def test_a_section_shows_its_types_and_all_its_keys_in_one_table(capsys):
    lines = printed(capsys, "algorithm.kl_control")
    first = lines.index("keys of [algorithm.kl_control]:")
    assert [
        line.split()[0]
        for line in lines[lines.index("types of [algorithm.kl_control]:") + 1 : first]
    ] == [
        "fixed",
        "adaptive",
        "linear",
    ]
    names = [line.split()[0] for line in lines[first + 1 :]]
    assert names == ["type", "target", "horizon", "final", "steps"]
    assert lines[first + 2].endswith("(adaptive)")


def test_a_section_of_several_kinds_of_files_says_whose_a_key_is(capsys):
    lines = printed(capsys, "data")
    [sources] = [line for line in lines if line.startswith("  sources ")]
    assert sources.endswith("(stage)")


def test_without_a_key_all_sections_are_listed(capsys):
    lines = printed(capsys)
    assert [line.split()[0] for line in lines] == [path for path in sections() if path]
    assert all(len(line.split()) > 3 for line in lines)


def test_an_unknown_key_ends_in_an_error_with_the_near_ones(capsys):
    assert main(["config", "learner.learning_rte"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: learner.learning_rte: no run file has this key; did you mean")
    assert "learner.learning_rate" in error


@pytest.mark.parametrize(
    "module", ["rlhf_cluster.config.reference", "rlhf_cluster.config.run_config"]
)
def test_help_imports_nothing_that_the_command_needs(module):
    code = (
        "import sys; from rlhf_cluster.cli.commands import main; main(['config', '--help']); "
        f"sys.exit({module!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
