"""What `[checkpoint]` must agree on with the other sections; called by `config.run` and
`config.stage`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.environment import without_credentials

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig
    from rlhf_cluster.config.stage import StageConfig


def check_checkpoint(c: RunConfig | StageConfig) -> None:
    """Raises `ValueError` for a second copy that cannot be written or would go with the first."""
    url = c.checkpoint.copy_to
    if url is None:
        return
    from fsspec import available_protocols, get_filesystem_class

    shown = without_credentials(url)
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
        path, run_dir = Path(kind._strip_protocol(url)), c.run_dir.absolute()
        if path == run_dir or run_dir in path.parents:
            raise ValueError(
                f"checkpoint.copy_to = {shown!r} is in the run directory {run_dir}: what deletes the "
                "checkpoints would delete their copies too. Give a folder elsewhere"
            )
