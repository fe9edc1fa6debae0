"""Hashes of the files that a lock pins, as pip finds them: `make lock`.

python deploy/lock.py LOCK...

Versions and comments of a lock stay; behind each version come the SHA-256 of the wheels that pip takes
for it, here and on the oldest Linux that all of it installs on. pip is asked twice: with the sources
that it is configured with on this machine, and with PyPI alone. Where the two give different files,
these are told and the lock is left as it was. pip takes hashes for all lines of a lock or for none:
such a package belongs into a lock of its own, as torch does (requirements-torch.lock), whose build for
the CPU is not on PyPI.

Ends with 0 when every lock has its hashes, with 1 when one was left as it was.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OLDEST_GLIBC = 31  # 2.31, of Ubuntu 20.04 and Debian 11: llguidance has no wheel for an older one
PYTHON = "3.11"
PYPI = "https://pypi.org/simple"
TIMEOUT_S = 900
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)")


def pins(lock: str) -> dict[str, str]:
    """Version by name, as written."""
    found = (PIN.match(line) for line in lock.splitlines())
    return {pin[1]: pin[2] for pin in found if pin}


def files(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """File name and SHA-256 by canonical name, of pip's installation report. Raises `SystemExit` for a
    source that gives no SHA-256."""
    found = {}
    for package in report["install"]:
        name, info = package["metadata"]["name"], package["download_info"]
        digest = info.get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise SystemExit(f"{name}: {info['url']} comes without a SHA-256")
        found[canonical(name)] = (info["url"].rpartition("/")[2], digest)
    return found


def disagreements(
    ours: Mapping[str, tuple[str, str]], theirs: Mapping[str, tuple[str, str]]
) -> list[str]:
    """What two sources give different files of, or only one has, in words."""
    return [
        f"{name}: {ours.get(name, 'missing')} here, {theirs.get(name, 'missing')} on PyPI"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def hashed(lock: str, found: Sequence[Mapping[str, tuple[str, str]]]) -> str:
    """`lock` with the hashes of all of `found` in place of those that it had."""
    lines = []
    for line in lock.splitlines():
        if pin := PIN.match(line):
            name = canonical(pin[1])
            digests = dict.fromkeys(files_of[name][1] for files_of in found)
            line = " ".join([pin[0], *(f"--hash=sha256:{digest}" for digest in digests)])
        lines.append(line)
    return "\n".join(lines) + "\n"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def ask(lock: str, options: Sequence[str], pypi_alone: bool) -> dict[str, tuple[str, str]]:
    """What pip would install of `lock`; nothing is installed. Raises `SystemExit` when it cannot."""
    environment = dict(os.environ)
    if pypi_alone:
        environment = {k: v for k, v in environment.items() if not k.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": PYPI}
        environment |= {k: v for k, v in os.environ.items() if k == "PIP_CERT"}
    with tempfile.TemporaryDirectory() as folder:
        asked, report = Path(folder) / "lock.txt", Path(folder) / "report.json"
        asked.write_text("".join(f"{n}=={v}\n" for n, v in pins(lock).items()), encoding="utf-8")
        words = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--quiet"]
        words += ["--only-binary", ":all:", "--report", str(report), "--requirement", str(asked)]
        command = [sys.executable, "-m", "pip", *words, *options]
        done = subprocess.run(command, env=environment, timeout=TIMEOUT_S)
        if done.returncode != 0:
            raise SystemExit(f"pip could not find all of the lock: {' '.join(options)}")
        return files(json.loads(report.read_text(encoding="utf-8")))


def oldest(folder: str) -> list[str]:
    """pip's options for the oldest Linux, best first."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(OLDEST_GLIBC, 4, -1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    options = ["--python-version", PYTHON, "--target", folder]
    return options + [word for tag in tags for word in ("--platform", tag)]


def main(paths: Sequence[str]) -> int:
    """Waits for: pip, at most `TIMEOUT_S` a question."""
    code = 0
    for path in map(Path, paths):
        lock = path.read_text(encoding="utf-8")
        here, pypi = ask(lock, [], pypi_alone=False), ask(lock, [], pypi_alone=True)
        if different := disagreements(here, pypi):
            print(f"{path} is left as it was:", *different, sep="\n  ")
            code = 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = [here, ask(lock, oldest(folder), pypi_alone=True)]
        partial = path.with_suffix(".partial")
        partial.write_text(hashed(lock, found), encoding="utf-8")
        partial.replace(path)
        print(f"{path}: {len(pins(lock))} packages with hashes")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
