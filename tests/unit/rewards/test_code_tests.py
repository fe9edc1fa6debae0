"""The code reward around its sandbox: which program, which tests, and what becomes of outcomes."""

import json
import threading

import pytest

from rlhf_cluster.rewards.programs.candidate import plain
from rlhf_cluster.rewards.programs.code_tests import (
    Code,
    CodeConfig,
    called_names,
    find_program,
    read_test,
    same,
)
from rlhf_cluster.rewards.programs.sandbox import (
    Outcome,
    Ran,
)
from rlhf_cluster.rewards.reward import (
    CountsOutcomes,
    RewardContext,
)
from rlhf_cluster.rewards.reward_failure import RewardFailure
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)


class ScriptedSandbox:
    """Answers by the program's text, from a table of outputs or outcomes."""

    def __init__(self, answers):
        self.answers = answers
        self.given = []

    def run(self, program, stdin=b"", call=None):
        self.given.append((program, stdin, call))
        answer = self.answers[program]
        if callable(answer):
            answer = answer(stdin, call)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Outcome):
            return Ran(outcome=answer, output=b"", detail="")
        return Ran(outcome=Outcome.ENDED, output=answer, detail="")


@pytest.fixture
def code():
    made = []

    def make(answers, **keys):
        made.append(Code(CodeConfig(**keys), RewardContext(), ScriptedSandbox(answers)))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def score(reward, tests, *completions):
    prompt = make_prompt(columns={"tests": tests})
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


@pytest.mark.parametrize(
    ("completion", "fenced_only", "program"),
    [
        ("a\n```python\nx = 1\n```\nb\n```\nx = 2\n```\nc", True, "x = 1\n"),
        ("```py\nx = 1\n```", True, "x = 1\n"),
        ("```python\nx = 1", True, "x = 1"),
        ("```\ns = '``` no end'\n```", True, "s = '``` no end'\n"),
        ("x = 1", False, "x = 1"),
        ("x = 1", True, None),
        ("  \n", False, None),
    ],
)
def test_the_program_of_a_completion(completion, fenced_only, program):
    assert find_program(completion, fenced_only) == program


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nx = 1\n```\nIt prints:\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```output\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```\nRun it:\n```bash\npython x.py\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2\n"),
        ("```Python3\nx = 1\n```", "x = 1\n"),
        ('``` {.python title="x"}\nx = 1\n```', "x = 1\n"),
        ("```\nx = 1\n```\n```\nx = 2\n```", "x = 2\n"),
        ("```bash\nls\n```", None),
        ("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\n```</think>Done.", "Done."),
        ("1. So:\n   ```python\n   if x:\n       y = 1\n   ```\n", "if x:\n    y = 1\n"),
    ],
)
def test_b8_the_program_is_the_last_block_of_python(completion, program):
    assert find_program(completion, require_fence=False) == program


@pytest.mark.parametrize(
    ("test", "call", "expected"),
    [
        ("assert f(1) == 2", "f(1)", 2),
        ("assert (2, [3]) == f('a', b={})", "f('a', b={})", (2, [3])),
        ("assert f(1) is None", "f(1)", None),
        ("assert f(1) == -2.5, 'no'", "f(1)", -2.5),
        ("assert f(1)", "f(1)", True),
        ("assert not f(1)", "f(1)", False),
        ({"call": "f(1)", "expected": None}, "f(1)", None),
        ({"call": "f(1)", "expected": 3, "input": None, "output": None}, "f(1)", 3),
    ],
)
def test_a_test_is_read_as_a_call_and_what_it_gives(test, call, expected):
    case = read_test(test)
    assert (case.call, case.expected) == (call, expected)


@pytest.mark.parametrize(
    "test",
    [
        "assert abs(f(1) - 2.5) < 0.1",
        "assert f(1) == g(2)",
        "assert f(1) == x",
        "assert 1 == 1",
        "f(1)",
        "assert f(1) == 1; assert f(2) == 2",
        "assert f(",
        {"call": "f(", "expected": 1},
        {"call": "f(1)"},
        {"input": "1"},
        {"input": 1, "output": "2"},
        5,
        None,
    ],
    ids=repr,
)
def test_a_test_that_would_need_its_answer_inside_or_cannot_be_read_is_an_error(code, test):
    with pytest.raises(RewardFailure, match="column 'tests'") as failure:
        score(code({}), [test], "x")
    assert failure.value.reason == "column"


