"""What `[model]` must agree on; called by `config.run` and `config.stage`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig
    from rlhf_cluster.config.stage import StageConfig


def check_model(c: RunConfig | StageConfig) -> None:
    """Raises `ValueError` for no model, two of them, or one that cannot be made."""
    if (c.model.path is None) == (c.model.init is None):
        found = "both" if c.model.path else "neither"
        raise ValueError(
            f"model.path and model.init: {found} given. Give model.path (a Hugging Face folder) or "
            "a [model.init] section (a small model made from numbers), not both"
        )
    if c.model.init is not None:
        init = c.model.init
        if c.model.tokenizer is not None:
            raise ValueError(
                "model.tokenizer with [model.init]: a made model has a tokenizer of its own. "
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
