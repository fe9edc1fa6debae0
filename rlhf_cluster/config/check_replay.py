"""What `[buffer.replay]` must agree on with the other sections; called by `config.run`.

The reasons are in docs/replay.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.replay import Replay, fresh_groups

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_replay(c: RunConfig) -> None:
    """Raises `ValueError` for replay that could never happen, or would train on the wrong thing."""
    replay = c.buffer.replay
    if replay is None:
        return
    if not c.buffer.durable:
        raise ValueError(
            "[buffer.replay] with buffer.durable = false: groups are replayed from their files. Set "
            "buffer.durable = true, or remove the section"
        )
    if c.staleness.max_staleness == 0:
        raise ValueError(
            "[buffer.replay] with staleness.max_staleness = 0: a group is a step older when it is "
            "trained again, and nothing older than the weights may be trained. Allow staleness (over "
            "staleness.pipeline_depth, so that groups are young enough after their first step), or "
            "remove the section"
        )
    correction = getattr(c.algorithm, "correction", None)
    # with "bypass" the surrogate's own ratio is the one to the sampler, with or without a rule
    bypass = getattr(c.algorithm, "proximal", None) == "bypass"
    if correction is None or (correction.type == "none" and not bypass):
        has = "has no off-policy correction" if correction is None else "has correction = 'none'"
        raise ValueError(
            f"[buffer.replay] with algorithm.type = {c.algorithm.type!r}, which {has}: the policy was "
            "trained on a replayed group already, so it is never its sampler. Use a policy-gradient "
            "algorithm with a correction such as 'token_tis' or with proximal = 'bypass', or remove "
            "the section"
        )
    _check_sizes(c, replay)
    _check_priority(c, replay)


def _check_sizes(c: RunConfig, replay: Replay) -> None:
    groups, learner, fresh = c.run.groups_per_step, c.learner, fresh_groups(c)
    numbers = (
        f"buffer.replay.fraction = {replay.fraction:g} of run.groups_per_step = {groups} is "
        f"{groups - fresh} replayed groups and {fresh} fresh ones a step"
    )
    if fresh in (0, groups):
        raise ValueError(
            f"{numbers}; there must be at least one of each. Change the fraction, or raise "
            "groups_per_step"
        )
    rollouts = fresh * c.algorithm.group_size
    if rollouts < learner.ranks * learner.minibatches:
        raise ValueError(
            f"{numbers}: the first steps have the fresh ones alone, and their {rollouts} rollouts are "
            f"under learner.ranks * learner.minibatches = {learner.ranks} * {learner.minibatches}. "
            "Lower the fraction, or raise groups_per_step"
        )


def _check_priority(c: RunConfig, replay: Replay) -> None:
    if replay.priority == "uniform":
        if (replay.alpha, replay.beta) != (Replay().alpha, Replay().beta):
            raise ValueError(
                f"buffer.replay.alpha = {replay.alpha:g} and buffer.replay.beta = {replay.beta:g} with "
                "buffer.replay.priority = 'uniform': they shape a priority. Remove them, or set "
                "priority = 'reward_spread'"
            )
    elif c.algorithm.group_size == 1:
        raise ValueError(
            "buffer.replay.priority = 'reward_spread' with algorithm.group_size = 1: a single reward "
            "has no spread. Use priority = 'uniform', or larger groups"
        )
