"""Models named by their id on the Hugging Face Hub: the folder of this machine that has one.

Promises: a model in the local cache is used as it is, without a network, so a run that resumes has
the model that it began with. A download has a deadline, and happens only where HF_HUB_OFFLINE is not
set; otherwise the error has the command that fetches the model.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.model_folder import read_index

DOWNLOAD_S = 3600.0
"""Deadline of one download in seconds."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
"""Files to download: weights in other formats are never read, and may be as large again."""
_DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download; "
    "snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])"
)


def is_hub_id(path: str) -> bool:
    """Return whether `path` may be the id of a model: OWNER/NAME, and no folder here."""
    return _ID.fullmatch(path) is not None and not Path(path).exists()


def find_cached(hub_id: str, cache: str | Path | None = None) -> Path | None:
    """Return the folder of a model in the local cache; None for one that is not whole there.

    `cache`: folder of the cache. Default: that of huggingface_hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(str(snapshot_download(hub_id, cache_dir=cache, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Return whether the folder has the files of a model; a download that was cut short lacks some."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    files = set(read_index(index).values()) if index.exists() else {"model.safetensors"}
    return all((folder / name).exists() for name in files)


def download(hub_id: str, limit_s: float = DOWNLOAD_S) -> None:
    """Download a model into the local cache, in a child process that shows its progress.

    Raises `ConfigError` for a model that cannot be had, and after `limit_s`.
    """
    command = [sys.executable, "-c", _DOWNLOAD, hub_id, *_FILES]
    try:
        done = subprocess.run(command, stderr=None, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"model.path = {hub_id!r}: not downloaded within {limit_s:g} s. {_cure(hub_id)}"
        ) from error
    if done.returncode:
        raise ConfigError(
            f"model.path = {hub_id!r}: no such folder, and it cannot be downloaded (the reason is "
            f"above). {_cure(hub_id)}"
        )


def local_folder(
    hub_id: str,
    fetch: Callable[[str], None] | None = download,
    find: Callable[[str], Path | None] = find_cached,
    variables: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = print,
) -> Path:
    """Return the folder of model `hub_id`, downloaded if it has to be. Raises `ConfigError`.

    Args:
        fetch: puts a model into the cache; None where nothing may be downloaded.
        find: looks for a model in the cache.
        variables: environment variables, of which HF_HUB_OFFLINE forbids a download.
        say: prints a line for the user before a download.
    """
    if (folder := find(hub_id)) is not None:
        return folder
    is_offline = variables.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if fetch is None or is_offline:
        why = "HF_HUB_OFFLINE is set" if is_offline else "`rlhf-cluster run` would download it"
        raise ConfigError(
            f"model.path = {hub_id!r}: no such folder, and not in the Hugging Face cache of this "
            f"machine; {why}. {_cure(hub_id)}"
        )
    say(f"{hub_id}: not in the Hugging Face cache, downloading it")
    fetch(hub_id)
    if (folder := find(hub_id)) is None:
        raise ConfigError(
            f"model.path = {hub_id!r}: downloaded, and still no whole model in the cache, with "
            f"config.json and all of its .safetensors files. {_cure(hub_id)}"
        )
    return folder


def _cure(hub_id: str) -> str:
    folder = f"models/{hub_id.partition('/')[2]}"
    return (
        f"Fetch it with: hf download {hub_id} --local-dir {folder}, and set model.path = {folder!r}"
    )
