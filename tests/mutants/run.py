"""Break the product on purpose, in one place after another, and see whether a test notices.

    python -m tests.mutants.run --out benchmarks/results/mutants.json    # all of table.toml
    python -m tests.mutants.run --part 2/8 --out ...                     # every 8th from the 2nd on
    python -m tests.mutants.run --only clip --only lock                  # those whose name has a word
    python -m tests.mutants.run --baseline                               # the tests alone, unbroken

Each mutant of `table.toml` replaces one piece of one file in a copy of the repository, and the tests
named beside it run there. A test that fails kills it, and so does a run that does not end within
`--timeout` seconds. A mutant that all tests pass survived: either a test is missing, or the piece is
dead code. Where pytest cannot collect the tests, the table is wrong and the whole run ends: a broken
import proves nothing.

The tests of a mutant must pass without it; `--baseline` says so, and comes first where a result is
written. A result keeps the rows of earlier parts whose mutant, file and tests are unchanged, so that
parts may run one after another, each for some minutes, with a commit in between.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

REPOSITORY = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("table.toml")
Verdict = Literal["killed", "hung", "survived"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One replacement, and the test files that must notice it. Paths are relative to the repository."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> str:
        """Break the copy in `root`; returns the text that was there.

        Raises `ValueError` where `before` does not stand exactly once in the file.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.before)) != 1:
            raise ValueError(
                f"mutant {self.name!r}: its piece stands {count} times in {self.file}, expected once. "
                f"Adapt {TABLE.name} to the code"
            )
        path.write_text(text.replace(self.before, self.after), encoding="utf-8")
        return text


def part_of(mutants: Sequence[Mutant], part: str) -> list[Mutant]:
    """Every n-th mutant from the k-th on, for `part` = "k/n". Raises `ValueError`."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f"--part {part!r}: give k/n with 1 <= k <= n, such as 2/8")
    return list(mutants[int(found[1]) - 1 :: int(found[2])])


def fingerprint(mutant: Mutant, root: Path = REPOSITORY) -> str:
    """Hash of all that the verdict on a mutant depends on: the mutant, its file and its tests."""
    from benchmarks.listing import code_hash

    return code_hash(root, [mutant.file, *mutant.tests], repr(mutant))


def merge_rows(
    table: Sequence[Mutant], before: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of a result in the table's order: those just judged, and earlier ones that still hold."""
    hold = {row["name"]: row for row in before}
    rows = {
        m.name: row
        for m in table
        if (row := hold.get(m.name)) is not None and row.get("fingerprint") == fingerprint(m)
    } | {row["name"]: row for row in judged}
    return [rows[mutant.name] for mutant in table if mutant.name in rows]


def load_table(path: Path = TABLE) -> list[Mutant]:
    rows: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copy_repository(root: Path) -> None:
    """All that git tracks or would add, in the folder `root`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        timeout=60,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, root / name)


def run_tests(root: Path, tests: tuple[str, ...], timeout_s: float) -> tuple[int | None, str]:
    """pytest's exit code, None past the deadline, and the end of what it printed."""
    # pytest's own deadline of a test comes first: it says where the test hangs
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, "--timeout", str(int(0.8 * timeout_s)), *tests],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return None, f"no end within {timeout_s:g} s"
    return process.returncode, output[-2000:]


def judge(mutant: Mutant, root: Path, timeout_s: float) -> Verdict:
    """What the mutant's tests say of it. The copy in `root` is whole again afterwards."""
    whole = mutant.apply(root)
    try:
        code, output = run_tests(root, mutant.tests, timeout_s)
    finally:
        (root / mutant.file).write_text(whole, encoding="utf-8")
    if code is None:
        return "hung"
    if code not in (0, 1):
        raise RuntimeError(f"mutant {mutant.name!r}: pytest ended with {code}\n{output}")
    return "killed" if code else "survived"


def run_all(mutants: list[Mutant], workers: int, timeout_s: float) -> list[dict[str, Any]]:
    """A row a mutant: name, file, verdict, seconds. `workers` copies are tested side by side."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            copy_repository(Path(folder) / str(number))
            copies.put(Path(folder) / str(number))

        def one(mutant: Mutant) -> dict[str, Any]:
            root, began = copies.get(), time.monotonic()
            try:
                verdict = judge(mutant, root, timeout_s)
            finally:
                copies.put(root)
            seconds = round(time.monotonic() - began, 1)
            print(f"{verdict:9s} {seconds:6.1f} s  {mutant.name}", flush=True)
            return {
                "name": mutant.name,
                "file": mutant.file,
                "verdict": verdict,
                "seconds": seconds,
                "fingerprint": fingerprint(mutant),
            }

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, mutants))


def check_baseline(mutants: list[Mutant], timeout_s: float) -> None:
    """Raises `SystemExit` when a test fails without any mutant."""
    tests = tuple(sorted({test for mutant in mutants for test in mutant.tests}))
    code, output = run_tests(REPOSITORY, tests, timeout_s * 10)
    if code != 0:
        raise SystemExit(f"the tests fail without a mutant\n{output}")
    print(f"{len(tests)} test files pass without a mutant", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a part of a mutant's name")
    parser.add_argument("--baseline", action="store_true", help="run the tests without a mutant")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds a mutant")
    parser.add_argument("--out", type=Path, help="the result file; rows are added to it")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th mutant from the k-th on")
    options = parser.parse_args()
    table = load_table()
    chosen = [m for m in table if not options.only or any(w in m.name for w in options.only)]
    mutants = part_of(chosen, options.part)
    if options.baseline or options.out:
        check_baseline(mutants, options.timeout)
    if options.baseline:
        return
    rows = run_all(mutants, options.workers, options.timeout)
    survived = [row["name"] for row in rows if row["verdict"] == "survived"]
    print(f"{len(rows)} mutants, {len(survived)} survived: {survived}")
    if options.out:
        write_rows(options.out.stem, table, rows)
    sys.exit(1 if survived else 0)


def write_rows(name: str, table: Sequence[Mutant], judged: Sequence[dict[str, Any]]) -> None:
    from benchmarks.harness import results, write_result

    rows = merge_rows(table, results(name).get("runs", {}).get("mutants", []), judged)
    figures = {
        "mutants": len(rows),
        "survived": sum(row["verdict"] == "survived" for row in rows),
        "not_judged": len(table) - len(rows),
    }
    write_result(name, figures, {"mutants": rows})


if __name__ == "__main__":
    main()
