"""Whether a plan finds a place on the nodes of a given cluster, and what is said when it does not."""

import re

import pytest

from rlhf_cluster.errors import PlacementError
from rlhf_cluster.planning.cluster_room import judge_placement
from rlhf_cluster.planning.placement import check_fits, demand, unplaced
from tests.support.builders.run_configs import tiny_config

CONFIG = tiny_config(
    generation={"workers": 3, "num_gpus": 1.0, "num_cpus": 1.0}, scoring={"num_gpus": 2.0}
)
BUNDLES = demand(CONFIG)  # 5 GPUs, 1.6 CPUs
NODES = {"a": {"CPU": 8.0, "GPU": 3.0}, "b": {"CPU": 8.0, "GPU": 2.0}}
FREE = {"CPU": 16.0, "GPU": 5.0}


def judged(nodes=None, free=None, node_timeout_s=0.0):
    found = judge_placement(
        BUNDLES, NODES if nodes is None else nodes, free or FREE, node_timeout_s
    )
    assert bool(found.cure) == (found.verdict != "ok")
    return found


def test_what_fits_is_said_with_the_numbers():
    found = judged()
    assert (found.verdict, found.value) == ("ok", "room for all; bundles: 6, nodes: 2")


def test_each_bundle_that_finds_no_place_is_named_and_no_other():
    found = judged({"a": {"CPU": 8.0, "GPU": 3.0}})
    assert found.verdict == "wrong"
    assert "no room for generation-1 (1 CPU, 1 GPU), generation-2 (1 CPU, 1 GPU). " in found.value
    assert "Nodes: a: 8 CPU, 3 GPU" in found.value


def test_two_halves_are_no_place_for_a_whole():
    found = judged({name: {"CPU": 8.0, "GPU": 1.0} for name in "abcde"})
    assert "no room for scoring-0 (0.25 CPU, 2 GPU). Nodes" in found.value


def test_a_cluster_without_nodes_has_no_place():
    assert judged({}).value.count("GPU)") == 4
    assert judged({}).value.endswith("no live node")


def test_nodes_that_may_come_are_waited_for():
    found = judged({}, node_timeout_s=900.0)
    assert found.verdict == "note"
    assert "cluster.node_timeout_s = 900 s" in found.cure


def test_what_other_jobs_hold_is_said():
    found = judged(free={"CPU": 16.0, "GPU": 1.5})
    assert (found.verdict, found.value) == ("note", "other jobs leave 1.5 GPU of 5")


def test_worker_groups_need_nodes_of_their_kind():
    config = tiny_config(cluster={"worker_groups": True})
    nodes = {kind: {"CPU": 8.0, f"rlhf_{kind}": 1.0} for kind in ("generation", "scoring")}
    found = judge_placement(demand(config), nodes, {"CPU": 16.0}, 0.0)
    assert found.value.startswith("no room for learner-0 (0.25 CPU, 0.001 rlhf_training), buffer (")
    assert "generation-0" not in found.value


@pytest.mark.parametrize("gpus", range(8))
def test_it_says_no_exactly_where_the_run_would_be_refused(gpus):
    nodes = {"a": {"CPU": 8.0, "GPU": float(gpus)}}
    left = unplaced(BUNDLES, nodes)
    assert bool(left) == (gpus < 5)
    assert (judged(nodes).verdict == "wrong") == bool(left)
    if not left:
        return check_fits(BUNDLES, nodes)
    with pytest.raises(PlacementError, match=re.escape(f"no node can hold {left[0]}")):
        check_fits(BUNDLES, nodes)
