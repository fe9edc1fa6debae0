"""From the rewards' answers to the parts, what is watched, and the reward of each rollout."""

import json
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.drivers.rl_observer import group_metrics
from rlhf_cluster import rewards
from rlhf_cluster.algorithms import build_algorithm
from rlhf_cluster.buffer.group_file import Header, decode, encode
from rlhf_cluster.errors import ScoringError
from rlhf_cluster.observe.metrics import part_means, scoring_totals
from rlhf_cluster.observe.record.samples import read_samples, write_samples
from rlhf_cluster.pipeline import StepTimes
from rlhf_cluster.records import TrainingGroup
from rlhf_cluster.rewards.judge import JudgeConfig
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_group, make_prompt, make_rollouts
from tests.support.fakes.checked_metrics import CheckedMetrics
from tests.support.fakes.scripted_rewards import ENSEMBLE, RESPONSES, Scripted, Telling, named


class Run:
    """Scores groups whose prompt has the columns that are given."""

    def __init__(self, scorer: ScoringWorker) -> None:
        self.scorer = scorer

    def __call__(self, number: int = 7, responses: Any = RESPONSES, **columns: Any):
        prompt = make_prompt("w2 w3", columns, ids=[2, 3])
        return self.scorer.score(make_group(prompt, make_rollouts(prompt, responses), number))[1]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture
def score(model_dir, monkeypatch):
    """Scores one group by rewards that are named as the column they read."""
    monkeypatch.setitem(rewards.REWARDS, "exact_match", Scripted)
    monkeypatch.setitem(rewards.REWARDS, "ensemble", Telling)
    monkeypatch.setattr(Scripted, "asked", [])

    def build(*configured: dict[str, Any], **scoring: Any):
        config = tiny_config(scoring={"rewards": list(configured), **scoring})
        scorer = ScoringWorker(config, str(model_dir), "scoring-0")
        scorer.start()

        return Run(scorer)

    return build


def step_times() -> StepTimes:
    return StepTimes(
        step_s=1.0,
        learner_wait_s=1.0,
        generation_wait_s=1.0,
        train_s=1.0,
        publish_wait_s=1.0,
        generation_busy_s=1.0,
        scoring_busy_s=1.0,
        pool_busy_s={"proxies": 1.0},
    )


GOLD = [1.0, 0.0, 0.5, 2.0]


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "gdpo", "reinforce_pp"])
def test_a_watched_reward_reaches_neither_the_reward_nor_any_advantage(score, algorithm):
    run = score(named("gold"), named("proxy", watch=True, weight=100.0), ENSEMBLE)
    one = run(gold=GOLD, proxy=[9.0, -9.0, 3.0, 0.0])
    other = run(gold=GOLD, proxy=[0.0, 0.0, 70.0, -5.0])
    failed = run(gold=GOLD, proxy="fail")
    assert [s.watched["proxy"] for s in one.scored] == [9.0, -9.0, 3.0, 0.0]
    assert [s.watched["proxy"] for s in other.scored] == [0.0, 0.0, 70.0, -5.0]
    made = build_algorithm(tiny_config(algorithm={"type": algorithm}).algorithm, 8)
    expected = made.advantages([one])[0]
    assert any(own.any() for own in expected)
    for group in (other, failed):
        assert [s.reward for s in group.scored] == [s.reward for s in one.scored]
        assert [s.reward_parts for s in group.scored] == [s.reward_parts for s in one.scored]
        for own, wanted in zip(made.advantages([group])[0], expected, strict=True):
            np.testing.assert_array_equal(own, wanted)


def test_a_watched_reward_that_fails_costs_no_group_and_is_counted(score):
    run = score(named("gold"), named("proxy", watch=True), cache_entries=1)
    scored = run(gold=GOLD, proxy="fail")
    assert all(s.watched == {} for s in scored.scored)
    assert run(gold=GOLD, proxy=[float("nan")] * 4).summary().parts == {"gold": 0.875}
    stats = run.scorer.stats()
    assert (stats["errors/proxy/died"], stats["errors/proxy/nan"]) == (1, 1)
    assert stats["watched_errors/proxy"] == 2
    totals = scoring_totals(stats)
    assert totals == {
        "scoring/watched_errors_total/proxy": 2,
        "scoring/cache_hits_total": 0,
        "scoring/cache_misses_total": 0,
    }
    CheckedMetrics().record(totals)  # raises on a name that is not in the table
    with pytest.raises(ScoringError, match=r"reward 'gold', group g00000007: \[died\]"):
        run(gold="fail", proxy=GOLD)


