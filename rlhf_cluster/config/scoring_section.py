"""The section of the scoring pool. It has a separate module as it imports every reward's section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.config.pool_sections import (
    EXACT,
    POOL_NAME,
    REFERENCE,
    SCORING,
    TEACHER,
    ScoringPool,
)
from rlhf_cluster.rewards import RewardConfig
from rlhf_cluster.rewards.combination import (
    Objective,
    WeightedSum,
)
from rlhf_cluster.sections.reference_update import FixedReference, ReferenceUpdate
from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import (
    Dtype,
    FrozenQuantization,
)


class Scoring(Section):
    """The scoring pool: rewards, the reference model, and exact log-probabilities."""

    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """Live workers that the pool needs to start, and to survive once it may replace none.

    Default: half of `workers`, rounded up. The others may join later.
    """
    rewards: list[RewardConfig] = Field(min_length=1)
    objective: Objective = WeightedSum()
    """Rule that makes one reward of all; see `rewards.combination`."""
    step_separator: str = Field(default="\n", min_length=1)
    """Text that separates the reasoning steps of a response, for rewards that score steps.

    Blank segments do not count.
    """
    reference: bool = False
    """Compute the reference policy's log-probabilities of every response token."""
    reference_update: ReferenceUpdate = FixedReference()
    """Reference policy: the starting policy, or one that moves (`scoring.moving_reference`)."""
    teacher: str | None = None
    """Folder of a frozen model with the policy's tokenizer, which gives the log-probabilities of every
    response token that `on_policy_distillation` learns from."""
    dtype: Dtype = "bfloat16"
    """Compute type of the reference and of the teacher. With `learner.dtype` a policy equal to the
    reference has a KL of exactly 0."""
    quantization: FrozenQuantization | None = None
    """Quantization (`int8`) of the reference and of the teacher; see `models.int8_linear`.

    A policy equal to the reference then has a KL slightly above 0. Exact log-probabilities are never
    rounded.
    """
    exact_logprobs: bool = False
    """Compute every response token's log-probability under the version that sampled it.

    They are computed as the learner computes them, which separates engine mismatch from staleness;
    see `scoring.exact_logprobs`.
    """
    cached_versions: PositiveInt = 2
    """Versions that a worker keeps in host memory for `exact_logprobs`, each as large as a published
    one; any other is read from the weight store again."""
    tokens_per_batch: PositiveInt = 16384
    """Token budget of one forward pass of the frozen models."""
    batch_groups: PositiveInt = 1
    """Most groups that share the forward passes of the reference, the teacher or a reward model.

    Groups share passes where they wait for the same model and fit the token budget together. 1: no
    sharing, so that no value depends, even in its last bits, on what is scored at the same time. See
    `models.shared_passes`.
    """
    cache_entries: int = Field(default=0, ge=0)
    """Most scores that a worker caches, to return them for the same prompt and response.

    Scores of reward models, ensembles, and judges that rate at temperature 0 are cached. 0: none, so
    that no score depends, even in its last bits, on what was scored before. See
    `scoring.served_rewards.ScoreCache`.
    """
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    request_timeout_s: PositiveFloat = 300.0
    """Deadline of one group on one worker, all rewards and models included."""
    max_retries: int = Field(default=2, ge=0)
    """Most retries of a group whose scoring failed, before it is discarded."""
    max_error_rate: float = Field(default=0.5, gt=0, le=1)
    """The run stops when more than this share of the last 100 groups failed to be scored."""
    pools: dict[Annotated[str, Field(pattern=POOL_NAME)], ScoringPool] = Field(default_factory=dict)
    """Further pools, by name, for models or rewards that should scale separately.

    The workers of `[scoring]` serve the rest, join the results of all pools, and store them.
    """

    @property
    def pays_steps(self) -> bool:
        """Whether a reward that is optimised scores reasoning steps."""
        return any(reward.scores_steps and not reward.watch for reward in self.rewards)

    @property
    def models(self) -> frozenset[str]:
        """Names of the configured models of log-probabilities (`config.pool_sections.MODELS`)."""
        models = {REFERENCE: self.reference, TEACHER: self.teacher, EXACT: self.exact_logprobs}
        return frozenset(name for name, setting in models.items() if setting)

    def served_by(self, pool: str) -> frozenset[str]:
        """Return names of the models (`config.pool_sections.MODELS`) and rewards that a pool serves."""
        if pool != SCORING:
            return frozenset(self.pools[pool].serves)
        names = self.models | {reward.name or reward.type for reward in self.rewards}
        return frozenset(names.difference(*(section.serves for section in self.pools.values())))

    def of_pool(self, pool: str) -> Scoring:
        """Return these settings with the precision and device of `pool`."""
        own = self.pools.get(pool)
        if own is None:
            return self
        return self.model_copy(
            update={
                "num_gpus": own.num_gpus,
                "dtype": own.dtype or self.dtype,
                "quantization": own.quantization or self.quantization,
            }
        )

    def pool_of(self, name: str) -> str:
        """Return the pool that serves a model or a reward."""
        owners = (pool for pool, section in self.pools.items() if name in section.serves)
        return next(owners, SCORING)
