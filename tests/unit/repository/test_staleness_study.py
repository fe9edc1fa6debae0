"""The staleness study: what is drawn, what is selected, what counts, and the interval."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness, learning_curves
from benchmarks import staleness_study as study
from benchmarks.in_process import PlainSampler, train
from benchmarks.listing import code_of
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.records import Sampling, Ticket
from tests.support.builders.tiny_learner import build_llama, make_prompt, save_llama


def row(*rewards: float, kl: float = 0.1) -> study.Row:
    return {
        "looks": [{"reward": r, "kl": kl, "effective_sample_size": 1 - kl} for r in rewards],
        "code": "x",
    }


def complete(best: dict[int, tuple[int, int]]) -> dict[str, study.Row]:
    """A search where the `best` two of each staleness lead, and their rewards on the fresh seeds:
    the first of two is better on all seeds but the last."""
    rows = {}
    for job in study.search_jobs():
        staleness, index, _ = job
        first, second = best[staleness]
        rows[study.key_of(job)] = row(0.9 if index == first else 0.8 if index == second else 0.1)
    for staleness, (first, second) in best.items():
        for seed in study.CONFIRM_SEEDS:
            last = seed == study.CONFIRM_SEEDS[-1]
            rows[study.key_of((staleness, first, seed))] = row(0.2 if last else 0.7)
            rows[study.key_of((staleness, second, seed))] = row(0.9 if last else 0.6)
    return rows


def test_settings_are_the_same_for_both_and_legal_and_cover_the_space() -> None:
    drawn = study.draw()
    assert drawn == study.draw() != study.draw(seed=study.DRAW_SEED + 1)
    for staleness, index, seed in study.search_jobs():
        case = study.case_of(staleness, index)
        assert {"algorithm": case.algorithm, "learner": case.learner} == drawn[index]
        validate(RunConfig, learning_curves.tree_of(case, seed, 3), source="test")
    algorithms = [s["algorithm"] for s in drawn]
    rates = sorted(math.log10(s["learner"]["learning_rate"]) + 4 for s in drawn)
    assert [int(12 * rate) for rate in rates] == list(range(12))
    assert [s["learner"]["minibatches"] for s in drawn].count(8) == 3
    assert [a["proximal"] for a in algorithms].count("bypass") == 8
    assert {a["correction"]["type"] for a in algorithms} == set(study.CORRECTIONS)
    duals = [a["dual_clip"] for a in algorithms if "dual_clip" in a]
    assert len(duals) == 6
    assert all(1.5 <= d <= 3 for d in duals)


def test_the_seed_of_the_search_is_no_seed_of_the_confirmation_and_there_are_44_runs() -> None:
    rows = complete({0: (3, 5), 8: (7, 1)})
    search, confirm = study.search_jobs(), study.confirm_jobs(rows)
    assert len({*search, *confirm}) == len(search) + len(confirm) == 44
    assert {seed for *_, seed in search}.isdisjoint(seed for *_, seed in confirm)
    assert {job[:2] for job in confirm} == {(0, 3), (0, 5), (8, 7), (8, 1)}


def test_a_missing_run_is_named_and_nothing_is_selected_without_it() -> None:
    rows = complete({0: (3, 5), 8: (7, 1)})
    del rows["8/4/10"]
    with pytest.raises(SystemExit, match="1 of 24 runs are missing: 8/4/10"):
        study.confirm_jobs(rows)
    rows = complete({0: (3, 5), 8: (7, 1)})
    del rows["0/5/12"]
    with pytest.raises(SystemExit, match="1 of 20 runs are missing: 0/5/12"):
        study.figures(rows)


def test_a_run_counts_by_the_mean_of_its_last_three_looks() -> None:
    assert study.reward(row(0.0, 0.1, 0.2, 0.6)) == pytest.approx(0.3)


def test_no_seed_chooses_the_setting_that_it_counts_with() -> None:
    rows = complete({0: (3, 5), 8: (7, 1)})
    # on the last seed the first setting is worse; there the four others have chosen it
    assert [study.reward(r) for r in study.counted(rows, 0)][-1] == 0.2
    assert rows["0/3/15"] in study.counted(rows, 0)


def test_the_figures_are_of_fresh_seeds_alone() -> None:
    rows = complete({0: (3, 5), 8: (7, 1)})
    before = study.figures(rows)
    assert before["difference"] == pytest.approx(before["sync"] - before["stale_8"])
    assert before["difference_low"] < before["difference"] < before["difference_high"]
    assert before["stale_8/kl"] == pytest.approx(0.1)
    rows["0/3/10"] = row(1.0, kl=0.9)
    after = study.figures(rows)
    assert {k: v for k, v in after.items() if "/search/" not in k} == {
        k: v for k, v in before.items() if "/search/" not in k
    }
    assert study.tables(rows).count("5 fresh") == 4


def test_the_published_result_is_replaced_as_a_whole_and_by_runs_of_one_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    published = tmp_path / "staleness_study.json"
    harness.write_result(study.NAME, {"best_at_4": 0.9}, {"old": {}})
    before = published.read_text()
    rows = complete({0: (3, 5), 8: (7, 1)})
    harness.write_result(study.ROWS, {}, {**rows, "0/3/11": {**rows["0/3/11"], "code": "y"}})
    with pytest.raises(SystemExit, match="44 runs are of 2 versions of the code"):
        study.write_figures()
    assert published.read_text() == before
    harness.write_result(study.ROWS, {}, rows)
    study.write_figures()
    found = json.loads(published.read_text())
    assert (found["runs"], found["code"]["hash"]) == (rows, "x")
    assert "best_at_4" not in found["figures"]


def test_runs_of_other_code_or_another_setting_are_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    settings = learning_curves.changes(study.case_of(8, 2), learning_curves.default_steps())
    good = {**row(0.5), "code": code_of(study.NAME)["hash"], "settings": settings}
    changed = {**settings, "staleness": 0}
    rows = {
        "8/2/10": good,
        "8/2/11": {**good, "code": "x"},
        "8/2/12": {**good, "settings": changed},
    }
    harness.write_result(study.ROWS, {}, rows)
    assert set(study.finished()) == {"8/2/10"}


def test_the_interval_is_welchs() -> None:
    # variances 2.5 / 5 and 10 / 5: 5.88 degrees of freedom, rounded down to 5
    found = study.interval([1, 2, 3, 4, 5], [0, 2, 4, 6, 8])
    assert found == pytest.approx((-1 - 2.571 * math.sqrt(2.5), -1 + 2.571 * math.sqrt(2.5)))
    assert study.interval([1, 1], [0, 0]) == (1, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = study.interval(
            list(random.normal(0.9, 0.03, 5)), list(random.normal(0.8, 0.1, 5))
        )
        held += low <= 0.1 <= high
    assert 0.94 <= held / 2000 <= 0.98


def test_the_distance_to_the_sampler_is_0_for_itself_and_the_kl_otherwise(tmp_path: Path) -> None:
    sampler = PlainSampler(save_llama(tmp_path / "model"), seed=3)
    prompts = [make_prompt(0, [2, 9, 4]), make_prompt(1, [5, 7, 30])]
    tickets = [Ticket(number=n, version=0) for n in range(2)]
    sampling = Sampling(num_samples=200, temperature=0.7, max_tokens=5)
    groups = sampler.sample(tickets, prompts, sampling)
    same = sampler.distance(groups)
    assert same == pytest.approx({"kl": 0, "effective_sample_size": 1}, abs=1e-6)
    weights = build_llama().state_dict()
    sampler.load({name: 1.1 * value for name, value in weights.items()}, 1)
    near = sampler.distance(groups)
    sampler.load({name: 1.3 * value for name, value in weights.items()}, 1)
    far = sampler.distance(groups)
    assert 0 < near["kl"] < far["kl"]
    assert 1 > near["effective_sample_size"] > far["effective_sample_size"]


def test_looks_are_taken_through_a_run(tmp_path: Path) -> None:
    case = study.case_of(8, 0)
    tree = learning_curves.tree_of(case, seed=1, steps=4)
    tree["run"] |= {"root": str(tmp_path), "groups_per_step": 2}
    tree["model"] = {"init": {"hidden_size": 32, "num_heads": 1, "intermediate_size": 32}}
    tree["sft"] = {"steps": 2, "batch_size": 4}
    tree["evaluation"] = {"num_prompts": 3}
    found = train(validate(RunConfig, tree, source="test"), tmp_path / "scratch", 8, look_every=2)
    assert [look["step"] for look in found["looks"]] == [2, 4]
    assert found["looks"][-1]["reward"] == found["reward_after"]
    assert all(look["kl"] > 0 for look in found["looks"])
