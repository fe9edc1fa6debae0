"""A release agrees with itself: version, changelog, citation, dependencies, contents, installation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

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
