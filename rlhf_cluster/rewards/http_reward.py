"""Scores from a server over HTTP: one request per group, answers joined by their ids.

    POST url
    {"items": [{"id": "...", "prompt": ..., "completion": "...", "columns": {...}}, ...]}
    -> {"scores": [{"id": "...", "score": 0.5}, ...]}         in any order

`prompt` is the data set's prompt (text or messages), `columns` are the columns named in the section.
An answer that misses an id, has one twice or one that was not asked for, or a score that is not a
finite number, is a `RewardFailure`; a list without ids is refused, since nothing shows its order.
`http_client.py` says how often and how long is asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.http_client import RemoteSection, Server
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, check_scores, column


class HttpConfig(RemoteSection):
    """A server scores the completions."""

    type: Literal["http"] = "http"
    columns: list[str] = Field(default_factory=list)
    """Columns of the data set that go along with each completion."""
    timeout_s: PositiveFloat = 250.0
    """Deadline of one group, all attempts and pauses."""


class Http:
    def __init__(self, config: HttpConfig, context: RewardContext) -> None:
        """Read the key. Raises `ConfigError` where its environment variable is not set."""
        self._config = config
        self._server = Server(config)

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """The server's scores. Raises `RewardFailure` for whatever else it answers."""
        deadline = time.monotonic() + self._config.timeout_s
        columns = {name: column(prompt, name) for name in self._config.columns}
        # The number makes ids unique: a greedy answer may share its rollout's.
        ids = [f"{number}:{rollout.rollout_id}" for number, rollout in enumerate(rollouts)]
        items = [
            {"id": own, "prompt": prompt.source, "completion": text, "columns": columns}
            for own, text in zip(ids, completions, strict=True)
        ]
        try:
            answer = self._server.ask({"items": items}, deadline)
        except (TypeError, ValueError) as error:
            raise RewardFailure(
                f"the columns {self._config.columns} cannot be sent as JSON ({error}). Leave out "
                "those that are neither text, numbers, lists nor tables",
                "column",
            ) from error
        return join_scores(answer, ids)

    def close(self) -> None:
        self._server.close()


def join_scores(answer: Any, ids: Sequence[str]) -> list[float]:
    """The scores in the order of `ids`. Raises `RewardFailure` with the reason."""
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise RewardFailure(
            f'answered {str(answer)[:100]!r}, expected {{"scores": [...]}}', "reply"
        )
    if len(scores) != len(ids):
        raise RewardFailure(
            f"answered {len(scores)} scores for {len(ids)} completions; answer exactly one each",
            "length",
        )
    found: dict[str, Any] = {}
    for entry in scores:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise RewardFailure(
                f"answered {str(entry)[:60]!r}, expected id and score: nothing else shows whose "
                "score it is",
                "ids",
            )
        found[entry["id"]] = entry.get("score")
    if found.keys() != set(ids):
        wrong = sorted(found.keys() - set(ids)) or ["one twice"]
        raise RewardFailure(
            f"answered other ids than were asked for ({wrong[0][:60]!r}); answer each exactly once",
            "ids",
        )
    return check_scores([found[own] for own in ids], len(ids))
