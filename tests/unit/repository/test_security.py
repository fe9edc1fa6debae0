"""What a stranger's file, name or address cannot do."""

from __future__ import annotations

import ast
import functools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from actors.vllm.vllm_arguments import engine_arguments
from rlhf_cluster.config.load import PipelineSection
from rlhf_cluster.errors import ConfigError, DataError, RunError, WeightError
from rlhf_cluster.models.model_folder import checkpoint_shapes
from rlhf_cluster.observe.record import logs
from rlhf_cluster.observe.report.serve import serve
from rlhf_cluster.run.checkpoint.checkpoint_folder import is_plain
from rlhf_cluster.util.addresses import (
    check_address,
    is_local_host,
)
from rlhf_cluster.weights.manifest import Part
from tests.support.builders.run_configs import tiny_config

OURS = sorted([*Path("rlhf_cluster").rglob("*.py"), *Path("actors").rglob("*.py")])
IN_THE_JAIL = {Path("rlhf_cluster/rewards/programs/candidate.py")}
"""Runs programs that a policy wrote: its whole purpose, inside the sandbox."""
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE = {
    *(f"{module}.{name}" for module in PICKLERS for name in ("load", "loads", "Unpickler", "open")),
    "torch.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "eval",
    "exec",
}
LAST_WORDS = {name.rpartition(".")[2] for name in UNSAFE}
OBJECT_COLLECTIVES = ("_object", "_object_list")  # torch.distributed unpickles what they receive


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def unsafe(tree: ast.Module) -> list[str]:
    """What in `tree` unpickles, or runs text as code, by line."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        last = getattr(node, "attr", getattr(node, "id", ""))
        in_question = last in names or last in LAST_WORDS or last.endswith(OBJECT_COLLECTIVES)
        if not (isinstance(node, ast.Name | ast.Attribute) and in_question):
            continue
        head, dot, rest = ast.unparse(node).partition(".")
        called = f"{names.get(head, head)}{dot}{rest}"
        if called in UNSAFE or called.endswith(OBJECT_COLLECTIVES):
            found.append(f"line {node.lineno}: {called}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            found.append(f"line {node.value.lineno}: {node.arg}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(b'')",
        "import pickle as p\np.Unpickler(f)",
        "from pickle import loads as read\nread(b'')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "exec(text)",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
    ],
)
def test_code_that_unpickles_is_found(code):
    assert unsafe(ast.parse(code))


def test_nothing_is_unpickled_and_no_text_is_run_as_code():
    found = {str(p): unsafe(parsed(p)) for p in OURS if p not in IN_THE_JAIL}
    assert not {path: lines for path, lines in found.items() if lines}
    assert all(unsafe(parsed(path)) for path in IN_THE_JAIL)


def loads(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls that read something in the format of Hugging Face."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
            yield node


def test_no_code_of_a_model_folder_is_trusted_and_only_safetensors_are_read():
    calls = [(path, call) for path in OURS for call in loads(parsed(path))]
    assert len(calls) >= 5
    for path, call in calls:
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        where = f"{path}:{call.lineno}"
        assert given.get("trust_remote_code") == "False", where
        if "Model" in ast.unparse(call.func):
            assert given.get("use_safetensors") == "True", where


@pytest.mark.parametrize(
    "argument", [{"trust_remote_code": True}, {"load_format": "pt"}, {"load_format": "auto"}]
)
def test_engines_are_never_told_to_trust_a_model_folder(argument):
    plain = engine_arguments(tiny_config(), "model", "generation-0")
    assert (plain["trust_remote_code"], plain["load_format"]) == (False, "safetensors")
    config = tiny_config(generation={"engine_args": argument})
    with pytest.raises(ConfigError, match=rf"generation.engine_args.{next(iter(argument))} = "):
        engine_arguments(config, "model", "generation-0")


class Planted:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_model_in_a_pickle_is_refused_and_not_read(tmp_path):
    import torch

    from rlhf_cluster.models.policy_model import load_policy
    from tests.support.builders.tiny_llama import (
        build,
        save,
    )

    folder, mark = tmp_path / "model", tmp_path / "mark"
    save(build(0, 64), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Planted(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_policy(folder, torch.float32, "cpu", trainable=False)
    assert not mark.exists()


OUTSIDE = ["../outside.safetensors", "/etc/outside.safetensors", "a/../../b.safetensors", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_names_a_file_outside_the_model_folder_is_refused(name, tmp_path):
    import torch

    from rlhf_cluster.models.policy_model import load_policy

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightError, match="nothing outside of it is read"):
        checkpoint_shapes(tmp_path)
    with pytest.raises(ConfigError, match="nothing outside of it is read"):
        load_policy(tmp_path, torch.float32, "cpu", trainable=False)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_manifests_markers_and_files_stay_in_their_folder(name, tmp_path):
    assert not is_plain(name)
    with pytest.raises(ValidationError):
        Part(file=name, offset=0, numel=1)
    with pytest.raises(ValidationError):
        PipelineSection(name=name)
    with pytest.raises(ConfigError, match="run.name"):
        tiny_config(run={"name": name})
    with pytest.raises(RunError, match="log name"):
        logs.configure("scoring", name, tmp_path)


@pytest.mark.parametrize("address", ["192.0.2.7:6379", "ray://192.0.2.7:10001", "http://head:8265"])
def test_another_machines_cluster_is_refused_without_a_token(address):
    for mode in ({}, {"RAY_AUTH_MODE": "disabled"}):
        with pytest.raises(ConfigError, match=r"cluster\.address = .*RAY_AUTH_MODE=token"):
            check_address("cluster.address", address, mode, lambda host: False)
    check_address("cluster.address", address, {"RAY_AUTH_MODE": "token"}, lambda host: False)
    check_address("cluster.address", address, {}, lambda host: host in ("192.0.2.7", "head"))


def test_this_machines_addresses_are_known_and_no_others():
    for address in ("auto", "127.0.0.1:6379", "ray://localhost:10001", "http://[::1]:8265"):
        check_address("cluster.address", address, {})
    assert not is_local_host("192.0.2.254")  # an address that documents use, and nobody has
    assert not is_local_host("not a host")
    with pytest.raises(ConfigError):
        check_address("cluster.address", "http://:8265", {})


@pytest.mark.parametrize(("host", "stays"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_a_cluster_that_answers_on_loopback_alone_is_joined_there(host, stays, monkeypatch):
    from ray._private import ray_constants, services

    from actors.cluster.ray_cluster import follow_loopback

    for name in (ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    with socket.create_server((host, 0)) as cluster:
        follow_loopback(f"127.0.0.1:{cluster.getsockname()[1]}", outward="127.0.0.2")
    assert ray_constants.ENABLE_RAY_CLUSTER is not stays
    if stays:
        assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
    follow_loopback("192.0.2.7:6379")
    assert ray_constants.ENABLE_RAY_CLUSTER


def test_every_way_to_a_cluster_is_refused_without_a_token(monkeypatch):
    from actors.cluster.ray_cluster import connected
    from actors.jobs import jobs
    from actors.services import control_actor

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="on another machine"):
        jobs.connect("http://192.0.2.254:8265")
    with pytest.raises(ConfigError, match="on another machine"):
        control_actor.find("run", "192.0.2.254:6379")
    config = tiny_config(cluster={"address": "192.0.2.254:6379"})
    with pytest.raises(ConfigError, match="on another machine"), connected(config):
        pass


def test_the_clusters_of_deploy_ask_for_a_token():
    documents = [
        document
        for path in Path("deploy/kuberay").rglob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
    ]
    specs = [
        document["spec"].get("rayClusterSpec", document["spec"])
        for document in documents
        if document["kind"] in ("RayCluster", "RayJob")
    ]
    assert [spec["authOptions"] for spec in specs] == [{"mode": "token"}] * 2
    script = Path("deploy/slurm/run.sbatch").read_text()
    assert "export RAY_AUTH_MODE=token" in script.partition("ray start")[0]


def test_the_report_is_served_on_loopback_alone():
    with serve(lambda: "page") as address:
        assert address.startswith("http://127.0.0.1:")


def test_a_tokenizer_with_code_of_its_own_does_not_run_it(tmp_path):
    from rlhf_cluster.data.tokenizer import load_tokenizer

    mark = tmp_path / "mark"
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    assert not mark.exists()
