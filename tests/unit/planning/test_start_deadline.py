"""The time that the processes of a run have to start, by the size of the model."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.planning.start_deadline import with_start_deadline
from tests.support.builders.offline_stages import stage_config
from tests.support.builders.run_configs import tiny_config

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
