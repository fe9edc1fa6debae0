"""The section [generation.quarantine]."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rlhf_cluster.config.base import Section


class Quarantine(Section):
    """When a generation worker that still answers is drained and replaced (`rlhf_cluster.quarantine`).
    Each costs one of `cluster.max_restarts`."""

    max_faults: int = Field(default=5, ge=0)
    """Groups that failed on one worker within `window_s`, and on no other half as many. 0: no rule."""
    window_s: PositiveFloat = 600.0
    straggler_factor: float = Field(default=5.0, ge=0)
    """A straggler takes more than this many times as long a token as the others do, by the medians of
    the last `straggler_groups` groups, and seconds more a group. 0: no rule."""
    straggler_groups: PositiveInt = 20

    @field_validator("straggler_factor")
    @classmethod
    def _above_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(
                f"straggler_factor = {value:g} would drain workers that are as fast as the others. "
                "Give a factor over 1, or 0 for no rule"
            )
        return value
