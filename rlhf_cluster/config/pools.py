"""The pools of a run: their names, sections ([scoring], [autoscale]), sizes and needs.

    generation         samples
    scoring            everything that scores and no other pool serves; it joins and stores
    [scoring.pools.X]  what its `serves` names: a model of frozen weights or single rewards, apart

Promises:
- `pool_sections` names every pool of a run, and is the only place that does;
- what one pool serves no other pool serves, and together they serve all that is configured.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.rewards import RewardConfig
from rlhf_cluster.rewards.combination import (
    Objective,
    WeightedSum,
)
from rlhf_cluster.sections.rl_run import NEVER_STARTS, Generation
from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import (
    Dtype,
    FixedReference,
    FrozenQuantization,
    ReferenceUpdate,
)

GENERATION, SCORING = "generation", "scoring"

REFERENCE, TEACHER, EXACT = "reference", "teacher", "exact_logprobs"

MODELS = (REFERENCE, TEACHER, EXACT)
"""Names of the models that give log-probabilities rather than rewards."""

POOL_NAME = r"^[a-z][a-z0-9_]{0,31}$"

RESERVED = (
    *(GENERATION, SCORING, "learner", "training", "buffer", "control", "controller", "driver"),
    *("spare", "stage"),
)
"""Names of other processes of a run."""


class ScoringPool(Section):
    """Separate replicas for what is costly to score, in addition to those of `[scoring]`."""

    serves: list[str] = Field(min_length=1)
    """Names of what the pool serves: `reference`, `teacher`, `exact_logprobs`, and rewards."""
    workers: PositiveInt = 1
    """Workers of this pool at the start of the run."""
    min_workers: PositiveInt | None = None
    """Live workers that the pool needs to start, and to survive once it may replace none.

    Default: half of `workers`, rounded up. The others may join later.
    """
    num_cpus: PositiveFloat = 1.0
    """Logical CPUs that one worker reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker: 0, a share of one GPU, or whole ones; see `sections.values`."""
    dtype: Dtype | None = None
    """Compute type of the reference and of the teacher in this pool. Default: `scoring.dtype`.

    Each reward model has a separate setting.
    """
    quantization: FrozenQuantization | None = None
    """Quantization (`int8`) of the reference and of the teacher in this pool.

    Default: `scoring.quantization`.
    """

    def problems(self) -> Iterator[str]:
        yield from _problems_of_size(self)
        if {REFERENCE, TEACHER} & {*self.serves}:
            return
        for key in ("dtype", "quantization"):
            if getattr(self, key) is not None:
                yield (
                    f"{{{key}}} with serves = {self.serves}: it is of the reference and of the "
                    "teacher. Remove it; reward models have their own in scoring.rewards, exact "
                    "log-probabilities have learner.dtype"
                )


def _problems_of_size(pool: ScoringPool | Scoring) -> Iterator[str]:
    if pool.min_workers is not None and pool.min_workers > pool.workers:
        yield NEVER_STARTS
    if pool.num_gpus > 1 and pool.num_gpus % 1:
        yield "{num_gpus}: a share of a GPU, or whole ones. Round it"


class Scoring(Section):
    """The scoring pool: rewards, the reference model, and exact log-probabilities."""

    workers: PositiveInt = 1
    """Workers of the pool at the start of the run."""
    min_workers: PositiveInt | None = None
    """Live workers that the pool needs to start, and to survive once it may replace none.

    Default: half of `workers`, rounded up. The others may join later.
    """
    rewards: list[RewardConfig] = Field(min_length=1)
    """Rewards of a response, at least one; see [[scoring.rewards]]. `objective` combines them."""
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
    """Logical CPUs that one worker reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker: 0, a share of one GPU, or whole ones; see `sections.values`."""
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

    def problems(self) -> Iterator[str]:
        yield from _problems_of_size(self)
        if self.reference_update.type != "fixed" and not self.reference:
            yield (
                "{reference_update.type} with {reference}: there is no reference to move. Set "
                "scoring.reference = true, or remove reference_update"
            )
        if self.quantization and not (self.reference or self.teacher):
            yield (
                "{quantization} with {reference} and no scoring.teacher: it is of these two. Remove "
                "it, or set quantization on the reward models"
            )
        yield from self._problems_of_rewards()
        yield from self._problems_of_objective()
        yield from self._problems_of_pools()

    def _problems_of_rewards(self) -> Iterator[str]:
        names = [reward.name or reward.type for reward in self.rewards]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield (
                f"scoring.rewards: the name {name!r} appears {names.count(name)} times. Give each "
                "reward another name"
            )
        for name, reward in zip(names, self.rewards, strict=True):
            derived = {f"{name}.{detail}" for detail in (*reward.details, "unclipped", "counted")}
            for taken in sorted(derived & {*names}):
                yield (
                    f"scoring.rewards: the name {taken!r} is what the reward {name!r} reports in "
                    "addition to its score. Give one of them another name"
                )
            if reward.weight == 0 and not reward.watch and name not in self.objective.names:
                yield (
                    f"scoring.rewards: {name!r} has weight = 0, and the objective does not name it. "
                    "Set watch = true to have it computed and shown only"
                )
        if all(reward.watch for reward in self.rewards):
            yield (
                "scoring.rewards: all have watch = true, and nothing is left to optimise. Take it off "
                "one"
            )

    def _problems_of_objective(self) -> Iterator[str]:
        running = [r.name or r.type for r in self.rewards if r.normalize == "running"]
        if running and self.objective.type != "weighted_sum":
            yield (
                f"{{objective.type}} with normalize = 'running' of {running[0]!r}: floors and "
                "thresholds are in the unit of scores, which a running mean would move. Remove one"
            )
        if self.objective.type == "lexicographic" and self.step_rewards:
            yield (
                f"{{objective.type}} with {self.step_rewards[0]!r}, which scores reasoning steps: they "
                "are rewarded before it is known what their response opens. Let it give one score per "
                "response, or use 'constrained'"
            )

    def _problems_of_pools(self) -> Iterator[str]:
        rewards = [reward.name or reward.type for reward in self.rewards]
        owner: dict[str, str] = {}
        for pool, section in self.pools.items():
            if pool in RESERVED:
                yield f"scoring.pools.{pool}: a run has processes of that name. Choose another one"
            for name in section.serves:
                serves = f"scoring.pools.{pool}.serves names {name!r}"
                if name in owner:
                    yield (
                        f"{serves}, which {owner[name]!r} serves. Leave it in one of them; a pool "
                        "grows by its workers"
                    )
                elif name in MODELS and name in rewards:
                    yield f"{serves}, and a reward has that name too. Give the reward another name"
                elif name not in (*MODELS, *rewards):
                    known = (*(model for model in MODELS if model in self.models), *rewards)
                    yield (
                        f"{serves}, and this run scores with {', '.join(map(repr, known))}. Use one of "
                        "these"
                    )
                elif name in MODELS and name not in self.models:
                    yield (
                        f"{serves}, and scoring.{name} is not set: the pool would have nothing to do. "
                        f"Set scoring.{name}, or remove the name"
                    )
                owner.setdefault(name, pool)

    @property
    def step_rewards(self) -> list[str]:
        """Names of the optimised rewards that score reasoning steps."""
        rewards = (r for r in self.rewards if r.scores_steps and not r.watch)
        return [reward.name or reward.type for reward in rewards]

    @property
    def models(self) -> frozenset[str]:
        """Names of the configured models of log-probabilities (`config.pools.MODELS`)."""
        models = {REFERENCE: self.reference, TEACHER: self.teacher, EXACT: self.exact_logprobs}
        return frozenset(name for name, setting in models.items() if setting)

    def served_by(self, pool: str) -> frozenset[str]:
        """Return names of the models (`config.pools.MODELS`) and rewards that a pool serves."""
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


PoolSection = Generation | Scoring | ScoringPool


class HasPools(Protocol):
    """A run file whose workers sample and score."""

    @property
    def generation(self) -> Generation: ...

    @property
    def scoring(self) -> Scoring: ...


def pool_sections(config: HasPools) -> Mapping[str, PoolSection]:
    """Return the sections by pool name: `generation`, `scoring`, then those of `[scoring.pools]`."""
    return {GENERATION: config.generation, SCORING: config.scoring, **config.scoring.pools}


def no_such_pool(pool: str, pools: Iterable[str]) -> str:
    """Return the message that refuses a pool that is none of the run's `pools`."""
    there = list(pools)
    close = difflib.get_close_matches(pool, there, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f". Pools: {', '.join(there)}"
    return f"refused: no pool {pool!r}{hint}"


class PoolScale(Section):
    """Smallest and largest size of a pool, and the pause between changes."""

    minimum: PositiveInt = 1
    """Smallest number of workers that the pool may shrink to."""
    maximum: PositiveInt
    """Largest number of workers that the pool may grow to."""
    cooldown_s: PositiveFloat = 300.0
    """Seconds from one change of the pool to the next in the same direction. A change in the opposite
    direction waits four times as long."""

    def problems(self) -> Iterator[str]:
        if self.minimum == self.maximum:
            yield (
                "{minimum} and {maximum}: the pool could not change. Raise the maximum, or remove the "
                "section"
            )


class Autoscale(Section):
    """Pools that grow and shrink with the bottleneck advisor (`rlhf_cluster.run.autoscaler`).

    A pool without a section here keeps its size. The size at the start is `generation.workers` and
    its counterparts in the other pools' sections.
    """

    generation: PoolScale | None = None
    """[autoscale.generation]: limits of the generation pool. Default: it keeps its size."""
    scoring: PoolScale | None = None
    """[autoscale.scoring]: limits of the pool of [scoring]. Default: it keeps its size."""
    pools: dict[str, PoolScale] = Field(default_factory=dict)
    """Sections for the pools of `[scoring.pools]`, by name."""
    gpu_budget: float | None = Field(default=None, gt=0)
    """Most GPUs that the pools hold together. A pool that can spare a GPU passes it to another pool."""
    grow_at: float = Field(default=1.1, gt=1)
    """Smallest predicted speedup of steps for which a worker is added."""
    shrink_at: float = Field(default=1.03, ge=1)
    """Largest predicted slowdown of steps at which a worker is removed."""
    steps: int = Field(default=8, ge=4, le=32)
    """Steps measured with the current pools before a change."""

    def problems(self) -> Iterator[str]:
        if not self.scales:
            yield (
                "[autoscale] without [autoscale.generation] or [autoscale.scoring]: no pool would "
                "change its size. Add one of them with a maximum, or remove the section"
            )
        if self.shrink_at >= self.grow_at:
            yield (
                "{shrink_at} is not under {grow_at}: workers would come and go. Lower the former, or "
                "raise the latter"
            )

    @property
    def scales(self) -> dict[str, PoolScale]:
        """Section of each pool that changes its size, by the pool's name."""
        found = {GENERATION: self.generation, SCORING: self.scoring, **self.pools}
        return {name: scale for name, scale in found.items() if scale is not None}
