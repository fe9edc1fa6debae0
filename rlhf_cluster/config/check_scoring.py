"""What the KL of `[algorithm]` must agree on with the other sections; called by `config.run_config`.

Rewards, how they become one, and the algorithm that is to use them; called by `config.run_config`.

Rewards of reasoning steps, and the algorithm that is to use them; called by `config.run_config`.

The teacher of the scoring pool, and the algorithm that learns from it; called by `config.run_config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.kl import LinearKl

if TYPE_CHECKING:
    from rlhf_cluster.config.run_config import RunConfig


def check_kl(c: RunConfig) -> None:
    """Raises `ValueError` where nobody would hold the reference that the KL is to."""
    if c.algorithm.full_kl_in is not None:
        _check_full_kl(c)
    elif c.algorithm.needs_reference and not c.scoring.reference:
        if c.algorithm.type == "online_dpo":
            raise ValueError(
                f"algorithm.loss.type = {c.algorithm.loss.type!r} with scoring.reference = false: it "
                "compares with a reference. Set scoring.reference = true, or loss.type = 'simpo'"
            )
        key, value, control = "kl_coef", c.algorithm.kl_coef, c.algorithm.kl_control
        if value == 0 and isinstance(control, LinearKl):
            key, value = "kl_control.final", control.final
        raise ValueError(
            f"algorithm.{key} = {value} needs scoring.reference = true, found false. Turn the "
            f"reference on, or set {key} = 0"
        )


def _check_full_kl(c: RunConfig) -> None:
    key, update = "algorithm.kl_estimator = 'full'", c.scoring.reference_update.type
    if update != "fixed":
        raise ValueError(
            f"{key} with scoring.reference_update.type = {update!r}: the learner's own reference does "
            "not move. Use reference_update.type = 'fixed', or an estimator such as 'k2'"
        )
    if c.sft.steps:
        raise ValueError(
            f"{key} with sft.steps = {c.sft.steps}: the reference would be what the warm-up leaves, "
            "which no checkpoint keeps for a run that goes on. Give the model of a warmed-up run as "
            "model.path and set sft.steps = 0, or use an estimator such as 'k2'"
        )
    if c.learner.backend != "fsdp2":
        raise ValueError(
            f"{key} with learner.backend = {c.learner.backend!r}: the reference is sharded by FSDP2 "
            "only, as a DeepSpeed engine is made for a model that trains. Set learner.backend = "
            "'fsdp2', or use an estimator such as 'k2'"
        )


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
    for name, weight in getattr(c.algorithm, "reward_weights", {}).items():
        if weight * rewards[name].weight <= 0:
            raise ValueError(
                f"algorithm.reward_weights.{name} = {weight:g} with weight = {rewards[name].weight:g} "
                f"of {name!r} in scoring.rewards: they must have the same sign, or what is shown as a "
                "cost would be maximised. Change one, or set watch = true on the reward"
            )
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


def check_teacher(c: RunConfig) -> None:
    """Raises `ValueError` for an algorithm without its teacher, and for a teacher of nobody."""
    teacher, needed = c.scoring.teacher, c.algorithm.needs_teacher
    if needed and teacher is None:
        raise ValueError(
            f"algorithm.type = {c.algorithm.type!r} without scoring.teacher: nobody rates the sampled "
            "tokens. Set scoring.teacher to the folder of a model with the policy's tokenizer"
        )
    if teacher is not None and not needed:
        raise ValueError(
            f"scoring.teacher = {teacher!r} with algorithm.type = {c.algorithm.type!r}: that algorithm "
            "does not learn from a teacher. Remove it, or use 'on_policy_distillation'"
        )