@pytest.mark.parametrize("tests", [[], "assert f(1) == 2", None, 5])
def test_s23_a_column_without_tests_is_an_error_and_never_a_zero(code, tests):
    with pytest.raises(RewardFailure, match="expected a list"):
        score(code({}), tests, "x")


def test_scripts_are_compared_by_their_output_without_white_space_at_ends(code):
    answers = {"a": b"3 \n4\n\n", "b": b"3\n\n4", "c": b"34", "d": b"3\r\n4\xff"}
    tests = [{"input": "1 2\n", "output": "3\n4"}]
    reward = code(answers)
    assert score(reward, tests, "a", "b", "c", "d") == [1.0, 0.0, 0.0, 0.0]
    assert ("a", b"1 2\n", None) in reward._sandbox.given


def test_only_the_input_of_a_test_goes_into_the_sandbox(code):
    reward = code({"a": b"7"})
    assert score(reward, [{"call": "f(2)", "expected": 7}, "assert f(3) == 7"], "a") == [1.0]
    assert reward._sandbox.given == [("a", b"", "f(2)"), ("a", b"", "f(3)")]


@pytest.mark.parametrize(
    ("value", "expected", "right"),
    [
        (3, 3, True),
        (3.0, 3, True),
        (True, 1, True),
        ("3", 3, False),
        ([1, 2], [1, 2], True),
        ((1, 2), [1, 2], True),
        ({"a": (1,)}, {"a": [1]}, True),
        ({1: 2}, {"1": 2}, True),
        (None, None, True),
        (float("nan"), 1.0, False),
    ],
)
def test_an_expected_value_from_json_knows_no_tuples(code, value, expected, right):
    written = json.dumps(plain(value)).encode()
    tests = [{"call": "f()", "expected": expected}]
    assert score(code({"a": written}), tests, "a") == [float(right)]


@pytest.mark.parametrize(
    ("value", "text", "right"),
    [
        ((1, 2), "(1, 2)", True),
        ([1, 2], "(1, 2)", False),
        ({1, 2}, "{2, 1}", True),
        ({1: {2}}, "{1: {2}}", True),
        (0.1 + 0.2, "0.3", False),
        (frozenset({1}), "{1}", True),
    ],
)
def test_an_assert_compares_as_python_does(code, value, text, right):
    written = json.dumps(plain(value)).encode()
    assert score(code({"a": written}), [f"assert f() == {text}"], "a") == [float(right)]


def test_a_bare_assert_asks_for_truth(code):
    answers = {"list": b'["list", [0]]', "empty": b'["list", []]'}
    assert score(code(answers), ["assert f()"], "list", "empty") == [1.0, 0.0]
    assert score(code(answers), ["assert not f()"], "list", "empty") == [0.0, 1.0]


def test_floats_are_equal_within_the_tolerance_wherever_they_stand():
    assert same([1.0, {"a": (0.1 + 0.2,)}], [1, {"a": (0.3,)}], 1e-9)
    assert not same([1.0], [1.1], 1e-9)
    assert not same([1.0], [1.0, 1.0], 1.0)
    assert not same({"a": 1.0}, {"b": 1.0}, 1.0)
    assert same(10**400, 10**400, 0.0)


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"no json",
        b'["list"]',
        b'["dict", [[["list", []], 1]]]',
        b'["set", [["list", []]]]',
        b'["list", 5]',
        b"[" * 100_000,
        b'["list", [' * 100 + b"]]" * 100,
        b"9" * 10_000,
        b"[1, 2, 3]",
    ],
    ids=lambda text: text[:20].decode(),
)
def test_what_a_program_writes_in_place_of_its_value_is_wrong_and_harms_nobody(code, written):
    reward = code({"a": written})
    assert score(reward, ["assert f() == 1", {"call": "f()", "expected": 1.5}], "a") == [0.0]
    assert reward.outcomes() == {"wrong": 1.0}


@pytest.mark.parametrize("outcome", [one for one in Outcome if one is not Outcome.ENDED])
def test_whatever_a_program_does_scores_zero_and_is_counted_by_its_outcome(code, outcome):
    reward = code({"bad": outcome, "good": b"1"})
    assert score(reward, ["assert f() == 1"], "bad", "good", "bad") == [0.0, 1.0, 0.0]
    assert reward.outcomes() == {str(outcome): 2.0, "passed": 1.0}
    assert isinstance(reward, CountsOutcomes)


