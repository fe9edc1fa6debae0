"""The rewards that are rules on the text: multiple choice, format, JSON schema, length."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.rewards.rules import format as format_rule
from rlhf_cluster.rewards.rules.format import (
    Format,
    FormatConfig,
)
from rlhf_cluster.rewards.rules.json_schema import (
    JsonSchema,
    JsonSchemaConfig,
    find_json,
    score_json,
)
from rlhf_cluster.rewards.rules.length import (
    Length,
    LengthConfig,
)
from rlhf_cluster.rewards.rules.multiple_choice import (
    MultipleChoice,
    MultipleChoiceConfig,
    choice,
)
from rlhf_cluster.rewards.rules.numeric import Numeric, NumericConfig
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)

CONTEXT = RewardContext()
LONG = 100_000


def scores(reward, columns, *completions):
    prompt = make_prompt(columns=columns)
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b).", "B"),
        ("**B**", "B"),
        ("so:\n#### B\nand A", None),
        ("#### A or B", None),
        ("#### A\n#### b", "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{A} no, \boxed{\textbf{B}}", "B"),
        (r"\boxed{42}", None),
        ("The answer is B.", "B"),
        ("The answer is (B) because A is not", "B"),
        ("answer: A. Wait, the correct answer is option B", "B"),
        ("Answer: B\n", "B"),
        ("the answer is a mystery", None),
        ("the answer is Because", None),
        ("the answer is E", None),
        ("A is wrong.\nB is right.", None),
        ("Let me think.\nA\nNo:\n(B)\nThat is it.", "B"),
        ("A B", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_choice_of_a_text(text, letter):
    assert choice(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is A great deal", None),
        ("The answer is a", None),
        ("The answer is A", "A"),
        ("The answer is A because B is not", "A"),
        ("The answer is A, which is right", "A"),
        ("The answer is (b)", "B"),
        ("The answer is C great", "C"),
        (r"\textbf{(B)}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{\textbf{(B) } 12}", "B"),
        (r"\boxed{\text{B. Paris}}", "B"),
        (r"\boxed{\mathrm{B}}", "B"),
        (r"\boxed{A, B}", None),
        (r"\boxed{A or B}", None),
        (r"\boxed{\text{not A but B}}", "B"),
        ("Answer: (C)", "C"),
        ("Answer: A. Paris", "A"),
        ("**Answer: B**", "B"),
        ("**Answer:** B", "B"),
        ("Answer: A or B", None),
        ("The answer is: **(B) 12**", "B"),
        ("The correct answer is:\n\nB) Paris", "B"),
        ("The correct option is **D**.", "D"),
        ("Final answer\nB", "B"),
        ("**C**", "C"),
        ("C.", "C"),
        ("C) because A is wrong", "C"),
        ("(B) Paris", "B"),
        ("A. one\nB. two\nC. three", None),
        ("Not A but B", "B"),
        ("The answer is not A but B", "B"),
        ("The answer is not B", None),
        ("<answer>C</answer>", "C"),
        ("<answer>(c) Paris</answer>", "C"),
        ("<think>\\boxed{A}</think> B", "B"),
        ("<think>The answer is A", None),
        ("The answer is A.</think>B", "B"),
        ("#### A heading\nThe answer is B.", "B"),
        ("\\boxed{B}\n#### A", "B"),
        ("\u7b54\u6848\uff1aB", "B"),
        ("\u7b54\u6848\u662f\uff22", "B"),
        ("B is right", None),
    ],
)
def test_b10_the_choice_of_what_chat_models_write(text, letter):
    assert choice(text, "ABCD") == letter


@pytest.mark.parametrize(("target", "right"), [("B", "B"), ("(b)", "B"), (1, "B"), (0, "A")])
def test_a_choice_is_compared_with_a_letter_or_a_number_counted_from_zero(target, right):
    reward = MultipleChoice(MultipleChoiceConfig(), CONTEXT)
    wrong = "C"
    assert scores(reward, {"answer": target}, right, wrong, "none") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("target", ["E", "AB", 4, -1, True, None, ""])
def test_s23_a_target_that_is_no_choice_is_an_error_and_never_a_zero(target):
    with pytest.raises(RewardFailure, match="expected one of ABCD"):
        scores(MultipleChoice(MultipleChoiceConfig(), CONTEXT), {"answer": target}, "A")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    ["(" * LONG, "answer is " * (LONG // 10), "A" * LONG, "answer:" + " " * LONG, "A\n" * LONG],
)
def test_a_hostile_completion_is_read_in_linear_time(text):
    assert choice(text, "BC") is None


def test_a_format_is_matched_over_the_whole_completion():
    reward = Format(FormatConfig(pattern=r"<think>.*?</think>\s*<answer>[^<]*</answer>"), CONTEXT)
    good = "\n<think>a\nb</think>\n<answer>4</answer> "
    bad = ("<think>a</think><answer>4</answer> so", "<answer>4</answer>", "")
    assert scores(reward, {}, good, *bad) == [1.0, 0.0, 0.0, 0.0]


def test_l13_the_documented_pattern_takes_one_block_of_each():
    text = Path("docs/rewards.md").read_text()
    [pattern] = re.findall(r"^    pattern = '(.*)'$", text, re.MULTILINE)
    assert pattern in (format_rule.__doc__ or "")
    thoughts, answer = "<think>a\n< 3</think>", "<answer>4 < 5\n</answer>"
    good = (thoughts + answer, f" {thoughts}\n\n{answer}\n", "<think></think><answer></answer>")
    bad = (
        f"{thoughts}{answer}{answer}",
        f"{thoughts}{thoughts}{answer}",
        f"{thoughts}<answer>1</answer> or <answer>2</answer>",
        f"{thoughts}<answer><answer>4</answer>",
        f"<think>a<think>b</think>{answer}",
        answer,
        thoughts,
    )
    reward = Format(FormatConfig(pattern=pattern), CONTEXT)
    assert scores(reward, {}, *good, *bad) == [1.0] * len(good) + [0.0] * len(bad)
    assert scores(reward, {}, f"<think>{'x<' * LONG}</think>{answer}") == [1.0]


@pytest.mark.timeout(60)
def test_s23_a_pattern_without_end_is_an_error_at_its_deadline_and_never_a_zero():
    reward = Format(FormatConfig(pattern=r"(?:a|a|aa)+$", match_s=0.05), CONTEXT)
    with pytest.raises(RewardFailure, match="nested repetition") as failure:
        scores(reward, {}, "a" * 5000 + "b")
    assert failure.value.reason == "timeout"


def test_a_pattern_that_is_none_is_refused_with_the_configuration():
    with pytest.raises(ConfigError, match="not a regular expression"):
        validate(FormatConfig, {"pattern": "(a"}, "run.toml")


def test_the_length_penalty_is_linear_between_its_two_counts():
    reward = Length(LengthConfig(free_tokens=2, full_tokens=6), CONTEXT)
    prompt = make_prompt()
    rollouts = make_rollouts(prompt, [[5] * n for n in (1, 2, 3, 4, 6, 9)])
    found = reward.score(prompt, rollouts, [""] * 6)
    assert found == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    mask = np.array([True, True, False, False, True, True], dtype=np.bool_)
    masked = [replace(rollouts[4], response_mask=mask)]
    assert reward.score(prompt, masked, [""]) == [-0.5]


def test_a_length_penalty_that_has_no_slope_is_refused():
    with pytest.raises(ConfigError, match="not below full_tokens = 5"):
        validate(LengthConfig, {"free_tokens": 5, "full_tokens": 5}, "run.toml")


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0}},
    "required": ["age"],
    "additionalProperties": False,
}


def test_json_is_accepted_by_its_schema_or_not():
    texts = [
        '{"age": 3}',
        'Here:\n```json\n{"age": 4}\n```\nDone.',
        '{"age": -1}',
        '{"age": 3, "x": 1}',
        "{'age': 3}",
        '{"age": NaN}',
        "[" * LONG,
        "",
    ]
    assert score_json(SCHEMA, texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert find_json("```\n1\n```\n```json\n2\n```") == "2\n"


@pytest.mark.parametrize(
    ("text", "json"),
    [
        ("```json\n1\n```\nIt prints:\n```output\n2\n```", "1\n"),
        ("```json\n1\n```\n```\n2\n```", "1\n"),
        ("```\n1\n```\n```text\n2\n```", "1\n"),
        ("<think>```json\n1\n```</think>```json\n2", "```json\n2"),
        ("1. So:\n   ```JSON\n   {\n     1: 2}\n   ```\n", "{\n  1: 2}\n"),
    ],
)
def test_b8_json_is_the_last_block_that_says_so(text, json):
    assert find_json(text) == json


def test_a_schema_may_be_json_text_and_fetches_nothing():
    assert score_json('{"type": "integer"}', ["5", "5.5", '"5"']) == [1.0, 0.0, 0.0]
    for bad in ({"type": "no such type"}, "[1]", "no json", {"$ref": "http://127.0.0.1:1/x"}):
        with pytest.raises(Exception, match=r"."):
            score_json(bad, ["5"])


def test_l13_numbers_that_no_float_holds_are_no_json():
    texts = [
        "1e999",
        "[-1E400]",
        '{"a": {"b": 1e309}}',
        "1.7e308",
        "1e-999",
        "9" * 400,
        "-Infinity",
    ]
    assert score_json({}, texts) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="1e999 is greater than the largest float"):
        score_json('{"maximum": 1e999}', ["5"])


def test_json_is_validated_in_a_child_by_the_schema_of_each_row():
    reward = JsonSchema(JsonSchemaConfig(schema_column="schema"), CONTEXT)
    try:
        assert scores(reward, {"schema": SCHEMA}, '{"age": 3}', "{}") == [1.0, 0.0]
        for bad in ({"type": "no such type"}, 5):
            with pytest.raises(RewardFailure) as failure:
                scores(reward, {"schema": bad}, "5")
            assert failure.value.reason == "raised"
        with pytest.raises(RewardFailure, match="no column 'schema'"):
            scores(reward, {}, "5")
    finally:
        reward.close()


@pytest.mark.parametrize("keys", [{}, {"json_schema": {}, "schema_column": "s"}])
def test_a_json_schema_comes_from_one_place(keys):
    with pytest.raises(ConfigError, match="either json_schema or schema_column"):
        validate(JsonSchemaConfig, keys, "run.toml")


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (Numeric(NumericConfig(prompt_opens_reasoning=True), CONTEXT), "\\boxed{1}"),
        (MultipleChoice(MultipleChoiceConfig(prompt_opens_reasoning=True), CONTEXT), "\\boxed{B}"),
    ],
)
def test_l05_a_guess_counts_only_after_reasoning_that_the_prompt_opened(reward, text):
    columns = {"answer": 1}
    assert scores(reward, columns, text, f"so</think>{text}") == [0.0, 1.0]


def test_l05_a_guess_between_tags_of_the_section_is_no_answer():
    reward = Numeric(NumericConfig(reasoning_tags=(("<r>", "</r>"),)), CONTEXT)
    assert scores(reward, {"answer": 1}, "<r>\\boxed{2}</r>1", "1<r>2") == [1.0, 1.0]
    with pytest.raises(ValueError, match="at least 1 character"):
        NumericConfig(reasoning_tags=(("", "</r>"),))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So option B is correct.", "B"),
        ("So option B is not correct.", None),
        ("If option B is correct, then 1 = 2.", None),
        ("Option (C) is the best one.", "C"),
        ("B is the correct answer.", "B"),
        ("**B** is the correct option, since A is not.", "B"),
        ("A is not the correct answer.", None),
        ("The answer to the question is B.", "B"),
        ("The correct answer for this problem is **(D)**", "D"),
        ("`C`", "C"),
        ("The answer is `C`.", "C"),
        ("The answer is 'C'.", "C"),
        ("The answer is A's problem.", None),
        ("Hence (B).", "B"),
        ("Therefore, B.", "B"),
        ("Thus the answer B", "B"),
        ("So I", None),
        ('{"answer": "B"}', "B"),
        ("{'answer': 'B', 'why': 'A is wrong'}", "B"),
        ('```json\n{"reasoning": "not A", "answer": "C"}\n```', "C"),
        ("\u6545\u9009B\u3002", "B"),
        ("\u7b54\u6848\u9009\uff08C\uff09", "C"),
        ("\u6b63\u786e\u7b54\u6848\u662f\uff1aD", "D"),
        ("\u672c\u9898\u9009\u62e9 A", "A"),
        ("C or maybe D", None),
        ("Answer: C or maybe D", None),
        ("Answer: C (or D)", None),
        ("The answer is C or option D.", None),
        ("The answer is maybe C", None),
        ("Incorrect answer: B", None),
        ("If the answer is B, then no.", None),
        ("Answer: C\n\nMy previous answer is B.", "C"),
        (r"\\boxed{C or perhaps D}", None),
    ],
)
def test_l10_the_choice_of_what_else_chat_models_write(text, letter):
    assert choice(text, "ABCD") == letter
