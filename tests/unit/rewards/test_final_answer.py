"""Where a text states its answer."""

import pytest

from rlhf_cluster.rewards.rules.final_answer import (
    final_statement,
    target_statement,
)
from rlhf_cluster.rewards.rules.numeric import final_number
from rlhf_cluster.rewards.rules.reasoning import USUAL_TAGS, open_reasoning, without_reasoning


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("#### Step 1\n48\n#### Step 2\nso \\boxed{72}", ("72", "box")),
        ("so \\boxed{72}\n#### 48", ("72", "box")),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}} or 3", ("\\frac{1}{2}", "box")),
        ("\\boxed{1}, \\boxed{2}", ("1, 2", "box")),
        ("$\\boxed{1}$ and $\\boxed{2}$", ("1, 2", "box")),
        ("\\boxed{1} or \\boxed{2}", ("1, 2", "box")),
        ("\\boxed{2}\n\\[\\boxed{2}\\]", ("2", "box")),
        ("\\boxed{2} of \\boxed{}", ("2", "box")),
        ("\\boxed{\\boxed{2}}", ("2", "box")),
        ("\\boxed {2}", ("2", "box")),
        ("\\boxed{\\text{a}\\}b}", ("\\text{a}\\}b", "box")),
        ("\\boxed{72\nand so on", ("72", "box")),
        ("<answer>a\n#### 72</answer>", ("72", "hash")),
        ("<answer> 72 </answer>", ("72", "tag")),
        ("<answer>It is \\boxed{72}</answer>", ("72", "box")),
        ("so\n#### 72\n\n", ("72", "hash")),
        ("so #### 72", ("72", "hash")),
        ("#### 72\nso", ("#### 72\nso", "prose")),
        ("#### 72\nso\n####", ("#### 72\nso\n####", "prose")),
        ("the answer is 72\nCheck: 5", ("72", "said")),
        ("Answer: 71\nno, the answer is 72.", ("72.", "said")),
        ("**Final Answer**\n\n72 eggs\n", ("72 eggs", "said")),
        ("The final answer is:\n\\[\n72\n\\]\nDone 5.", ("72", "said")),
        ("The answer is 72. The answer is right.", ("72. The answer is right.", "said")),
        ("What is the answer? 72", ("What is the answer? 72", "prose")),
        ("The answer is not 71", ("not 71", "said")),
        ("The answer cannot be 71", ("cannot 71", "said")),
        ("It is 72", ("It is 72", "prose")),
    ],
)
def test_b1_the_statement_of_a_completion(text, statement):
    assert final_statement(text) == statement


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("b<think>a", "b"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<thinking>a</thinking>b", "b"),
        ("I think so", "I think so"),
        ("<think>", ""),
        ("</think>", ""),
    ],
)
def test_b1_reasoning_is_left_out(text, rest):
    assert without_reasoning(text) == rest


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("so 5\n#### 72\nmore", ("72", "hash")),
        ("#### 1\n####   2", ("2", "hash")),
        ("####", ("", "hash")),
        ("\\boxed{5}\n#### 72", ("72", "hash")),
        ("so \\boxed{72}.", ("72", "box")),
        ("the answer is 72", None),
    ],
)
def test_b1_a_target_keeps_the_rules_of_the_data_sets(text, statement):
    assert target_statement(text) == statement


@pytest.mark.parametrize(
    "text",
    [
        "#### 1. Solve\nso \\boxed{72}",
        "so \\boxed{72}\n#### Check 5",
        "so\n#### 72",
        "<think>\\boxed{5}</think>\\boxed{72}",
        "\\boxed{5}</think>#### Step 1\n\\boxed{72}\n#### 2. Check",
    ],
)
def test_b1_a_heading_never_hides_a_box(text):
    assert final_number(text) == 72


@pytest.mark.parametrize(("opening", "closing"), USUAL_TAGS)
def test_l05_reasoning_of_every_usual_tag_is_left_out(opening, closing):
    assert without_reasoning(f"a{opening}b{closing}c") == "ac"
    assert without_reasoning(f"b{closing}c") == "c"
    assert without_reasoning(f"a{opening}b") == "a"


def test_l05_a_section_may_name_further_tags():
    tags = (("[[", "]]"),)
    assert without_reasoning("a[[5]]b<think>c</think>", tags) == "ab"
    assert without_reasoning("a[[5]]b") == "a[[5]]b"


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("user: 1+1?\nassistant: <think>\n", "\n"),
        ("assistant: <think>\n\n</think>\n\n", None),
        ("Think between <think> and </think>. 1+1?", None),
        ("assistant: <think>\nOkay,", "\nOkay,"),
        ("1+1?", None),
    ],
)
def test_l05_a_prompt_tells_whether_it_leaves_reasoning_open(prompt, begun):
    assert open_reasoning(prompt) == begun
    assert open_reasoning(prompt.replace("think>", "muse>")) is None
    tags = (("<muse>", "</muse>"),)
    assert open_reasoning(prompt.replace("think>", "muse>"), tags) == begun


def test_l05_a_completion_that_begins_within_reasoning_and_never_leaves_it_has_no_answer():
    assert without_reasoning("\\boxed{5}", is_open=True) == ""
    assert without_reasoning("\\boxed{5}<think>", is_open=True) == ""
    assert without_reasoning("5</think>6", is_open=True) == "6"
    assert without_reasoning("5</think>6<think>7</think>8", is_open=True) == "68"