def test_what_an_ensemble_tells_is_watched_and_named_after_it(score):
    scored = score(ENSEMBLE)().scored
    assert [s.reward_parts for s in scored] == [
        {"ens": 2.0},
        {"ens": 1.0},
        {"ens": 1.0},
        {"ens": 2},
    ]
    assert scored[0].watched == {"ens.0": 2.0, "ens.1": 4.0, "ens.disagreement": 0.5}


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"0": [1.0] * 4, "1": [1.0] * 3, "disagreement": [0.0] * 4}, "length"),
        ({"0": [1.0] * 4, "1": [float("nan")] * 4, "disagreement": [0.0] * 4}, "nan"),
        ({"0": [1.0] * 4, "disagreement": [0.0] * 4}, "reply"),
    ],
)
def test_a_detail_that_cannot_be_used_is_an_error_and_is_not_kept(
    score, monkeypatch, details, reason
):
    run = score(ENSEMBLE, cache_entries=9)
    with monkeypatch.context() as patch:
        patch.setattr(Telling, "score_in_detail", lambda self, *_: ([1.0] * 4, details))
        with pytest.raises(ScoringError, match=rf"reward 'ens', group g00000007: \[{reason}\]"):
            run()
    run()
    assert run.scorer.stats()["cache_hits"] == 0


def test_a_score_is_clipped_before_it_counts_and_kept_as_it_was(score):
    run = score(named("gold", clip=[0.25, 1.5], weight=2.0), named("other"))
    scored = run(gold=GOLD, other=[0.0] * 4).scored
    assert [s.reward_parts["gold"] for s in scored] == [1.0, 0.25, 0.5, 1.5]
    assert [s.watched for s in scored] == [{"gold.unclipped": value} for value in GOLD]
    assert [s.reward for s in scored] == [2.0, 0.5, 1.0, 3.0]


def test_what_each_part_adds_is_kept_and_adds_up_to_the_reward(score):
    run = score(
        named("gold", weight=2.0),
        named("safe", weight=0.0),
        objective={"type": "constrained", "floors": {"safe": 1.0}, "coef": 3.0},
    )
    scored = run(gold=GOLD, safe=[1.0, 2.0, 0.5, 0.0]).scored
    assert [s.reward for s in scored] == [2.0, 0.0, 1.0 - 1.5, 4.0 - 3.0]
    for one in scored:
        assert set(one.watched) == {"gold.counted", "safe.counted"}
        assert sum(one.watched.values()) == one.reward
    assert [s.reward_parts["safe"] for s in scored] == [1.0, 2.0, 0.5, 0.0]


def test_a_greedy_answer_is_scored_by_the_same_objective(score):
    run = score(
        named("safe", weight=0.0),
        named("gold"),
        objective={"type": "lexicographic", "order": ["safe", "gold"], "thresholds": {"safe": 1.0}},
    )
    prompt = make_prompt("w2", {"safe": [0.0, 1.0], "gold": [5.0, 6.0]}, ids=[2])
    sampled, greedy = make_rollouts(prompt, [[5, 1], [6, 1]])
    group = replace(make_group(prompt, [sampled]), greedy=greedy)
    found = run.scorer.score(group)[1]
    assert ([s.reward for s in found.scored], found.greedy_reward) == ([0.0], 6.0)


def test_scores_of_a_reward_that_says_so_are_kept(score):
    run = score(ENSEMBLE, named("gold"), cache_entries=3)
    first, again = run(gold=GOLD), run(gold=GOLD, number=8)
    assert Scripted.asked == [("ensemble", 4), ("gold", 4), ("ensemble", 1), ("gold", 4)]
    assert [s.watched for s in again.scored] == [s.watched for s in first.scored]
    assert [s.reward for s in again.scored] == [s.reward for s in first.scored]
    stats = run.scorer.stats()
    assert (stats["cache_hits"], stats["cache_misses"]) == (3, 5)
    run(gold=GOLD[::-1])
    assert Scripted.asked[-2] == ("ensemble", 4), "another column is another content"


