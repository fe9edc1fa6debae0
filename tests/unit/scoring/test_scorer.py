"""A scoring worker: joining, decoding, errors, and groups beside each other."""

import os
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster import rewards
from rlhf_cluster.errors import ConfigError, ScoringError, WorkerError
from rlhf_cluster.records import FinishReason
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import (
    make_group,
    make_prompt,
    make_rollouts,
)

MODULE = """
import time

def length(prompts, completions, **columns):
    return [float(len(c.split())) for c in completions]

def by_step(prompts, completions, steps, **columns):
    return [[float(len(step.split())) for step in own] for own in steps]

def by_column(prompts, completions, behaviour, **columns):
    if behaviour[0] == "raise":
        raise KeyError("unit")
    if behaviour[0] == "hang":
        while True:
            pass
    if behaviour[0].startswith("/"):
        open(behaviour[0], "rb").read()
    return [1.0] * len(completions)
"""
EXACT = {"type": "exact_match"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "scored_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(function: str, **keys) -> dict:
    return {"type": "python", "function": f"scored_rewards:{function}", **keys}


@pytest.fixture
def make(model_dir):
    """Builds and starts a worker; closes it at the end."""
    made = []

    def build(*configured, **scoring):
        steps = any(reward.get("per_step") for reward in configured)
        config = tiny_config(
            scoring={"rewards": list(configured), **scoring},
            algorithm={"advantage": "process" if steps else "outcome"},
        )
        one = ScoringWorker(config, str(model_dir), "scoring-3")
        made.append(one)
        one.start()
        return one

    yield build
    for one in made:
        one.close()


def group(*responses, number=7, purpose="train", temperature=1.0, **columns):
    prompt = make_prompt("w2 w3", columns, ids=[2, 3])
    made = make_rollouts(prompt, responses or ([5, 6, 1], [5, 1]), temperature=temperature)
    return make_group(prompt, made, number, purpose)


def test_rewards_are_joined_by_weight_and_ids_pass_through_untouched(make):
    scorer = make(
        {"type": "exact_match", "weight": 2.0},
        python("length", name="words", weight=-0.5),
    )
    given = group([5, 6, 1], [5, 1], [5, 0, 6, 1], answer="w5 w6")
    scored = scorer.score(given)[1]
    # Special tokens (<end>, <pad>) are not part of the text that rewards read.
    assert [s.reward_parts for s in scored.scored] == [
        {"exact_match": 1.0, "words": 2.0},
        {"exact_match": 0.0, "words": 1.0},
        {"exact_match": 1.0, "words": 2.0},
    ]
    assert [s.reward for s in scored.scored] == [1.0, -0.5, 1.0]
    assert [s.rollout for s in scored.scored] == list(given.rollouts)
    assert (scored.ticket, scored.prompt) == (given.ticket, given.prompt)
    assert {s.scorer for s in scored.scored} == {"scoring-3"}
    assert all(s.ref_logprobs is None for s in scored.scored)
    stats = scorer.stats()
    assert (stats["num_groups"], stats["num_rollouts"]) == (1, 3)


def test_the_reference_scores_every_response_token(make, model_dir):
    from rlhf_cluster.scoring.frozen_policy import FrozenPolicy

    scorer = make(EXACT, reference=True, dtype="float32")
    given = group(answer="w5")
    expected = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096).logprobs(
        given.rollouts
    )
    for one, logprobs in zip(scorer.score(given)[1].scored, expected, strict=True):
        assert np.array_equal(one.ref_logprobs, logprobs)


@pytest.mark.parametrize("update", [{"type": "periodic", "every": 2}, {"type": "ema"}])
def test_no_group_is_scored_before_the_reference_of_the_run_was_given(
    make, model_dir, tmp_path, update
):
    """The model folder is not the reference where it moves: a worker that joins late has to wait."""
    worker = make(EXACT, reference=True, dtype="float32", reference_update=update)
    with pytest.raises(WorkerError, match="call load_reference first"):
        worker.score(group(answer="w5"))
    other = tiny_llama.build(seed=2, max_position=48)
    version = tiny_llama.publish(tmp_path / "reference", 4, tiny_llama.checkpoint_tensors(other))
    worker.load_reference(version)
    _, scored = worker.score(group(answer="w5"))
    expected = make(EXACT, reference=True, dtype="float32")._reference
    expected.load(version)
    for one, logprobs in zip(
        scored.scored, expected.logprobs(group(answer="w5").rollouts), strict=True
    ):
        assert np.array_equal(one.ref_logprobs, logprobs)


def test_a_run_without_a_reference_has_none_to_replace(make, model_dir, tmp_path):
    version = tiny_llama.publish(
        tmp_path, 0, tiny_llama.checkpoint_tensors(tiny_llama.build(1, max_position=48))
    )
    with pytest.raises(WorkerError, match=r"scoring\.reference = False"):
        make(EXACT).load_reference(version)


