"""Ensembles of one stage: what each member trains on, where it lies, and what all are worth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from pydantic import ValidationError

from actors.jobs import job_folder
from rlhf_cluster.cli.summaries import stage_ending
from rlhf_cluster.config import StageConfig
from rlhf_cluster.config.load import load_all, members_of, name_in_file, needs
from rlhf_cluster.data.preferences import parse_pair, parse_paraphrases
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import is_held_out, load_units
from rlhf_cluster.errors import ConfigError, DataError, RecordError
from rlhf_cluster.offline import build_stage
from rlhf_cluster.offline.scorer_report import Scored, ensemble_report, paraphrase_report
from rlhf_cluster.offline.train_ensemble import times
from rlhf_cluster.offline.train_reward_model import RewardModelStage, RewardModelStageConfig
from tests.support.builders.offline_stages import stage_config, stage_tree, write_rows
from tests.support.builders.preference_ranks import (
    bpe_tokenizer,
    context,
    random_pairs,
    stage_ranks,
)
from tests.support.builders.run_configs import tiny_tree

start_stage = pytest.fixture(stage_ranks)
tokenizer = pytest.fixture(scope="module")(bpe_tokenizer)

KEYS = [f"prompt {number}" for number in range(2000)]


def member(number: int, members: int = 3, **keys: Any) -> RewardModelStageConfig:
    return RewardModelStageConfig(members=members, member=number, **keys)


def pair_rows(num: int, **more: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"one {n}", "chosen": "two", "rejected": "three", **more} for n in range(num)
    ]


# What each trains on


def test_every_unit_is_left_out_by_exactly_one_member() -> None:
    counts = np.array([[times(member(k), key) for key in KEYS] for k in range(3)])
    assert (counts.sum(0) == 2).all()
    assert ((counts == 0).mean(1) - 1 / 3 < 0.05).all()


def test_a_bootstrap_draws_each_unit_once_in_the_mean_and_differently_for_each_member() -> None:
    counts = np.array([[times(member(k, split="bootstrap"), key) for key in KEYS] for k in (0, 1)])
    assert np.abs(counts.mean(1) - 1).max() < 0.1
    assert np.abs((counts == 0).mean(1) - np.exp(-1)).max() < 0.04
    assert np.abs(counts.var(1) - 1).max() < 0.2
    assert abs(np.corrcoef(counts)[0, 1]) < 0.1


def test_one_model_and_equal_splits_train_on_everything_once() -> None:
    alone = RewardModelStageConfig()
    assert {times(alone, key) for key in KEYS} == {1}
    assert {times(member(1, split="same"), key) for key in KEYS} == {1}


@pytest.mark.parametrize("split", ["leave_out", "bootstrap"])
def test_members_have_the_same_held_out_units_and_their_own_trained_ones(
    tokenizer: Any, tmp_path: Path, split: Any
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", pair_rows(60))
    data = context(tokenizer, sources=({"path": path},), held_out=0.2).data
    streams = []
    for number in range(2):
        own = member(number, members=2, split=split)
        stage = RewardModelStage(own, context(tokenizer))
        streams.append(load_units(data, stage, seed=number))
    held_out = [[u.key for u in s.held_out] for s in streams]
    assert held_out[0] == held_out[1]
    trained = [[s.at(place).key for place in range(s.end_of(1))] for s in streams]
    assert not {*held_out[0]} & {*trained[0], *trained[1]}
    assert sorted(trained[0]) != sorted(trained[1])
    left = streams[0].counts.skipped["not in the part that this member trains on"]
    assert left == 60 - len(held_out[0]) - len({*trained[0]})
    if split == "leave_out":
        assert not {*trained[0]} & {*trained[1]}
    else:
        assert len(trained[0]) > len({*trained[0]})


# Where they lie


def ensemble_config(tmp_path: Path, **stage: Any) -> StageConfig:
    return stage_config(
        run={"root": str(tmp_path), "name": "rm"},
        stage={"type": "reward_model", "members": 3, **stage},
    )


def test_a_stage_of_members_is_a_run_for_each_below_its_folder(tmp_path: Path) -> None:
    config = ensemble_config(tmp_path)
    found = members_of(config)
    assert [each.run_dir for each in found] == [tmp_path / "rm" / f"rm-{k}" for k in range(3)]
    assert len({each.run.seed for each in found}) == 3
    assert [name_in_file(each) for each in found] == ["rm"] * 3
    assert all(each.learner == config.learner and each.data == config.data for each in found)
    (alone,) = members_of(ensemble_config(tmp_path, member=1))
    assert alone == found[1]
    one = stage_config()
    assert members_of(one) == [one]
    other = members_of(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}))
    assert not {each.run.seed for each in found} & {each.run.seed for each in other}


def test_what_stands_for_several_models_cannot_be_trained_as_one(tmp_path: Path) -> None:
    config = ensemble_config(tmp_path)
    with pytest.raises(ConfigError, match=r"stage\.members = 3 and no stage\.member"):
        build_stage(config.stage, context())
    with pytest.raises(ValidationError, match="member = 3 with members = 3"):
        member(3)
    with pytest.raises(ValidationError, match="split = 'bootstrap' with members = 1"):
        RewardModelStageConfig(split="bootstrap")


def test_a_pipeline_names_the_members_of_its_ensemble(tmp_path: Path) -> None:
    first, second = stage_tree(stage={"type": "reward_model", "members": 2}), tiny_tree()
    paths = ["{stages.reward-0.final}", "{stages.reward-1.final}"]
    second["scoring"]["rewards"] = [
        {"type": "reward_model", "path": path, "name": path[8:16]} for path in paths
    ]
    for tree in (first, second):
        tree["run"] = {k: v for k, v in tree["run"].items() if k not in ("name", "root")}
    tree = {
        "pipeline": {"name": "all", "root": str(tmp_path)},
        "stages": {"reward": first, "rl": second},
    }
    path = tmp_path / "pipeline.toml"
    path.write_text(tomli_w.dumps(tree))
    *members, rl = load_all(path)
    finals = [tmp_path / "all" / "reward" / f"reward-{k}" / "final" for k in range(2)]
    assert [each.run_dir / "final" for each in members] == finals
    assert [reward.path for reward in rl.scoring.rewards] == [str(f) for f in finals]  # type: ignore
    assert needs(rl, members) == ["reward-0", "reward-1"]
    with pytest.raises(ConfigError, match=r"known here: \{stages.reward-0.final\}"):
        load_all(path, ["stages.rl.model.path={stages.reward.final}"])
    tree["stages"] = {"reward": first, "reward-1": first}
    path.write_text(tomli_w.dumps(tree))
    with pytest.raises(ConfigError, match="reward-1-0|reward-1 is a member"):
        load_all(path, ["stages.reward-1.stage.members=1"])


def test_a_submitted_ensemble_is_steered_by_the_name_of_its_table(tmp_path: Path) -> None:
    tree = stage_tree(stage={"type": "reward_model", "members": 2})
    tree["run"] = {"steps": 4, "units_per_step": 8}
    tree["cluster"] = {"address": "ray://head:10001"}
    path = tmp_path / "pipeline.toml"
    whole = {"pipeline": {"name": "all", "root": "/shared"}, "stages": {"reward": tree}}
    path.write_text(tomli_w.dumps(whole))
    work = job_folder.read(path, [], None)
    assert len(work.configs) == 2
    assert {*work.overrides} == {"stages.reward.cluster.address=auto"}
    assert [each.cluster.address for each in load_all(path, work.overrides)] == ["auto"] * 2
    tree["run"] |= {"name": "rm", "root": "/shared"}
    path.write_text(tomli_w.dumps(tree))
    assert job_folder.read(path, [], None).name == "rm"


# What they are worth


def scored(*scores: tuple[float, float], lengths: Any = None) -> Scored:
    given = np.array(scores, dtype=np.float64)
    return Scored(scores=given, lengths=np.ones(given.shape, int) if lengths is None else lengths)


def test_the_report_of_two_members_is_the_one_worked_out_by_hand() -> None:
    one = scored((2, 0), (1, 0), (0, 1), (3, 0))
    two = scored((1, 0), (0, 2), (0, 3), (1, 0))
    report = ensemble_report([one, two])
    assert [m["accuracy"] for m in report["members"]] == [0.75, 0.5]
    # means: (1.5, 0), (0.5, 1), (0, 2), (2, 0)
    assert report["ensemble"]["accuracy"] == 0.5
    assert report["ensemble"]["margin_mean"] == pytest.approx((1.5 - 0.5 - 2 + 2) / 4)
    found = report["disagreement"]
    assert found["split_fraction"] == 0.25
    assert found["accuracy_split"] == 0.0
    assert found["accuracy_unanimous"] == pytest.approx(2 / 3)
    # of two numbers the deviation is half their distance
    assert found["score_std"] == pytest.approx((0.5 + 0 + 0.5 + 1 + 0 + 1 + 1 + 0) / 8)
    json.dumps(report)


def test_members_that_err_apart_are_better_together() -> None:
    draw = np.random.default_rng(0)
    members = [
        Scored(
            scores=np.array([1.0, 0.0]) + 1.5 * draw.normal(size=(2000, 2)),
            lengths=np.ones((2000, 2)),
        )
        for _ in range(4)
    ]
    report = ensemble_report(members)
    best = max(m["accuracy"] for m in report["members"])
    assert report["ensemble"]["accuracy"] > best + 0.05
    found = report["disagreement"]
    assert found["accuracy_unanimous"] > found["accuracy_split"] + 0.1


def test_members_of_other_pairs_are_refused() -> None:
    with pytest.raises(RecordError, match="scores of the same pairs"):
        ensemble_report([scored((1, 0)), scored((1, 0), (2, 0))])
    with pytest.raises(RecordError, match="scores of the same pairs"):
        ensemble_report([scored((1, 0)), scored((1, 0), lengths=np.array([[1, 2]]))])


def test_a_verdict_that_turns_under_a_paraphrase_is_no_agreement() -> None:
    scores = np.array([[2.0, 0], [1, 0], [0, 1], [5, 5]])
    again = np.array([[3.0, 1], [0, 1], [np.nan, np.nan], [1, 0]])
    found = paraphrase_report(scores, again)
    assert found is not None
    assert found["num_pairs"] == 3
    assert found["agreement"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["score_shift"] == pytest.approx((1 + 1 + 1 + 1 + 4 + 5) / 6)
    assert paraphrase_report(scores, np.full((4, 2), np.nan)) is None


def test_scores_survive_a_file() -> None:
    whole = Scored(
        scores=np.array([[1.0, 2], [3, 4]]),
        lengths=np.array([[1, 2], [3, 4]]),
        paraphrased=np.array([[1.5, 2], [np.nan, np.nan]]),
    )
    again = Scored.from_dict(json.loads(json.dumps(whole.as_dict(), allow_nan=False)))
    np.testing.assert_array_equal(again.scores, whole.scores)
    np.testing.assert_array_equal(again.paraphrased, whole.paraphrased)  # type: ignore
    assert again.report() == whole.report()


def test_the_last_member_writes_the_report_of_all(start_stage: Any, tmp_path: Path) -> None:
    held_out = random_pairs(12, seed=99, values=True)
    reports = []
    for number in (1, 0):
        own = {"type": "reward_model", "members": 2, "member": number}
        rank = start_stage(own, learner={"learning_rate": 1e-2})
        for step in range(3):
            rank.train(random_pairs(12, seed=10 * number + step, values=True))
        found = rank.report(held_out)
        folder = tmp_path / "rm" / f"rm-{number}"
        folder.mkdir(parents=True)
        stage = build_stage(RewardModelStageConfig(members=2, member=number), context())
        reports.append(stage.conclude(found, held_out, folder))
        assert (tmp_path / "rm" / "report.json").exists() is (number == 0)
    assert "ensemble" not in reports[0]
    assert "held_out" not in reports[0]
    together = json.loads((tmp_path / "rm" / "report.json").read_text())
    assert together["ensemble"] == reports[1]["ensemble"]
    assert [m["accuracy"] for m in together["members"]] == [r["accuracy"] for r in reports[::-1]]
    other = tmp_path / "rm" / "rm-1" / "held_out.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "units": ["x"] * 12}))
    again = stage.conclude(found, held_out, tmp_path / "rm" / "rm-0")
    assert "ensemble" not in again, "its members were evaluated on other pairs"


def test_the_ending_shows_the_accuracies_and_what_to_look_at(tmp_path: Path) -> None:
    own = scored(*[(1.0, 0.0)] * 9, (0.0, 1.0)).report()
    summary = {
        "run": "rm-1",
        "stage": "reward_model",
        "run_dir": str(tmp_path / "rm-1"),
        "final_model": str(tmp_path / "rm-1" / "final"),
        "before": 0.5,
        "after": 0.9,
        "metric": "ranking/accuracy",
        "report": {**own, "warnings": ["look here"], "ensemble": own},
        "data_notes": ["3 left out"],
        "steps": 4,
        "total_s": 1.0,
    }
    text = "\n".join(stage_ending(summary, "rlhf-cluster", tmp_path))
    low, high = own["accuracy_low"], own["accuracy_high"]
    assert text.count(f"0.900 [{low:.3f}, {high:.3f}]") == 2
    assert "of all members" in text
    assert "look here" in text


# Paraphrases


def test_paraphrases_are_read_beside_held_out_pairs_alone(tokenizer: Any) -> None:
    section = RewardModelStageConfig(paraphrases=True)
    stage = RewardModelStage(section, context(tokenizer, held_out=0.5))
    sizes = {True: set(), False: set()}
    for number, columns in enumerate(pair_rows(20, chosen_paraphrase="four")):
        (unit,) = stage.read(Row(number, f"line {number}", columns), "f")
        sizes[is_held_out(unit.key, 0.5)].add(len(unit.sequences))
    assert sizes == {True: {4}, False: {2}}
    assert stage.section.max_unit_size == 4
    plain = RewardModelStage(RewardModelStageConfig(), context(tokenizer, held_out=0.5))
    (unit,) = plain.read(Row(0, "line 1", pair_rows(1, chosen_paraphrase="four")[0]), "f")
    assert len(unit.sequences) == 2


def test_a_paraphrase_takes_the_place_of_what_it_says_again() -> None:
    columns = {"prompt": "p", "chosen": "a", "rejected": "b", "rejected_paraphrase": "c"}
    pair = parse_pair(columns, "line 1")
    assert parse_paraphrases(columns, pair, "line 1") == ("a", "c")
    assert parse_paraphrases({}, pair, "line 1") is None
    with pytest.raises(DataError, match=r"line 1, column 'chosen_paraphrase': found int 3"):
        parse_paraphrases({"chosen_paraphrase": 3}, pair, "line 1")
    with pytest.raises(
        ValidationError, match="paraphrases = true with loss.type = 'plackett_luce'"
    ):
        RewardModelStageConfig.model_validate(
            {"loss": {"type": "plackett_luce"}, "paraphrases": True}
        )


def test_paraphrases_change_the_report_and_no_number_of_the_loss(start_stage: Any) -> None:
    from dataclasses import replace

    pairs = random_pairs(8, values=True)
    others = random_pairs(8, seed=5, values=True)
    said_again = [
        replace(u, sequences=(*u.sequences, *o.sequences)) if n % 2 else u
        for n, (u, o) in enumerate(zip(pairs, others, strict=True))
    ]
    rank = start_stage(
        {"type": "reward_model", "paraphrases": True}, learner={"learning_rate": 1e-2}
    )
    for _ in range(2):
        rank.train(pairs)
    plain, more = rank.evaluate(pairs), rank.evaluate(said_again)
    assert more == pytest.approx(plain, rel=1e-5)
    report = rank.report(said_again)
    assert report["paraphrases"]["num_pairs"] == 4
    assert report["accuracy"] == plain["ranking/accuracy"]
