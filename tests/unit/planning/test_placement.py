"""Whether a plan finds a place on the nodes of a given cluster, and what is said when it does not."""

from __future__ import annotations

import re

import pytest

from rlhf_cluster.errors import PlacementError
from rlhf_cluster.planning.placement import (
    Bundle,
    check_fits,
    demand,
    fewer_ranks,
    judge_placement,
    unplaced,
)
from tests.support.builders.run_configs import tiny_config


def bundle(owner: str, cpus: float, gpus: float = 0.0) -> Bundle:
    return Bundle(owner=owner, cpus=cpus, gpus=gpus)


def test_demand_lists_every_replica_and_rank():
    config = tiny_config(generation={"workers": 2, "num_cpus": 0.5}, learner={"ranks": 2})
    owners = [b.owner for b in demand(config)]
    assert owners == [
        "generation-0",
        "generation-1",
        "scoring-0",
        "learner-0",
        "learner-1",
        "buffer",
    ]
    assert demand(config)[0].resources == {"CPU": 0.5}


def test_what_fits_passes_and_leaves_the_nodes_alone():
    nodes = {"a": {"CPU": 2.0}, "b": {"CPU": 1.0, "GPU": 1.0}}
    check_fits([bundle("x", 1.5), bundle("y", 0.5), bundle("z", 1.0, 1.0)], nodes)
    assert nodes["a"] == {"CPU": 2.0}


def test_the_error_names_demand_supply_and_the_bundle():
    nodes = {"10.0.0.1": {"CPU": 2.0}}
    with pytest.raises(PlacementError) as error:
        check_fits([bundle("generation-0", 1.5), bundle("learner-0", 1.0)], nodes)
    message = str(error.value)
    assert "no node can hold learner-0 (1 CPU)" in message
    assert "Demand: 2.5 CPU in 2 bundles" in message
    assert "Supply: 10.0.0.1: 2 CPU" in message


def test_a_bundle_never_spans_two_nodes():
    nodes = {"a": {"CPU": 8.0, "GPU": 4.0}, "b": {"CPU": 8.0, "GPU": 4.0}}
    with pytest.raises(PlacementError, match="no node can hold generation-0"):
        check_fits([bundle("generation-0", 1.0, 8.0)], nodes)


def test_an_empty_cluster_is_named():
    with pytest.raises(PlacementError, match="Supply: no live node"):
        check_fits([bundle("buffer", 0.1)], {})


@pytest.mark.parametrize(
    ("free", "least", "expected"),
    [
        ({"CPU": 100.0}, 1, [3, 2, 1]),
        ({"CPU": 100.0}, 3, [3]),
        ({"CPU": 5.0}, 1, [2, 1]),
        ({"CPU": 3.0}, 2, []),
        ({}, 1, []),
    ],
)
def test_fewer_ranks_are_tried_from_the_most_that_could_fit(free, least, expected):
    ranks = [bundle(f"learner-{i}", 2.0) for i in range(4)]
    assert list(fewer_ranks(ranks, least, free)) == expected


def test_the_scarcest_resource_says_how_many_ranks_could_fit():
    ranks = [bundle(f"learner-{i}", 0.1, 1.0) for i in range(8)]
    assert list(fewer_ranks(ranks, 1, {"CPU": 0.3, "GPU": 5.0})) == [3, 2, 1]
    assert list(fewer_ranks(ranks, 4, {"CPU": 64.0, "GPU": 5.0})) == [5, 4]


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