def test_s23_a_sandbox_that_fails_is_an_error_of_the_group_and_never_a_zero(code):
    reward = code({"good": b"1", "bad": RewardFailure("lost", "sandbox")})
    with pytest.raises(RewardFailure) as failure:
        score(reward, ["assert f() == 1"], "good", "bad")
    assert failure.value.reason == "sandbox"


def test_a_completion_without_a_program_is_counted_apart(code):
    reward = code({}, require_fence=True)
    assert score(reward, ["assert f() == 1"], "def f(): return 1") == [0.0]
    assert reward.outcomes() == {"no_program": 1.0}


def test_a_partial_score_is_the_share_of_tests_and_a_hang_is_tried_once(code):
    def half(stdin, call):
        return b"1" if call in ("f(1)", "f(3)") else b"2"

    def hangs(stdin, call):
        return Outcome.TIMEOUT if call == "f(2)" else b"1"

    tests = [f"assert f({n}) == 1" for n in (1, 2, 3, 4)]
    reward = code({"half": half, "hangs": hangs}, partial=True)
    assert score(reward, tests, "half", "hangs") == [0.5, 0.25]
    assert len([1 for program, _, _ in reward._sandbox.given if program == "hangs"]) == 2
    assert reward.outcomes() == {"wrong": 1.0, "timeout": 1.0}
    reward = code({"half": half})
    assert score(reward, tests, "half") == [0.0]
    assert len(reward._sandbox.given) == 2


@pytest.mark.timeout(60)
def test_a_group_that_is_not_done_by_its_deadline_is_an_error(code):
    release = threading.Event()

    def waits(stdin, call):
        release.wait(30)
        return b"1"

    reward = code({"a": waits}, timeout_s=0.2, parallel=1)
    try:
        with pytest.raises(RewardFailure) as failure:
            score(reward, ["assert f() == 1"], "a", "a")
        assert failure.value.reason == "timeout"
    finally:
        release.set()


@pytest.mark.timeout(60)
def test_scores_keep_the_order_of_completions_whichever_ends_first(code):
    first_may_end = threading.Event()

    def slow(stdin, call):
        assert first_may_end.wait(30)
        return b"1"

    def fast(stdin, call):
        first_may_end.set()
        return b"2"

    reward = code({"slow": slow, "fast": fast}, parallel=2)
    assert score(reward, ["assert f() == 1"], "slow", "fast") == [1.0, 0.0]


SOLUTION = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    "completion",
    [
        f"```python\n{SOLUTION}```\nExample usage:\n```python\nprint(add(1, 2))\n```",
        f"```\n{SOLUTION}```\nExample usage:\n```python\nprint(add(1, 2))\n```",
        f"```python\ndef add(a): pass\n```\nBetter:\n```python\n{SOLUTION}```\n```py\nadd(1, 2)\n```",
        f"~~~python\n{SOLUTION}~~~",
        f"````python\n{SOLUTION}````",
        f"````\n{SOLUTION}````\nprints\n````text\n```\n3\n```\n````",
    ],
)
def test_l11_the_last_block_that_defines_what_is_called_is_the_program(completion):
    assert find_program(completion, True, ["add"]) == SOLUTION


def test_l11_a_class_or_an_assignment_defines_a_name_and_a_fence_within_a_longer_one_ends_nothing():
    for program in ("class Solution:\n    x = 1\n", "Solution = make()\n"):
        text = f"```python\n{program}```\n```python\nSolution().add(1)\n```"
        assert find_program(text, True, ["Solution"]) == program
    assert find_program("````python\n# a\n```\n# b\n````", True) == "# a\n```\n# b\n"
    assert find_program("```python\nx = 1\n```\n```python\nx = 2\n```", True, ["f"]) == "x = 2\n"


def test_l11_the_names_that_tests_call_are_not_those_that_python_has():
    cases = [read_test("assert sorted(f(1)) == [1]"), read_test("assert Solution().g(2) == 3")]
    assert called_names(cases) == {"f", "Solution"}
    assert called_names([read_test({"input": "1", "output": "2"})]) == frozenset()
