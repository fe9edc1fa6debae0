"""Files or relay, where a run leaves the choice to us."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_cluster.planning.choose_transport import with_transport
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
