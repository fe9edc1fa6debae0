r"""How chat models write down an answer: what `benchmarks/verifiers.py` has the verifiers read.

A presentation makes a text of an `Answer`. Where the answer is a restated problem it stands in the
place of the number, as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A solution and what it ends with."""

    work: str
    """The lines of the solution, without its answer."""
    value: int
    restated: str | None = None
    """Stands for the value: arithmetic that comes to it."""

    @property
    def plain(self) -> str:
        return self.restated or str(self.value)

    @property
    def latex(self) -> str:
        return self.plain.replace(" / ", r" \div ").replace("*", r"\times")

    def grouped(self, separator: str) -> str:
        return self.restated or f"{self.value:,}".replace(",", separator)

    @property
    def steps(self) -> list[str]:
        return [line for line in self.work.splitlines() if line.strip()]


def numbered(a: Answer) -> str:
    return "\n".join(f"{i}. {step}" for i, step in enumerate(a.steps, 1))


def bullets(a: Answer) -> str:
    return "\n".join(f"- {step}" for step in a.steps)


def headed(a: Answer, level: str = "####") -> str:
    return "\n\n".join(f"{level} Step {i}\n{step}" for i, step in enumerate(a.steps, 1))


def think(a: Answer) -> str:
    """Reasoning that guesses before it knows."""
    guesses = f"Maybe \\boxed{{{a.value + 7}}}?\nThe answer is {a.value + 3}?"
    return f"<think>\nOkay. {guesses}\n{a.work}\n</think>"


FIRST: Mapping[str, Callable[[Answer], str]] = {
    "gsm8k": lambda a: f"{a.work}\n#### {a.plain}",
    "gsm8k_thousands": lambda a: f"{a.work}\n#### {a.grouped(',')}",
    "gsm8k_dollars": lambda a: f"{a.work}\n#### ${a.plain}",
    "heading_final_answer": lambda a: f"{headed(a)}\n\n#### Final Answer: {a.plain}",
    "box": lambda a: f"{a.work}\n\nTherefore, the answer is $\\boxed{{{a.latex}}}$.",
    "display_box": lambda a: f"{a.work}\n\nThe final answer is:\n\\[\n\\boxed{{{a.latex}}}\n\\]",
    "headings_before_box": lambda a: f"{headed(a)}\n\n#### Conclusion\n\\(\\boxed{{{a.latex}}}\\)",
    "heading_after_box": lambda a: (
        f"{a.work}\n\n$$\\boxed{{{a.latex}}}$$\n\n#### Step-by-step summary\n{numbered(a)}"
    ),
    "last_line_heading_after_box": lambda a: f"{a.work}\n\\boxed{{{a.latex}}}\n#### 1. Done",
    "box_unit": lambda a: f"{a.work}\nSo we get $\\boxed{{{a.latex} \\text{{ miles}}}}$.",
    "box_unit_squared": lambda a: f"{a.work}\nThe area is $\\boxed{{{a.latex}\\text{{ cm}}^2}}$.",
    "box_dollars": lambda a: f"{a.work}\nShe makes $\\boxed{{\\${a.latex}}}$ every day.",
    "box_thousands": lambda a: f"{a.work}\nIn total, $\\boxed{{{a.grouped(',')}}}$.",
    "box_thin_thousands": lambda a: f"{a.work}\nIn total, $\\boxed{{{a.grouped(chr(92) + ',')}}}$.",
    "box_brace_thousands": lambda a: f"{a.work}\nIn total, $\\boxed{{{a.grouped('{,}')}}}$.",
    "box_percent": lambda a: f"{a.work}\nThat is $\\boxed{{{a.latex}\\%}}$.",
    "box_name": lambda a: f"{a.work}\nHence $\\boxed{{x = {a.latex}}}$.",
    "several_boxes": lambda a: (
        f"First, $\\boxed{{{a.value + 5}}}$ before it.\n{a.work}\n\nThus $\\boxed{{{a.latex}}}$."
    ),
    "box_then_check": lambda a: (
        f"{a.work}\n\n$\\boxed{{{a.latex}}}$\n\n**Verification:**\n{bullets(a)}\n"
        f"All {len(a.steps)} steps hold. \u2713"
    ),
    "box_then_remark": lambda a: (
        f"{a.work}\n\\boxed{{{a.latex}}}\nI checked it 2 times. Ask 1 more!"
    ),
    "said": lambda a: f"{a.work}\nThe answer is {a.plain}.",
    "said_dollars": lambda a: (
        f"{a.work}\nSo the final answer is ${a.grouped(',')}.00."
        if a.restated is None
        else f"{a.work}\nSo the final answer is {a.restated}."
    ),
    "said_unit_squared": lambda a: f"{a.work}\nThe answer is {a.plain} m^2.",
    "said_then_check": lambda a: (
        f"{a.work}\n\nThe answer is **{a.plain}**.\n\nCheck: {a.steps[-1]} \u2705 (all 3 checks passed)"
    ),
    "said_bold_label": lambda a: f"{numbered(a)}\n\n**Answer:** {a.plain} apples",
    "said_heading": lambda a: f"{headed(a, '##')}\n\n## Final Answer\n\n**{a.plain}**\n",
    "said_formula": lambda a: f"{bullets(a)}\n\nThe correct answer is: \\( {a.latex} \\).",
    "bold_sentence": lambda a: f"{bullets(a)}\n\nSo she sells **{a.plain}** of them at 2 markets.",
    "last_sentence": lambda a: f"{a.work}\nTherefore, the total is {a.plain}.",
    "list_total": lambda a: f"{bullets(a)}\n- **Total:** {a.plain}",
    "table": lambda a: (
        "| step | value |\n|---|---|\n"
        + "".join(f"| {i} | {step} |\n" for i, step in enumerate(a.steps, 1))
        + f"\n**Final answer: {a.plain}**"
    ),
    "think_box": lambda a: f"{think(a)}\n\n{a.work}\n\n\\boxed{{{a.latex}}}",
    "think_said": lambda a: f"{think(a)}\n\nThe answer is {a.plain}.",
    "think_opened_by_prompt": lambda a: (
        f"{think(a).removeprefix('<think>')}\n\n#### Solution\n{a.work}\n\n"
        f"**Answer:** \\boxed{{{a.latex}}}"
    ),
    "answer_tag": lambda a: f"{think(a)}\n<answer>{a.plain}</answer>",
    "answer_tag_sentence": lambda a: (
        f"{think(a)}\n<answer>\n{a.work}\n\\boxed{{{a.latex}}}\n</answer>"
    ),
    "chinese": lambda a: f"{a.work}\n\n\u6240\u4ee5\u7b54\u6848\u662f\uff1a{a.plain}\u3002",
}

