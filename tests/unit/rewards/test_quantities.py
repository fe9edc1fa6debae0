"""What number an answer is: the table of `tests/support/builders/answer_table.py`, and texts that are
made to be slow."""

import subprocess
import sys
from fractions import Fraction

import pytest

from rlhf_cluster.rewards.rules.numeric import final_number
from rlhf_cluster.rewards.rules.quantities import read_target
from tests.support.builders.answer_table import CASES

NUMERIC = [case for case in CASES if case[2] is not None]

HOSTILE = r"""
from rlhf_cluster.rewards.programs.code_tests import find_program
from rlhf_cluster.rewards.rules.multiple_choice import choice
from rlhf_cluster.rewards.rules.numeric import final_number
from rlhf_cluster.rewards.rules.quantities import read_target
pieces = [
    '1', '1,111', '1,11', '1/', '1 1/', '1 ', '-', '.', '1.', '1e', '1 234 ', '1^', '1*10^', '1 or ',
    '(1', '=', '1=', '1+', '1:2', '\\boxed{', '\\boxed{1}', '\\boxed{}', '\\boxed{1}, ', '\\frac{1}{',
    '\\text{', '\\text{{', '0.\\overline{1}', 'x_1', 'x^2', '{', '}', '$1$', '**1** ', '#', '#### ',
    'answer ', 'a', 'ab ', 'not ', '\\u2248', '(', ' (', "a'", '-a', '\\(', 'answer is ',
    'Answer:\n', '<think>', '</think>', '<answer>', '```', ' ', '\n',
    '\\begin{matrix}', '\\hline', 'previous answer ', 'thought it ', '[', '1. ', 'Answer: 1. ',
    '```python\n', '\u7b54\u6848', 'A or ', 'not A but ', 'A) ', 'answer: A', '\u00bd', '\u00b2',
]
reads = (final_number, read_target, lambda t: choice(t, 'BC'), lambda t: find_program(t, True))
for piece in pieces:
    text = piece * (100_000 // len(piece)) + '\n1'
    for read in reads:
        read(text)
    final_number('\\boxed{' + text)
    for length in (50, 300, 1500):
        for start in ('1 ', '1', 'a 1', 'x = 1 '):
            final_number('\\boxed{' + start + (piece * length)[:length] + '!}')
            final_number('Answer: ' + start + (piece * length)[:length] + '!')
"""


def test_b4_the_table_has_enough_of_both_verdicts():
    assert len(CASES) >= 250
    assert min(sum(case[2] == verdict for case in NUMERIC) for verdict in (0, 1)) >= 80


@pytest.mark.parametrize("case", NUMERIC, ids=lambda case: case[1][:40])
def test_b4_every_answer_of_the_table_has_its_verdict(case):
    expected, completion, verdict, _, _ = case
    target = read_target(expected)
    assert target is not None
    assert (final_number(completion) == target.value) == verdict


@pytest.mark.timeout(300)
def test_a_hostile_completion_costs_time_in_proportion_to_its_length():
    """One quadratic step over 100,000 characters would take minutes, an exponential one for ever."""
    subprocess.run([sys.executable, "-c", HOSTILE], check=True, timeout=240)


@pytest.mark.parametrize(
    "text", ["x^2+1", "v^2=u^2+2as", "3ab", r"3\sqrt{2}", "10!", "3<x<4", r"\binom{5}{2}", "-(5)"]
)
def test_l01_a_formula_that_is_more_than_a_number_is_none(text):
    assert read_target(text) is None
    assert final_number(f"The answer is ${text}$.") is None
    assert final_number(f"\\boxed{{{text}}}") is None


@pytest.mark.parametrize(
    "form", ["{}", "Answer: {}", "### Final Answer\n{}", "<answer>{}</answer>", "Answer: **{}**"]
)
@pytest.mark.parametrize(
    "sentence",
    ["The 5 boys have 72 clips.", "The cost of 5 shirts is $72.", "He has 9 * 8 = 72 on day 3."],
)
def test_l06_a_sentence_states_the_same_number_wherever_it_stands(form, sentence):
    assert final_number(form.format(sentence)) == 72


@pytest.mark.parametrize(
    ("equation", "number"),
    [
        ("2^3 = 8", 8),
        ("2^3 = 9", None),
        ("2^{3} = 9", None),
        ("2^{1+2} = 8", 8),
        ("3 * 2^{-1} = 1.5", Fraction(3, 2)),
        ("(2+3)^2 = 25", 25),
        ("20\u00b2 = 400", 400),
        ("5 + = 9", None),
        ("(2 + 3 = 5", None),
        ("9^9^9^9 = 5", None),
        ("1, 2 = 5", None),
        ("5! = 120", 120),
        (r"\sqrt{16} = 4", 4),
        ("10 / 3 = 3.33", Fraction(333, 100)),
    ],
)
def test_l07_a_side_before_that_is_arithmetic_has_to_come_to_the_number(equation, number):
    assert final_number(f"\\boxed{{{equation}}}") == number
    assert final_number(f"The answer is ${equation}$.") == number


@pytest.mark.parametrize(
    "text",
    ["42 cannot be right.", "I doubt it is 42.", "Is it 42?", "The answer is probably 42.",
     "The answer is unknown; a guess is 42.", "The answer is anything but 42.",
     "The answer is unlikely to be 42.", "It's impossible that it is 42."],
)  # fmt: skip
def test_l09_a_number_that_is_doubted_or_asked_for_is_no_answer(text):
    assert final_number(text) is None
    assert final_number(f"{text}\nThe answer is 42.") == 42
