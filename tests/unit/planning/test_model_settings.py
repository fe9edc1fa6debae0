"""Settings by the size of the model: files or relay where a run leaves it open, time to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_cluster.planning.model_settings import with_start_deadline, with_transport
from tests.support.builders.offline_stages import stage_config
from tests.support.builders.run_configs import tiny_config

NUMBERS = 1000

IN_BFLOAT16 = 2 * NUMBERS


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tensors = {"a": torch.zeros(NUMBERS // 2), "b": torch.zeros(5, NUMBERS // 10)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def chosen(model_dir: Path, **sections: Any) -> str:
    weights = {"relay_above_bytes": IN_BFLOAT16 - 1, "dtype": "bfloat16"}
    sections["weights"] = weights | sections.get("weights", {})
    sections.setdefault("generation", {"workers": 2})
    config = tiny_config(run={"root": "/somewhere"}, **sections)
    found = with_transport(config, model_dir)
    assert found.weights.is_relayed == (found.weights.transport == "relay")
    assert found.model_copy(update={"weights": config.weights}) == config, "nothing else changes"
    return found.weights.transport


def test_a_large_version_with_several_readers_takes_the_relay(model_dir: Path) -> None:
    assert chosen(model_dir) == "relay"
    assert chosen(model_dir, generation={"workers": 1}) == "files"
    grows = {"generation": {"maximum": 2}}
    assert chosen(model_dir, generation={"workers": 1}, autoscale=grows) == "relay"
    parts = {"workers": 1, "tensor_parallel_size": 2, "num_gpus": 2}
    assert chosen(model_dir, generation=parts) == "relay"


def test_the_bound_is_of_the_published_bytes(model_dir: Path) -> None:
    assert chosen(model_dir, weights={"relay_above_bytes": IN_BFLOAT16}) == "files"
    in_float32 = {"relay_above_bytes": IN_BFLOAT16, "dtype": "float32"}
    assert chosen(model_dir, weights=in_float32) == "relay"


def test_what_the_run_says_is_not_changed(model_dir: Path) -> None:
    assert chosen(model_dir, weights={"transport": "files"}) == "files"
    said = {"transport": "relay", "relay_above_bytes": 1 << 40}
    assert chosen(model_dir, weights=said, generation={"workers": 1}) == "relay"
    folder = {"mirror": "/fast", "relay_above_bytes": 1 << 40}
    assert chosen(model_dir, weights=folder, generation={"workers": 1}) == "relay"


def test_a_store_that_lies_where_the_copies_would_is_read_in_place(model_dir: Path) -> None:
    assert chosen(model_dir, weights={"root": "/dev/shm/weights"}) == "files"


def test_a_folder_whose_tensors_cannot_be_listed_leaves_files(tmp_path: Path) -> None:
    assert chosen(tmp_path / "nothing") == "files"


IN_SIMULATION_S = (
    820.0  # 448 workers on 56 nodes, 140 GB, a storage of 10 GB/s (docs/reliability.md)
)


def model_of(folder: Path, *sizes: int) -> Path:
    """A folder with safetensors of these sizes, without their bytes, and other files."""
    for number, size in enumerate(sizes):
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(size)
    with (folder / "optimizer.bin").open("wb") as file:
        file.truncate(10**12)
    return folder


def test_a_large_model_has_the_time_that_it_needs_from_the_storage(tmp_path: Path):
    found = with_start_deadline(tiny_config(), model_of(tmp_path, 70 * 10**9, 70 * 10**9))
    assert found.run.start_timeout_s == 600.0 + 700.0 > IN_SIMULATION_S
    slow = tiny_config(generation={"pull_bytes_per_s": 1e8}, run={"start_timeout_s": 50.0})
    assert with_start_deadline(slow, tmp_path).run.start_timeout_s == 50.0 + 1400.0


def test_a_stage_without_workers_reads_at_the_default_rate(tmp_path: Path):
    config = stage_config("model")
    found = with_start_deadline(config, model_of(tmp_path, 20 * 10**9))
    assert found.run.start_timeout_s == config.run.start_timeout_s + 100.0
    assert found.model_copy(update={"run": config.run}) == config, "nothing else changes"


@pytest.mark.parametrize("sizes", [(), (1000,), (199_999_999,)])
def test_a_small_model_changes_nothing(tmp_path: Path, sizes: Any):
    config = tiny_config()
    assert with_start_deadline(config, model_of(tmp_path, *sizes)) == config


def test_a_folder_that_cannot_be_listed_is_refused_by_its_reader(tmp_path: Path):
    config = tiny_config()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "missing")
    assert with_start_deadline(config, tmp_path) == config
    assert with_start_deadline(config, tmp_path / "nowhere") == config
