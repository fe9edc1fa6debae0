"""Memory that the roles of a run or stage need, by formulas, for `validate --deep`. Pure functions.

The estimate, in bytes, for P parameters of w bytes each and R ranks:

    learner rank   16 P / R       float32 weights, gradients and two moments, and the same for a critic;
                                  with adapters 4 P / R, in 4 bits 0.63 P / R
                   34 w/2 T H L   passes: T tokens of a micro-batch, hidden size H, L layers;
                                  2 w/2 T H L with gradient checkpointing (Korthikanti et al. 2022,
                                  arXiv 2205.05198, without the attention scores)
                   w P / R        each further frozen model: a stage's teacher, its reference, and
                                  the reference of an algorithm whose KL is over the whole vocabulary;
                                  4 P / R for a stage's reference that moves, none under adapters
                   v P / R        in the host's memory, with the relay of `weights.transport`: the lent
                                  copy of its shard of a full version, v bytes per parameter
    generation     w P / t        each of t tensor-parallel parts, and the KV cache, of which a token
                                  takes 2 w L times the size of its keys
    scoring pools  w P            each frozen model that a pool serves: reference, teacher, exact
                                  log-probabilities, reward models; w = 1 where they are quantized

While it loads, before the first step:

    learner rank   4 P            with ZeRO-3, where each rank loads the whole model before it is
                                  sharded; FSDP2's read their shards alone, or a layer at a time
    scoring pools  w P            a model that will be rounded to 8 bits: its full width, with the rest

It does not include memory that libraries keep for themselves, so a role needs at least this much.
Hosts hold 12 P / R more for each rank while a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.config.pools import (
    EXACT,
    GENERATION,
    REFERENCE,
    TEACHER,
    Scoring,
    pool_sections,
)
from rlhf_cluster.offline import build_stage
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.planning.doctor import (
    GIB,
    Finding,
    Verdict,
)
from rlhf_cluster.sections.training import Learner
from rlhf_cluster.sections.values import (
    is_share,
    memory_share,
)

BYTES = {"float32": 4, "bfloat16": 2}
STATE_BYTES = 16  # per trained parameter
FROZEN_BYTES = 4.0  # per frozen parameter under adapters
QUANTIZED_BYTES = 0.63  # per frozen parameter under adapters, in 4 bits
ROUNDED_BYTES = 1  # per parameter in 8 bits
ACTIVATIONS, RECOMPUTED = 34, 2  # bytes per token, hidden unit and layer, in 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model that is trained or sampled from. `key_size`: key heads times their size."""

    num_parameters: int
    hidden_size: int
    num_layers: int
    key_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A frozen model: its folder (None: the policy's), bytes per parameter, and its pool.

    `load_width` are the bytes per parameter while it loads.
    """

    path: str | None
    width: int
    pool: str
    load_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that one process of a role needs, by their purpose.

    `parts` are on its device; `host_parts` are in the host's memory, also where the device is a GPU.
    `load_parts` are on its device while it loads, instead of `parts`.
    """

    role: str
    processes: int
    gpus: float  # of one process
    parts: Mapping[str, float]
    host_parts: Mapping[str, float] = field(default_factory=dict)
    load_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> float:
        """Bytes at the worst moment."""
        return max(sum(self.parts.values()), sum(self.load_parts.values()))

    @property
    def is_load_worst(self) -> bool:
        """Whether loading needs more than what follows it."""
        return sum(self.load_parts.values()) > sum(self.parts.values())

    @property
    def host_bytes(self) -> float:
        """Bytes in the host's memory; all of them for a role without GPUs."""
        return sum(self.host_parts.values()) + (self.num_bytes if self.gpus == 0 else 0)


def of_run(config: RunConfig, shape: Shape, frozen: Mapping[str, float]) -> list[Need]:
    """Return the needs of each role of a run. `frozen`: bytes of the scoring pools' models, by name."""
    critic = ALGORITHMS[config.algorithm.type](config.algorithm).needs_critic
    group = config.algorithm.group_size * config.max_sequence_tokens
    learner = _learner(
        config.learner,
        shape,
        batch_tokens=config.run.groups_per_step * group,
        models=2 if critic and config.critic.kind == "separate" else 1,
        beside={"reference": shape.num_parameters * BYTES[config.learner.dtype]}
        if config.algorithm.full_kl_in is not None and config.learner.lora is None
        else {},
    )
    if config.weights.is_relayed:
        shard = BYTES[config.publish_dtype] * shape.num_parameters / config.learner.ranks
        learner = replace(learner, host_parts={"lent shard": shard})
    return [learner, *of_pools(config, shape, frozen)]


def of_stage(config: StageConfig, shape: Shape, teacher_parameters: int = 0) -> list[Need]:
    """Return the needs of the ranks of an offline stage."""
    stage = build_stage(config.stage, StageContext(data=config.data))
    width = BYTES[config.learner.dtype]
    beside = {}
    if stage.needs_reference and config.learner.lora is None:
        moving = BYTES["float32"] if stage.reference_moves else width
        beside["reference"] = moving * shape.num_parameters
    if stage.teacher is not None:
        beside["teacher"] = width * teacher_parameters
    unit = config.stage.max_unit_size * config.data.max_tokens
    return [_learner(config.learner, shape, config.run.units_per_step * unit, 1, beside)]


def of_pools(
    config: RunConfig | GenerateConfig, shape: Shape, frozen: Mapping[str, float]
) -> list[Need]:
    """Return the needs of a worker of each pool. `frozen`: bytes of the pools' models, by name."""
    generation = config.generation
    models = frozen_models(config)
    pool_of = {name: model.pool for name, model in models.items()}
    # Models load one after the other, so only one of them is too wide at a time.
    too_wide = {
        n: size * (models[n].load_width / models[n].width - 1) for n, size in frozen.items()
    }
    longest = config.data.max_prompt_tokens + generation.max_response_tokens
    width = ROUNDED_BYTES if generation.quantization is not None else BYTES[generation.dtype]
    cache = BYTES[generation.dtype] * 2 * shape.num_layers * shape.key_size
    one_sequence = cache * longest / generation.tensor_parallel_size
    return [
        Need(
            role="generation worker",
            processes=generation.workers,
            gpus=generation.num_gpus,
            parts={
                "weights": width * shape.num_parameters / generation.tensor_parallel_size,
                "KV cache": generation.kv_cache_bytes or one_sequence,  # at the least
            },
        ),
        *(
            Need(
                role=f"{pool} worker",
                processes=section.workers,
                gpus=section.num_gpus,
                parts={name: size for name, size in frozen.items() if pool_of[name] == pool},
                load_parts={
                    "all models": sum(size for n, size in frozen.items() if pool_of[n] == pool),
                    "full width of the largest": max(
                        (size for n, size in too_wide.items() if pool_of[n] == pool), default=0.0
                    ),
                },
            )
            for pool, section in pool_sections(config).items()
            if pool != GENERATION
        ),
    ]


def frozen_models(config: RunConfig | GenerateConfig) -> dict[str, Frozen]:
    """Return the models of the scoring pools by name, each with its type and precision.

    The reference and the model of exact log-probabilities have the policy's size.
    """
    scoring = config.scoring
    found: dict[str, Frozen] = {}
    if scoring.reference:
        found["reference"] = _frozen(scoring, REFERENCE, None)
    if scoring.teacher is not None:
        found["teacher"] = _frozen(scoring, TEACHER, scoring.teacher)
    if scoring.exact_logprobs and isinstance(config, RunConfig):
        width = BYTES[config.learner.dtype]
        found["exact log-probabilities"] = Frozen(
            path=None, width=width, pool=scoring.pool_of(EXACT), load_width=width
        )
    for reward in scoring.rewards:
        rounded = getattr(reward, "quantization", None) is not None
        full = BYTES[getattr(reward, "dtype", scoring.dtype)]
        width = ROUNDED_BYTES if rounded else full
        for number, path in enumerate(reward.model_paths):
            name = f"{reward.name or reward.type} {number}".removesuffix(" 0")
            pool = scoring.pool_of(reward.name or reward.type)
            found[name] = Frozen(path=path, width=width, pool=pool, load_width=full)
    return found


def _frozen(scoring: Scoring, name: str, path: str | None) -> Frozen:
    """Return the reference or the teacher, with the precision of its pool."""
    pool = scoring.pool_of(name)
    own = scoring.of_pool(pool)
    width = ROUNDED_BYTES if own.quantization is not None else BYTES[own.dtype]
    return Frozen(path=path, width=width, pool=pool, load_width=BYTES[own.dtype])


def judge(
    needs: Sequence[Need], gpus: Sequence[int], host_bytes: int | None, alone: bool
) -> Iterator[Finding]:
    """Yield one finding per role, and one for this host.

    A role with GPUs is compared with the smallest GPU here. The sum of the roles without GPUs is
    compared with this host's memory, where the run is `alone` on it, and with it what the other roles
    have there.
    """
    on_host = 0.0
    for need in needs:
        parts = need.load_parts if need.is_load_worst else need.parts
        when = "while it loads: " if need.is_load_worst else ""
        value = f"{gib(need.num_bytes)} each ({when}{_list(parts)}), {need.processes} of them"
        if need.host_parts:
            lent = gib(sum(need.host_parts.values()))
            value += f"; each in host memory {lent} ({_list(need.host_parts)})"
        cure = ""
        verdict: Verdict = "ok"
        on_host += need.processes * need.host_bytes
        if need.gpus and gpus and need.num_bytes > memory_share(need.gpus) * min(gpus):
            part = f"{need.gpus:g} of " if is_share(need.gpus) else ""
            verdict = "wrong"
            cure = f"{part}{gib(min(gpus))} on a GPU here. {_cure(need)}"
        elif need.gpus and not gpus:
            value += "; no GPU here to compare it with"
        yield Finding(name=f"memory, {need.role}", verdict=verdict, value=value, cure=cure)
    if on_host and host_bytes is not None and alone:
        full = on_host > host_bytes
        yield Finding(
            name="memory of this host",
            verdict="wrong" if full else "ok",
            value=f"{gib(on_host)} of {gib(host_bytes)} that are free, for what is not on a GPU",
            cure=_host_cure(needs) if full else "",
        )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g} GiB"


