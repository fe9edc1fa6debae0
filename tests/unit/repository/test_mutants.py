"""The table of mutants fits the code; `make mutants` runs them."""

from pathlib import Path

import pytest

from tests.mutants.run import REPOSITORY, Mutant, load_table

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
