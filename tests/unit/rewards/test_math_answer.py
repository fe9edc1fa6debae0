"""The maths reward: which targets it takes, and who is to blame for a hang."""

import pytest

from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.rewards.rules.math_answer import (
    Maths,
    MathsConfig,
    is_prose,
)
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)


def scores(reward, target, *completions):
    prompt = make_prompt(columns={"answer": target})
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


@pytest.mark.parametrize(
    ("target", "prose"),
    [
        ("It takes 72 hours for 3 people", True),
        ("The answer is 72", True),
        ("about 72", True),
        ("even", True),
        ("It takes 3 people #### 72", False),
        (r"It takes 3 people \boxed{72}", False),
        ("72", False),
        ("72 hours", False),
        ("$72 per day", False),
        (r"\text{even}", False),
        (r"\sin x", False),
        ("sqrt(2)", False),
        ("2x + 1", False),
    ],
)
def test_b5_a_target_in_prose_is_refused_with_the_row_and_the_cure(target, prose):
    assert is_prose(target) == prose
    maths = Maths(MathsConfig(), RewardContext(), SlowChild("busy", is_broken=False))
    if not prose:
        assert scores(maths, target, target) == [1.0]
        return
    with pytest.raises(
        RewardFailure, match=r"prompt row-0, column 'answer'.*after ####"
    ) as failure:
        scores(maths, target, target)
    assert failure.value.reason == "column"


class SlowChild:
    """A pool whose comparisons with one completion fail, as at a deadline."""

    def __init__(self, reason, is_broken):
        self.reason, self.is_broken = reason, is_broken
        self.calls = []

    def check(self):
        pass

    def call(self, arguments, timeout_s):
        self.calls.append(arguments["completion"])
        hostile = arguments["completion"] == "hostile"
        if hostile or (self.is_broken and arguments["completion"] is not None):
            raise RewardFailure("too slow", self.reason)
        return arguments["completion"] in (None, arguments["expected"])


@pytest.mark.parametrize("reason", ["timeout", "died"])
def test_a_comparison_that_hangs_is_blamed_on_the_completion_only_where_the_machine_is_well(reason):
    child = SlowChild(reason, is_broken=False)
    maths = Maths(MathsConfig(), RewardContext(), child)
    assert scores(maths, "72", "72", "hostile", "71") == [1.0, 0.0, 0.0]
    assert child.calls == [None, "72", "hostile", "72", "71"]
    assert maths.outcomes() == {"right": 1.0, "undecided": 1.0, "wrong": 1.0}
    maths = Maths(MathsConfig(), RewardContext(), SlowChild(reason, is_broken=True))
    with pytest.raises(RewardFailure) as failure:
        scores(maths, "72", "hostile")
    assert failure.value.reason == reason
    assert maths.outcomes() == {}


def test_another_failure_of_the_child_is_nobodys_zero():
    maths = Maths(MathsConfig(), RewardContext(), SlowChild("busy", is_broken=False))
    with pytest.raises(RewardFailure) as failure:
        scores(maths, "72", "hostile")
    assert failure.value.reason == "busy"


def test_only_the_end_of_a_long_completion_is_read():
    child = SlowChild("busy", is_broken=False)
    maths = Maths(MathsConfig(max_answer_characters=3), RewardContext(), child)
    assert scores(maths, "72", "x" * 1000 + " 72") == [0.0]
    assert child.calls == [None, " 72"]


def test_l05_reasoning_is_left_out_before_the_text_is_cut():
    child = SlowChild("busy", is_broken=False)
    maths = Maths(MathsConfig(max_answer_characters=20), RewardContext(), child)
    assert scores(maths, "72", "<think>" + "x" * 1000 + "72", "<think>x</think>72") == [0.0, 1.0]
    assert child.calls == [None, "", "72"]
