"""A published version as a Hugging Face folder."""

import json
import os
from pathlib import Path

import pytest
import torch

from rlhf_cluster.errors import WeightError
from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.sections.every_run import ModelInit
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from tests.support.builders.small_weights import publish


def trained(model_dir: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        return {name: (p * 1.5).to(dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_files_of_a_model_have_the_permissions_of_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        model_dir = make_model(ModelInit(), tmp_path / "model", seed=0)
        version = publish(tmp_path / "store", 1, trained(model_dir, torch.bfloat16))
        out = export_hf(version, model_dir, tmp_path / "out", max_file_bytes=100_000)
    finally:
        os.umask(before)
    files = [path for folder in (model_dir, out) for path in folder.iterdir()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(mode) for path in files
    }
    assert sum(path.suffix == ".safetensors" for path in files) > 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_file_bytes", [4 * 10**9, 100_000])
def test_an_export_loads_with_the_published_weights(
    tmp_path: Path, tied: bool, max_file_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_dir = make_model(ModelInit(tie_embeddings=tied), tmp_path / "model", seed=0)
    weights = trained(model_dir, torch.bfloat16)
    version = publish(tmp_path / "store", 1, weights)
    out = export_hf(version, model_dir, tmp_path / "out", max_file_bytes=max_file_bytes)
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (
        tokenizer("12=")["input_ids"]
        == AutoTokenizer.from_pretrained(model_dir)("12=")["input_ids"]
    )
    assert (out / "generation_config.json").is_file()
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if max_file_bytes > 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert len(files) > 2


def test_an_export_over_an_existing_folder_is_refused(tmp_path: Path) -> None:
    model_dir = make_model(ModelInit(), tmp_path / "model", seed=0)
    version = publish(tmp_path / "store", 1, trained(model_dir, torch.bfloat16))
    with pytest.raises(WeightError, match="model: already exists"):
        export_hf(version, model_dir, model_dir)


def test_a_damaged_version_leaves_no_folder_behind(tmp_path: Path) -> None:
    model_dir = make_model(ModelInit(), tmp_path / "model", seed=0)
    version = publish(tmp_path / "store", 1, trained(model_dir, torch.bfloat16))
    shard = next(Path(version.path).glob("shard-00001*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(WeightError, match="damaged"):
        export_hf(version, model_dir, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]


def test_s25_weights_of_another_model_are_not_exported(tmp_path: Path) -> None:
    model_dir = make_model(ModelInit(tie_embeddings=False), tmp_path / "model", seed=0)
    weights = trained(model_dir, torch.bfloat16)
    del weights["lm_head.weight"]
    version = publish(tmp_path / "store", 1, weights)
    with pytest.raises(WeightError, match=r"missing: lm_head\.weight"):
        export_hf(version, model_dir, tmp_path / "out")
    with pytest.raises(WeightError, match=r"config\.json: cannot be read.*folder of the model"):
        export_hf(store.latest(tmp_path / "store"), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
