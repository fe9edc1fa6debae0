"""What a run moves into its directory before it begins."""

from pathlib import Path

import pytest

from actors.drivers import driver


def test_n17_a_model_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    source, target = tmp_path / "made", tmp_path / "run" / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    missing = source / "weights.safetensors"
    missing.symlink_to(tmp_path / "nowhere")
    target.parent.mkdir()
    with pytest.raises(OSError, match="nowhere|weights"):
        driver._copy_whole(source, target)
    assert not target.exists(), "half a copy has not its name"
    missing.unlink()
    missing.write_bytes(b"weights")
    (target.parent / ".model.partial" / "of_before").write_text("")
    driver._copy_whole(source, target)
    names = ["config.json", "weights.safetensors"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert [path.name for path in target.parent.iterdir()] == ["model"]
