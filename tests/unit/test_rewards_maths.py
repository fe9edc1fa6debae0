"""The maths reward: which part of a text is its answer, and who is to blame for a hang."""

import pytest

from rlhf_cluster.rewards.base import RewardContext
from rlhf_cluster.rewards.failure import RewardFailure
from rlhf_cluster.rewards.maths import Maths, MathsConfig, final_answer
from tests.rewarding import make_prompt, make_rollouts


def scores(reward, target, *completions):
    prompt = make_prompt(columns={"answer": target})
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 #### 72\nbecause", "72"),
        ("#### 1\n####   2", "2"),
        ("####", ""),
        (r"\boxed{1} then \boxed{\frac{1}{2}} or 3", r"\frac{1}{2}"),
        (r"\boxed{72", "72"),
        ("the answer is 72", None),
    ],
)
def test_the_marked_answer_of_a_text(text, answer):
    assert final_answer(text) == answer


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
