"""Adapters of a version as a folder of peft's: what peft makes of it, over what it may be served."""

import copy

import pytest
import torch

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.formats.peft_folder import refuse_other_base, write_peft_folder
from rlhf_cluster.weights.manifest import LocalPart
from rlhf_cluster.weights.read_version import read_factors
from rlhf_cluster.weights.shards import ShardBase
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.builders import tiny_llama
from tests.support.builders.engine_models import adapted, damage


def publish(root, number, parts, base=None):
    report = store.write_shard(root, number, 0, parts, base=base)
    return store.commit(root, number, [report], keep=10)


@pytest.fixture(scope="module")
def model():
    return tiny_llama.build(seed=0, max_position=64)


@pytest.fixture
def folder(model, tmp_path):
    tiny_llama.save(model, tmp_path / "model")
    return tmp_path / "model"


def test_peft_makes_of_the_folder_what_readers_merge(model, folder, tmp_path):
    from peft import PeftModel

    merged = copy.deepcopy(model)
    first = publish(tmp_path, 1, adapted(model, 1, copy.deepcopy(model)))
    parts = [
        part
        for part in adapted(model, 2, merged)
        if part.scale is not None or part.name.endswith(lora_factors.TRAINED)
    ]
    version = publish(tmp_path, 2, parts, ShardBase(version=1, parts={}))
    damage(first)
    manifest, factors = read_factors(version.path, version.digest)  # needs nothing of version 1
    write_peft_folder(tmp_path / "adapter", manifest, factors)
    served = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        found, expected = served(ids).logits, merged(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - model(ids).logits).abs().max() > 1


def test_damaged_factors_and_another_version_are_refused_by_name(model, tmp_path):
    version = publish(tmp_path, 1, adapted(model, 1, copy.deepcopy(model)))
    with pytest.raises(WeightError, match="not the version that was announced"):
        read_factors(version.path, "0" * 32)
    (shard,) = (tmp_path / "v000001").glob("*.safetensors")
    good, parts = shard.read_bytes(), adapted(model, 1, copy.deepcopy(model))
    up = next(p for p in parts if p.name.endswith(lora_factors.UP))
    at = good.index(up.tensor.numpy().tobytes())
    shard.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
    with pytest.raises(WeightError, match=f"{up.name!r} has hash .* damaged in .*v000001"):
        read_factors(version.path, version.digest)


def test_a_version_of_another_format_is_refused(model, tmp_path):
    whole = [
        LocalPart(name=n, shape=tuple(t.shape), offset=0, tensor=t.detach().reshape(-1))
        for n, t in tiny_llama.checkpoint_tensors(model).items()
    ]
    version = publish(tmp_path, 1, whole)
    with pytest.raises(WeightError, match="format 'full'"):
        read_factors(version.path, version.digest)


def test_only_the_folder_that_the_adapters_were_trained_over_is_served(model, folder, tmp_path):
    version = publish(tmp_path, 1, adapted(model, 1, copy.deepcopy(model)))
    manifest, _ = read_factors(version.path, version.digest)
    refuse_other_base(folder, manifest)
    for changed in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_parameter(changed).view(-1)[0] += 1
        tiny_llama.save(other, tmp_path / "other")
        with pytest.raises(WeightError, match=f"another '{changed}'"):
            refuse_other_base(tmp_path / "other", manifest)
    half = tiny_llama.build(seed=0, max_position=64).bfloat16()
    tiny_llama.save(half, tmp_path / "half")
    with pytest.raises(WeightError, match="another"):
        refuse_other_base(tmp_path / "half", manifest)


def test_the_comparison_ends_at_its_deadline(model, folder, tmp_path):
    version = publish(tmp_path, 1, adapted(model, 1, copy.deepcopy(model)))
    manifest, _ = read_factors(version.path, version.digest)
    late = Deadline("reading version 1", 0.0)
    with pytest.raises(StalledError, match="tensor"):
        refuse_other_base(folder, manifest, late)


def test_dora_and_adapters_of_several_scales_are_refused(model, tmp_path):
    version = publish(tmp_path, 1, adapted(model, 1, copy.deepcopy(model)))
    manifest, factors = read_factors(version.path, version.digest)
    gain = {**factors, "q_proj.weight#gain": torch.ones(4)}
    with pytest.raises(WeightError, match="DoRA"):
        write_peft_folder(tmp_path / "dora", manifest, gain)
    name = next(n for n, e in manifest.tensors.items() if e.scale)
    other = manifest.tensors[name].model_copy(update={"scale": 0.5})
    several = manifest.model_copy(update={"tensors": {**manifest.tensors, name: other}})
    with pytest.raises(WeightError, match="scales"):
        write_peft_folder(tmp_path / "several", several, factors)


def test_a_disk_that_takes_nothing_is_a_weight_error(model, tmp_path):
    version = publish(tmp_path, 1, adapted(model, 1, copy.deepcopy(model)))
    manifest, factors = read_factors(version.path, version.digest)
    (tmp_path / "file").touch()
    with pytest.raises(WeightError, match="cannot be written for the engine"):
        write_peft_folder(tmp_path / "file" / "adapter", manifest, factors)
