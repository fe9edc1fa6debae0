"""Rewards of reasoning steps, and the algorithm that is to use them; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_steps(c: RunConfig) -> None:
    """Raises `ValueError` where step rewards would lose their places, or are not there."""
    names = [r.name or r.type for r in c.scoring.rewards if r.scores_steps and not r.watch]
    reason = c.algorithm.no_steps
    if names and reason is not None:
        raise ValueError(
            f"scoring.rewards: {names[0]!r} scores reasoning steps, with algorithm.type = "
            f"{c.algorithm.type!r}: {reason}. Let the reward give one score a response, or use 'grpo' "
            "with advantage = 'process', or 'ppo'"
        )
    if not names and getattr(c.algorithm, "advantage", "outcome") == "process":
        raise ValueError(
            "algorithm.advantage = 'process' and no reward in scoring.rewards scores reasoning steps: "
            "all advantages would be those of outcomes. Add a reward of type 'equations', or one of "
            "type 'python' with per_step = true; or set advantage = 'outcome'"
        )
