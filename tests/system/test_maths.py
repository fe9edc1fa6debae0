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


@pytest.mark.parametrize(
    ("target", "restated", "written"),
    [
        (r"3\sqrt{2}", r"\sqrt2+\sqrt8", r"3\cdot\sqrt2"),
        (r"\ln 2", r"\ln4-\ln2", r"\ln(2)"),
        ("4x^2", "(2x)^2", r"4\cdot x^{2}"),
        ("2^{100}", r"2^{50}\cdot2^{50}", "2^{ 100 }"),
        ("x^2+5", r"x\cdot x+5", "5+x^2"),
        (r"5 \pm \sqrt{3}", r"\frac{10 \pm 2\sqrt{3}}{2}", r"5+\sqrt3, 5-\sqrt3"),
        ("13+15t", "28", "15t+13"),
        (r"10\sqrt{2} \text{ cm}", r"\sqrt2+9\sqrt2", r"10\sqrt{2}"),
        (r"\frac{1}{\sqrt{2}}", r"\sqrt2-\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
        (
            r"\begin{pmatrix} 4 \\ 6 \end{pmatrix}",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix} + \begin{pmatrix} 3 \\ 4 \end{pmatrix}",
            r"\begin{bmatrix} 4 \\ 6 \end{bmatrix}",
        ),
    ],
)
def test_l08_a_restated_formula_is_wrong_and_another_way_of_writing_is_right(
    maths, target, restated, written
):
    assert scores(maths, target, rf"\boxed{{{restated}}}", rf"\boxed{{{written}}}") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("target", "part"), [(r"\log_e 36", "36"), (r"\frac{1 \pm \sqrt{x}}{2}", "2")]
)
def test_l08_a_number_in_a_formula_is_not_the_formula(maths, target, part):
    assert scores(maths, target, rf"\boxed{{{part}}}", rf"\boxed{{{target}}}") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        ("(3, 4)", r"\boxed{x = 3, y = 4}", r"\boxed{x = 4, y = 3}"),
        ("(3, 4)", r"\boxed{y = 4, x = 3}", r"\boxed{3, 4, 5}"),
        ("[3, 4)", r"\boxed{3 \le x < 4}", r"\boxed{3 < x < 4}"),
        ("[3, 4)", r"The answer is $x \in [3,4)$.", r"The answer is $x \in [3,5)$."),
        (r"(3, \infty)", r"\boxed{x>3}", r"\boxed{x \ge 3}"),
        (r"(-\infty, 3)\cup(5, \infty)", r"\boxed{x<3 \text{ or } x > 5}", r"\boxed{x < 3}"),
        ("1, 2", r"\boxed{x = 1 \text{ or } x = 2}", r"\boxed{x = 1 \text{ or } x = 3}"),
        ("1, 2", "The answer is $x=1$ or $x=2$.", "The answer is $x=1$."),
        ("x = 1, x = 2", r"\boxed{1, 2}", r"\boxed{2}"),
        (r"2\sqrt{3}", "Answer: 2\u221a3", "Answer: 3\u221a2"),
        (r"\ln 2", r"\boxed{\log_e 2}", r"\boxed{\log_{10} 2}"),
        ("x^2+1", "Answer: x\u00b2+1", "Answer: x\u00b3+1"),
        (r"\text{not defined}", r"\boxed{\text{not defined}}", r"\boxed{\text{defined}}"),
        (r"2\pm\sqrt{3}", r"\boxed{x = 2+\sqrt3 \text{ or } x = 2-\sqrt3}", r"\boxed{2+\sqrt3}"),
        ("x^2+1", r"\[\begin{aligned} f(x) &= x^2+1 \end{aligned}\]", r"\boxed{f(x)}"),
    ],
)
def test_l09_an_answer_counts_in_each_usual_spelling(maths, target, right, wrong):
    assert scores(maths, target, right, wrong) == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "The answer is not $x^2$.",
        "The answer is $x^2$ or $x^3$.",
        "The answer is $x^3$ or $x^2$.",
        "Answer: more than $x^2$",
        "Answer: maybe x^2",
        "I don't know, maybe $x^2$.",
        "I cannot determine $x^2$.",
        "Answer: $x^2$ to $x^3$",
        "Answer: $x^2$ is wrong.",
        r"\boxed{x^2 \text{ is wrong}}",
        r"\boxed{\text{not } x^2}",
        r"\boxed{\text{more than } x^2}",
        r"<answer>either $x^2$ or $x^3$</answer>",
        r"\boxed{x^2} or \boxed{x^3}",
    ],
)
def test_l09_a_formula_that_is_denied_hedged_ranged_or_one_of_several_is_no_answer(maths, text):
    assert scores(maths, "x^2", text) == [0.0]


@pytest.mark.parametrize(
    "form",
    ["{}", "So:\n**{}**", "Final answer: `{}`", "The answer is \\[{}.\\]", "\\boxed{{{}.}}",
     "\\boxed{{\\displaystyle {}}}", "\\begin{{align*}} {} \\end{{align*}}"],
)  # fmt: skip
@pytest.mark.parametrize(("target", "written"), [("x^2+1", "1+x^2"), ("1, 2", "x = 1, x = 2")])
def test_l09_a_formula_counts_in_each_usual_setting(maths, form, target, written):
    assert scores(maths, target, form.format(written)) == [1.0]
