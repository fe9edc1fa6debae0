"""The pools of a run: their names, sizes and needs, from one place.

    generation         samples
    scoring            everything that scores and no other pool serves; it joins and stores
    [scoring.pools.X]  what its `serves` names: a model of frozen weights or single rewards, apart

Promises:
- `pool_sections` names every pool of a run, and is the only place that does;
- what one pool serves no other pool serves, and together they serve all that is configured.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import (
    Dtype,
    FrozenQuantization,
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
    min_workers: PositiveInt | None = None
    """Live workers that the pool needs to start, and to survive once it may replace none.

    Default: half of `workers`, rounded up. The others may join later.
    """
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    dtype: Dtype | None = None
    """Compute type of the reference and of the teacher in this pool. Default: `scoring.dtype`.

    Each reward model has a separate setting.
    """
    quantization: FrozenQuantization | None = None
    """Quantization (`int8`) of the reference and of the teacher in this pool.

    Default: `scoring.quantization`.
    """


class PoolSection(Protocol):
    """Settings that every pool's section has."""

    @property
    def workers(self) -> int: ...

    @property
    def min_workers(self) -> int | None: ...

    @property
    def num_cpus(self) -> float: ...

    @property
    def num_gpus(self) -> float: ...


class ScoringPools(PoolSection, Protocol):
    """Section of the scoring pool: the settings of a pool, and the further scoring pools."""

    @property
    def pools(self) -> Mapping[str, ScoringPool]: ...


class HasPools(Protocol):
    """A run file whose workers sample and score."""

    @property
    def generation(self) -> PoolSection: ...

    @property
    def scoring(self) -> ScoringPools: ...


def pool_sections(config: HasPools) -> Mapping[str, PoolSection]:
    """Return the sections by pool name: `generation`, `scoring`, then those of `[scoring.pools]`."""
    return {GENERATION: config.generation, SCORING: config.scoring, **config.scoring.pools}


def no_such_pool(pool: str, pools: Iterable[str]) -> str:
    """Return the message that refuses a pool that is none of the run's `pools`."""
    there = list(pools)
    close = difflib.get_close_matches(pool, there, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f". Pools: {', '.join(there)}"
    return f"refused: no pool {pool!r}{hint}"
