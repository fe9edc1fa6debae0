"""A Hub id in model.path becomes a folder: of the cache, of a download, or an error with a command."""

import pytest

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.hub import download, find_cached, is_hub_id, local_folder
from rlhf_cluster.planning.local_models import with_local_model
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.durable_files import read_json, write_json
from tests.support.builders.run_configs import tiny_config

ID = "Qwen/Qwen2.5-0.5B-Instruct"
REVISION = "a" * 40
COMMAND = f"hf download {ID} --local-dir models/Qwen2.5-0.5B-Instruct"


def put_in_cache(cache):
    entry = cache / "models--Qwen--Qwen2.5-0.5B-Instruct"
    folder = entry / "snapshots" / REVISION
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(REVISION)
    return folder


def of_hub(root):
    config = tiny_config(run={"root": str(root)})
    model = config.model.model_copy(update={"path": ID, "init": None})
    return config.model_copy(update={"model": model})


def test_only_owner_and_name_that_are_no_folder_are_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(ID)
    for path in ("/models/qwen", "./models/qwen", "qwen", "a/b/c", "~/qwen"):
        assert not is_hub_id(path)
    (tmp_path / ID).mkdir(parents=True)
    assert not is_hub_id(ID)


def test_a_model_in_the_cache_is_used_without_a_download(tmp_path):
    assert find_cached(ID, tmp_path) is None
    folder = put_in_cache(tmp_path)
    found = local_folder(ID, pytest.fail, lambda hub_id: find_cached(hub_id, tmp_path), {})
    assert found == folder


def test_a_download_that_was_cut_short_is_no_model_yet(tmp_path):
    folder = put_in_cache(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert find_cached(ID, tmp_path) is None
    both = {str(i): f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    write_json(folder / "model.safetensors.index.json", {"weight_map": both}, fsync=False)
    assert find_cached(ID, tmp_path) is None
    (folder / both["2"]).touch()
    assert find_cached(ID, tmp_path) == folder


def test_a_model_that_is_not_there_is_downloaded_where_a_network_is_permitted(tmp_path):
    said, asked = [], []

    def fetch(hub_id):
        asked.append(hub_id)
        put_in_cache(tmp_path)

    found = local_folder(ID, fetch, lambda hub_id: find_cached(hub_id, tmp_path), {}, said.append)
    assert found.name == REVISION
    assert asked == [ID]
    assert said == [f"{ID}: not in the Hugging Face cache, downloading it"]


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_the_error_is_the_command_that_fetches_it(value):
    offline = {"HF_HUB_OFFLINE": value}
    with pytest.raises(ConfigError, match=COMMAND) as refused:
        local_folder(ID, pytest.fail, lambda hub_id: None, offline)
    assert "HF_HUB_OFFLINE is set" in str(refused.value)


def test_a_download_that_leaves_no_model_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=f"still no whole model.*{COMMAND}"):
        local_folder(ID, lambda hub_id: None, lambda hub_id: None, {}, lambda text: None)


def test_a_download_that_fails_or_takes_too_long_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(ConfigError, match=f"cannot be downloaded.*{COMMAND}"):
        download(ID, limit_s=60.0)
    with pytest.raises(ConfigError, match=f"not downloaded within 0.001 s.*{COMMAND}"):
        download(ID, limit_s=0.001)


def test_the_run_records_folder_id_and_revision(tmp_path):
    folder = put_in_cache(tmp_path / "cache")
    config = with_local_model(of_hub(tmp_path), lambda hub_id: folder)
    assert config.model.path == str(folder)
    with RunDir.create(config.run_dir, config) as run:
        recorded = read_json(run.environment)["model"]
    assert recorded == {"folder": str(folder), "hub_id": ID, "revision": REVISION}


def test_a_folder_stays_as_it_is():
    config = tiny_config()
    assert with_local_model(config, pytest.fail) is config