def test_a_reference_that_cannot_score_fails_the_group_by_name(make):
    scorer = make(EXACT, reference=True, dtype="float32")
    with pytest.raises(ScoringError, match=r"reference, group g00000007: .*temperature 0"):
        scorer.score(group(temperature=0.0, answer="w5"))
    assert scorer.stats()["errors/reference/sequence"] == 1


def test_s23_a_failed_reward_names_reward_group_and_reason_and_is_counted_by_reason(make):
    scorer = make(EXACT, python("by_column", name="mine", timeout_s=0.3))
    for behaviour, reason in (("raise", "raised"), ("hang", "timeout"), ("hang", "timeout")):
        with pytest.raises(ScoringError) as error:
            scorer.score(group(answer="w5", behaviour=behaviour))
        assert f"reward 'mine', group g00000007: [{reason}]" in str(error.value)
        assert type(pickle.loads(pickle.dumps(error.value))) is ScoringError
    scorer.score(group(answer="w5", behaviour="fine"))
    stats = scorer.stats()
    assert stats["errors/mine/raised"] == 1
    assert stats["errors/mine/timeout"] == 2
    assert stats["num_groups"] == 1


class ScriptedReward:
    """Returns what the prompt's column says."""

    def __init__(self, config, context) -> None:
        pass

    def score(self, prompt, rollouts, completions):
        return prompt.columns["scores"]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([1.0], "length"),
        ([1.0, 2.0, 3.0], "length"),
        ([1.0, None], "none"),
        ([1.0, float("nan")], "nan"),
        ([float("-inf"), 1.0], "infinite"),
        (None, "not_a_list"),
    ],
)
def test_s23_whatever_a_reward_returns_is_checked_where_it_is_used(
    make, monkeypatch, scores, reason
):
    monkeypatch.setitem(rewards.REWARDS, "exact_match", ScriptedReward)
    scorer = make(EXACT)
    with pytest.raises(ScoringError, match=rf"\[{reason}\]"):
        scorer.score(group(scores=scores))
    assert scorer.stats()[f"errors/exact_match/{reason}"] == 1


def test_a_weighted_sum_that_overflows_is_an_error(make, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "exact_match", ScriptedReward)
    scorer = make({"type": "exact_match", "weight": 1e10})
    with pytest.raises(ScoringError, match=r"the sum of rewards, group g00000007: \[infinite\]"):
        scorer.score(group(scores=[1.0, 1e300]))


def test_a_reward_that_cannot_start_fails_setup_and_releases_the_others(make, monkeypatch):
    closed = []
    monkeypatch.setattr(ScriptedReward, "close", lambda self: closed.append(self))
    monkeypatch.setitem(rewards.REWARDS, "exact_match", ScriptedReward)
    with pytest.raises(ConfigError, match="has no attribute 'absent'"):
        make(EXACT, python("absent"))
    assert len(closed) == 1


@pytest.mark.timeout(60)
def test_a_reward_that_waits_for_its_child_holds_up_neither_rewards_nor_reference_of_other_groups(
    make, folder
):
    gate = str(folder / "gate")
    os.mkfifo(gate)
    scorer = make(python("by_column", processes=2), reference=True, dtype="float32")
    finished = []

    def run() -> None:
        finished.append(scorer.score(group(number=1, behaviour=gate))[1].group_id)

    blocked = threading.Thread(target=run)
    blocked.start()
    with open(gate, "wb"):  # waits for: the first group's reward to be running
        finished.append(scorer.score(group(number=2, behaviour="fine"))[1].group_id)
    blocked.join(timeout=30)
    assert finished == ["g00000002", "g00000001"]


class CountingReward:
    def score(self, prompt, rollouts, completions):
        return [0.0] * len(completions)

    def outcomes(self):
        return {"timeout": 2.0}

    def close(self):
        pass


def test_outcomes_that_a_reward_counts_are_among_the_totals(make):
    scorer = make(EXACT)
    assert not any(name.startswith("outcomes/") for name in scorer.stats())
    scorer._rewards._built["code"] = CountingReward()
    assert scorer.stats()["outcomes/code/timeout"] == 2.0


def test_a_scorer_that_is_not_set_up_or_closed_says_so(make, model_dir):
    config = tiny_config(scoring={"rewards": [EXACT]})
    with pytest.raises(WorkerError, match="call start"):
        ScoringWorker(config, str(model_dir), "scoring-0").score(group(answer="w5"))
    scorer = make(EXACT)
    scorer.close()
    with pytest.raises(WorkerError, match="call start"):
        scorer.score(group(answer="w5"))


