"""Pictures that are drawn with matplotlib, whose import takes a second."""

import struct
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_curves
from rlhf_cluster.observe.report.learning_curve import draw_curve


@pytest.mark.parametrize("num_steps", [1, 40])
def test_a_curve_is_a_picture(tmp_path: Path, num_steps: int) -> None:
    records: list[dict[str, Any]] = [
        {"step": 0, "evaluation/reward_mean": 0.1},
        *({"step": k, "reward/mean": k / 40, "time/step_s": 1.0} for k in range(1, num_steps + 1)),
        {"step": num_steps + 1, "evaluation/reward_mean": 0.9, "staleness/mean": None},
    ]
    draw_curve(records, tmp_path / "curve.png", "demo")
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1000
    assert height > 800
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


def test_the_picture_is_drawn_from_whatever_is_finished(tmp_path: Path) -> None:
    runs = {}
    for case in ("grpo", "ppo", "staleness-2-coupled"):
        record = {"case": case, "seed": 0, "rewards": [0.1] * 12, "reward_after": 0.5}
        runs[f"{case}/0"] = record
    learning_curves.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
