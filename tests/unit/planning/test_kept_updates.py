"""What `doctor` and `plan` say of a small update of a run with adapters."""

import json
from pathlib import Path

import pytest

from rlhf_cluster.cli.commands import main
from rlhf_cluster.planning import doctor
from rlhf_cluster.planning.kept_updates import KEPT, SIZES, kept_lines, way_of
from tests.support.builders.run_configs import tiny_config
from tests.unit.planning.test_doctor import GOOD

RESULT = Path("benchmarks/results/lora_rounding.json")


def test_the_numbers_are_those_that_were_measured():
    figures = json.loads(RESULT.read_text())["figures"]
    ways = {key.split("/")[0] for key in figures if "/" in key}
    assert set(KEPT) == ways
    for way, kept in KEPT.items():
        what = "bfloat16_pass" if way == "served" else "kept"
        measured = [figures[f"{way}/{size:g}/{what}"] for size in SIZES]
        assert list(kept) == [pytest.approx(found, abs=0.0051) for found in measured], way


def lora(**sections):
    return tiny_config(**{"learner": {"lora": {}}, **sections})


@pytest.mark.parametrize(
    ("sections", "way"),
    [
        ({"generation": {"dtype": "bfloat16"}}, "stochastic"),
        ({"generation": {"dtype": "bfloat16"}, "weights": {"rounding": "nearest"}}, "nearest"),
        ({"generation": {"dtype": "bfloat16"}, "weights": {"dtype": "float32"}}, "nearest"),
        ({"generation": {"dtype": "float32"}}, "float32"),
        ({"weights": {"dtype": "bfloat16"}}, "stochastic"),
        (
            {
                "generation": {"dtype": "bfloat16", "lora": "served"},
                "weights": {"format": "adapter"},
            },
            "served",
        ),
        ({"generation": {"lora": "served"}, "weights": {"format": "adapter"}}, "float32"),
        (
            {"generation": {"dtype": "bfloat16", "quantization": "int8"}},
            "int8_of_stochastic",
        ),
        (
            {
                "generation": {"dtype": "bfloat16", "quantization": "int8"},
                "weights": {"dtype": "float32"},
            },
            "int8_of_float32",
        ),
        ({"generation": {"dtype": "bfloat16", "quantization": "fp8_per_channel"}}, None),
    ],
)
def test_a_run_is_told_its_own_row(sections, way):
    config = lora(**sections)
    assert way_of(config) == way
    lines = list(kept_lines(config))
    marked = [line.split()[0] for line in lines if "<- this run" in line]
    assert marked == ([] if way is None else [way])
    assert ("was not measured" in lines[-1]) == (way is None)


def test_without_adapters_nothing_is_said():
    assert not list(kept_lines(tiny_config()))


def test_doctor_and_plan_print_the_table_of_a_run_with_adapters(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look", lambda *_: GOOD)
    set_ = ["--set", "learner.lora.rank=8", "--set", "generation.dtype=bfloat16"]
    for command in ("doctor", "plan"):
        assert main([command, "configs/quickstart.toml", *set_]) == 0
        out = capsys.readouterr().out
        assert "  1e-4  3e-4  1e-3  4e-3\n" in out
        assert "0.99  1.00  1.00  1.00  <- this run\n" in out
        assert main([command, "configs/quickstart.toml"]) == 0
        assert "this run" not in capsys.readouterr().out
