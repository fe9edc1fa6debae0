"""The table of mutants fits the code; `make mutants` runs them."""

from pathlib import Path

import pytest

from tests.mutants.run import REPOSITORY, Mutant, fingerprint, load_table, merge_rows, part_of

MUTANTS = load_table()


def test_the_table_has_many_mutants_of_different_names() -> None:
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_breaks_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    text = (REPOSITORY / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1, "adapt tests/mutants/table.toml to the code"
    assert mutant.before != mutant.after
    compile(text.replace(mutant.before, mutant.after), mutant.file, "exec")
    assert mutant.tests
    assert all((REPOSITORY / test).is_file() for test in mutant.tests)


def test_a_mutant_is_applied_once_or_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 2\n")
    mutant = Mutant(name="m", file="code.py", before="a = 1", after="a = 3", tests=("t",))
    assert mutant.apply(tmp_path) == "a = 1\nb = 2\n"
    assert (tmp_path / "code.py").read_text() == "a = 3\nb = 2\n"
    with pytest.raises(ValueError, match="stands 0 times"):
        mutant.apply(tmp_path)


def test_the_parts_are_all_mutants_once() -> None:
    parts = [part_of(MUTANTS, f"{k}/7") for k in range(1, 8)]
    assert sorted(m.name for part in parts for m in part) == sorted(m.name for m in MUTANTS)
    for wrong in ("0/7", "8/7", "1", "1/0", "a/b"):
        with pytest.raises(ValueError, match=wrong):
            part_of(MUTANTS, wrong)


def test_rows_of_earlier_parts_stay_until_what_they_judged_changes(tmp_path: Path) -> None:
    first, second, third = MUTANTS[:3]

    def row(mutant: Mutant, verdict: str) -> dict[str, str]:
        return {"name": mutant.name, "verdict": verdict, "fingerprint": fingerprint(mutant)}

    stale = {**row(third, "survived"), "fingerprint": "of other code"}
    gone = {"name": "no such mutant", "verdict": "killed", "fingerprint": ""}
    before = [row(second, "survived"), row(first, "killed"), stale, gone]
    merged = merge_rows(MUTANTS, before, [row(second, "killed")])
    assert merged == [row(first, "killed"), row(second, "killed")]
    for name in (first.file, *first.tests):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    unchanged = fingerprint(first, tmp_path)
    (tmp_path / first.tests[0]).write_text("a = 2")
    assert fingerprint(first, tmp_path) != unchanged
