"""Checks of `[learner]`, `[model]`, `[weights]`, `[checkpoint]` against other sections.

`config.run_config` calls them; `config.stage_config` calls those that an offline stage needs.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.gpu_shares import is_share
from rlhf_cluster.sections.rl_run import Checkpoint, Learner, Model
from rlhf_cluster.util.provenance import remove_credentials


def check_learner(c: RunSections) -> None:
    """Check that spares can be used and `min_ranks` has an effect.

    Raises `ValueError` where they cannot or it has none.
    """
    _check_spares(c.learner)
    least, ranks, on_loss = c.learner.min_ranks, c.learner.ranks, c.learner.on_loss
    if least > ranks:
        raise ValueError(
            f"learner.min_ranks = {least} is over learner.ranks = {ranks}: no number of ranks is both. "
            "Lower it, or raise learner.ranks"
        )
    if on_loss == "restart" and least != Learner.model_fields["min_ranks"].default:
        raise ValueError(
            f"learner.min_ranks = {least} with learner.on_loss = 'restart': a run never continues "
            "with fewer ranks then. Remove it, or set on_loss = 'shrink'"
        )


def _check_spares(learner: Learner) -> None:
    if learner.spares > learner.ranks:
        raise ValueError(
            f"learner.spares = {learner.spares} is over learner.ranks = {learner.ranks}: as many "
            "are used after a failure as there are ranks, and the others would never be. Lower it"
        )
    if learner.spares and not learner.max_restarts:
        raise ValueError(
            f"learner.spares = {learner.spares} with learner.max_restarts = 0: the first loss ends the "
            "run, and no spare would ever be used. Remove it, or raise learner.max_restarts"
        )


def check_model(model: Model) -> None:
    """Check that exactly one model is given and that it can be made. Raises `ValueError`."""
    if (model.path is None) == (model.init is None):
        found = "both" if model.path else "neither"
        raise ValueError(
            f"model.path and model.init: {found} given. Give model.path (a Hugging Face folder) or "
            "a [model.init] section (a small model made from numbers), not both"
        )
    if model.init is not None:
        init = model.init
        if model.tokenizer is not None:
            raise ValueError(
                "model.tokenizer with [model.init]: a made model comes with its tokenizer. "
                "Remove model.tokenizer, or give model.path"
            )
        if init.hidden_size % init.num_heads:
            raise ValueError(
                f"model.init.hidden_size = {init.hidden_size} is not a multiple of "
                f"model.init.num_heads = {init.num_heads}. Change one of them"
            )
        if init.num_heads % (init.num_kv_heads or init.num_heads):
            raise ValueError(
                f"model.init.num_heads = {init.num_heads} is not a multiple of "
                f"model.init.num_kv_heads = {init.num_kv_heads}. Change one of them"
            )


def check_weights(c: RunSections) -> None:
    """Check that the relay's folder is used, and separate from the folders of the run.

    Raises `ValueError` where nothing is copied to it, or where it and a folder of the run overlap.
    """
    weights = c.weights
    if weights.mirror is not None and weights.transport == "files":
        raise ValueError(
            f"weights.mirror = {weights.mirror!r} with weights.transport = 'files': readers read the "
            "store, and nothing is copied. Set weights.transport = 'relay', or remove weights.mirror"
        )
    if not weights.is_relayed:
        return
    found = folder_beside_copies(c)
    if found is not None:
        raise ValueError(
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


def check_checkpoint(checkpoint: Checkpoint, run_dir: Path) -> None:
    """Check that copies of checkpoints can be written and survive the checkpoints themselves.

    Raises `ValueError` for an unusable URL, and for a folder inside the run directory.
    """
    url = checkpoint.copy_to
    if url is None:
        return
    from fsspec import available_protocols, get_filesystem_class

    shown = remove_credentials(url)
    protocol, separator, _ = url.partition("://")
    if not separator or "::" in url:
        raise ValueError(
            f"checkpoint.copy_to = {shown!r}: not the URL of one storage. Give one such as "
            "file:///mnt/copies or s3://bucket/runs"
        )
    if protocol not in available_protocols():
        raise ValueError(
            f"checkpoint.copy_to = {shown!r}: unknown protocol {protocol!r}. fsspec knows "
            f"{', '.join(sorted(available_protocols()))}"
        )
    try:
        kind = get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f"checkpoint.copy_to = {shown!r}: {error}") from None
    if protocol in ("file", "local"):
        path, run_dir = Path(kind._strip_protocol(url)), run_dir.absolute()
        if path == run_dir or run_dir in path.parents:
            raise ValueError(
                f"checkpoint.copy_to = {shown!r} is in the run directory {run_dir}: what deletes the "
                "checkpoints would delete their copies too. Give a folder elsewhere"
            )


def check_ranks(learner: Learner) -> None:
    """Check that each rank can use its GPUs. Raises `ValueError`."""
    if learner.num_gpus > 1:
        raise ValueError(
            f"learner.num_gpus = {learner.num_gpus:g}: a rank drives one GPU (1), a share of one, or "
            "none (0). Set learner.ranks for more GPUs"
        )
    if is_share(learner.num_gpus) and learner.ranks > 1:
        raise ValueError(
            f"learner.num_gpus = {learner.num_gpus:g} with learner.ranks = {learner.ranks}: NCCL "
            "connects whole GPUs, one for each rank. Set learner.ranks = 1, or learner.num_gpus = 1"
        )


def check_devices(c: RunSections) -> None:
    """Check that ranks and workers of all pools can use their GPUs. Raises `ValueError`."""
    check_ranks(c.learner)
    generation = c.generation
    gpus, parallel = generation.num_gpus, generation.tensor_parallel_size
    shared = is_share(gpus) and parallel == 1
    if gpus and gpus != parallel and not shared:
        raise ValueError(
            f"generation.num_gpus = {gpus:g} and generation.tensor_parallel_size = {parallel}: a "
            "worker needs one GPU a tensor-parallel part. Make them equal (or num_gpus = 0 for CPU, or "
            "a share of a GPU with one part)"
        )
    if shared and generation.kv_cache_bytes is None:
        raise ValueError(
            f"generation.num_gpus = {gpus:g} without generation.kv_cache_bytes: vLLM measures what is "
            "free for its cache, and finds what other processes of the GPU have not taken yet. Set "
            "generation.kv_cache_bytes, so that weights and cache fit this share"
        )
    sections = {
        "scoring": c.scoring,
        **{f"scoring.pools.{n}": p for n, p in c.scoring.pools.items()},
    }
    for name, section in sections.items():
        if section.num_gpus > 1 and section.num_gpus % 1:
            raise ValueError(
                f"{name}.num_gpus = {section.num_gpus:g}: a share of a GPU, or whole ones. Round it"
            )
