"""The section of the scoring pool. It stands apart because it pulls in every reward's own section."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.config.base import Section
from rlhf_cluster.config.sections import Dtype
from rlhf_cluster.rewards import RewardConfig


class Scoring(Section):
    """The scoring pool: a frozen reference model and the rewards."""

    workers: PositiveInt = 1
    rewards: list[RewardConfig] = Field(min_length=1)
    reference: bool = False
    """Compute the starting policy's log-probabilities of every response token."""
    dtype: Dtype = "bfloat16"
    """Compute type of the reference model."""
    tokens_per_batch: PositiveInt = 16384
    """Token budget of one forward pass of the frozen models."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    request_timeout_s: PositiveFloat = 300.0
    """Deadline of one group on one worker, all rewards and the reference included."""
    max_retries: int = Field(default=2, ge=0)
    """How often a group whose scoring failed is tried again before it is discarded."""
    max_error_rate: float = Field(default=0.5, gt=0, le=1)
    """The run stops when more than this share of the last 100 groups failed to be scored."""
