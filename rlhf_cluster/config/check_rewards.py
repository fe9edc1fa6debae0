"""Rewards, how they become one, and the algorithm that is to use them; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_rewards(c: RunConfig) -> None:
    """Raises `ValueError` where names do not fit, or a setting would have no effect."""
    rewards = {r.name or r.type: r for r in c.scoring.rewards}
    _check_names(c)
    optimised = [name for name, reward in rewards.items() if not reward.watch]
    if not optimised:
        raise ValueError(
            "scoring.rewards: all have watch = true, and nothing is left to optimise. Take it off one"
        )
    for key, names in (
        ("algorithm.reward_weights", getattr(c.algorithm, "reward_weights", {})),
        ("scoring.objective", c.scoring.objective.names),
    ):
        unknown = sorted({*names} - {*optimised})
        if unknown:
            raise ValueError(
                f"{key} names {unknown[0]!r}, and scoring.rewards has "
                f"{', '.join(map(repr, optimised))} (without what is only watched). Use one of these "
                "names"
            )
    _check_objective(c)
    for name in optimised:
        if rewards[name].weight == 0 and name not in c.scoring.objective.names:
            raise ValueError(
                f"scoring.rewards: {name!r} has weight = 0, and the objective does not name it. Set "
                "watch = true to have it computed and shown only"
            )


def _check_names(c: RunConfig) -> None:
    names = [r.name or r.type for r in c.scoring.rewards]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"scoring.rewards: the name {twice[0]!r} appears {names.count(twice[0])} times. Give each "
            "reward a name of its own"
        )
    for reward in c.scoring.rewards:
        name = reward.name or reward.type
        derived = {f"{name}.{detail}" for detail in (*reward.details, "unclipped", "counted")}
        taken = sorted(derived & {*names})
        if taken:
            raise ValueError(
                f"scoring.rewards: the name {taken[0]!r} is what the reward {name!r} tells beside its "
                "score. Give one of them another name"
            )


def _check_objective(c: RunConfig) -> None:
    kind = c.scoring.objective.type
    running = [r.name or r.type for r in c.scoring.rewards if r.normalize == "running"]
    if running and kind != "weighted_sum":
        raise ValueError(
            f"scoring.objective.type = {kind!r} with normalize = 'running' of {running[0]!r}: floors "
            "and thresholds are in the unit of scores, which a running mean would move. Remove one"
        )
    if running and (c.algorithm.type == "gdpo" or c.sampling.greedy_baseline):
        why = (
            "normalises every reward by itself"
            if c.algorithm.type == "gdpo"
            else "takes off the reward of a greedy answer, whose parts are not kept"
        )
        raise ValueError(
            f"normalize = 'running' of {running[0]!r} with algorithm.type = {c.algorithm.type!r}, "
            f"which {why}. Remove it, or use another algorithm"
        )
    if c.algorithm.type == "gdpo" and kind != "weighted_sum":
        raise ValueError(
            f"scoring.objective.type = {kind!r} with algorithm.type = 'gdpo', which makes one of the "
            "rewards by itself. Use another algorithm, or the weighted sum"
        )
    steps = [r.name or r.type for r in c.scoring.rewards if r.scores_steps and not r.watch]
    if kind == "lexicographic" and steps:
        raise ValueError(
            f"scoring.objective.type = 'lexicographic' with {steps[0]!r}, which scores reasoning "
            "steps: they are rewarded before it is known what their response opens. Let it give one "
            "score a response, or use 'constrained'"
        )