LATER: Mapping[str, Callable[[Answer], str]] = {
    "llama_steps": lambda a: f"{headed(a, '##')}\n\nThe final answer is: $\\boxed{{{a.latex}}}$",
    "qwen_sentence": lambda a: (
        f"To find the total, follow these steps:\n\n{numbered(a)}\n\n"
        f"Therefore, Natalia sold a total of \\(\\boxed{{{a.latex}}}\\) clips in 2 months."
    ),
    "deepseek_final": lambda a: (
        f"**Step 1:** {a.work}\n\n---\n\n**Final Answer:**\n$$\n\\boxed{{{a.latex}}}\n$$\n"
    ),
    "gemma_bold_sentence": lambda a: (
        f"**Here's how to solve it:**\n\n{bullets(a)}\n\n**Therefore, she sold {a.plain} clips.**"
    ),
    "gpt_display": lambda a: (
        f"{headed(a, '###')}\n\n### Final Answer:\n\\[\n{a.latex} \\, \\text{{clips}}\n\\]"
    ),
    "minerva": lambda a: (
        f"{a.work}\nFinal Answer: The final answer is ${a.latex}$. I hope it is correct."
    ),
    "answer_first": lambda a: f"Answer:\n${a.plain} per day\n\nExplanation:\n{bullets(a)}",
    "json": lambda a: f'```json\n{{\n  "steps": {len(a.steps)},\n  "answer": {a.plain}\n}}\n```',
    "qwen_tool": lambda a: (
        f"```python\nprint(sum([1, 2]))\n```\n```output\n{a.plain}\n```\n"
        f"The answer is $\\boxed{{{a.latex}}}$."
    ),
    "last_display": lambda a: f"{a.work}\n\nSo:\n\\[ x = {a.latex} \\text{{ dollars}} \\]",
    "box_sentence": lambda a: (
        f"{a.work}\n$\\boxed{{\\text{{Total}} = {a.latex} \\text{{ clips}}}}$"
    ),
    "box_per_day": lambda a: f"{a.work}\n$$\\boxed{{\\${a.latex} \\text{{ per day}}}}$$",
    "answer_emoji": lambda a: (
        f"{bullets(a)}\n\n\u2705 **Answer:** Janet makes **${a.plain}** every day. \U0001f986"
    ),
    "bold_with_parts": lambda a: (
        f"{a.work}\n\nThus, the total number is: **{a.plain} clips** (48 in April and 24 in May)."
    ),
    "last_sentence_dollars": lambda a: (
        f"{a.work}\nSo, Janet makes \\${a.latex} every day at the market."
    ),
}

ALL = {**FIRST, **LATER}
