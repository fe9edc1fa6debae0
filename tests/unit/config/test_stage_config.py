"""Run files of stages and of pipelines: what is refused, what follows, what takes whose place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from rlhf_cluster.config import RunConfig, StageConfig, load_any, validate
from rlhf_cluster.config.load import (
    load_all,
    needs,
)
from rlhf_cluster.errors import ConfigError, RunError
from rlhf_cluster.planning.placement import demand
from rlhf_cluster.planning.run_inputs import check_stage_inputs
from rlhf_cluster.records import LearnerState
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.checkpoint.checkpoint_folder import (
    Checkpoint,
    Found,
)
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.run_directory import RunDir
from tests.support.builders.offline_stages import (
    stage_config,
    stage_tree,
)
from tests.support.builders.run_configs import tiny_tree


def refused(**sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        stage_config(**sections)
    return str(error.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"run": {"epochs": 1}}, ["run.steps and run.epochs: both given"]),
        (
            {"run": {"units_per_step": 1}, "learner": {"ranks": 2}},
            ["run.units_per_step = 1 is under learner.ranks = 2"],
        ),
        ({"run": {"evaluate_every": 2}}, ["run.evaluate_every = 2 with data.held_out = 0"]),
        ({"data": {"sources": []}}, ["data.sources"]),
        (
            {"data": {"sources": [{"task": "sort_digits"}]}},
            ["data.sources.0.task = 'sort_digits' without limit"],
        ),
        (
            {"data": {"sources": [{"task": "sort_digits", "path": "x", "limit": 2}]}},
            ["data.sources.0.task and data.sources.0.path: both given"],
        ),
        ({"data": {"system_prompt": "x"}}, ["data.system_prompt needs data.template = 'chat'"]),
        ({"data": {"template": "chat"}}, ["with [model.init]", "has no chat template"]),
        ({"data": {"max_tokens": 65}}, ["data.max_tokens = 65 is over model.init.max_position"]),
        ({"learner": {"tokens_per_row": 16}}, ["data.max_tokens = 32", "tokens_per_row = 16"]),
        ({"learner": {"tokens_per_micro_batch": 16}}, ["tokens_per_micro_batch = 16"]),
        ({"learner": {"epochs": 2}}, ["learner.epochs = 2 with [stage]", "run.epochs"]),
        ({"learner": {"on_loss": "shrink"}}, ["learner.on_loss = 'shrink' with [stage]"]),
        ({"learner": {"spares": 1}}, ["learner.spares = 1 with [stage]", "Remove it"]),
        ({"learner": {"schedule": "wsd"}}, ["learner.decay_steps = None"]),
        ({"checkpoint": {"keep_best": 1}}, ["checkpoint.keep_best = 1 with data.held_out = 0"]),
        ({"generation": {"workers": 1}}, ["generation: unknown key"]),
    ],
)
def test_impossible_combinations_are_refused(sections: Any, words: list[str]) -> None:
    message = refused(**sections)
    assert message.startswith("test: ")
    for word in words:
        assert word in message


def test_a_file_is_a_stage_when_it_has_one(tmp_path: Path) -> None:
    for tree, kind in ((stage_tree(), StageConfig), (tiny_tree(), RunConfig)):
        path = tmp_path / "run.toml"
        path.write_text(tomli_w.dumps(tree))
        assert type(load_any(path)) is kind
        assert [type(each) for each in load_all(path)] == [kind]


def test_a_stage_needs_its_ranks_and_nothing_else() -> None:
    config = stage_config(learner={"ranks": 3, "num_cpus": 2})
    assert [(b.owner, b.cpus) for b in demand(config)] == [(f"learner-{i}", 2) for i in range(3)]


def test_without_a_length_a_stage_goes_over_its_data_once() -> None:
    run = stage_config(run={"steps": None}).run
    assert (run.steps, run.epochs) == (None, 1)
    assert stage_config(run={"steps": 7}).run.epochs is None


def test_epochs_end_with_what_is_left_and_give_the_number_of_steps(tmp_path: Path) -> None:
    config = stage_config(
        run={"steps": None, "epochs": 2, "units_per_step": 12},
        data={"sources": [{"task": "sort_digits", "limit": 20}], "deduplicate": False},
    )
    inputs = check_stage_inputs(config, tmp_path)
    assert inputs.num_steps == 4
    assert [len(inputs.batch(step)) for step in range(4)] == [12, 12, 12, 4]


def test_a_decay_longer_than_the_stage_is_refused(tmp_path: Path) -> None:
    learner = {"schedule": "wsd", "decay_steps": 3, "warmup_steps": 2}
    with pytest.raises(ConfigError, match="= 2 \\+ 3 are over the stage's 4 optimizer steps"):
        check_stage_inputs(stage_config(learner=learner), tmp_path)


def test_what_decides_the_order_of_the_data_cannot_change_in_a_stage(tmp_path: Path) -> None:
    before = stage_config(run={"root": str(tmp_path)})
    run = RunDir.create(before.run_dir, before)
    learner = LearnerState(version=2, num_bytes=0, skips={}, algorithm={})
    state = RunState.of_stage(learner, before=None, score=-0.5, packages={})
    assert RunState.from_json(state.to_json().encode(), "x") == state
    found = Found(checkpoint=Checkpoint(folder=tmp_path, state=state))
    assert resume.look(run, before, False, found).checkpoint is not None
    for changes in ({"seed": 1}, {"units_per_step": 4}):
        after = stage_config(run={"root": str(tmp_path), **changes})
        with pytest.raises(RunError, match="cannot change in a run"):
            resume.look(run, after, True, found)
    slower = stage_config(run={"root": str(tmp_path)}, learner={"learning_rate": 1e-4})
    assert resume.look(run, slower, True, found).checkpoint is not None
    run.close()


def pipeline(tmp_path: Path, **changes: Any) -> Path:
    """Three stages: a made model, what it became, and reinforcement learning on that."""
    first, second, third = stage_tree(), stage_tree(), tiny_tree()
    second["model"] = {"path": "{stages.sft.final}"}
    third["model"] = {"path": "{stages.more.final}"}
    third["scoring"]["rewards"] = [{"type": "reward_model", "path": "{stages.sft.final}"}]
    for tree in (first, second, third):
        tree["run"] = {k: v for k, v in tree["run"].items() if k not in ("name", "root")}
    tree = {
        "pipeline": {"name": "all", "root": str(tmp_path)},
        "stages": {"sft": first, "more": second, "rl": third},
    }
    for key, value in changes.items():
        tree["stages"][key] |= value
    path = tmp_path / "pipeline.toml"
    path.write_text(tomli_w.dumps(tree))
    return path


def test_a_pipeline_gives_each_stage_its_folder_and_the_models_of_those_before(tmp_path) -> None:
    found = load_all(pipeline(tmp_path), ["stages.more.run.steps=7"])
    assert [type(each) for each in found] == [StageConfig, StageConfig, RunConfig]
    assert [each.run_dir for each in found] == [tmp_path / "all" / n for n in ("sft", "more", "rl")]
    assert found[1].model.path == str(tmp_path / "all" / "sft" / "final")
    assert found[1].run.steps == 7
    assert isinstance(found[2], RunConfig)
    assert found[2].scoring.rewards[0].path == str(tmp_path / "all" / "sft" / "final")
    assert needs(found[0], []) == []
    assert needs(found[1], found[:1]) == ["sft"]
    assert needs(found[2], found[:2]) == ["sft", "more"]
    (tmp_path / "all" / "sft" / "final").mkdir(parents=True)
    assert needs(found[1], found[:1]) == []


def test_a_pipeline_that_cannot_work_is_refused_with_the_stage(tmp_path: Path) -> None:
    later = pipeline(tmp_path, sft={"model": {"path": "{stages.more.final}"}})
    with pytest.raises(ConfigError, match=r"\[stages.sft\]: model.path = .*known here: none"):
        load_all(later)
    with pytest.raises(ConfigError, match=r"\[stages.more\]: run.name = 'x'"):
        load_all(pipeline(tmp_path), ["stages.more.run.name=x"])
    for run in ("5", "[1]"):
        with pytest.raises(ConfigError, match=r"\[stages.more\]: run = .*: not a section"):
            load_all(pipeline(tmp_path), [f"stages.more.run={run}"])
    with pytest.raises(ConfigError, match=r"\[stages.rl\]: 1 problem"):
        load_all(pipeline(tmp_path), ["stages.rl.learner.ranks=0"])
    path = tmp_path / "none.toml"
    path.write_text(tomli_w.dumps({"stages": {"a": stage_tree()}}))
    with pytest.raises(ConfigError, match="pipeline: required"):
        load_all(path)


def test_the_shipped_stage_is_valid_and_needs_no_file(tmp_path: Path) -> None:
    config = load_any("configs/sft_cpu.toml")
    assert isinstance(config, StageConfig)
    inputs = check_stage_inputs(config, tmp_path)
    assert inputs.stream.held_out
    assert validate(StageConfig, config.model_dump(), "again") == config
