"""Data sets made by the pools: the run file, pipelines, and going on."""

from __future__ import annotations

from typing import Any

import pytest
import tomli_w

from rlhf_cluster.cli.summaries import derived_generation, generation_ending
from rlhf_cluster.config import GenerateConfig, RunConfig, load_any, validate
from rlhf_cluster.config.load import load_all, needs
from rlhf_cluster.errors import ConfigError, RunError
from rlhf_cluster.planning.placement import demand
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.synthetic_data.dataset import write_dataset
from tests.support.builders.dataset_runs import answers, section, written
from tests.support.builders.offline_stages import stage_tree
from tests.support.builders.run_configs import tiny_tree


def tree(**sections: Any) -> dict[str, Any]:
    own = {name: tiny_tree()[name] for name in ("model", "generation", "scoring")}
    own |= {
        "run": {"name": "made"},
        "stage": {"type": "generate", "samples": 4, "select": "best_of_n"},
        "data": {"task": "sort_digits", "limit": 8, "max_prompt_tokens": 8},
    }
    return {name: {**own.get(name, {}), **sections.get(name, {})} for name in {*own, *sections}}


def made(**sections: Any) -> GenerateConfig:
    return validate(GenerateConfig, tree(**sections), "test")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"stage": {"select": "threshold"}}, "select = 'threshold' without threshold"),
        ({"stage": {"select": "step_labels", "threshold": 1}}, "without completions"),
        ({"stage": {"completions": 4}}, "completions = 4 with select = 'best_of_n'"),
        ({"stage": {"keep": 5}}, "samples = 4 with select = 'best_of_n' and keep = 5"),
        ({"stage": {"select": "pairs", "keep": 3}}, "6 samples are needed"),
        ({"data": {"limit": None}}, "data.task = 'sort_digits' without data.limit"),
        ({"scoring": {"reference": True}}, "scoring.reference = true with stage.type"),
        ({"generation": {"quantization": "int8"}}, "quantization = 'int8' with stage.type"),
        ({"generation": {"max_response_tokens": 80}}, "is over model.init.max_position = 64"),
        ({"learner": {"ranks": 1}}, "learner: unknown key"),
    ],
)
def test_run_files_that_cannot_work_are_refused(sections, words):
    with pytest.raises(ConfigError) as error:
        made(**sections)
    assert words in str(error.value)
    assert "validation error" not in str(error.value)


def test_the_pools_get_a_run_of_their_own_and_nothing_else_is_asked_for():
    config = made(generation={"workers": 2}, run={"seed": 3})
    assert isinstance(config.as_run, RunConfig)
    assert config.as_run.sampling.num_samples == 4
    assert (config.as_run.run.seed, config.as_run.run_dir) == (3, config.run_dir)
    assert not config.as_run.buffer.durable
    names = [bundle.owner for bundle in demand(config)]
    assert names == ["generation-0", "generation-1", "scoring-0"]
    assert GenerateConfig.model_validate(config.model_dump()) == config


def test_a_pipeline_takes_the_data_set_of_an_earlier_stage(tmp_path):
    stages = {
        "samples": {**tree(), "run": {}},
        "tuned": {
            **stage_tree(),
            "run": {"epochs": 1, "units_per_step": 8},
            "data": {"sources": [{"path": "{stages.samples.data}"}], "max_tokens": 32},
        },
    }
    path = tmp_path / "p.toml"
    whole = {"pipeline": {"name": "p", "root": str(tmp_path)}, "stages": stages}
    path.write_text(tomli_w.dumps(_without_none(whole)))
    samples, tuned = load_all(path)
    assert isinstance(samples, GenerateConfig)
    assert tuned.data.sources[0].path == str(samples.data_file)
    assert needs(tuned, [samples]) == ["samples"]
    samples.data_file.parent.mkdir(parents=True)
    samples.data_file.write_text("")
    assert needs(tuned, [samples]) == []
    whole["stages"]["tuned"]["data"]["sources"] = [{"path": "{stages.samples.final}"}]
    path.write_text(tomli_w.dumps(_without_none(whole)))
    with pytest.raises(ConfigError, match="known here: {stages.samples.data}"):
        load_all(path)


def test_another_selection_goes_on_with_the_same_answers_and_another_model_is_refused(tmp_path):
    config = made(run={"root": str(tmp_path)})
    with RunDir.create(config.run_dir, config):
        pass
    rundir = RunDir.open(config.run_dir)
    assert resume.look(rundir, config, False).kept
    other = made(run={"root": str(tmp_path)}, stage={"keep": 2})
    with pytest.raises(RunError, match="stage.keep = 2"):
        resume.look(rundir, other, False)
    rundir.write_summary({})
    assert resume.look(rundir, config, False).finished
    again = resume.look(rundir, other, True)
    assert again.kept
    assert not again.finished
    for sections in ({"stage": {"samples": 8}}, {"run": {"seed": 1}}):
        sections.setdefault("run", {})["root"] = str(tmp_path)
        with pytest.raises(RunError, match="cannot change"):
            resume.look(rundir, made(**sections), True)


def test_the_last_lines_tell_of_all_that_was_left_out(tmp_path):
    path, target = written(tmp_path, [answers(0.25, 0.5, 0.5)]), tmp_path / "data.jsonl"
    report = write_dataset(path, target, section("best_of_n", 3), {"ScoringError": 2})
    summary = {
        "run": "made", "stage": "generate", "run_dir": str(tmp_path), "total_s": 3.0,
        "report": report, "data_file": str(target),
    }  # fmt: skip
    lines = "\n".join(generation_ending(summary, "rlhf-cluster", tmp_path.parent))
    for words in (
        "1 of 3 samples",
        "0.4167 of all, 0.5 of what was selected",
        "2 responses that the selection did not take",
        "2 prompts discarded by ScoringError",
        f"{tmp_path.name}/data.jsonl",
    ):
        assert words in lines
    assert derived_generation(made(), 8)["rows"] == "at most 8"


def test_a_file_is_read_by_the_type_of_its_stage(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tree()))
    assert type(load_any(path)) is GenerateConfig


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
