"""Checks of what the scoring pool serves against the algorithm that uses it.

They cover the KL of `[algorithm]`, rewards and how they combine, rewards of reasoning steps, and
the teacher. `config.run_config` calls them.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_cluster.algorithms.kl import LinearKl
from rlhf_cluster.config.pool_sections import (
    MODELS,
    REFERENCE,
    RESERVED,
    TEACHER,
    ScoringPool,
    pool_sections,
)
from rlhf_cluster.config.run_sections import RunSections


def check_kl(c: RunSections) -> None:
    """Check that some process holds the reference of the KL. Raises `ValueError`."""
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


def _check_full_kl(c: RunSections) -> None:
    key, update = "algorithm.kl_estimator = 'full'", c.scoring.reference_update.type
    if update != "fixed":
        raise ValueError(
            f"{key} with scoring.reference_update.type = {update!r}: the learner's own reference does "
            "not move. Use reference_update.type = 'fixed', or an estimator such as 'k2'"
        )
    if c.sft.steps:
        raise ValueError(
            f"{key} with sft.steps = {c.sft.steps}: the reference would be what the warm-up leaves, "
            "which no checkpoint keeps for a resumed run. Give the model of a warmed-up run as "
            "model.path and set sft.steps = 0, or use an estimator such as 'k2'"
        )
    if c.learner.backend != "fsdp2":
        raise ValueError(
            f"{key} with learner.backend = {c.learner.backend!r}: the reference is sharded by FSDP2 "
            "only, as a DeepSpeed engine is made for a model that trains. Set learner.backend = "
            "'fsdp2', or use an estimator such as 'k2'"
        )


def check_rewards(c: RunSections) -> None:
    """Check that reward names agree between sections and every setting has an effect.

    Raises `ValueError` where they do not.
    """
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


def _check_names(c: RunSections) -> None:
    names = [r.name or r.type for r in c.scoring.rewards]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"scoring.rewards: the name {twice[0]!r} appears {names.count(twice[0])} times. Give each "
            "reward another name"
        )
    for reward in c.scoring.rewards:
        name = reward.name or reward.type
        derived = {f"{name}.{detail}" for detail in (*reward.details, "unclipped", "counted")}
        taken = sorted(derived & {*names})
        if taken:
            raise ValueError(
                f"scoring.rewards: the name {taken[0]!r} is what the reward {name!r} reports in "
                "addition to its score. Give one of them another name"
            )


def _check_objective(c: RunSections) -> None:
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
            "score per response, or use 'constrained'"
        )


def check_steps(c: RunSections) -> None:
    """Check that the algorithm can use rewards of reasoning steps, and has them where it needs them.

    Raises `ValueError` for step rewards whose positions the algorithm would not keep, and for an
    algorithm that needs step rewards and has none.
    """
    names = [r.name or r.type for r in c.scoring.rewards if r.scores_steps and not r.watch]
    reason = c.algorithm.no_steps
    if names and reason is not None:
        raise ValueError(
            f"scoring.rewards: {names[0]!r} scores reasoning steps, with algorithm.type = "
            f"{c.algorithm.type!r}: {reason}. Let the reward give one score per response, or use "
            "'grpo' with advantage = 'process', or 'ppo'"
        )
    if not names and getattr(c.algorithm, "advantage", "outcome") == "process":
        raise ValueError(
            "algorithm.advantage = 'process' and no reward in scoring.rewards scores reasoning steps: "
            "all advantages would be those of outcomes. Add a reward of type 'equations', or one of "
            "type 'python' with per_step = true; or set advantage = 'outcome'"
        )


def check_teacher(c: RunSections) -> None:
    """Check that there is a teacher exactly where the algorithm learns from one.

    Raises `ValueError` where it is missing or unused.
    """
    teacher, needed = c.scoring.teacher, c.algorithm.needs_teacher
    if needed and teacher is None:
        raise ValueError(
            f"algorithm.type = {c.algorithm.type!r} without scoring.teacher: no model rates the "
            "sampled tokens. Set scoring.teacher to the folder of a model with the policy's tokenizer"
        )
    if teacher is not None and not needed:
        raise ValueError(
            f"scoring.teacher = {teacher!r} with algorithm.type = {c.algorithm.type!r}: that algorithm "
            "does not learn from a teacher. Remove it, or use 'on_policy_distillation'"
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


def check_pools(c: RunSections) -> None:
    """Check that pools fit what is scored and start with enough workers.

    Raises `ValueError` for a pool that serves something unknown, unused or served elsewhere, and for
    a pool that needs more workers than it starts with.
    """
    for pool, section in pool_sections(c).items():
        if section.min_workers is not None and section.min_workers > section.workers:
            raise ValueError(
                f"{pool}.min_workers = {section.min_workers} is over {pool}.workers = "
                f"{section.workers}: the pool would never start. Lower it, or raise workers"
            )
    rewards = [r.name or r.type for r in c.scoring.rewards]
    configured: dict[str, bool] = dict(zip(MODELS, _is_set(c), strict=True))
    owner: dict[str, str] = {}
    for pool, section in c.scoring.pools.items():
        if pool in RESERVED:
            raise ValueError(
                f"scoring.pools.{pool}: a run has processes of that name. Choose another one"
            )
        for name in section.serves:
            if name in owner:
                raise ValueError(
                    f"scoring.pools.{pool}.serves names {name!r}, which {owner[name]!r} serves. Leave "
                    "it in one of them; a pool grows by its workers"
                )
            owner[name] = pool
            _check_name_in_pool(pool, name, configured, rewards)
        if not {REFERENCE, TEACHER} & {*section.serves}:
            _refuse_precision(pool, section)


def _is_set(c: RunSections) -> tuple[bool, bool, bool]:
    """Return for each of `MODELS` whether the run has it."""
    return c.scoring.reference, c.scoring.teacher is not None, c.scoring.exact_logprobs


def _check_name_in_pool(
    pool: str, name: str, configured: Mapping[str, bool], rewards: list[str]
) -> None:
    """Check one name of `serves`. Raises `ValueError` where it is ambiguous, unknown or not set."""
    if name in configured and name in rewards:
        raise ValueError(
            f"scoring.pools.{pool}.serves names {name!r}, and a reward has that name too. Give the "
            "reward another name"
        )
    if name not in configured and name not in rewards:
        known = ", ".join(map(repr, (*(m for m in MODELS if configured[m]), *rewards)))
        raise ValueError(
            f"scoring.pools.{pool}.serves names {name!r}, and this run scores with {known}. Use one of "
            "these"
        )
    if name in configured and not configured[name]:
        raise ValueError(
            f"scoring.pools.{pool}.serves names {name!r}, and scoring.{name} is not set: the pool "
            f"would have nothing to do. Set scoring.{name}, or remove the name"
        )


def _refuse_precision(pool: str, section: ScoringPool) -> None:
    for key in ("dtype", "quantization"):
        if (found := getattr(section, key)) is not None:
            raise ValueError(
                f"scoring.pools.{pool}.{key} = {found!r} with serves = {section.serves}: it is of the "
                "reference and of the teacher. Remove it; reward models have their own in "
                "scoring.rewards, exact log-probabilities have learner.dtype"
            )
