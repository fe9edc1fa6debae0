"""Judges: points, pairs, principles, and every way to get no verdict."""

import json
import re

import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.judge import Judge, JudgeConfig, meetings, shares
from rlhf_cluster.rewards.reward import RewardContext
from tests.support.builders.scored_groups import failure_of, score
from tests.support.servers.scripted_server import never, scored, serving

serve = pytest.fixture(serving)


def says(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def judge(server, waited=None, **keys):
    config = JudgeConfig(url=server.url + "/v1", model="m", parallel=4, **keys)
    return Judge(config, RewardContext())


def test_a_pointwise_judge_rates_each_completion_on_the_scale(serve):
    def answer(question, _):
        text = question["messages"][0]["content"]
        rating = "[[8]]" if "<answer>\ngood\n</answer>" in text else "first [[9]], no: [[ 2.5 ]]"
        return says(rating)

    server = serve(answer)
    reward = judge(server, criteria="Be brief.", reference_column="answer")
    assert score(reward, "bad", "good", "bad") == [0.25, 0.8, 0.25]
    path, _, question = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (question["model"], question["temperature"]) == ("m", 0.0)
    text = question["messages"][0]["content"]
    for part in ("Be brief.", "2 + 2 =", "<reference answer>\n4\n"):
        assert part in text


@pytest.mark.parametrize("text", ["no verdict", "[[11]]", "[[-1]]", "[[nan]]", "[[good]]", ""])
def test_s23_a_judge_without_a_verdict_is_asked_again_and_then_an_error(serve, text):
    server = serve(lambda *_: says(text))
    failure = failure_of(judge(server, verdict_attempts=2), "a")
    assert failure.reason == "reply"
    assert len(server.requests) == 2
    server = serve(lambda q, n: says(text) if n == 0 else says("[[5]]"))
    assert score(judge(server), "a") == [0.5]


@pytest.mark.parametrize("answer", [{}, {"choices": []}, [], {"choices": [{"message": None}]}])
def test_an_answer_in_another_form_is_an_error(serve, answer):
    server = serve(lambda *_: (200, json.dumps(answer).encode()))
    assert failure_of(judge(server), "a").reason == "reply"


def verdict_of(question, better):
    """The verdict of a judge that knows how good each completion is."""
    text = question["messages"][0]["content"]
    first, second = (text.partition(f"<answer {s}>\n")[2].partition("\n")[0] for s in "AB")
    return (
        "[[C]]"
        if better(first) == better(second)
        else "[[A]]"
        if better(first) > better(second)
        else "[[B]]"
    )


def test_a_pairwise_judge_sees_each_pair_both_ways(serve):
    server = serve(lambda q, _: says(verdict_of(q, len)))
    found = score(judge(server, mode="pairwise", opponents=3), "a", "bbb", "cc", "dd")
    assert found == [0.0, 1.0, 0.5, 0.5]
    assert len(server.requests) == 12
    seen = {q["messages"][0]["content"].partition("<answer A>")[2] for _, _, q in server.requests}
    assert len(seen) == 12


def test_a_judge_that_prefers_a_position_prefers_nobody(serve):
    server = serve(lambda *_: says("[[A]]"))
    assert score(judge(server, mode="pairwise"), "a", "bb", "ccc") == [0.5, 0.5, 0.5]


def test_s23_one_judgement_that_cannot_be_had_is_an_error_of_the_group(serve):
    server = serve(lambda q, n: says("[[A]]") if n != 2 else (400, b"no"))
    assert failure_of(judge(server, mode="pairwise"), "a", "bb", "ccc").reason == "remote"


def test_a_pair_needs_two(serve):
    assert failure_of(judge(serve(scored), mode="pairwise"), "a").reason == "length"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("opponents", [1, 2, 3, 9])
def test_each_pair_meets_once_and_everyone_as_often(count, opponents):
    pairs = meetings(count, opponents)
    assert len(pairs) == len({frozenset(pair) for pair in pairs})
    met = [sum(one in pair for pair in pairs) for one in range(count)]
    assert set(met) == {min(2 * opponents, count - 1)}


def test_shares_of_judgements_by_hand():
    orders = [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert shares(orders, [1.0, 0.5, 0.0, 1.0], 3) == [0.75, 0.125, 1.0]


def test_criteria_that_hold_a_verdict_are_refused():
    with pytest.raises(ConfigError, match="marks a verdict"):
        validate(
            JudgeConfig, {"url": "http://x", "model": "m", "criteria": "say [[1]]"}, "run.toml"
        )


@pytest.mark.timeout(60)
def test_a_pair_is_judged_by_one_principle_in_both_positions(serve):
    principles = [f"Principle {n}." for n in range(4)]
    server = serve(lambda *_: says("[[C]]"))
    reward = judge(server, mode="pairwise", opponents=4, principles=principles, criteria="Always.")
    assert score(reward, "one", "two", "three", "four", "five") == [0.5] * 5
    met: dict[frozenset[str], set[str]] = {}
    for _, _, question in server.requests:
        text = question["messages"][0]["content"]
        assert "Always.\n" in text
        [given] = [principle for principle in principles if principle in text]
        met.setdefault(frozenset(re.findall(r"<answer [AB]>\n(\w+)\n", text)), set()).add(given)
    assert len(met) == 10
    assert all(len(given) == 1 for given in met.values())
    assert len(set().union(*met.values())) > 1


@pytest.mark.parametrize(
    ("principles", "words"), [(["say [[1]]"], "a principle holds"), ([" "], "blank text")]
)
def test_principles_that_no_judge_could_use_are_refused(principles, words):
    tree = {"url": "http://x", "model": "m", "principles": principles}
    with pytest.raises(ConfigError, match=words):
        validate(JudgeConfig, tree, "run.toml")


def test_a_group_that_is_not_judged_by_its_deadline_is_an_error(serve):
    server = serve(lambda *_: never)
    failure = failure_of(judge(server, timeout_s=0.2), *"abcdefgh")
    assert failure.reason == "timeout"