def test_the_rewards_that_say_so():
    """Each of them reads prompt and response alone; `code` and `maths` depend on the clock."""
    kept = {"reward_model", "ensemble", "process_reward_model"}
    for kind in rewards.REWARDS:
        section = next(
            own
            for own in typing.get_args(typing.get_args(rewards.RewardConfig)[0])
            if own.model_fields["type"].default == kind
        )
        if kind != "judge":
            assert section.model_construct().scores_alone == (kind in kept), kind
    base = {"url": "http://judge/v1", "model": "m"}
    assert JudgeConfig(**base).scores_alone
    assert not JudgeConfig(**base, mode="pairwise").scores_alone
    assert not JudgeConfig(**base, temperature=0.5).scores_alone


def test_nothing_is_kept_unless_it_is_asked_for(score):
    run = score(ENSEMBLE)
    run()
    run()
    assert Scripted.asked == [("ensemble", 4)] * 2
    assert "cache_hits" not in run.scorer.stats()


def test_the_version_changes_with_what_decides_scores_and_with_nothing_else(score, monkeypatch):
    def version(*configured, **scoring):
        run = score(*configured, **scoring)
        [found] = {s.scorer_version for s in run(gold=GOLD).scored}
        return found

    base = version(named("gold"), ENSEMBLE)
    assert len(base) == 16
    assert base == version(named("gold", timeout_s=3.0), {**ENSEMBLE, "paths": ["c", "d"]})
    objective = {"type": "constrained", "floors": {"gold": 1.0}}
    others = [
        version(named("gold", weight=0.5), ENSEMBLE),
        version(named("gold", require_stop=False), ENSEMBLE),
        version(named("gold", clip=[0, 1]), ENSEMBLE),
        version(named("gold"), {**ENSEMBLE, "watch": True}),
        version(named("gold"), {**ENSEMBLE, "combine": "min"}),
        version(named("gold"), ENSEMBLE, objective=objective),
    ]
    monkeypatch.setattr(Telling, "version", "other weights")
    others.append(version(named("gold"), ENSEMBLE))
    assert len({base, *others}) == 1 + len(others)


def test_parts_and_what_is_watched_stand_in_store_samples_and_metrics(score, tmp_path):
    group = score(named("gold"), named("proxy", watch=True))(gold=GOLD, proxy=[1.0, 2.0, 3.0, 4.0])
    again, _ = decode(encode(group, Header(newest_version=0, made_by="ab" * 16)))
    for one, other in zip(group.scored, again.scored, strict=True):
        assert (one.reward_parts, one.watched) == (other.reward_parts, other.watched)
        assert one.scorer_version == other.scorer_version != ""
    path = write_samples(tmp_path, 1, [group], 0, str, limit=9)
    assert path is not None
    rows = read_samples(path)
    assert [json.loads(row["watched"]) for row in rows] == [s.watched for s in group.scored]
    assert {row["scorer_version"] for row in rows} == {group.scored[0].scorer_version}
    times = step_times()
    taken = [TrainingGroup(ticket=group.ticket, handle=None, summary=group.summary())]
    values = group_metrics(taken, times)
    assert (values["reward/part/gold"], values["reward/part/proxy"]) == (0.875, 2.5)
    CheckedMetrics().record(values)  # raises on a name that is not in the table


def test_a_replayed_group_counts_in_the_size_of_a_step_and_not_in_its_rewards(score):
    """Each group's rewards are in the metrics of one step."""
    run = score(named("gold"))
    fresh, old = (run(gold=[value] * 4) for value in (1.0, 9.0))
    times = step_times()
    taken = [
        TrainingGroup(ticket=group.ticket, handle=None, summary=group.summary(), uses=uses)
        for uses, group in enumerate((fresh, old))
    ]
    values, alone = group_metrics(taken, times), group_metrics(taken[:1], times)
    sizes = {"step/groups", "step/rollouts", "step/response_tokens", "step/tokens_per_s"}
    assert {name for name in values if values[name] != alone[name]} == sizes
    assert {values[name] / alone[name] for name in sizes} == {2.0}


def test_a_mean_of_parts_is_over_the_rollouts_that_have_them(score):
    run = score(named("gold"), named("proxy", watch=True))
    whole = run(gold=GOLD, proxy=[1.0, 2.0, 3.0, 4.0]).summary()
    without = run(gold=[1.0], proxy="fail", responses=[[5, 1]]).summary()
    small = run(gold=[0.0], proxy=[8.0], responses=[[5, 1]]).summary()
    assert part_means([whole, without, small], "reward/part") == {
        "reward/part/gold": pytest.approx((sum(GOLD) + 1.0 + 0.0) / 6),
        "reward/part/proxy": pytest.approx((10.0 + 8.0) / 5),
    }
    assert part_means([], "reward/part") == {}
