"""What one scoring worker found out about a group: a part, of which several are joined.

Each pool of a run serves some rewards and models (`Scoring.served_by`) and gives their answers as they
are, unweighted. `scoring.joining` makes rewards of them.

Shapes: B rollouts, R = B or, with a greedy response, B + 1; S steps; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Row = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardAnswer:
    """What one reward gave: [R] rows of its score and its details; [R][S] the scores of steps."""

    rows: Sequence[Row]
    steps: Sequence[Sequence[float]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePart:
    """`rewards` by name, None of one that is only watched and failed; `versions` of these rewards.
    `logprobs` by model (`config.pools.MODELS`): [B] arrays [T] float32, in nats.
    `reference_version` is of the newest reference that these can be of, -1 without one."""

    rewards: Mapping[str, RewardAnswer | None] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    logprobs: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    reference_version: int = -1
