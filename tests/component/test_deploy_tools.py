"""deploy/ as its tools take it: kustomize builds the Kubernetes files, bash runs the Slurm script."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from rlhf_cluster.config import load_run
from rlhf_cluster.planning.placement import WORKER_GROUPS, group_resource
from tests.support.checks.kubernetes_schemas import (
    KUBERAY,
    faults,
)

SBATCH = Path("deploy/slurm/run.sbatch")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("folder", "kind"), [("cluster", "RayCluster"), ("job", "RayJob")])
def test_kustomize_builds_them_and_puts_another_image_in(folder, kind, tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    image = {"name": "rlhf-cluster", "newName": "registry.example/rlhf", "newTag": "7"}
    own = {"resources": [f"../kuberay/{folder}"], "images": [image]}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "kustomization.yaml").write_text(yaml.safe_dump(own))
    built = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "own")], capture_output=True, text=True, check=True
    )
    documents = list(yaml.safe_load_all(built.stdout))
    assert {d["kind"] for d in documents} == {kind, "PodMonitor", "PersistentVolumeClaim"}
    assert [fault for document in documents for fault in faults(document)] == []
    assert set(re.findall(r"image: (\S+)", built.stdout)) == {"registry.example/rlhf:7"}


# The script runs with stand-ins for Slurm, Ray and the run: each writes down how it was called.
STAND_IN = """#!/bin/bash
name=$(basename "$0")
{ printf '%s' "$name"; printf '\\t%s' "$@"; } > "$CALLS/.$name.$$"
mv "$CALLS/.$name.$$" "$CALLS/$name.$$"
case "$name" in
    scontrol) [ "$1" = show ] && echo first-node ;;
    srun) trap 'exit 0' TERM; while :; do sleep 0.05; done ;;
    rlhf-cluster)
        trap 'echo term > "$CALLS/asked"; exit 1' TERM
        until [ "$(ls "$CALLS" | grep -c '^srun')" -ge 4 ]; do sleep 0.02; done
        touch "$CALLS/running"
        [ -n "$HANGS" ] && while :; do sleep 0.05; done ;;
esac
exit 0
"""


def batch(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    for name in ("scontrol", "srun", "ray", "rlhf-cluster"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").mkdir()
    slurm = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST_HET_GROUP_0": "n[1-2]"}
    for component, (num_nodes, cpus) in enumerate(((2, 16), (3, 24), (1, 10))):
        slurm[f"SLURM_JOB_NUM_NODES_HET_GROUP_{component}"] = str(num_nodes)
        slurm[f"SLURM_CPUS_PER_TASK_HET_GROUP_{component}"] = str(cpus)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(SBATCH), "run.toml", "--set", "run.steps=3"],
        env={**os.environ, **slurm, "PATH": path, "CALLS": str(tmp_path / "calls"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def calls(tmp_path: Path, name: str) -> list[list[str]]:
    found = (path.read_text().split("\t") for path in (tmp_path / "calls").glob(f"{name}.*"))
    return sorted(words[1:] for words in found)


def test_the_slurm_script_starts_each_group_and_then_the_run(tmp_path):
    job = batch(tmp_path, HANGS="")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    found = {}
    for words in calls(tmp_path, "srun"):
        options = {w.split("=", 1)[0]: w.split("=", 1)[1] for w in words if "=" in w}
        (group,) = json.loads(options["--resources"])
        key = (group, "--head" in words)
        found[key] = (options["--het-group"], options["--nodes"], options["--num-cpus"])
        assert ("--address" in options) != ("--head" in words)
    assert found == {
        ("rlhf_training", True): ("0", "1", "16"),
        ("rlhf_training", False): ("0", "1", "16"),
        ("rlhf_generation", False): ("1", "3", "24"),
        ("rlhf_scoring", False): ("2", "1", "10"),
    }
    assert {group for group, _ in found} == {group_resource(g) for g in WORKER_GROUPS}
    (run,) = calls(tmp_path, "rlhf-cluster")
    assert run[:2] == ["run", "run.toml"]
    settings = run[3::2]
    assert settings[0] == "cluster.address=first-node:6379"
    assert settings[1] == "cluster.worker_groups=true"
    assert settings[-1] == "run.steps=3"
    load_run("configs/qwen3_8b_8gpu.toml", settings)


def test_the_slurm_script_hands_the_signal_on_and_requeues(tmp_path):
    job = batch(tmp_path, HANGS="1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls" / "running").exists():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1, output
    assert (tmp_path / "calls" / "asked").exists()
    assert ["requeue", "9"] in calls(tmp_path, "scontrol")