def test_a_worker_returns_the_summary_first_and_the_record_second(make):
    worker = make(EXACT, reference=True, dtype="float32")
    summary, experience = worker.score(group(answer="w5 w6"))
    assert summary == experience.summary()
    assert summary.rewards == (1.0, 0.0)
    assert worker.health() == {"worker": "scoring-3", "num_in_flight": 0}
    assert worker.stats()["num_groups"] == 1
    assert pickle.loads(pickle.dumps(experience)).group_id == "g00000007"


def test_a_worker_scores_greedy_held_out_groups_without_a_reference(make):
    worker = make(EXACT, reference=True, dtype="float32")
    _, trained = worker.score(group(answer="w5"))
    _, held_out = worker.score(group(purpose="evaluate", temperature=0.0, answer="w5"))
    assert all(s.ref_logprobs is not None for s in trained.scored)
    assert all(s.ref_logprobs is None for s in held_out.scored)


def test_a_failed_group_leaves_the_worker_healthy_and_a_closed_worker_is_not(make):
    worker = make(EXACT)
    with pytest.raises(ScoringError, match="no column 'answer'"):
        worker.score(group())
    assert worker.health()["num_in_flight"] == 0
    worker.close()
    for call in (worker.health, worker.stats, lambda: worker.score(group())):
        with pytest.raises(WorkerError, match="call start"):
            call()


def test_a_response_cut_at_the_limit_is_scored_with_its_finish_reason(make):
    prompt = make_prompt("w2", {"answer": "w5"}, ids=[2])
    cut = make_rollouts(prompt, [[5, 1]], FinishReason.LENGTH)
    _, scored = make(EXACT).score(make_group(prompt, cut))
    assert [s.reward for s in scored.scored] == [0.0]


def test_a_greedy_answer_is_scored_by_the_rewards_and_is_no_rollout_of_the_group(make):
    scorer = make(
        {"type": "exact_match", "weight": 2.0},
        python("length", name="words", weight=-0.5),
        reference=True,
        dtype="float32",
    )
    given = group([5, 6, 1], [5, 1], answer="w5 w6")
    (greedy,) = make_rollouts(given.prompt, [[5, 6, 5, 1]], temperature=0.0)
    scored = scorer.score(replace(given, greedy=greedy))[1]
    alone = scorer.score(given)[1]
    assert scored.greedy_reward == 0 * 2.0 + 3 * -0.5
    assert [s.reward for s in scored.scored] == [s.reward for s in alone.scored] == [1.0, -0.5]
    assert all(s.ref_logprobs is not None for s in scored.scored)
    assert scored.summary() == alone.summary()
    assert alone.greedy_reward is None


def test_rewards_of_steps_are_summed_and_keep_the_tokens_at_which_steps_end(make):
    scorer = make(
        {"type": "exact_match", "weight": 10.0},
        python("by_step", name="lines", per_step=True, weight=0.5),
        step_separator=" w9 ",
    )
    given = group([5, 6, 9, 7, 1], [5, 9, 9, 9, 6, 6, 1], [1], answer="w5 w6 w9 w7")
    (greedy,) = make_rollouts(given.prompt, [[5, 9, 6, 1]], temperature=0.0)
    scored = scorer.score(replace(given, greedy=greedy))[1]
    # "w5 w9 w9 w9 w6 w6": the separator takes the spaces around it, so a lone w9 is a step
    assert [s.step_rewards.tolist() for s in scored.scored] == [[1.0, 0.5], [0.5, 0.5, 1.0], [0.0]]
    assert [s.step_ends.tolist() for s in scored.scored] == [[1, 4], [0, 2, 6], [0]]
    assert [s.reward_parts for s in scored.scored] == [
        {"exact_match": 1.0, "lines": 3.0},
        {"exact_match": 0.0, "lines": 4.0},
        {"exact_match": 0.0, "lines": 0.0},
    ]
    assert [s.reward for s in scored.scored] == [11.5, 2.0, 0.0]
    assert [s.outcome_reward for s in scored.scored] == [10.0, 0.0, 0.0]
    assert [s.rollout for s in scored.scored] == list(given.rollouts)
    assert scored.greedy_reward == 1.0
    _, alone = make(EXACT).score(given)
    assert all(s.step_ends is None and s.step_rewards is None for s in alone.scored)


def test_a_wrong_number_of_step_scores_fails_the_group_and_is_counted(make, monkeypatch):
    monkeypatch.setattr(ScriptedReward, "score_steps", lambda self, *_: [[1.0]] * 2, raising=False)
    monkeypatch.setitem(rewards.REWARDS, "python", ScriptedReward)
    scorer = make(python("by_step", per_step=True), step_separator=" w9 ")
    words = (
        r"reward 'python', group g00000007: \[steps\] .* 1 step scores for rollout 1, .* 2 steps"
    )
    with pytest.raises(ScoringError, match=words):
        scorer.score(group([5, 1], [5, 9, 6, 1]))
    assert scorer.stats()["errors/python/steps"] == 1
