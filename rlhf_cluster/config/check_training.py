"""Checks of `[learner]`, `[critic]`, `[weights]`, `[checkpoint]` against other sections.

`config.run_config` calls them; `config.stage_config` calls `check_checkpoint` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.rl_run import Critic
from rlhf_cluster.sections.training import Checkpoint
from rlhf_cluster.util.provenance import remove_credentials


def check_batch(c: RunSections) -> Iterator[str]:
    """Refuse a batch that is too small for all ranks, and a schedule that is longer than the run."""
    learner, groups, size = c.learner, c.run.groups_per_step, c.algorithm.group_size
    parts = learner.ranks * learner.minibatches
    bound = f"learner.ranks * learner.minibatches = {learner.ranks} * {learner.minibatches}"
    idle = (
        "some ranks would have nothing to train on. Raise the batch, or lower the ranks or the "
        "minibatches"
    )
    if c.algorithm.unit_size > 1 and groups < parts:
        yield (
            f"{{run.groups_per_step}} is under {bound}, and with {{algorithm.type}} a group is one "
            f"pair: {idle}"
        )
    elif groups * size < parts:
        yield (
            f"run.groups_per_step * algorithm.group_size = {groups} * {size} is under {bound}: {idle}"
        )
    total = c.run.steps * learner.epochs * learner.minibatches
    if learner.decay_steps is not None and learner.warmup_steps + learner.decay_steps > total:
        yield (
            f"learner.warmup_steps + learner.decay_steps = {learner.warmup_steps} + "
            f"{learner.decay_steps} are over run.steps * learner.epochs * learner.minibatches = "
            f"{total} optimizer steps. Lower them, or train longer"
        )


def check_critic(c: RunSections) -> Iterator[str]:
    """Refuse a critic that the algorithm does not learn, or that the learner cannot train."""
    needed = ALGORITHMS[c.algorithm.type](c.algorithm).needs_critic
    if c.critic != Critic() and not needed:
        yield (
            "[critic] with {algorithm.type}: that algorithm learns no values. Remove the section, or "
            "set algorithm.type = 'ppo'"
        )
    if c.critic.kind == "head" and c.learner.backend != "fsdp2":
        yield (
            "{critic.kind} with {learner.backend}: the head's passes run inside the policy's backward "
            "pass, which a DeepSpeed engine runs for its own module alone. Set learner.backend = "
            "'fsdp2', or critic.kind = 'separate'"
        )
    if c.learner.lora is not None and needed and c.critic.kind == "separate":
        yield (
            "[learner.lora] with {algorithm.type}: the critic starts as a copy of the policy's own "
            "weights. Remove the section, or use an algorithm without a critic"
        )


def check_weights(c: RunSections) -> Iterator[str]:
    """Refuse formats without what they store, and a mirror that overlaps a folder of the run."""
    weights, lora = c.weights, c.learner.lora
    if weights.format == "adapter" and lora is None:
        yield (
            "{weights.format} without [learner.lora]: all weights are trained, and there are no "
            "adapters to write. Add the section, or set weights.format = 'delta' or 'full'"
        )
    if weights.rounding == "stochastic" and lora is None:
        yield (
            "{weights.rounding} without [learner.lora]: only what is merged from adapters is rounded "
            "by it. Remove it, or add the section"
        )
    elif weights.rounding == "stochastic" and c.publish_dtype != "bfloat16":
        yield (
            f"{{weights.rounding}} with versions in {c.publish_dtype}, to which nothing is rounded. "
            "Remove it, or set weights.dtype = 'bfloat16'"
        )
    found = folder_beside_copies(c) if weights.is_relayed else None
    if found is not None:
        yield (
            f"weights.mirror = {weights.mirror_folder!r} and {found} are one folder, or one is in the "
            "other: what is mirrored and its copies would be on one disk. Give the mirror a "
            "separate folder that every node has for itself, such as /dev/shm/mirror"
        )


def folder_beside_copies(c: RunSections) -> str | None:
    """Return key and value of a folder of the run that contains, or is in, the relay's folder.

    None where the folders are apart.
    """
    mirror = Path(c.weights.mirror_folder).absolute()
    for key, value in {"run.root": c.run.root, "weights.root": c.weights.root}.items():
        if value is None:
            continue
        folder = Path(value).absolute()
        if folder.is_relative_to(mirror) or mirror.is_relative_to(folder):
            return f"{key} = {value!r}"
    return None


def check_checkpoint(checkpoint: Checkpoint, run_dir: Path) -> Iterator[str]:
    """Refuse copies that cannot be written, or that would be deleted with the run directory."""
    url = checkpoint.copy_to
    if url is None:
        return
    from fsspec import available_protocols, get_filesystem_class

    shown = f"checkpoint.copy_to = {remove_credentials(url)!r}"
    protocol, separator, _ = url.partition("://")
    if not separator or "::" in url:
        yield (
            f"{shown}: not the URL of one storage. Give one such as file:///mnt/copies or "
            "s3://bucket/runs"
        )
        return
    if protocol not in available_protocols():
        yield (
            f"{shown}: unknown protocol {protocol!r}. fsspec knows "
            f"{', '.join(sorted(available_protocols()))}"
        )
        return
    try:
        kind = get_filesystem_class(protocol)
    except ImportError as error:
        yield f"{shown}: {error}"
        return
    if protocol in ("file", "local"):
        path, run_dir = Path(kind._strip_protocol(url)), run_dir.absolute()
        if path.is_relative_to(run_dir):
            yield (
                f"{shown} is in the run directory {run_dir}: what deletes the checkpoints would delete "
                "their copies too. Give a folder elsewhere"
            )
