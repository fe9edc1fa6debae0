"""Data columns as rewards read them. A column that cannot be used is a failure, never a score."""

from __future__ import annotations

from typing import Any

from rlhf_cluster.records import Prompt
from rlhf_cluster.rewards.failure import RewardFailure


def column(prompt: Prompt, name: str) -> Any:
    """The value of column `name` of the prompt's row. Raises `RewardFailure` when it is absent."""
    if name not in prompt.columns:
        known = ", ".join(sorted(prompt.columns)) or "none"
        raise RewardFailure(
            f"prompt {prompt.prompt_id} has no column {name!r}; its columns: {known}. Set "
            "target_column to one of them",
            "column",
        )
    return prompt.columns[name]
