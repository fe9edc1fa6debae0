"""The reward that scores each step by its equations."""

from collections.abc import Sequence

import pytest

from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.rules.equations import (
    MAX_TOKENS,
    Equations,
    EquationsConfig,
    equations,
)
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16 - 3 - 4 = 9", [True]),
        ("16 - 3 - 4 = 8", [False]),
        ("So she sells 9 * $2 = $18 a day.", [True]),
        ("(2 + 3) * 4 = 20, and 2 + 3 * 4 = 14", [True, True]),
        ("2 + 3 = 5 = 10 / 2", [True, True]),
        ("2 + 3 = 5 = 10 / 4", [True, False]),
        ("1,200 / 4 = 300", [True]),
        ("1,200/4=301", [False]),
        ("3 x 4 = 12", [True]),
        ("3 \u00d7 4 \u00f7 2 \u2212 1 = 5", [True]),
        ("5 - 8 = -3", [True]),
        ("- 3 + 4 = 7", [True]),
        ("* 3 + 4 = 7", [True]),
        ("1. 3 + 4 = 7.", [True]),
        ("In 2020 3 + 4 = 7", [True]),
        ("10 / 3 = 3.33", [True]),
        ("10 / 3 = 3.34", [False]),
        ("10 / 3 = 3", [False]),
        ("0.1 + 0.2 = 0.3", [True]),
        ("12 = 3 * 4", [True]),
        ("0.5 = 1 / 2", [True]),
    ],
)
def test_equations_by_hand(text: str, expected: list[bool]) -> None:
    assert equations(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no equation",
        "5 = 5",
        "x = 5",
        "x = 3 + y",
        "2x + 1 * 3 = 9",
        "Total - 3 + 4 = 7",
        "3 apples + 4 apples = 7 apples",
        "50% * 20 = 10",
        "5 / 0 = 0",
        "(3 + 4 = 7",
        "3 + 4 =",
        "= 7",
        "3 ** 4 = 81",
        "9" * 31 + " + 1 = 2",
        "+".join(["1"] * MAX_TOKENS) + f" = {MAX_TOKENS}",
    ],
)
def test_what_is_no_arithmetic_on_both_sides_is_no_equation(text: str) -> None:
    assert equations(text) == []


def test_a_step_is_right_when_all_its_equations_are_and_scores_nothing_without_any() -> None:
    steps: Sequence[Sequence[str]] = (
        ["1 + 1 = 2", "2 + 2 = 4 and 3 + 3 = 7", "done"],
        ["1 + 1 = 3"],
    )
    prompt = make_prompt()
    rollouts = make_rollouts(prompt, [[5, 1]] * 2)
    texts = ["\n".join(own) for own in steps]
    config = EquationsConfig(right=0.5, wrong=-2.0)
    reward = Equations(config, RewardContext())
    assert reward.score_steps(prompt, rollouts, texts, steps) == [[0.5, -2.0, 0.0], [-2.0]]
    assert config.scores_steps
    reward.close()


@pytest.mark.timeout(60)
def test_long_texts_without_sense_are_read_in_no_time() -> None:
    for part in ("1+", "(", "9", " ", "-", "a ", "1,", "$", "1 ", "x"):
        assert equations(part * 10_000 + " = 1 + y") == []
    assert len(equations("1=1+0=" * 300)) == 600 - 1


@pytest.mark.parametrize(
    ("step", "found"),
    [
        ("2^3 = 8", [True]),
        ("so 2 ^ 3 = 9", [False]),
        ("-2^2 = -4", [True]),
        ("2^-1 = 0.5", [True]),
        ("2^3^2 = 512", [True]),
        ("x^2 = 9", []),
        ("9^9^9^9 = 5", []),
        ("2^0.5 = 1", []),
        ("0^-1 = 5", []),
    ],
)
def test_l07_powers_are_arithmetic(step, found):
    assert equations(step) == found
