"""When a reference gets newer weights: never, periodically, or as a moving average."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.sections.section import Section


class FixedReference(Section):
    """The reference stays the policy as it is when reinforcement learning begins."""

    type: Literal["fixed"] = "fixed"


class PeriodicReference(Section):
    """The reference becomes the policy's live version."""

    type: Literal["periodic"] = "periodic"
    every: PositiveInt
    """Versions between two moves; it moves when one goes live that many after the last."""


class EmaReference(Section):
    """The reference is an exponential moving average of the policy's live versions."""

    type: Literal["ema"] = "ema"
    every: PositiveInt = 1
    """Versions between two moves; it moves when one goes live that many after the last."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Share of the old reference that stays at a move."""


ReferenceUpdate = Annotated[
    FixedReference | PeriodicReference | EmaReference, Field(discriminator="type")
]
