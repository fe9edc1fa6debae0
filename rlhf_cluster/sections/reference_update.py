"""Updates of the reference's weights: never, periodically, or as a moving average."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.sections.section import Section


class FixedReference(Section):
    """Fixed reference: the policy at the start of reinforcement learning."""

    type: Literal["fixed"] = "fixed"


class PeriodicReference(Section):
    """Reference that is periodically replaced by the policy's live version."""

    type: Literal["periodic"] = "periodic"
    every: PositiveInt
    """Versions between two updates. An update happens when a version goes live that is at least
    this many after the last update's."""


class EmaReference(Section):
    """Reference that is an exponential moving average of the policy's live versions."""

    type: Literal["ema"] = "ema"
    every: PositiveInt = 1
    """Versions between two updates. An update happens when a version goes live that is at least
    this many after the last update's."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Weight of the old reference at an update."""


ReferenceUpdate = Annotated[
    FixedReference | PeriodicReference | EmaReference, Field(discriminator="type")
]
