"""What is common to all that ask an OpenAI-compatible chat endpoint."""

from __future__ import annotations

from typing import Any

from rlhf_cluster.rewards.failure import RewardFailure

PATH = "/chat/completions"


def question_of(model: str, text: str, temperature: float, max_tokens: int) -> dict[str, Any]:
    """The request whose one message of the user is `text`."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": temperature,
        "max_tokens": max_tokens,
    }


def content_of(answer: Any) -> str:
    """The text of an answer. Raises `RewardFailure` for what is no answer."""
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise RewardFailure(
            f"answered {str(answer)[:100]!r}, expected choices[0].message.content", "reply"
        )
    return content


def is_cut(answer: Any) -> bool:
    """The answer, one with a content, ended at its limit of tokens."""
    return answer["choices"][0].get("finish_reason") == "length"


def prompt_text(source: str | list[dict[str, str]]) -> str:
    """A prompt as it stands in a question about it."""
    if isinstance(source, str):
        return source
    return "\n".join(f"{message['role']}: {message['content']}" for message in source)