def _cure(need: Need) -> str:
    if need.is_load_worst and need.role == "learner rank":
        return "Larger GPUs, or learner.backend = 'fsdp2', which loads by shards"
    return _CURES.get(need.role, _CURES["scoring worker"])


_CURES = {
    "learner rank": "More learner.ranks, fewer learner.tokens_per_micro_batch, "
    "learner.gradient_checkpointing = true, or [learner.lora]",
    "generation worker": "A larger generation.tensor_parallel_size, fewer "
    "generation.kv_cache_bytes, or generation.quantization",
    "scoring worker": "scoring.dtype = 'bfloat16', scoring.quantization = 'int8', smaller reward "
    "models, a pool of [scoring.pools] for one of them, or larger GPUs",
}


def _learner(
    learner: Learner, shape: Shape, batch_tokens: int, models: int, beside: Mapping[str, float]
) -> Need:
    """Return the need of a learner rank.

    `batch_tokens`: most tokens of a step. `beside`: bytes of whole frozen models in the rank, by name.
    """
    state = float(STATE_BYTES)
    if learner.lora is not None:
        state = QUANTIZED_BYTES if learner.lora.quantize_base else FROZEN_BYTES
    of_a_token = RECOMPUTED if learner.gradient_checkpointing else ACTIVATIONS
    tokens = min(learner.tokens_per_micro_batch, batch_tokens)
    half = BYTES[learner.dtype] / 2
    loads_whole = learner.backend == "zero3"
    return Need(
        role="learner rank",
        processes=learner.ranks,
        gpus=learner.num_gpus,
        parts={
            "state": models * state * shape.num_parameters / learner.ranks,
            "passes": of_a_token * half * tokens * shape.hidden_size * shape.num_layers,
            **{name: size / learner.ranks for name, size in beside.items()},
        },
        load_parts={"the whole model in float32": 4.0 * shape.num_parameters}
        if loads_whole
        else {},
    )


def _host_cure(needs: Sequence[Need]) -> str:
    cure = "Fewer workers or ranks, a smaller model, or a larger machine"
    lends = any(need.host_parts for need in needs)
    return cure + (", or weights.transport = 'files', which lends no shards" if lends else "")


def _list(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in parts.items()) or "no model"
