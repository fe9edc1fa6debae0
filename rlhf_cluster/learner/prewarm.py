"""Preparation of a process for any learner rank: imports, which are most of a rank's start.

No weights are read, no device is used and no group is joined. A warm process needs only host memory.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rlhf_cluster.sections.training import Learner


def warm(settings: Learner, model_dir: str | Path) -> None:
    """Import the modules that a rank with `settings` uses, and the code of the model's class."""
    importlib.import_module("rlhf_cluster.learner.learner_rank")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if settings.lora is not None:
        importlib.import_module("peft")
    if settings.backend == "zero3":
        from rlhf_cluster.learner.sharding.zero3 import import_deepspeed

        import_deepspeed(torch.device("cuda" if settings.num_gpus else "cpu"))
