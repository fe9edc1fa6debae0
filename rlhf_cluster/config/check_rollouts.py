"""Checks of `[generation]`, `[staleness]` and `[buffer.replay]` against the other sections.

`config.run_config` calls them. docs/staleness.md and docs/replay.md give the reasons. Settings
that depend on the device are checked in `actors.vllm.vllm_arguments`.
"""

from __future__ import annotations

from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.rl_run import Replay

_WEIGHTLESS = ("ngram", "ngram_gpu", "suffix")

_DRAFT = "draft_model"

_KEYS_OF_THEIR_OWN = {
    "speculative_config": "speculative",
    "quantization": "quantization",
    "enable_prefix_caching": "prefix_caching",
    "enable_lora": "lora",
}


def check_generation(c: RunSections) -> None:
    """Check that the engine serves the weights, caches and probabilities that the run expects.

    Raises `ValueError` for settings under which it would serve others.
    """
    _check_caches(c)
    _check_speculation(c)
    for name, key in _KEYS_OF_THEIR_OWN.items():
        if name in c.generation.engine_args:
            raise ValueError(
                f"generation.engine_args.{name} = {c.generation.engine_args[name]!r} passes by what "
                f"is checked of generation.{key}. Set generation.{key} instead"
            )


def _check_caches(c: RunSections) -> None:
    how = c.generation.cache_on_update
    if how == "salt" and not c.generation.prefix_caching:
        raise ValueError(
            "generation.cache_on_update = 'salt' with generation.prefix_caching = false: there is no "
            "prefix cache to keep apart by version. Use 'keep', which is the same there, or turn "
            "prefix_caching on"
        )
    if how != "recompute" and getattr(c.algorithm, "sampler", None) == "exact":
        raise ValueError(
            f"generation.cache_on_update = {how!r} with algorithm.sampler = 'exact': a response in "
            "flight at an update continues from keys and values of the old weights, so no version "
            "alone has sampled its later tokens. Use cache_on_update = 'recompute', or sampler = "
            "'sampled'"
        )


def _check_speculation(c: RunSections) -> None:
    settings = c.generation.speculative
    if settings is None:
        return
    method, key = settings.get("method"), "generation.speculative"
    if method not in (*_WEIGHTLESS, _DRAFT):
        raise ValueError(
            f"{key}.method = {method!r}: what proposes tokens has weights that are neither trained "
            "nor published, and would stay as they are while the policy moves away from them. Use "
            f"one of {', '.join(map(repr, _WEIGHTLESS))} (no weights), or {_DRAFT!r} with a folder "
            "of the policy's own tensors"
        )
    if (method == _DRAFT) != ("model" in settings):
        raise ValueError(
            f"{key}.method = {method!r} with {key}.model = {settings.get('model')!r}: a draft model "
            f"needs a folder, and nothing else takes one. Set method = {_DRAFT!r} and model, or "
            "remove model"
        )
    if settings.get("rejection_sample_method") == "synthetic":
        raise ValueError(
            f"{key}.rejection_sample_method = 'synthetic' accepts drafts by a given rate and not by "
            "their probability, so that responses are not the policy's. Remove it"
        )


def check_staleness(c: RunSections) -> None:
    """Check that the staleness bound holds and the learner never waits for ever.

    Raises `ValueError` for settings under which it does not.
    """
    settings, publish_every, groups = c.staleness, c.weights.publish_every, c.fresh_groups
    if publish_every > settings.max_staleness + 1:
        raise ValueError(
            f"weights.publish_every = {publish_every} is over staleness.max_staleness + 1 = "
            f"{settings.max_staleness + 1}: the learner would wait for ever for a version that is "
            "never published. Publish more often, or allow more staleness"
        )
    largest = largest_look_ahead(
        max_staleness=settings.max_staleness,
        publish_every=publish_every,
        groups_per_step=groups,
    )
    what = "run.groups_per_step" if c.buffer.replay is None else "the fresh groups of a step"
    if settings.look_ahead > largest:
        raise ValueError(
            f"staleness.look_ahead = {settings.look_ahead} is over {largest} = (staleness."
            f"max_staleness + 1 - weights.publish_every) * {what} + 1 = "
            f"({settings.max_staleness} + 1 - {publish_every}) * {groups} + 1: a group "
            "overtaken so often would be too old. Lower look_ahead (groups in the order of their "
            "completion have no bound at all), or allow more staleness"
        )
    _check_on_stale(c)
    if settings.adaptive is not None:
        _check_adaptive(c)


