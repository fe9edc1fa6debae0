"""When an evaluation is due during training."""

from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.evaluation.schedule import due_sets


def points(every: int, live: list[int], last: int, covered: dict[str, int]) -> list[int]:
    """The versions of `live` that are measured, with `covered` as the record so far."""
    found = []
    for version in live:
        for name in due_sets({"set": every}, covered, version, last):
            covered[name] = version
            found.append(version)
    return found


def test_a_set_is_due_every_so_many_versions_and_not_at_the_ends() -> None:
    assert points(3, list(range(13)), 12, {}) == [3, 6, 9]
    assert points(0, list(range(13)), 12, {}) == []


def test_where_a_version_is_skipped_the_next_one_that_is_live_takes_its_place() -> None:
    assert points(4, [0, 3, 5, 6, 7, 9, 11, 12], 12, {}) == [5, 9]


def test_sets_have_intervals_of_their_own() -> None:
    every, covered = {"a": 2, "b": 3, "c": 0}, {}
    due = {version: due_sets(every, covered, version, 9) for version in (2, 3, 6)}
    assert due == {2: ["a"], 3: ["a", "b"], 6: ["a", "b"]}


@given(
    every=st.integers(1, 7),
    last=st.integers(2, 40),
    kills=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=4),
)
def test_a_resumed_run_repeats_no_point_and_loses_none(
    every: int, last: int, kills: list[tuple[int, int]]
) -> None:
    """Killed after `kill`, resumed from `checkpoint`: later points are cut from the record with it."""
    record: dict[int, None] = {}
    start = 0
    for kill, checkpoint in [*kills, (last, 0)]:
        covered = {"set": max(record, default=0)}
        for version in points(every, list(range(start, min(kill, last) + 1)), last, covered):
            assert version not in record
            record[version] = None
        if kill < last:
            start = min(checkpoint, max(start, kill))
            record = {version: None for version in record if version <= start}
    assert sorted(record) == list(range(every, last, every))
