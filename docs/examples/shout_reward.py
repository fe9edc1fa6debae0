"""A reward in a package of yours: the share of the words that are written in capitals."""

from collections.abc import Sequence

from pydantic import Field

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext, RewardSection
from rlhf_cluster.rewards.reward_failure import RewardFailure


class ShoutSection(RewardSection):
    """Keys of the reward in a run file, in addition to those that every reward has."""

    type: str
    min_words: int = Field(default=1, ge=1)
    """Shorter responses score 0."""


class Shout:
    section_class = ShoutSection

    def __init__(self, section: ShoutSection, context: RewardContext) -> None:
        self._section = section

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """Return one score per rollout. Several threads may call it at once."""
        if prompt.columns.get("language") == "Japanese":
            raise RewardFailure("Japanese has no capitals. Remove these rows")
        return [self._share(text.split()) for text in completions]

    def _share(self, words: list[str]) -> float:
        if len(words) < self._section.min_words:
            return 0.0
        return sum(word.isupper() for word in words) / len(words)

    def close(self) -> None:
        """Release what was opened: nothing."""
