"""The order in which `make component` and `make system` begin their files."""

from pathlib import Path

from tests.conftest import LONGEST_FIRST

TESTS = Path(__file__).parents[2]


def test_what_is_begun_first_is_there() -> None:
    files = {path.stem for kind in ("component", "system") for path in (TESTS / kind).glob("*.py")}
    assert {f"test_{name}" for name in LONGEST_FIRST} <= files
    assert len(set(LONGEST_FIRST)) == len(LONGEST_FIRST)
