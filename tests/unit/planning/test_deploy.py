"""Files for Kubernetes, Slurm and Docker: read as their readers read them, fit for what runs ask."""

import copy
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from rlhf_cluster.config import load_run
from rlhf_cluster.errors import PlacementError
from rlhf_cluster.planning.placement import (
    WORKER_GROUPS,
    check_fits,
    demand,
    fewer_ranks,
    group_resource,
    rank_bundles,
)
from tests.support.builders.run_configs import tiny_config
from tests.support.checks.kubernetes_schemas import (
    KUBERAY,
    SCHEMAS,
    faults,
)

DOCUMENTS = [
    (str(path), document)
    for path in sorted(KUBERAY.rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
SBATCH = Path("deploy/slurm/run.sbatch")
DOCKER = Path("deploy/docker")


def of_kind(kind: str) -> dict:
    return next(document for _, document in DOCUMENTS if document["kind"] == kind)


def cluster_specs() -> dict[str, dict]:
    return {
        "RayCluster": of_kind("RayCluster")["spec"],
        "RayJob": of_kind("RayJob")["spec"]["rayClusterSpec"],
    }


def offered(group: dict) -> dict[str, float]:
    """The resource parameter as `ray start` gets it, once the shell has taken its quotes off."""
    return json.loads(json.loads(group["rayStartParams"]["resources"]))


def nodes(spec: dict, groups: set[str]) -> dict[str, dict[str, float]]:
    found = {}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        size = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        for number in range(group["replicas"] if group["groupName"] in groups else 0):
            found[f"{group['groupName']}-{number}"] = size | offered(group)
    return found


@pytest.mark.parametrize(("path", "document"), DOCUMENTS)
def test_kubernetes_documents_have_the_fields_of_their_kind(path, document):
    assert faults(document) == []


FREE = {"annotations", "labels", "matchLabels", "limits", "requests", "rayStartParams"}


def named_places(value, path=()):
    """Paths of all fields whose names a definition lays down."""
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from named_places(each, (*path, number))
    elif isinstance(value, dict) and not (path and path[-1] in FREE):
        for key, each in value.items():
            yield (*path, key)
            yield from named_places(each, (*path, key))


@pytest.mark.parametrize("kind", ["RayJob", "PodMonitor", "PersistentVolumeClaim"])
def test_every_misspelt_field_is_found_and_named(kind):
    whole = copy.deepcopy(of_kind(kind))
    if kind == "RayJob":  # a RayCluster's fields are among them
        del groups(whole)[1:]
        assert SCHEMAS["RayCluster"]["properties"]["spec"]["additionalProperties"] is False
    places = [place for place in named_places(whole) if place != ("kind",)]
    assert len(places) > 6
    for *path, key in places:
        wrong = copy.deepcopy(whole)
        parent = wrong
        for step in path:
            parent = parent[step]
        parent[f"{key}x"] = parent.pop(key)
        assert any(f"'{key}x' was unexpected" in fault for fault in faults(wrong)), (path, key)


def test_a_wrong_value_and_a_missing_field_are_found():
    changes = {
        "'1' is not of type 'integer'": lambda d: groups(d)[0].update(replicas="1"),
        "1 is not of type 'string'": lambda d: groups(d)[0]["rayStartParams"].update(a=1),
        "'none' is not one of": lambda d: spec_of(d)["authOptions"].update(mode="none"),
        "'headGroupSpec' is a required": lambda d: spec_of(d).pop("headGroupSpec"),
        "'ray.io/v1' was expected": lambda d: d.update(apiVersion="ray.io/v1alpha1"),
    }
    for message, change in changes.items():
        wrong = copy.deepcopy(of_kind("RayJob"))
        change(wrong)
        assert any(message in fault for fault in faults(wrong)), message


def spec_of(job: dict) -> dict:
    return job["spec"]["rayClusterSpec"]


def groups(job: dict) -> list[dict]:
    return spec_of(job)["workerGroupSpecs"]


def test_every_schema_says_which_version_it_is_of():
    for kind, schema in SCHEMAS.items():
        assert re.search(r"\d+\.\d+", schema["$comment"]), kind


def test_kustomizations_name_files_that_exist_and_all_of_them():
    named = set()
    for path, document in DOCUMENTS:
        if document["kind"] == "Kustomization":
            for resource in document["resources"]:
                found = (Path(path).parent / resource).resolve()
                assert found.exists(), f"{path}: {resource}"
                named.add(found / "kustomization.yaml" if found.is_dir() else found)
    others = {path.resolve() for path in KUBERAY.rglob("*.yaml")} - named
    assert {path.parent.name for path in others} == {"cluster", "job"}, "what nobody applies"
    assert {path.name for path in others} == {"kustomization.yaml"}


def test_worker_groups_offer_what_bundles_ask_for():
    config = tiny_config(cluster={"worker_groups": True}, generation={"workers": 2})
    asked = {b.owner.rpartition("-")[0] or b.owner: set(b.resources) for b in demand(config)}
    services = {"generation": "generation", "scoring": "scoring"}
    services |= {"learner": "training", "buffer": "training"}
    assert asked.keys() == services.keys()
    for spec in cluster_specs().values():
        groups = {group["groupName"]: offered(group) for group in spec["workerGroupSpecs"]}
        assert tuple(groups) == WORKER_GROUPS
        for service, group in services.items():
            assert asked[service] - {"CPU", "GPU"} == set(groups[group]) == {group_resource(group)}


def test_without_worker_groups_any_node_will_do():
    assert all(set(b.resources) <= {"CPU", "GPU"} for b in demand(tiny_config()))


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_8_gpu_configuration_fits_the_cluster_and_each_group_is_needed(kind):
    config = load_run("configs/qwen3_8b_8gpu.toml", ["cluster.worker_groups=true"])
    spec = cluster_specs()[kind]
    check_fits(demand(config), nodes(spec, set(WORKER_GROUPS)))
    for group in WORKER_GROUPS:
        with pytest.raises(PlacementError, match=rf"rlhf_{group}\)"):
            check_fits(demand(config), nodes(spec, set(WORKER_GROUPS) - {group}))


def test_fewer_ranks_are_counted_by_the_nodes_of_training():
    bundles = rank_bundles(tiny_config(cluster={"worker_groups": True}, learner={"ranks": 4}))
    assert list(fewer_ranks(bundles, 1, {"CPU": 100.0, "rlhf_training": 1.0})) == [3, 2, 1]
    assert list(fewer_ranks(bundles, 1, {"CPU": 100.0, "rlhf_generation": 1.0})) == []


def test_a_run_of_its_own_and_a_cluster_to_submit_to_are_the_same_cluster():
    specs = cluster_specs()
    assert specs["RayJob"] == specs["RayCluster"]


def test_a_retried_job_gives_the_same_command_which_a_run_file_accepts():
    spec = of_kind("RayJob")["spec"]
    program, command, path, *options = spec["entrypoint"].split()
    assert (program, command, path) == ("rlhf-cluster", "run", "/shared/run.toml")
    assert set(options[::2]) == {"--set"}
    config = load_run("configs/qwen3_8b_8gpu.toml", options[1::2])
    assert config.cluster.worker_groups
    assert config.cluster.node_timeout_s > 0
    assert {str(config.run.root), str(config.weights.root)} == {"/shared/runs", "/shared/weights"}
    assert spec["backoffLimit"] > 0


def test_every_pod_is_the_user_of_the_image_without_rights_and_shares_the_claim():
    claim = of_kind("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    images = {
        f"{image['name']}:{image['newTag']}"
        for _, document in DOCUMENTS
        if document["kind"] == "Kustomization"
        for image in document["images"]
    }
    for spec in cluster_specs().values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            assert pod["automountServiceAccountToken"] is (group is spec["headGroupSpec"])
            user = pod["securityContext"]
            assert (user["runAsNonRoot"], user["runAsUser"], user["fsGroup"]) == (True, 1000, 1000)
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {container["image"]} == images
            assert container["resources"]["limits"] == container["resources"]["requests"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            shared = volumes["shared"]["persistentVolumeClaim"]["claimName"]
            assert shared == claim["metadata"]["name"]
            assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == {"shared": "/shared", "shm": "/dev/shm"}


def test_groups_scale_within_bounds_and_the_head_takes_no_work():
    for spec in cluster_specs().values():
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        scaled = {
            group["groupName"]
            for group in spec["workerGroupSpecs"]
            if group["maxReplicas"] > group["minReplicas"]
        }
        assert scaled == {"generation", "scoring"}


def test_pod_monitors_find_the_port_of_every_pod():
    monitors = [d for _, d in DOCUMENTS if d["kind"] == "PodMonitor"]
    types = [m["spec"]["selector"]["matchLabels"]["ray.io/node-type"] for m in monitors]
    assert types == ["head", "worker"]
    (port,) = {e["port"] for m in monitors for e in m["spec"]["podMetricsEndpoints"]}
    for spec in cluster_specs().values():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            (number,) = [p["containerPort"] for p in container["ports"] if p.get("name") == port]
            assert group["rayStartParams"]["metrics-export-port"] == str(number)


def test_the_versions_are_those_of_the_lock():
    lock = Path("deploy/requirements-cpu.lock").read_text()
    (ray_version,) = {spec["rayVersion"] for spec in cluster_specs().values()}
    assert f"\nray=={ray_version} " in lock
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    cuda = (DOCKER / "Dockerfile.cuda").read_text()
    (vllm,) = [each for each in extras["cuda"] if each.startswith("vllm==")]
    assert f'"{vllm}" "ray[default]=={ray_version}"' in cuda
    source = Path("deploy/requirements-deepspeed.lock").read_text().splitlines()[-1].split()[0]
    assert source.startswith("deepspeed==")
    assert f" {source} " in cuda


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_images_are_pinned_copy_what_exists_and_run_as_a_user(kind):
    path = DOCKER / f"Dockerfile.{kind}"
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    images = [words[1] for words in lines if words[0] == "FROM"]
    assert images
    assert all(re.search(r":\d+\.\d+", image) for image in images)
    allowed = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    assert allowed[0] == "*", "nothing is sent but what is named"
    for words in lines:
        for source in words[1:-1] if words[0] == "COPY" else ():
            assert Path(source).exists()
            assert f"!{source}" in allowed
    assert ["USER", "1000"] in lines
    assert ["COPY", "rlhf_cluster", "rlhf_cluster"] in lines


def test_the_slurm_options_are_those_of_sbatch():
    known = {"job-name", "output", "open-mode", "requeue", "time", "signal", "nodes"}
    known |= {"ntasks-per-node", "cpus-per-task", "gpus-per-node"}
    found = re.findall(r"^#SBATCH (?:--([a-z-]+)(=\S+)?|(hetjob))$", SBATCH.read_text(), re.M)
    assert {name for name, _, _ in found if name} == known
    assert sum(bool(separator) for *_, separator in found) == len(WORKER_GROUPS) - 1
    assert len(found) == SBATCH.read_text().count("\n#SBATCH")
