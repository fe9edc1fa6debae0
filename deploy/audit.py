"""Known vulnerabilities of what the locks pin, asked of PyPI by pip-audit: `make audit`.

python deploy/audit.py PIP_AUDIT LOCK...

Ends with 0 when every package was looked up and none is known to be vulnerable, with 1 when one is,
with 2 when packages could not be looked up: silence of the source is never taken for a clean answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT_S = 600


def pinned(lock: str) -> list[str]:
    """The requirements of a lock, as PyPI knows them: without hashes, and local parts such as +cpu."""
    lines = [line.split("#")[0].partition(" ")[0].strip() for line in lock.splitlines()]
    return [line.partition("+")[0] for line in lines if "==" in line]


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """Exit code and what to print, of pip-audit's JSON."""
    packages = report["dependencies"]
    skipped = [p for p in packages if "skip_reason" in p]
    bad = [p for p in packages if p.get("vulns")]
    lines = [
        f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for p in bad
        for v in p["vulns"]
    ]
    if skipped:
        names = ", ".join(p["name"] for p in skipped[:10])
        lines.append(
            f"NOT audited: {len(skipped)} of {len(packages)} packages ({names}...): "
            f"{skipped[0]['skip_reason']}. Can https://pypi.org/pypi be reached from here?"
        )
    lines.append(
        f"{len(packages) - len(skipped)} packages audited, {len(bad)} with known vulnerabilities"
    )
    return (1 if bad else 2 if skipped or not packages else 0), lines


def main(pip_audit: str, *locks: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        lines = [line for lock in locks for line in pinned(Path(lock).read_text())]
        requirements.write_text("\n".join(lines) + "\n")
        words = [pip_audit, "--requirement", str(requirements), "--no-deps", "--disable-pip"]
        done = subprocess.run(
            [*words, "--format", "json", "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    try:
        code, lines = verdict(json.loads(done.stdout))
    except (ValueError, KeyError):
        code, lines = 2, ["NOT audited: pip-audit gave no report.", done.stderr.strip()[-2000:]]
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
