"""Build sdist and wheel, check what they hold, and run the quick start from them: `make release-check`.

python deploy/release_check.py

The sdist is built from the files that git tracks, the wheel from the unpacked sdist. The commands
of the README's section "Install without make" are then run: in the unpacked sdist up to the
installation, with the wheel in place of the checkout (`.`), and the last of them in a folder that holds
nothing but the run file that it names. Nothing of the caller's environment but paths, pip's settings
and certificates is passed on. Ends with 0 when all of it worked.

The environment takes about 3 GB below TMPDIR while the check runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rlhf_cluster/", "actors/")
BUILD_TIMEOUT_S = 300
INSTALL_TIMEOUT_S = 3600
RUN_TIMEOUT_S = 1800
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LANG", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
# Fails when Python finds the packages outside the new environment.
INSTALLED = """python -c 'import sys, actors, rlhf_cluster
for p in actors, rlhf_cluster: assert p.__file__.startswith(sys.prefix + "/lib/"), p.__file__'"""
SECTION = "## Install without make"


def commands(readme: str) -> list[str]:
    """Return the commands of the section; raise `SystemExit` when it holds none."""
    section = readme.partition(SECTION)[2].partition("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    found = [line for block in blocks for line in block.splitlines() if line.strip()]
    if len(found) < 2:
        raise SystemExit(f'README.md: no commands below "{SECTION}"')
    return found


def with_wheel(lines: Sequence[str], wheel: Path) -> list[str]:
    """Return `lines` with the wheel in place of the checkout; exactly one line installs that."""
    changed = [re.sub(r"^(pip install .*) \.$", rf"\1 {wheel}", line) for line in lines]
    if sum(a != b for a, b in zip(lines, changed, strict=True)) != 1:
        raise SystemExit(
            f'README.md, "{SECTION}": not exactly one line installs the checkout (`.`)'
        )
    return changed


def wheel_problems(names: Sequence[str], tracked: Sequence[str]) -> list[str]:
    """Return what of the packages the wheel lacks, and what it holds besides them."""
    wanted = {name for name in tracked if name.startswith(PACKAGES)}
    held = {name for name in names if not re.match(r"[^/]+\.dist-info/", name)}
    problems = [f"the wheel lacks {name}" for name in sorted(wanted - held)]
    return problems + [f"the wheel holds {name}" for name in sorted(held - wanted)]


def sdist_problems(names: Sequence[str], tracked: Sequence[str]) -> list[str]:
    """Return what of the repository the sdist lacks, and what it holds besides it."""
    held = {name.partition("/")[2] for name in names}
    wanted = {name for name in tracked if name != ".gitignore"}
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    problems = [f"the sdist lacks {name}" for name in sorted(wanted - held)]
    return problems + [f"the sdist holds {name}" for name in sorted(held - made - set(tracked))]


def environment(caller: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a stranger's shell, with this machine's sources of packages."""
    kept = {k: v for k, v in caller.items() if k in PASSED_ON or k.startswith("PIP_")}
    return kept | {"PYTHONNOUSERSITE": "1", "PIP_QUIET": "1"}


def shell(lines: Sequence[str], folder: Path, timeout_s: float) -> None:
    """Run `lines` in one bash. Raise `SystemExit` when one of them fails."""
    print(*(f"$ {line}" for line in lines), sep="\n", flush=True)
    script = "set -eo pipefail\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment(os.environ), timeout=timeout_s
    )
    if done.returncode != 0:
        raise SystemExit(f"failed with exit code {done.returncode} in {folder}")


def built(kind: str, source: Path, out: Path) -> Path:
    """Build `kind`, "sdist" or "wheel", from `source` with the backend of pyproject.toml."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=source, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
    )
    if done.returncode != 0:
        raise SystemExit(f"no {kind} could be built:\n{done.stderr[-4000:]}")
    return out / done.stdout.strip().splitlines()[-1]


def build(work: Path) -> tuple[Path, Path]:
    """Return the unpacked sdist and the wheel, both checked."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = [name for name in listed.stdout.decode().split("\0") if name]
    copy = work / "copy"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    sdist = built("sdist", copy, work)
    with tarfile.open(sdist) as archive:
        problems = sdist_problems([m.name for m in archive if m.isfile()], tracked)
        archive.extractall(work, filter="data")
    unpacked = work / sdist.name.removesuffix(".tar.gz")
    wheel = built("wheel", unpacked, work)
    with zipfile.ZipFile(wheel) as archive:
        problems += wheel_problems(archive.namelist(), tracked)
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{sdist.name} and {wheel.name}: contents as they should be", flush=True)
    return unpacked, wheel


def main() -> None:
    """Check a release. Waits for: builds, installation and run, each with its own deadline."""
    with tempfile.TemporaryDirectory(prefix="rlhf-release-") as folder:
        work, empty = Path(folder), Path(folder) / "empty"
        unpacked, wheel = build(work)
        lines = with_wheel(commands((unpacked / "README.md").read_text(encoding="utf-8")), wheel)
        shell(lines[:-1], unpacked, INSTALL_TIMEOUT_S)
        [config] = re.findall(r"configs/\w+\.toml", lines[-1])
        (empty / config).parent.mkdir(parents=True)
        shutil.copy2(unpacked / config, empty / config)
        [activate] = re.findall(r"source (\S+)", "\n".join(lines))
        entered = f"source {unpacked / activate}"
        shell([entered, INSTALLED, lines[-1]], empty, RUN_TIMEOUT_S)
        name = tomllib.loads((empty / config).read_text(encoding="utf-8"))["run"]["name"]
        summary = json.loads((empty / "runs" / name / "summary.json").read_text(encoding="utf-8"))
        print(json.dumps(summary, indent=1)[:1000])
        print(f"{wheel.name}: installed, and {lines[-1]} ended well")


if __name__ == "__main__":
    main()
