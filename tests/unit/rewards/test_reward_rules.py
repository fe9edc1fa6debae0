"""The rewards that are rules: exact match and the final number."""

import json
import os
import random
from fractions import Fraction
from pathlib import Path

import pytest

from rlhf_cluster.records import FinishReason
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.rewards.rules.exact_match import (
    ExactMatch,
    ExactMatchConfig,
)
from rlhf_cluster.rewards.rules.numeric import (
    Numeric,
    NumericConfig,
    final_number,
)
from rlhf_cluster.rewards.rules.quantities import MAX_NUMBER_CHARACTERS
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)

CONTEXT = RewardContext()
LONG = 100_000


def scores(reward, target, *completions, finish_reason=FinishReason.STOP):
    prompt = make_prompt(columns={"answer": target})
    rollouts = make_rollouts(prompt, [[5, 1]] * len(completions), finish_reason)
    return reward.score(prompt, rollouts, completions)


def exact(**keys):
    return ExactMatch(ExactMatchConfig(**keys), CONTEXT)


def numeric(**keys):
    return Numeric(NumericConfig(**keys), CONTEXT)


def test_exact_match_ignores_only_surrounding_white_space():
    found = scores(exact(), "013579", "013579", " 013579\n", "013578", "0135790", "01 3579", "")
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_rollout_cut_at_the_length_limit_matches_only_when_the_setting_allows_it():
    cut = FinishReason.LENGTH
    assert scores(exact(), "42", "42", finish_reason=cut) == [0.0]
    assert scores(exact(require_stop=False), "42", "42", finish_reason=cut) == [1.0]


@pytest.mark.parametrize("target", [None, True, 1.5, ["42"]])
def test_an_unusable_target_of_exact_match_is_an_error(target):
    with pytest.raises(RewardFailure, match="column 'answer'") as failure:
        scores(exact(), target, "42")
    assert failure.value.reason == "column"


@pytest.mark.parametrize("reward", [exact(target_column="gold"), numeric(target_column="gold")])
def test_s23_a_missing_column_is_an_error_and_never_a_zero(reward):
    with pytest.raises(RewardFailure, match=r"no column 'gold'; its columns: answer"):
        scores(reward, "42", "42")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 72", 72),
        ("first 5, then 72.", 72),
        ("72 is less than 73\n#### 72", 72),
        ("#### 1\n#### 72 because 5 < 6", 72),
        ("#### no idea, 5 maybe", None),
        ("it costs 5 ####", 5),
        ("####", None),
        (r"\boxed{72} of 100", 72),
        (r"\boxed{7} or rather \boxed{x = 72} \text{km}", 72),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
        (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
        (r"\boxed{\text{about } 72 \text{ {km}}} 5", 72),
        (r"unfinished \boxed{72", 72),
        ("1,234,567", 1234567),
        ("1{,}234 and more: 10\\,000", 10000),
        ("numbers 1,2", None),
        ("$1,250.50", Fraction("1250.50")),
        (r"\$18", 18),
        ("-$5", -5),
        ("$-5", -5),
        ("a drop of -3", -3),
        ("\u22123", -3),
        ("+3", 3),
        ("10-3", None),
        ("(10)-3", None),
        ("5 - 3", None),
        ("25%", 25),
        ("3/4", Fraction(3, 4)),
        ("1.5 / 3", None),
        ("2 1/2 cups", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("1/0", None),
        (".5", Fraction(1, 2)),
        ("...72", 72),
        ("Rs.72", 72),
        ("1.5e3", 1500),
        ("2e-2", Fraction(1, 50)),
        ("72km", 72),
        ("72 km/h", 72),
        ("**72**", 72),
        ("60 g of CO2", 60),
        ("\u7b54\u6848\u662f72", 72),
        ("007", 7),
        ("no number at all", None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_exactly_and_not_as_floats():
    big = 2**53
    assert scores(numeric(), str(big + 1), str(big), str(big + 1)) == [0.0, 1.0]
    assert scores(numeric(), "0.3", "0.30", "3/10", "0.30000000000000004") == [1.0, 1.0, 0.0]


def test_tolerance_is_the_largest_difference_that_counts_as_equal():
    assert scores(numeric(tolerance=0.3), "1.0", "1.3", "0.7", "1.31") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("target", "text"), [(72, "72"), (0.1, "1/10"), (1e-05, "0.00001")])
def test_a_target_may_be_a_number(target, text):
    assert scores(numeric(), target, text, "5") == [1.0, 0.0]


@pytest.mark.parametrize(
    "target",
    [None, True, "none", "", "3:30", "2 + 2", "in 5 hours 72", float("nan"), float("inf"), [1]],
)
def test_s23_b5_a_target_without_one_number_is_an_error_and_never_a_zero(target):
    with pytest.raises(RewardFailure, match="no number, or more than one, in"):
        scores(numeric(), target, "72")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "1" * LONG,
        "1,111" * (LONG // 5),
        "1,11" * (LONG // 4) + "x",
        "1/" * (LONG // 2),
        "1 1/" * (LONG // 4),
        "1 " * (LONG // 2),
        "-" * LONG,
        "." * LONG,
        "1." * (LONG // 2),
        "1e" * (LONG // 2),
        r"\boxed{" * (LONG // 7),
        r"\boxed{" + "{" * LONG,
        r"\frac{1}{" * (LONG // 9),
        r"\frac{" + "1" * LONG,
        "#" * LONG,
        "####" + " 1" * (LONG // 2),
    ],
    ids=lambda text: text[:12],
)
def test_a_hostile_completion_is_read_in_linear_time(text):
    assert scores(numeric(), "72", text) == [0.0]


def test_a_run_of_digits_too_long_to_be_a_number_is_none():
    assert final_number("9" * MAX_NUMBER_CHARACTERS) == int("9" * MAX_NUMBER_CHARACTERS)
    assert final_number("9" * (MAX_NUMBER_CHARACTERS + 1)) is None


@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA is not set")
@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_answer_scores_one_and_every_shifted_one_scores_zero(name, count):
    path = Path(os.environ["RLHF_REAL_DATA"]) / "gsm8k" / f"{name}.jsonl"
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(answers) == count
    reward, rng = numeric(), random.Random(0)
    rollouts = make_rollouts(make_prompt(), [[5, 1]] * 3)
    for answer in answers:
        gold = int(answer.rpartition("#### ")[2].replace(",", ""))
        shift = rng.choice([-1000, -1, 1, 2, 10])
        shifted = answer.rpartition("####")[0] + f"#### {gold + shift:,}"
        plain = f"The answer is ${gold:,}.00."
        prompt = make_prompt(columns={"answer": answer})
        assert reward.score(prompt, rollouts, [answer, plain, shifted]) == [1.0, 1.0, 0.0], answer