def _check_on_stale(c: RunSections) -> None:
    settings = c.staleness
    on_stale, limit, bound = settings.on_stale, settings.stale_limit, settings.max_staleness
    if on_stale != "wait" and bound == 0:
        raise ValueError(
            f"staleness.on_stale = {on_stale!r} with staleness.max_staleness = 0: exactly on-policy "
            "training has to wait for every publish. Use on_stale = 'wait', or allow staleness"
        )
    if on_stale == "drop" and settings.look_ahead > 1:
        raise ValueError(
            f"staleness.on_stale = 'drop' with staleness.look_ahead = {settings.look_ahead}: a group "
            "gets old by being overtaken, so the slow ones (long answers) would be discarded. Use "
            "look_ahead = 1, or on_stale = 'wait'"
        )
    if on_stale != "reweight":
        if limit is not None:
            raise ValueError(
                f"staleness.stale_limit = {limit} with staleness.on_stale = {on_stale!r}: it is the "
                "bound of on_stale = 'reweight' only. Remove it, or set on_stale = 'reweight'"
            )
        return
    if limit is None or limit <= bound:
        raise ValueError(
            f"staleness.on_stale = 'reweight' needs a staleness.stale_limit over "
            f"staleness.max_staleness = {bound}, found {limit}. Set it to the largest staleness that "
            "may be trained, or use on_stale = 'wait'"
        )
    correction = getattr(c.algorithm, "correction", None)
    bypass = getattr(c.algorithm, "proximal", None) == "bypass"
    if correction is None or (correction.type == "none" and not bypass):
        raise ValueError(
            "staleness.on_stale = 'reweight' needs importance weights, with which groups over "
            "max_staleness are trained: an algorithm.correction other than 'none', or algorithm."
            "proximal = 'bypass', whose ratio is to the sampler. Set one, or use 'drop'"
        )


def _check_adaptive(c: RunSections) -> None:
    settings, adaptive = c.staleness, c.staleness.adaptive
    assert adaptive is not None
    if not settings.pipeline_depth <= settings.max_staleness or settings.max_staleness == 0:
        raise ValueError(
            f"staleness.adaptive with staleness.pipeline_depth = {settings.pipeline_depth} and "
            f"staleness.max_staleness = {settings.max_staleness}: the depth moves between 0 and "
            "max_staleness, and starts at pipeline_depth. Raise max_staleness, or lower the depth"
        )
    if adaptive.ess_low >= adaptive.ess_high:
        raise ValueError(
            f"staleness.adaptive.ess_low = {adaptive.ess_low:g} is not under staleness.adaptive."
            f"ess_high = {adaptive.ess_high:g}. Lower the first"
        )


def check_replay(c: RunSections) -> None:
    """Check that groups can be replayed and are trained correctly.

    Raises `ValueError` where no group could ever be replayed, or where a replayed group would be
    trained without a correction for its sampler.
    """
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


def _check_sizes(c: RunSections, replay: Replay) -> None:
    groups, learner, fresh = c.run.groups_per_step, c.learner, c.fresh_groups
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


def _check_priority(c: RunSections, replay: Replay) -> None:
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


def largest_look_ahead(*, max_staleness: int, publish_every: int, groups_per_step: int) -> int:
    """Return the largest window with which the learner always gets a whole step of groups.

    While it waits at version s, the newest version that gets live is at least
    s - (publish_every - 1). The bound must then admit (s + 1) * groups_per_step groups.
    """
    return (max_staleness + 1 - publish_every) * groups_per_step + 1
