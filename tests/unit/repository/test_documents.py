"""Statements of README, docs and docstrings: commands parse, files exist, figures were measured."""

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pip._internal.commands import create_command

from rlhf_cluster.cli.commands import app
from rlhf_cluster.observe.metric_table import docs_table

DOCUMENTS = [*sorted(Path().glob("*.md")), *sorted(Path("docs").rglob("*.md"))]
README = Path("README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.strip()
]
FIGURES = json.loads(Path("benchmarks/results/loop.json").read_text())["figures"]


def test_the_readme_has_the_two_commands():
    assert {"make quickstart", "make test"} <= set(COMMANDS)


def test_every_code_block_of_the_readme_is_of_a_kind_that_a_test_runs():
    assert len(BLOCKS) == README.count("\n```") / 2
    kinds = [language for language, _ in BLOCKS]
    assert kinds.count("") == 1  # the picture
    # bash: below. toml and python: test_readme_run_file.py.
    assert set(kinds) == {"", "bash", "toml", "python"}


PROGRAMS = {"make", "rlhf-cluster", "pip", "python3.11"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_line_of_bash_in_the_readme_calls_a_known_program_on_files_that_exist(command):
    for part in command.split("&&"):
        words = [w for w in shlex.split(part) if not re.fullmatch(r"[A-Z0-9_]+=\S*", w)]
        if words[0] == "source":
            assert f"python3.11 -m venv {words[1].removesuffix('/bin/activate')} " in command
            continue
        assert words[0] in PROGRAMS
        for word in words:
            assert not re.match(r"(configs|deploy|docs)/", word) or Path(word).exists(), word


PIP = [shlex.split(c.partition("pip ")[2]) for c in COMMANDS if "pip install" in c]


@pytest.mark.parametrize("words", PIP, ids=" ".join)
def test_every_pip_command_of_the_readme_parses(words):
    command = create_command(words[0])
    options, arguments = command.parse_args(words[1:])
    assert options.ignore_dependencies
    assert options.requirements or arguments == ["."]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_of_the_readme_exists(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "rlhf-cluster" in c])
def test_every_command_of_the_readme_parses_and_names_real_files(command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z0-9_]+=\S*", w)]
    assert words[0] == "rlhf-cluster"
    group = typer.main.get_command(app)
    name, parsed, rest = group.resolve_command(group.make_context("x", words[1:]), words[1:])
    assert name == words[1]
    parsed.make_context(name, list(rest))
    for word in words:
        if word.startswith("configs/"):
            assert Path(word).exists()


def test_every_figure_of_the_readme_is_the_measured_one():
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+)[^|]*\| `(\w+)` \|$", README, flags=re.MULTILINE)
    assert len(rows) >= 8
    for shown, name in rows:
        digits = len(shown.partition(".")[2])
        assert float(shown) == round(FIGURES[name], digits), name


def test_what_the_documents_say_of_learning_is_what_was_measured():
    found = json.loads(Path("benchmarks/results/learning_curves.json").read_text())["figures"]
    mean = {name.split("/")[1]: value for name, value in found.items() if name.endswith("/mean")}
    text = Path("docs/algorithms.md").read_text()
    section = text.partition("## What it learns")[2].partition("\n## ")[0]
    rows = re.findall(r"([A-Z]{3,5})\s([\d.]+\d)", section)
    assert len(rows) == 6
    for name, shown in rows:
        assert all(f"reward_after/{name.lower()}/{seed}" in found for seed in range(3))
        assert float(shown) == pytest.approx(mean[name.lower()], abs=0.0051), name


def test_what_the_documents_say_of_staleness_is_what_was_measured():
    found = json.loads(Path("benchmarks/results/staleness_study.json").read_text())["figures"]
    text = Path("docs/algorithms.md").read_text()
    section = text.partition("### How stale")[2].partition("\n### ")[0]
    rows = re.findall(
        r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", section, re.M
    )
    names = {"0": "sync", "8": "stale_8"}
    assert [staleness for staleness, *_ in rows] == list(names)
    for staleness, *shown in rows:
        name = names[staleness]
        keys = (name, *(f"{name}/{k}" for k in ("deviation", "kl", "effective_sample_size")))
        for figure, key, bound in zip(shown, keys, (5.1e-4, 5.1e-4, 1e-9, 5.1e-3), strict=True):
            assert float(figure) == pytest.approx(found[key], abs=bound), key
    shown = re.findall(r"difference is (\S+), 95 % interval (\S+) to (\S+):", section)
    keys = ("difference", "difference_low", "difference_high")
    expected = pytest.approx([found[key] for key in keys], abs=5.1e-4)
    assert [[float(value) for value in values] for values in shown] == [expected]
    by_setting = sorted(value for key, value in found.items() if "/setting_" in key)
    rewards = re.findall(r"^\| \d \| ([\d.]+) \| `", section, re.M)
    assert sorted(map(float, rewards)) == pytest.approx(by_setting, abs=5.1e-4)
    bests = re.findall(
        r"`bypass` reached a held-out reward of (\S+) .*?`recompute` (\S+)", text, re.S
    )
    searched = [found[f"stale_8/search/{proximal}"] for proximal in ("bypass", "recompute")]
    assert [[float(v) for v in pair] for pair in bests] == [pytest.approx(searched, abs=5.1e-4)]


