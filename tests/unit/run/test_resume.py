"""The same command on a run directory that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RunError
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.checkpoint.resume import defaults, describe, differences, standing
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import read_metrics
from rlhf_cluster.util.durable_files import remove_folder
from tests.support.builders.checkpoint_files import write
from tests.support.builders.run_configs import tiny_config


def config(root: Path, **sections) -> RunConfig:
    return tiny_config(**{**sections, "run": {"root": str(root), **sections.get("run", {})}})


@pytest.fixture
def left(tmp_path: Path) -> RunDir:
    """What a run of 3 steps left that died after step 2, with checkpoints of steps 1 and 2."""
    with RunDir.create(tmp_path / "tiny", config(tmp_path)) as run:
        lines = [{"step": s, "time_s": 0.0, "reward/mean": 0.1 * s} for s in (0, 1, 2, 3)]
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
        for step in (1, 2, 3):
            (run.samples / f"step-{step:06d}.parquet").touch()
        (run.path / "skipped").mkdir()
        for version in (1, 2):
            (run.path / "skipped" / f"{version:08d}.json").write_text(f'{{"version": {version}}}')
        run.final.mkdir()
        for step in (1, 2):
            write(run.checkpoints, step)
    return RunDir.open(tmp_path / "tiny")


def contents(path: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}


def look(left: RunDir, /, accept: bool = False, **sections) -> resume.Continuation:
    before = contents(left.path)
    found = standing(config(left.path.parent, **sections), False, accept)
    assert contents(left.path) == before, "looking changes nothing"
    assert found is not None
    return found


def test_it_goes_on_from_the_last_checkpoint_and_later_records_are_cut(left):
    found = look(left)
    assert found.checkpoint.state.step == 2
    assert found.notes == ["Run tiny continues from its checkpoint of step 2"]
    run = RunDir.reclaim(left.path, config(left.path.parent))
    run.go_on(config(left.path.parent))
    resume.cut_back(run, found.checkpoint)
    assert [r["step"] for r in read_metrics(run.metrics)] == [0, 1, 2]
    assert run.metrics.read_bytes().endswith(b"}\n")
    assert sorted(p.name for p in run.samples.iterdir()) == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]
    assert [p.name for p in (run.path / "skipped").iterdir()] == ["00000001.json"]
    assert not run.final.exists()
    run.close()


def test_it_goes_on_from_the_one_before_a_damaged_one_and_says_so(left):
    (left.checkpoints / "step-000002" / "complete.json").unlink()
    found = look(left)
    assert found.checkpoint.state.step == 1
    assert "passed over" in found.notes[0]
    run = RunDir.reclaim(left.path, config(left.path.parent))
    run.go_on(config(left.path.parent))
    resume.cut_back(run, found.checkpoint)
    names = sorted(p.name for p in run.checkpoints.iterdir())
    assert names == ["damaged-0000-step-000002", "step-000001"]
    run.close()


def test_a_changed_configuration_is_shown_and_needs_consent(left):
    changed = {"learner": {"learning_rate": 2e-3}, "run": {"steps": 9}}
    with pytest.raises(RunError) as refused:
        look(left, **changed)
    assert "  - learner.learning_rate = 0.002, was 0.001\n  - run.steps = 9, was 3\n" in str(
        refused.value
    )
    assert "--accept-changes" in str(refused.value)
    found = look(left, accept=True, **changed)
    assert found.checkpoint.state.step == 2
    assert "changed: run.steps = 9, was 3" in found.notes


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("run.groups_per_step", {"run": {"groups_per_step": 8}}),
        ("model.init.hidden_size", {"model": {"init": {"hidden_size": 64, "num_heads": 4}}}),
        ("sft.steps", {"sft": {"steps": 1}}),
        ("learner.lora.rank", {"learner": {"lora": {"rank": 4}}}),
        ("scoring.reference", {"scoring": {"reference": True}}),
    ],
)
def test_what_a_checkpoint_depends_on_cannot_change(left, key, sections):
    with pytest.raises(RunError, match=r"cannot change in a run.*run\.name=NEW") as refused:
        look(left, accept=True, **sections)
    assert key in str(refused.value)


def test_fewer_steps_than_are_done_are_refused(left):
    with pytest.raises(RunError, match="is under the 2 steps"):
        look(left, accept=True, run={"steps": 1})


def test_a_finished_run_has_nothing_to_do_unless_it_is_to_go_on(left):
    left.write_summary({"run": "tiny"})
    found = look(left)
    assert found.finished
    assert "has finished" in found.notes[0]
    with pytest.raises(RunError, match="run.steps = 9, was 3"):
        look(left, run={"steps": 9})
    assert look(left, accept=True, run={"steps": 9}).checkpoint.state.step == 2
    assert standing(config(left.path.parent), overwrite=True, accept_changes=False) is None


def test_only_a_run_that_had_no_checkpoint_yet_starts_from_the_beginning(left):
    for step in (1, 2):
        remove_folder(left.checkpoints / f"step-{step:06d}")
    found = look(left)
    assert (found.finished, found.checkpoint) == (False, None)
    assert "3 steps and no checkpoint yet; starts from the beginning" in found.notes[0]
    with pytest.raises(RunError, match="--accept-changes"):
        look(left, learner={"learning_rate": 2e-3})
    assert look(left, accept=True, learner={"learning_rate": 2e-3}).checkpoint is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_deleted(left):
    for step in (1, 2):
        (left.checkpoints / f"step-{step:06d}" / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"no checkpoint is whole: .*step-000002.*--overwrite"):
        look(left)


def test_a_run_without_checkpoints_is_not_deleted(tmp_path):
    off = {"checkpoint": {"every": 0}}
    with RunDir.create(tmp_path / "tiny", config(tmp_path, **off)) as run:
        run.metrics.write_text('{"step": 7, "time_s": 0.0}\n')
    with pytest.raises(RunError, match=r"7 steps are done .*without checkpoints.*--overwrite"):
        look(run, **off)


def test_a_directory_that_is_refused_is_given_back_as_it_was(left):
    owner = left.owner()
    run = RunDir.reclaim(left.path, config(left.path.parent))
    assert left.is_held()
    run.withdraw()
    assert not left.is_held()
    assert left.owner() == owner
    run = RunDir.reclaim(left.path, config(left.path.parent))
    run.restart(config(left.path.parent))
    assert not run.checkpoints.exists()
    assert run.resolved.exists()
    run.close()


def test_differences_are_told_by_setting():
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(before, before) == []
    assert differences(before, {"a": {"b": 2, "c": [1, 2]}, "d": {"e": "x"}}) == [
        "a.b = 2, was 1",
        'd.e = "x", was not set',
    ]


def test_a_setting_that_the_run_was_begun_without_had_its_default():
    now = tiny_config()
    before = describe(now)
    del before["buffer"], before["checkpoint"]["keep_best"]
    assert differences(before, describe(now), defaults(now)) == []
    other = tiny_config(checkpoint={"keep_best": 1})
    found = differences(before, describe(other), defaults(other))
    assert found == ["checkpoint.keep_best = 1, was 0"]
    before["checkpoint"]["gone"] = 5
    found = differences(before, describe(now), defaults(now))
    assert found == ["checkpoint.gone = not set, was 5"]


def test_a_setting_with_names_of_its_own_stands_beside_no_default():
    pools = {"proxies": {"serves": ["exact_match"]}}
    with_them, without = tiny_config(scoring={"pools": pools}), tiny_config()
    same = describe(with_them)
    assert differences(same, same, defaults(with_them)) == []
    found = differences(describe(without), same, defaults(with_them))
    assert 'scoring.pools.proxies.serves = ["exact_match"], was not set' in found
    assert all(line.startswith("scoring.pools.proxies.") for line in found)


def gdpo(*weights: float, **own: float) -> dict[str, object]:
    """Sections of a run by GDPO with one reward per weight: r0, r1, ..."""
    rewards = [{"type": "exact_match", "name": f"r{i}", "weight": w} for i, w in enumerate(weights)]
    return {
        "algorithm": {"type": "gdpo", "reward_weights": own},
        "scoring": {"rewards": rewards},
    }


def began(run: RunDir, stored: dict[str, float], **sections) -> None:
    """Make `run` one that began with `sections`, and stores only these weights of GDPO."""
    settings = describe(config(run.path.parent, **sections))
    settings["algorithm"]["reward_weights"] = stored
    run.resolved.write_text(json.dumps(settings))


def test_a_gdpo_run_without_stored_weights_was_trained_with_1_each(left: RunDir):
    began(left, {}, **gdpo(1.0, -0.5))
    with pytest.raises(RunError) as refused:
        look(left, **gdpo(1.0, -0.5))
    assert "  - algorithm.reward_weights.r1 = -0.5, was 1.0\n" in str(refused.value)
    assert "reward_weights.r0" not in str(refused.value)
    notes = look(left, accept=True, **gdpo(1.0, -0.5)).notes
    assert "changed: algorithm.reward_weights.r1 = -0.5, was 1.0" in notes


def test_a_gdpo_run_whose_weights_are_those_of_before_continues(left: RunDir):
    began(left, {"r1": 3.0}, **gdpo(2.0, 3.0))
    with pytest.raises(RunError, match=r"reward_weights\.r0 = 2\.0, was 1\.0"):
        look(left, **gdpo(2.0, 3.0))
    assert look(left, **gdpo(2.0, 3.0, r0=1.0)).notes == look(left, **gdpo(2.0, 3.0, r0=1)).notes
    with RunDir.reclaim(left.path, config(left.path.parent, **gdpo(2.0, 3.0))) as run:
        run.go_on(config(left.path.parent, **gdpo(2.0, 3.0)))
        stored = json.loads(run.resolved.read_text())["algorithm"]["reward_weights"]
    assert stored == {"r0": 2.0, "r1": 3.0}, "what the learner trains with"
    assert look(left, **gdpo(2.0, 3.0)).checkpoint is not None


def test_how_versions_travel_may_differ_in_a_resumed_run(left: RunDir):
    assert look(left, weights={"transport": "relay"}).notes == look(left).notes
    with pytest.raises(RunError, match="weights.publish_every"):
        look(
            left, weights={"transport": "relay", "publish_every": 2}, staleness={"max_staleness": 4}
        )
