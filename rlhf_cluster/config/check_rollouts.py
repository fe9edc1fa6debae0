"""Checks of `[generation]`, `[staleness]`, `[buffer.replay]` and `[autoscale]` against other sections.

`config.run_config` calls them. docs/staleness.md and docs/replay.md give the reasons. Settings
that depend on the device are checked in `actors.vllm.vllm_arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cluster.config.pools import pool_sections
from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.rl_run import Generation
from rlhf_cluster.sections.training import Lora


def check_generation(c: RunSections) -> Iterator[str]:
    """Refuse caches that give tokens probabilities under no single version where one is needed."""
    if (
        c.generation.cache_on_update != "recompute"
        and getattr(c.algorithm, "sampler", None) == "exact"
    ):
        yield (
            "{generation.cache_on_update} with {algorithm.sampler}: a response in flight at an update "
            "continues from keys and values of the old weights, so no version alone has sampled its "
            "later tokens. Use cache_on_update = 'recompute', or sampler = 'sampled'"
        )


def check_staleness(c: RunSections) -> Iterator[str]:
    """Refuse a staleness bound that does not hold, or for which the learner waits for ever."""
    settings, publish_every, groups = c.staleness, c.weights.publish_every, c.fresh_groups
    if publish_every > settings.max_staleness + 1:
        yield (
            "{weights.publish_every} is over staleness.max_staleness + 1 = "
            f"{settings.max_staleness + 1}: the learner would wait for ever for a version that is "
            "never published. Publish more often, or allow more staleness"
        )
        return
    largest = largest_look_ahead(
        max_staleness=settings.max_staleness,
        publish_every=publish_every,
        groups_per_step=groups,
    )
    what = "run.groups_per_step" if c.buffer.replay is None else "the fresh groups of a step"
    if settings.look_ahead > largest:
        yield (
            f"{{staleness.look_ahead}} is over {largest} = (staleness.max_staleness + 1 - "
            f"weights.publish_every) * {what} + 1 = ({settings.max_staleness} + 1 - {publish_every}) * "
            f"{groups} + 1: a group overtaken so often would be too old. Lower look_ahead (groups in "
            "the order of their completion have no bound at all), or allow more staleness"
        )
    if settings.on_stale == "reweight" and _has_no_weights(c):
        yield (
            "{staleness.on_stale} needs importance weights, with which groups over max_staleness are "
            "trained: an algorithm.correction other than 'none', or algorithm.proximal = 'bypass', "
            "whose ratio is to the sampler. Set one, or use 'drop'"
        )


def _has_no_weights(c: RunSections) -> bool:
    """Return whether the algorithm trains tokens as if the policy itself had sampled them."""
    correction = getattr(c.algorithm, "correction", None)
    # with "bypass" the surrogate's own ratio is the one to the sampler, with or without a rule
    bypass = getattr(c.algorithm, "proximal", None) == "bypass"
    return correction is None or (correction.type == "none" and not bypass)


def check_replay(c: RunSections) -> Iterator[str]:
    """Refuse replay where no group could ever be replayed, or none with a correct gradient."""
    replay, group_size = c.buffer.replay, c.algorithm.group_size
    if replay is None:
        return
    if not c.buffer.durable:
        yield (
            "[buffer.replay] with {buffer.durable}: groups are replayed from their files. Set "
            "buffer.durable = true, or remove the section"
        )
    if c.staleness.max_staleness == 0:
        yield (
            "[buffer.replay] with {staleness.max_staleness}: a group is a step older when it is "
            "trained again, and nothing older than the weights may be trained. Allow staleness (over "
            "staleness.pipeline_depth, so that groups are young enough after their first step), or "
            "remove the section"
        )
    if _has_no_weights(c):
        has_key = hasattr(c.algorithm, "correction")
        yield (
            "[buffer.replay] with {algorithm.type}, which has "
            f"{'correction = ' + repr('none') if has_key else 'no off-policy correction'}: the policy "
            "was trained on a replayed group already, so it is never its sampler. Use a "
            "policy-gradient algorithm with a correction such as 'token_tis' or with proximal = "
            "'bypass', or remove the section"
        )
    if replay.priority != "uniform" and group_size == 1:
        yield (
            "{buffer.replay.priority} with {algorithm.group_size}: a single reward has no spread. Use "
            "priority = 'uniform', or larger groups"
        )
    groups, learner, fresh = c.run.groups_per_step, c.learner, c.fresh_groups
    numbers = (
        "{buffer.replay.fraction} of {run.groups_per_step} is "
        f"{groups - fresh} replayed groups and {fresh} fresh ones a step"
    )
    if fresh in (0, groups):
        yield (
            f"{numbers}; there must be at least one of each. Change the fraction, or raise "
            "groups_per_step"
        )
    elif fresh * group_size < learner.ranks * learner.minibatches:
        yield (
            f"{numbers}: the first steps have the fresh ones alone, and their {fresh * group_size} "
            f"rollouts are under learner.ranks * learner.minibatches = {learner.ranks} * "
            f"{learner.minibatches}. Lower the fraction, or raise groups_per_step"
        )


def largest_look_ahead(*, max_staleness: int, publish_every: int, groups_per_step: int) -> int:
    """Return the largest window with which the learner always gets a whole step of groups.

    While it waits at version s, the newest version that gets live is at least
    s - (publish_every - 1). The bound must then admit (s + 1) * groups_per_step groups.
    """
    return (max_staleness + 1 - publish_every) * groups_per_step + 1


SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""

_OWNED = {"max_lora_rank", "max_cpu_loras", "lora_target_modules", "default_mm_loras"}


def check_served_adapters(c: RunSections) -> Iterator[str]:
    """Refuse adapters that no engine serves, or that it would serve as another policy."""
    if c.generation.lora != "served":
        return
    lora = c.learner.lora
    if lora is None:
        yield (
            "{generation.lora} without [learner.lora]: all weights are trained, and there is no "
            "adapter to serve. Add the section, or remove generation.lora"
        )
        return
    if c.weights.format != "adapter":
        yield (
            "{generation.lora} with {weights.format}: such versions hold merged weights, and no "
            "adapter. Set weights.format = 'adapter'"
        )
    if c.scoring.exact_logprobs and c.publish_dtype != "float32":
        yield (
            f"{{generation.lora}} with {{scoring.exact_logprobs}} and versions in {c.publish_dtype}: "
            "the engine samples with the adapter itself, and scoring computes with what was merged and "
            "rounded to that type, another policy. Set weights.dtype = 'float32', or exact_logprobs = "
            "false"
        )
    yield from _check_adapter(lora)
    yield from _check_engine(c.generation, lora.rank)


def _check_adapter(lora: Lora) -> Iterator[str]:
    if lora.dora:
        yield (
            "{generation.lora} with {learner.lora.dora}: vLLM serves LoRA alone, and refuses DoRA. Set "
            "generation.lora = 'merged', or dora = false"
        )
    if lora.quantize_base:
        yield (
            "{generation.lora} with {learner.lora.quantize_base}: the adapter is trained over weights "
            "that were rounded to 4 bits, and the engine would add it to those of the model folder. "
            "Set generation.lora = 'merged', or quantize_base = false"
        )
    if lora.rank > SERVED_RANKS[-1]:
        yield (
            f"{{generation.lora}} with {{learner.lora.rank}}: vLLM serves ranks up to "
            f"{SERVED_RANKS[-1]}. Lower it, or set generation.lora = 'merged'"
        )


def _check_engine(generation: Generation, rank: int) -> Iterator[str]:
    if generation.quantization is not None:
        yield (
            "{generation.lora} with {generation.quantization}: the engine would add the adapter to "
            "rounded weights, which no version describes. Set generation.lora = 'merged', which rounds "
            "what was merged, or remove quantization"
        )
    if generation.speculative is not None:
        yield (
            "{generation.lora} with {generation.speculative}: what proposes tokens would never follow "
            "the adapter. Remove it, or set generation.lora = 'merged'"
        )
    if generation.cache_on_update != "recompute":
        yield (
            "{generation.lora} with {generation.cache_on_update}: a response keeps its adapter to its "
            "end, and each adapter has separate caches, so that there is nothing to choose. Remove "
            "cache_on_update"
        )
    owned = sorted(_OWNED & generation.engine_args.keys())
    if owned:
        yield (
            f"{{generation.lora}} with generation.engine_args.{owned[0]}: [learner.lora] determines "
            "it. Remove it"
        )
    held = next((served for served in SERVED_RANKS if served >= rank), 0)
    if generation.engine_args.get("fully_sharded_loras") and held % generation.tensor_parallel_size:
        yield (
            "{generation.lora} with generation.engine_args.fully_sharded_loras and "
            f"{{generation.tensor_parallel_size}}: vLLM cuts max_lora_rank = {held} "
            "({learner.lora.rank}) into that many equal parts. Remove fully_sharded_loras"
        )


def check_autoscale(c: RunSections) -> Iterator[str]:
    """Refuse sizes and budgets that contradict those of the pools."""
    section = c.autoscale
    if section is None:
        return
    pools = pool_sections(c)
    for pool, scale in section.scales.items():
        if pool not in pools:
            yield (
                f"[autoscale.pools.{pool}] without [scoring.pools.{pool}]: there is no such pool. "
                f"Pools: {', '.join(pools)}"
            )
        elif not scale.minimum <= pools[pool].workers <= scale.maximum:
            yield (
                f"{pool}.workers = {pools[pool].workers} is not between autoscale.{pool}.minimum = "
                f"{scale.minimum} and autoscale.{pool}.maximum = {scale.maximum}. Change one of them"
            )
    if section.gpu_budget is None:
        return
    held = sum(own.workers * own.num_gpus for own in pools.values())
    if held == 0:
        yield (
            "{autoscale.gpu_budget} with num_gpus = 0 in every pool: no worker holds a GPU. Remove the "
            "budget"
        )
    if held > section.gpu_budget:
        sizes = ", ".join(f"{pool} {own.workers}" for pool, own in pools.items())
        yield (
            f"{{autoscale.gpu_budget}} is under the {held:g} GPUs that the workers at the start hold: "
            f"{sizes}. Raise the budget, or start with fewer workers"
        )
