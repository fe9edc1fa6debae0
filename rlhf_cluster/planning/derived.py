"""Numbers that follow from a configuration, for people to check before they start a run."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import pool_sections
from rlhf_cluster.config.replay import fresh_groups
from rlhf_cluster.planning.placement import Bundle, demand


def derived(config: RunConfig) -> dict[str, str]:
    """What the settings amount to, as name and text."""
    run, group_size = config.run, config.algorithm.group_size
    updates = config.learner.epochs * config.learner.minibatches
    samples = run.groups_per_step * group_size
    longest = config.generation.max_response_tokens
    fresh = fresh_groups(config)
    replayed = run.groups_per_step - fresh
    again = f", {replayed:,} of them replayed" if replayed else ""
    return {
        "steps": f"{run.steps:,}, with {updates:,} optimizer steps each",
        "prompts": f"{run.steps * fresh:,} ({fresh:,} a step)",
        "samples a step": f"{samples:,} ({run.groups_per_step:,} prompts x {group_size:,}{again})",
        "response tokens a step": f"at most {samples * longest:,}",
        "longest sequence": f"{config.max_sequence_tokens:,} tokens",
        "max staleness": f"{config.staleness.bound} steps",
        "warm-up": f"{config.sft.steps:,} steps of {config.sft.batch_size:,} examples"
        if config.sft.steps
        else "none",
        "held-out prompts": f"{config.evaluation.num_prompts:,}",
        **{
            f"{pool} demand": total_resources(
                [b for b in demand(config) if b.owner.rsplit("-", 1)[0] == pool]
            )
            for pool in (*pool_sections(config), "learner")
        },
        "total demand": total_resources(demand(config)),
        "run directory": str(config.run_dir),
    }


def total_resources(bundles: Sequence[Bundle]) -> str:
    """The sum of all bundles' needs, such as "4.1 CPU, 2 GPU"."""
    kinds = sorted({kind for bundle in bundles for kind in bundle.resources})
    sums = {kind: sum(b.resources.get(kind, 0.0) for b in bundles) for kind in kinds}
    return ", ".join(f"{amount:g} {kind}" for kind, amount in sums.items()) or "nothing"
