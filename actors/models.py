"""A made model belongs to its run: it moves from the scratch folder into the run directory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TypeVar

from rlhf_cluster.config.either import AnyConfig
from rlhf_cluster.inputs import Inputs
from rlhf_cluster.rundir import RunDir
from rlhf_cluster.stages.inputs import StageInputs

InputsT = TypeVar("InputsT", Inputs, StageInputs)


def move_in(inputs: InputsT, config: AnyConfig, rundir: RunDir) -> InputsT:
    """The inputs with the model folder that stays. One that is there from before is kept."""
    if config.model.init is None:
        return inputs
    if not rundir.model.exists():
        shutil.copytree(inputs.model_dir, rundir.model)
    return replace(inputs, model_dir=rundir.model)
