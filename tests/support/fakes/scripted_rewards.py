"""Rewards that give what a prompt's columns hold, in place of `exact_match` and `ensemble`."""

from __future__ import annotations

from typing import Any, ClassVar

from rlhf_cluster.rewards.reward_failure import RewardFailure

RESPONSES = ([5, 6, 1], [5, 1], [7, 1], [8, 8, 1])


class Scripted:
    """Gives what the prompt's column of its `target_column` holds, and remembers what it was asked."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, config: Any, context: Any) -> None:
        self._column = config.target_column

    def score(self, prompt, rollouts, completions):
        Scripted.asked.append((self._column, len(rollouts)))
        found = prompt.columns[self._column]
        if found == "fail":
            raise RewardFailure("it is gone", "died")
        return found[: len(rollouts)] if isinstance(found, list) else found

    def close(self) -> None:
        pass


class Telling(Scripted):
    """An ensemble whose members gave the columns `one` and `two`."""

    version = "weights"

    def __init__(self, config: Any, context: Any) -> None:
        pass

    def score_in_detail(self, prompt, rollouts, completions):
        Scripted.asked.append(("ensemble", len(rollouts)))
        words = [float(len(text.split())) for text in completions]
        return words, {"0": words, "1": [2 * w for w in words], "disagreement": [0.5] * len(words)}


def named(name: str, **keys: Any) -> dict[str, Any]:
    return {"type": "exact_match", "name": name, "target_column": name, **keys}


ENSEMBLE = {"type": "ensemble", "paths": ["a", "b"], "name": "ens"}
