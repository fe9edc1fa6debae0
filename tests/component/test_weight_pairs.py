"""Shards between processes through gloo, and readers that fail in the middle of one."""

from tests.support.processes.pair_readers import check_transfers


def test_readers_that_raise_die_or_hang_in_the_middle_cost_nobody_else_and_the_next_is_read() -> (
    None
):
    check_transfers("gloo")
