"""The pools of a run: their names, sizes and needs, from one place.

    generation         samples
    scoring            everything that scores and no other pool serves; it joins and stores
    [scoring.pools.X]  what its `serves` names: a model of frozen weights or single rewards, apart

Promises: `pool_sections` names every pool of a run, and nobody else does; what a pool serves no
other one does, and together they serve all that is configured.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import (
    Dtype,
    FrozenQuantization,
)

if TYPE_CHECKING:
    from rlhf_cluster.config.dataset_config import GenerateConfig
    from rlhf_cluster.config.run_config import RunConfig

GENERATION, SCORING = "generation", "scoring"
REFERENCE, TEACHER, EXACT = "reference", "teacher", "exact_logprobs"
MODELS = (REFERENCE, TEACHER, EXACT)
"""What gives log-probabilities rather than rewards."""
POOL_NAME = r"^[a-z][a-z0-9_]{0,31}$"
RESERVED = (
    *(GENERATION, SCORING, "learner", "training", "buffer", "control", "controller", "driver"),
    *("spare", "stage"),
)
"""Names of other processes of a run."""


class ScoringPool(Section):
    """Replicas of their own for what is costly to score, beside those of `[scoring]`."""

    serves: list[str] = Field(min_length=1)
    """`reference`, `teacher`, `exact_logprobs`, and names of rewards."""
    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """Live workers without which the pool does not start, and cannot live on once it may replace none;
    default: half of `workers`, rounded up. The others may join later."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    dtype: Dtype | None = None
    """Compute type of the reference and of the teacher here; default: `scoring.dtype`. Reward models
    have one of their own."""
    quantization: FrozenQuantization | None = None
    """`int8`: of the reference and of the teacher here; default: `scoring.quantization`."""


class PoolSection(Protocol):
    """What every pool's section has."""

    @property
    def workers(self) -> int: ...

    @property
    def min_workers(self) -> int | None: ...

    @property
    def num_cpus(self) -> float: ...

    @property
    def num_gpus(self) -> float: ...


def pool_sections(config: RunConfig | GenerateConfig) -> Mapping[str, PoolSection]:
    """By name, `generation` first, then `scoring`, then those of `[scoring.pools]`."""
    return {GENERATION: config.generation, SCORING: config.scoring, **config.scoring.pools}


def check_pools(c: RunConfig) -> None:
    """Raises `ValueError` where pools do not fit what is scored, or need more workers than they start
    with."""
    for pool, section in pool_sections(c).items():
        if section.min_workers is not None and section.min_workers > section.workers:
            raise ValueError(
                f"{pool}.min_workers = {section.min_workers} is over {pool}.workers = "
                f"{section.workers}: the pool would never start. Lower it, or raise workers"
            )
    rewards = [r.name or r.type for r in c.scoring.rewards]
    configured: dict[str, bool] = dict(zip(MODELS, _configured(c), strict=True))
    owner: dict[str, str] = {}
    for pool, section in c.scoring.pools.items():
        if pool in RESERVED:
            raise ValueError(
                f"scoring.pools.{pool}: a run has processes of that name. Choose another one"
            )
        for name in section.serves:
            if name in owner:
                raise ValueError(
                    f"scoring.pools.{pool}.serves names {name!r}, which {owner[name]!r} serves. Leave "
                    "it in one of them; a pool grows by its workers"
                )
            owner[name] = pool
            _check_served(pool, name, configured, rewards)
        if not {REFERENCE, TEACHER} & {*section.serves}:
            _refuse_precision(pool, section)


def _configured(c: RunConfig) -> tuple[bool, bool, bool]:
    return c.scoring.reference, c.scoring.teacher is not None, c.scoring.exact_logprobs


def _check_served(pool: str, name: str, configured: Mapping[str, bool], rewards: list[str]) -> None:
    if name in configured and name in rewards:
        raise ValueError(
            f"scoring.pools.{pool}.serves names {name!r}, and a reward has that name too. Give the "
            "reward another name"
        )
    if name not in configured and name not in rewards:
        known = ", ".join(map(repr, (*(m for m in MODELS if configured[m]), *rewards)))
        raise ValueError(
            f"scoring.pools.{pool}.serves names {name!r}, and this run scores with {known}. Use one of "
            "these"
        )
    if name in configured and not configured[name]:
        raise ValueError(
            f"scoring.pools.{pool}.serves names {name!r}, and scoring.{name} is not set: the pool "
            f"would have nothing to do. Set scoring.{name}, or remove the name"
        )


def _refuse_precision(pool: str, section: ScoringPool) -> None:
    for key in ("dtype", "quantization"):
        if (found := getattr(section, key)) is not None:
            raise ValueError(
                f"scoring.pools.{pool}.{key} = {found!r} with serves = {section.serves}: it is of the "
                "reference and of the teacher. Remove it; reward models have their own in "
                "scoring.rewards, exact log-probabilities have learner.dtype"
            )


def no_such_pool(pool: str, pools: Iterable[str]) -> str:
    """What is told of a pool that is none of the run's `pools`."""
    there = list(pools)
    close = difflib.get_close_matches(pool, there, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f". Pools: {', '.join(there)}"
    return f"refused: no pool {pool!r}{hint}"
