"""Checks of what the scoring pool serves against the algorithm that uses it.

They cover the KL of `[algorithm]`, rewards and how they combine, rewards of reasoning steps, and
the teacher. `config.run_config` calls them.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cluster.algorithms.kl import LinearKl
from rlhf_cluster.config.pools import REFERENCE
from rlhf_cluster.config.run_sections import RunSections


def check_kl(c: RunSections) -> Iterator[str]:
    """Refuse a KL whose reference no process holds."""
    if c.algorithm.full_kl_in is not None:
        yield from _check_full_kl(c)
    elif c.algorithm.needs_reference and not c.scoring.reference:
        if c.algorithm.type == "online_dpo":
            yield (
                "{algorithm.loss.type} with {scoring.reference}: it compares with a reference. Set "
                "scoring.reference = true, or loss.type = 'simpo'"
            )
            return
        by_control = c.algorithm.kl_coef == 0 and isinstance(c.algorithm.kl_control, LinearKl)
        key = "kl_control.final" if by_control else "kl_coef"
        yield (
            f"{{algorithm.{key}}} needs scoring.reference = true, found false. Turn the reference on, "
            f"or set {key} = 0"
        )


def _check_full_kl(c: RunSections) -> Iterator[str]:
    if c.scoring.reference_update.type != "fixed":
        yield (
            "{algorithm.kl_estimator} with {scoring.reference_update.type}: the learner's own "
            "reference does not move. Use reference_update.type = 'fixed', or an estimator such as 'k2'"
        )
    if c.sft.steps:
        yield (
            "{algorithm.kl_estimator} with {sft.steps}: the reference would be what the warm-up "
            "leaves, which no checkpoint keeps for a resumed run. Give the model of a warmed-up run as "
            "model.path and set sft.steps = 0, or use an estimator such as 'k2'"
        )
    if c.learner.backend != "fsdp2":
        yield (
            "{algorithm.kl_estimator} with {learner.backend}: the reference is sharded by FSDP2 only, "
            "as a DeepSpeed engine is made for a model that trains. Set learner.backend = 'fsdp2', or "
            "use an estimator such as 'k2'"
        )


def check_rewards(c: RunSections) -> Iterator[str]:
    """Refuse names, signs and combinations of rewards that the algorithm does not take."""
    rewards = {r.name or r.type: r for r in c.scoring.rewards}
    optimised = [name for name, reward in rewards.items() if not reward.watch]
    weights: dict[str, float] = getattr(c.algorithm, "reward_weights", {})
    for key, names in (
        ("algorithm.reward_weights", weights),
        ("scoring.objective", c.scoring.objective.names),
    ):
        unknown = sorted({*names} - {*optimised})
        if unknown and optimised:
            yield (
                f"{key} names {unknown[0]!r}, and scoring.rewards has "
                f"{', '.join(map(repr, optimised))} (without what is only watched). Use one of these "
                "names"
            )
    for name, weight in weights.items():
        if name in rewards and weight * rewards[name].weight <= 0:
            yield (
                f"algorithm.reward_weights.{name} = {weight:g} with weight = {rewards[name].weight:g} "
                f"of {name!r} in scoring.rewards: they must have the same sign, or what is shown as a "
                "cost would be maximised. Change one, or set watch = true on the reward"
            )
    is_gdpo = c.algorithm.type == "gdpo"
    running = [r.name or r.type for r in c.scoring.rewards if r.normalize == "running"]
    if running and (is_gdpo or c.sampling.greedy_baseline):
        why = (
            "normalises every reward by itself"
            if is_gdpo
            else "takes off the reward of a greedy answer, whose parts are not kept"
        )
        yield (
            f"normalize = 'running' of {running[0]!r} with {{algorithm.type}}, which {why}. Remove it, "
            "or use another algorithm"
        )
    if is_gdpo and c.scoring.objective.type != "weighted_sum":
        yield (
            "{scoring.objective.type} with {algorithm.type}, which makes one of the rewards by itself. "
            "Use another algorithm, or the weighted sum"
        )


def check_steps(c: RunSections) -> Iterator[str]:
    """Refuse step rewards that the algorithm would mix, and their lack where it needs them."""
    names, reason = c.scoring.step_rewards, c.algorithm.no_steps
    if names and reason is not None:
        yield (
            f"scoring.rewards: {names[0]!r} scores reasoning steps, with {{algorithm.type}}: {reason}. "
            "Let the reward give one score per response, or use 'grpo' with advantage = 'process', or "
            "'ppo'"
        )
    if not names and getattr(c.algorithm, "advantage", "outcome") == "process":
        yield (
            "{algorithm.advantage} and no reward in scoring.rewards scores reasoning steps: all "
            "advantages would be those of outcomes. Add a reward of type 'equations', or one of type "
            "'python' with per_step = true; or set advantage = 'outcome'"
        )


def check_teacher(c: RunSections) -> Iterator[str]:
    """Refuse a teacher that the algorithm does not learn from, and the lack of one that it needs."""
    teacher, needed = c.scoring.teacher, c.algorithm.needs_teacher
    if needed and teacher is None:
        yield (
            "{algorithm.type} without scoring.teacher: no model rates the sampled tokens. Set "
            "scoring.teacher to the folder of a model with the policy's tokenizer"
        )
    if teacher is not None and not needed:
        yield (
            "{scoring.teacher} with {algorithm.type}: that algorithm does not learn from a teacher. "
            "Remove it, or use 'on_policy_distillation'"
        )


def check_exact_logprobs(c: RunSections) -> Iterator[str]:
    """Refuse an algorithm that reads exact log-probabilities which no worker computes."""
    if getattr(c.algorithm, "sampler", None) == "exact" and not c.scoring.exact_logprobs:
        yield (
            "{algorithm.sampler} with {scoring.exact_logprobs}: no worker computes the exact "
            "log-probabilities. Set scoring.exact_logprobs = true, or sampler = 'sampled'"
        )


def kl_notes(c: RunSections) -> list[str]:
    """Return notes on a KL to the reference that is not a distance between policies."""
    scoring = c.scoring.of_pool(c.scoring.pool_of(REFERENCE))
    if not (c.algorithm.needs_reference and c.scoring.reference):
        return []
    if scoring.dtype == c.learner.dtype:
        return []
    return [
        f"scoring.dtype = {scoring.dtype!r} of the reference with learner.dtype = "
        f"{c.learner.dtype!r}: equal policies are not at a distance of 0 from it, and training "
        "follows the rounding too. Make them equal"
    ]
