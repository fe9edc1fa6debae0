"""End of a run's relay: the copies are removed from the nodes that are alive."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.weights.node_mirrors import _clear_nodes


@pytest.mark.parametrize("nodes", [[], [{"NodeID": "0", "Alive": False}]])
def test_a_run_whose_cluster_has_no_node_left_ends_all_the_same(nodes, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    _clear_nodes(copies, lambda: nodes)
    assert not copies.exists(), "there was nothing to remove, and nothing was made"
