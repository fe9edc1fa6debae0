"""The audit of what the lock pins: silence is no clean answer."""

import re
import runpy
from pathlib import Path

AUDIT = runpy.run_path("deploy/audit.py")
LOCK = Path("deploy/requirements-cpu.lock").read_text()


def package(name: str, **found) -> dict:
    return {"name": name, "version": "1", **({"vulns": []} | found)}


def test_only_a_whole_answer_without_findings_is_a_clean_one():
    verdict = AUDIT["verdict"]
    assert verdict({"dependencies": [package("a"), package("b")]})[0] == 0
    bad = package("a", vulns=[{"id": "CVE-1", "fix_versions": ["2"]}])
    skipped = {"name": "b", "version": "1", "skip_reason": "not found"}
    code, lines = verdict({"dependencies": [bad, skipped]})
    assert code == 1
    assert lines[0] == "a 1: CVE-1, fixed in 2"
    code, lines = verdict({"dependencies": [package("a"), skipped]})
    assert code == 2
    assert "NOT audited: 1 of 2 packages (b...)" in lines[0]
    assert verdict({"dependencies": []})[0] == 2


def test_every_line_of_the_lock_is_pinned_to_one_version_and_audited():
    lines = [line for line in LOCK.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) > 100
    assert [x for x in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", x)] == []
    assert len(AUDIT["pinned"](LOCK)) == len(lines)
    assert not any("+" in requirement for requirement in AUDIT["pinned"](LOCK))
