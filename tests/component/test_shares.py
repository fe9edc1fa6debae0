"""Shares of one GPU: an emulated node with one, and the bundles of a run that divides it."""

from __future__ import annotations

import asyncio
import os

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from actors.cluster.launch import (
    place,
    spawn,
    take_down,
)
from rlhf_cluster.config import load_run
from rlhf_cluster.errors import PlacementError
from rlhf_cluster.planning.placement import Bundle, demand


def test_processes_with_shares_of_a_gpu_are_put_on_the_same_one(ray_cluster: RayCluster) -> None:
    class WhoSees:
        def gpus(self) -> tuple[str, str]:
            return os.environ["CUDA_VISIBLE_DEVICES"], ray.get_runtime_context().get_node_id()

    node = ray_cluster.add_node(num_cpus=4, num_gpus=1)
    started = []

    async def start(bundle: Bundle) -> None:
        group = await place([bundle], bundle.owner, timeout_s=60.0)
        options = {"max_restarts": 0}
        actor = spawn(
            WhoSees, (), bundle=bundle, group=group, index=0, environment={}, options=options
        )
        started.append((actor, group))

    try:
        shared = [b for b in demand(load_run("configs/qwen3_0.6b_1gpu.toml")) if b.gpus]
        assert sorted(bundle.gpus for bundle in shared) == [0.1, 0.35, 0.55]
        for bundle in shared:
            asyncio.run(start(bundle))
        seen = ray.get([actor.gpus.remote() for actor, _ in started], timeout=60.0)
        assert seen == [("0", node.node_id)] * 3
        late = Bundle(owner="generation-1", cpus=1.0, gpus=0.2)
        with pytest.raises(PlacementError, match="no resources for generation-1"):
            asyncio.run(place([late], late.owner, timeout_s=2.0))
    finally:
        for actor, group in started:
            take_down(actor, group)
        ray_cluster.remove_node(node)
