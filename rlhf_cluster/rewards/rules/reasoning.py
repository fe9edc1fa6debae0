"""Removes the reasoning from a completion, between tags such as `<think>` and `</think>`.

Reasoning that never ends goes to the end of the text, and everything up to a closing tag whose opening
one is in the prompt is reasoning. Where the prompt's template always opens one, a completion
without any closing tag was cut within its reasoning: `prompt_opens_reasoning` leaves nothing of it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rlhf_cluster.rewards.reward import RewardSection

Tag = Annotated[str, Field(min_length=1, max_length=64)]
Tags = tuple[Tag, Tag]

_NAMES = ("think", "thinking", "thought", "reasoning", "seed:think")
USUAL_TAGS: tuple[Tags, ...] = (
    *((f"<{name}>", f"</{name}>") for name in _NAMES),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


class ReasoningSection(RewardSection):
    """Keys of rewards that read what a completion says after its reasoning."""

    reasoning_tags: tuple[Tags, ...] = Field(default=(), max_length=16)
    """Opening and closing tags of reasoning, besides `<think>`, `<thinking>`, `<thought>`,
    `<reasoning>`, `<seed:think>`, `[THINK]` and `<|begin_of_thought|>`."""
    prompt_opens_reasoning: bool = False
    """Every prompt ends in an open tag: a completion without a closing one has no answer. A run whose
    first prompt says otherwise is refused."""

    def without_reasoning(self, completions: Sequence[str]) -> list[str]:
        return [
            without_reasoning(text, self.reasoning_tags, self.prompt_opens_reasoning)
            for text in completions
        ]


def open_reasoning(text: str, tags: tuple[Tags, ...] = ()) -> str | None:
    """Return the text after an opening tag that is never closed, or None if there is none."""
    found = list(_pattern(tags).finditer(text))
    return text[found[-1].end() :] if found and found[-1]["opening"] else None


def without_reasoning(text: str, tags: tuple[Tags, ...] = (), is_open: bool = False) -> str:
    """The completion without its reasoning; `is_open`: it begins within it."""
    kept: list[str] = []
    begin, inside = 0, is_open
    for tag in _pattern(tags).finditer(text):
        if tag["opening"]:
            if not inside:
                kept.append(text[begin : tag.start()])
            inside = True
        else:
            if not inside:
                kept.clear()
            inside, begin = False, tag.end()
    if not inside:
        kept.append(text[begin:])
    return "".join(kept)


@functools.cache
def _pattern(tags: tuple[Tags, ...]) -> re.Pattern[str]:
    opening, closing = (
        "|".join(re.escape(tag) for tag in side) for side in zip(*USUAL_TAGS, *tags, strict=True)
    )
    return re.compile(f"(?P<opening>{opening})|{closing}")
