import pytest

from rlhf_cluster.errors import PlacementError
from rlhf_cluster.planning.placement import Bundle, check_fits, demand, fewer_ranks
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
