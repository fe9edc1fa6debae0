"""What Kubernetes is asked for, as plain values: a Ray cluster of three worker groups, and a run on it.

Promises: each worker group offers the resource that the bundles of its services ask for with
`cluster.worker_groups` (`rlhf_cluster.planning.placement`), so that a pending bundle makes Ray's
autoscaler start a pod of the right group and no other; the head offers no CPU, so that nothing of a run
lands there; pods share one folder, which holds models, runs and weights. `python deploy/generate.py`
writes them to deploy/kuberay. Sizes are those of configs/qwen3_8b_8gpu.toml.

Fields are those of KubeRay's ray.io/v1 (https://ray-project.github.io/kuberay/reference/api/).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rlhf_cluster.planning.placement import WORKER_GROUPS, group_resource

RAY_VERSION = "2.60.0"
IMAGE = "rlhf-cluster:cuda"
CLUSTER, JOB = "rlhf", "rlhf-run"
SHARED, CLAIM = "/shared", "rlhf-shared"
METRICS_PORT = 8080
USER_ID = 1000

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Pods of one kind. `cpus`, `gpus` and `memory_gib` are of one pod."""

    name: str
    cpus: int
    gpus: int
    memory_gib: int
    shm_gib: int
    replicas: int
    minimum: int
    maximum: int


GROUPS = (
    Group(
        name="generation",
        cpus=6,
        gpus=1,
        memory_gib=96,
        shm_gib=24,
        replicas=4,
        minimum=1,
        maximum=16,
    ),
    Group(
        name="scoring",
        cpus=10,
        gpus=1,
        memory_gib=96,
        shm_gib=24,
        replicas=1,
        minimum=1,
        maximum=4,
    ),
    Group(
        name="training",
        cpus=16,
        gpus=3,
        memory_gib=320,
        shm_gib=64,
        replicas=1,
        minimum=1,
        maximum=1,
    ),
)
assert tuple(group.name for group in GROUPS) == WORKER_GROUPS


def kuberay_files() -> dict[str, list[Tree]]:
    """Documents of each file below deploy/kuberay."""
    return {
        "base/volume.yaml": [_claim()],
        "base/podmonitors.yaml": [_pod_monitor("head"), _pod_monitor("worker")],
        "base/kustomization.yaml": [_kustomization(["volume.yaml", "podmonitors.yaml"])],
        "cluster/raycluster.yaml": [ray_cluster()],
        "cluster/kustomization.yaml": [_kustomization(["../base", "raycluster.yaml"])],
        "job/rayjob.yaml": [ray_job()],
        "job/kustomization.yaml": [_kustomization(["../base", "rayjob.yaml"])],
    }


def ray_cluster() -> Tree:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": CLUSTER},
        "spec": _cluster_spec(),
    }


def ray_job() -> Tree:
    """One run on a cluster of its own. A retry gives the same command, which goes on from the last
    checkpoint; so it does after the deletion of the cluster."""
    command = [
        *("rlhf-cluster", "run", f"{SHARED}/run.toml"),
        *("--set", "cluster.address=auto"),
        *("--set", "cluster.worker_groups=true"),
        *("--set", "cluster.node_timeout_s=900"),
        *("--set", f"run.root={SHARED}/runs"),
        *("--set", f"weights.root={SHARED}/weights"),
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": JOB},
        "spec": {
            "entrypoint": " ".join(command),
            "submissionMode": "K8sJobMode",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster_spec(),
        },
    }


def _cluster_spec() -> Tree:
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 300,
        },
        "headGroupSpec": {
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",
                "num-cpus": "0",
                "metrics-export-port": str(METRICS_PORT),
            },
            "template": _pod(
                "ray-head",
                {"cpu": 4, "memory": "16Gi"},
                shm_gib=4,
                ports={
                    "gcs-server": 6379,
                    "dashboard": 8265,
                    "client": 10001,
                    "metrics": METRICS_PORT,
                },
            ),
        },
        "workerGroupSpecs": [_worker_group(group) for group in GROUPS],
    }


def _worker_group(group: Group) -> Tree:
    limits: Tree = {"cpu": group.cpus, "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        limits["nvidia.com/gpu"] = group.gpus
    # KubeRay puts the value on a command line as it is: JSON, quoted once more.
    offered = json.dumps(json.dumps({group_resource(group.name): 1}))
    return {
        "groupName": group.name,
        "replicas": group.replicas,
        "minReplicas": group.minimum,
        "maxReplicas": group.maximum,
        "rayStartParams": {"resources": offered, "metrics-export-port": str(METRICS_PORT)},
        "template": _pod("ray-worker", limits, group.shm_gib, {"metrics": METRICS_PORT}),
    }


def _pod(name: str, limits: Tree, shm_gib: int, ports: dict[str, int]) -> Tree:
    container = {
        "name": name,
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "resources": {"limits": limits, "requests": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "shared", "mountPath": SHARED},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "spec": {
            "automountServiceAccountToken": name == "ray-head",  # Ray's autoscaler asks Kubernetes
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "fsGroup": USER_ID,
                "fsGroupChangePolicy": "OnRootMismatch",
            },
            "terminationGracePeriodSeconds": 120,
            "containers": [container],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": CLAIM}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
            ],
        }
    }


def _pod_monitor(node_type: str) -> Tree:
    """For the Prometheus operator. Pods of every Ray cluster of the namespace."""
    relabelings = [
        {"action": "replace", "sourceLabels": [source], "targetLabel": target}
        for source, target in (
            ("__meta_kubernetes_pod_label_ray_io_cluster", "ray_io_cluster"),
            ("__meta_kubernetes_pod_label_ray_io_group", "ray_io_group"),
        )
    ]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": f"rlhf-{node_type}"},
        "spec": {
            "selector": {"matchLabels": {"ray.io/node-type": node_type}},
            "podMetricsEndpoints": [
                {"port": "metrics", "interval": "15s", "relabelings": relabelings}
            ],
        },
    }


def _claim() -> Tree:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "2Ti"}},
        },
    }


def _kustomization(resources: list[str]) -> Tree:
    name, _, tag = IMAGE.partition(":")
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": resources,
        "images": [{"name": name, "newTag": tag}],
    }