def test_what_the_documents_say_of_int8_is_what_was_measured():
    runs = json.loads(Path("benchmarks/results/int8_scoring.json").read_text())["runs"].values()
    section = Path("docs/rewards.md").read_text().partition("## Frozen models in 8 bits")[2]
    found = re.findall(
        r"^\| .+ against .+ \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) \|$", section, re.M
    )
    compared = (
        "bfloat16_vs_float32",
        "int8_vs_float32",
        "int8_vs_bfloat16",
        "int8_float32_vs_float32",
    )
    for shown, name in zip(found, compared, strict=True):
        means = [run[f"reference/mean_abs_difference/{name}"] for run in runs]
        expected = (
            round(min(run[f"reward/spearman/{name}"] for run in runs), 5),
            round(100 * max(run[f"reward/order_changed/{name}"] for run in runs), 2),
            round(sum(means) / len(means), 4),
            round(max(run[f"reference/max_abs_difference/{name}"] for run in runs), 3),
        )
        assert tuple(map(float, shown)) == expected, name


def test_the_result_names_machine_versions_and_command():
    result = json.loads(Path("benchmarks/results/loop.json").read_text())
    assert {"machine", "versions", "command", "date", "figures", "runs"} <= set(result)
    assert {
        "pool_over_raw_vllm",
        "async_over_slower_side",
        "async_over_sync",
        "install_s",
        "first_step_s",
        "quickstart_s",
        "reward_before",
        "reward_after",
    } <= set(result["figures"])


def test_the_table_of_metrics_is_the_one_in_the_code():
    assert Path("docs/metrics.md").read_text().endswith(docs_table())


def test_files_that_the_documents_name_exist():
    for document in DOCUMENTS:
        for name in re.findall(
            r"`((?:rlhf_cluster|actors|tests|configs|docs|benchmarks|deploy)/[\w./-]+)`",
            document.read_text(),
        ):
            assert Path(name).exists(), f"{document}: {name}"


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield file and heading of each link that stays in the repository; either may be empty."""
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    ):
        if not target.startswith(("https://", "http://", "mailto:")):
            file, _, heading = target.partition("#")
            yield file, heading


def headings(text: str) -> set[str]:
    """Return the names that GitHub gives the headings of a document."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_every_link_of_a_document_resolves():
    assert set(links("[a](b.md#c-d), `[no](x)`, [e](https://f)")) == {("b.md", "c-d")}
    assert headings("# Run `a.b`, again\n```\n# no\n```\n") == {"run-ab-again"}
    seen = 0
    for document in DOCUMENTS:
        for file, heading in links(document.read_text()):
            target = document.parent / file if file else document
            assert target.exists(), f"{document}: {file}"
            assert not heading or heading in headings(target.read_text()), f"{document}: #{heading}"
            seen += 1
    assert seen >= 5  # plots, and what stands beside the README


def docstrings(path: Path) -> Iterator[str]:
    """Yield every string that is a statement: docstrings of modules, functions and attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text


def texts() -> Iterator[tuple[str, str]]:
    """Yield each place of prose and its text: documents, Makefile, docstrings, deploy files."""
    deployed = [path for path in Path("deploy").rglob("*") if path.suffix in {".md", ".yml"}]
    for path in [Path("Makefile"), *DOCUMENTS, *deployed]:
        yield str(path), path.read_text()
    for folder in ("rlhf_cluster", "actors", "benchmarks", "deploy", "tests"):
        for path in Path(folder).rglob("*.py"):
            for text in docstrings(path):
                yield str(path), text


def missing_modules(text: str) -> list[str]:
    """Return the paths of Python files of this repository that `text` names and that do not exist."""
    named = re.findall(r"(?<![\w./-])(?:rlhf_cluster|actors|tests)/[\w./-]*?\.py\b", text)
    return [name for name in named if not Path(name).exists()]


def test_every_python_file_that_a_text_names_exists():
    named = [(where, name) for where, text in texts() for name in missing_modules(text)]
    assert named == []


def test_a_text_that_names_a_moved_file_is_found():
    text = "see `rlhf_cluster/weights/store.py`, rlhf_cluster/moved.py::f and old/actors/gone.py"
    assert missing_modules(text) == ["rlhf_cluster/moved.py"]


def test_the_architecture_lists_every_room():
    text = Path("docs/architecture.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `([\w/]+)/` \|", text, re.M)
    found = [*Path("rlhf_cluster").glob("*/__init__.py"), *Path("actors").glob("*/__init__.py")]
    rooms = [str(path.parent).removeprefix("rlhf_cluster/") for path in found]
    assert sorted(listed) == sorted(rooms)


def test_every_test_that_the_documents_name_exists():
    named = [
        found
        for document in DOCUMENTS
        for found in re.findall(r"(tests/[\w/]+\.py)::(\w+)", document.read_text())
    ]
    assert len(named) > 40
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not Path(file).exists()
        or not re.search(
            rf"^ *(async )?(def|class) {name}\b|^{name} =", Path(file).read_text(), re.M
        )
    ]
    assert missing == []
