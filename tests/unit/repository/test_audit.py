"""The audit of what the lock pins: silence is no clean answer."""

import re
import runpy
from pathlib import Path

AUDIT = runpy.run_path("deploy/audit.py")
MAKEFILE = Path("Makefile").read_text()
LOCKS = sorted(Path("deploy").glob("requirements-*.lock"))


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


def lines_of(path: Path) -> list[str]:
    return [x for x in path.read_text().splitlines() if x.strip() and not x.startswith("#")]


def test_every_line_of_the_locks_is_pinned_to_one_version_and_audited():
    assert sum(len(lines_of(path)) for path in LOCKS) > 100
    for path in LOCKS:
        pins = [line.split()[0] for line in lines_of(path)]
        assert [x for x in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", x)] == []
        assert AUDIT["pinned"](path.read_text()) == [pin.partition("+")[0] for pin in pins]
        assert path.name in MAKEFILE
    assert re.search(
        r"pip-audit \$\(LOCK\) \$\(TORCH\) \$\(DEEPSPEED\) \$\(TRL\) \$\(DOCS\)\n", MAKEFILE
    )


def test_every_line_has_hashes_and_pip_asks_for_them_but_for_torch():
    without = [
        line
        for path in LOCKS
        for line in lines_of(path)
        if not re.fullmatch(r"\S+( --hash=sha256:[0-9a-f]{64})+", line)
    ]
    assert [line.partition("==")[0] for line in without] == ["torch"]
    installs = re.findall(r"pip install(.*)--requirement \$\((\w+)\)", MAKEFILE)
    assert {variable for options, variable in installs if "--require-hashes" in options} == {
        "LOCK",
        "DEEPSPEED",
        "TRL",
        "DOCS",
    }
    assert {variable for _, variable in installs} == {"LOCK", "TORCH", "DEEPSPEED", "TRL", "DOCS"}
