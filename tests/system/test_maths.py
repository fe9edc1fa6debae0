"""The maths reward with its library, in its real child process; no vLLM and no Ray."""

import json
import os
from pathlib import Path

import pytest

from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.rewards.rules.math_answer import (
    Maths,
    MathsConfig,
)
from tests.support.builders.answer_table import CASES
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)


@pytest.fixture(scope="module")
def maths():
    reward = Maths(MathsConfig(compare_s=60), RewardContext())
    yield reward
    reward.close()


def scores(reward, target, *completions):
    prompt = make_prompt(columns={"answer": target})
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        ("72", "#### 72", "#### 73"),
        (72, "The answer is $72.00.", "The answer is $-72$."),
        ("it is 5 #### 1,234", r"\boxed{1234}", r"\boxed{1.234}"),
        (r"\$18", "#### about 18 dollars", "#### about 81 dollars"),
        ("1/2", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{4}}"),
        ("1 1/2", r"\boxed{1.5}", r"\boxed{1}"),
        ("1.5e3", "1500", "1503"),
        (0.25, "so $x = 1/4$", "so $x = 4$"),
        (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", r"\boxed{\sqrt{2}}"),
        ("2x + 1", r"\boxed{1 + x \cdot 2}", r"\boxed{2x - 1}"),
        (r"(-\infty, 2]", r"\boxed{(-\infty,2]}", r"\boxed{(-\infty,2)}"),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", r"\boxed{\{2, 3\}}"),
        ("(1, 2, 3)", r"\boxed{(1,2,3)}", r"\boxed{(3,2,1)}"),
        (r"10\text{ km}", r"\boxed{10}", r"\boxed{100}"),
        (r"\text{even}", r"\boxed{\text{even}}", r"\boxed{\text{odd}}"),
    ],
)
def test_answers_are_compared_as_mathematics(maths, expected, right, wrong):
    assert scores(maths, expected, right, wrong, "no idea", "") == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("case", [c for c in CASES if c[3] is not None], ids=lambda c: c[1][:40])
def test_b6_every_answer_of_the_table_has_its_verdict(maths, case):
    expected, completion, _, verdict, _ = case
    assert scores(maths, expected, completion) == [verdict]


def test_b6_without_simplified_the_library_works_out_what_an_answer_says():
    reward = Maths(MathsConfig(compare_s=60, simplified=False), RewardContext())
    try:
        undone = [r"\boxed{40+32}", r"\boxed{\gcd(144,216)}", r"\boxed{144/2}", r"\boxed{71 = 72}"]
        assert scores(reward, "72", *undone) == [1.0, 1.0, 1.0, 0.0]
        assert scores(reward, "x^2+2x+1", r"\boxed{(x+1)^2}") == [1.0]
    finally:
        reward.close()


@pytest.mark.parametrize("target", [None, True, "", "no answer here", ["72"], "####"])
def test_s23_a_target_that_cannot_be_read_is_an_error_and_never_a_zero(maths, target):
    with pytest.raises(RewardFailure, match="no answer (can be read|is marked)") as failure:
        scores(maths, target, "72")
    assert failure.value.reason == "column"


@pytest.mark.timeout(120)
def test_a_tower_of_powers_ends_at_its_deadline_and_the_next_answer_is_compared():
    reward = Maths(MathsConfig(compare_s=6.0), RewardContext())
    try:
        tower = r"\boxed{9^{9^{9^{9}}} - 9^{9^{9^{8}}}}"
        right = r"\boxed{\sqrt{2}}"
        assert scores(reward, r"\sqrt{2}", tower, right) == [0.0, 1.0]
        assert reward.outcomes() == {"undecided": 1.0, "right": 1.0}
    finally:
        reward.close()


@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA is not set")
def test_every_gsm8k_answer_scores_one_and_every_wrong_variant_scores_zero(maths):
    path = Path(os.environ["RLHF_REAL_DATA"]) / "gsm8k" / "test.jsonl"
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(answers) == 1319
    for answer in answers:
        gold = int(answer.rpartition("#### ")[2].replace(",", ""))
        right = [answer, rf"So it is \boxed{{{gold}}}.", f"The answer is ${gold:,}.00."]
        wrong = [
            f"{answer}\n#### {gold + 1}",
            rf"\boxed{{{10 * gold + 1}}}",
            f"The answer is {gold - 2:,}.",
            f"#### {-gold - 1}",
            rf"\boxed{{{gold}.5}}",
        ]
        found = scores(maths, answer, *right, *wrong)
        assert found == [1.0] * len(right) + [0.0] * len(wrong), answer
