"""The cluster that a run starts for itself can be reached from this machine alone."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys

import psutil
import pytest

from tests.component.conftest import REPOSITORY

pytestmark = pytest.mark.timeout(300)

OWNER = """
import ray
from actors.services.control_actor import ControlActor, actor_name
from actors.cluster.ray_cluster import connected
from tests.support.builders.run_configs import tiny_config
with connected(tiny_config()) as address:
    control = ray.remote(ControlActor).options(name=actor_name("here"), num_cpus=0).remote()
    ray.get(control.exchange.remote({}))
    print(address, ray.util.get_node_ip_address(), flush=True)
    input()
"""
OTHER = """
import sys, ray
from actors.services.control_actor import find
print("wishes", ray.get(find("here", sys.argv[1]).exchange.remote({}), timeout=60)[1])
"""


def test_every_socket_of_a_local_cluster_is_on_loopback_and_other_processes_join_it():
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        try:
            address, node = owner.stdout.readline().split()
            assert (address.rpartition(":")[0], node) == ("127.0.0.1", "127.0.0.1")
            listening = [
                (process.name(), connection.laddr.ip)
                for process in [
                    psutil.Process(owner.pid),
                    *psutil.Process(owner.pid).children(recursive=True),
                ]
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
            assert len(listening) >= 8, listening
            assert [name for name, ip in listening if not on_loopback(ip)] == []
            found = subprocess.run(
                [sys.executable, "-c", OTHER, address],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert found.stdout == "wishes {}\n", found.stderr
        finally:
            owner.communicate("\n", timeout=60)


def on_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
