"""Sections of an RL run file alone; those that a stage has too are in `training` and `every_run`.

Each section checks its own bounds, and its `problems` yield what its keys contradict.
`rlhf_cluster.config.run_config` checks what two sections must agree on. Algorithms and rewards keep
their sections next to their code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rlhf_cluster.sections.every_run import RunSection
from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import Dtype, OnStale, Rounding, is_share


class Quarantine(Section):
    """Rules by which a generation worker that still answers is drained and replaced
    (`rlhf_cluster.generation.worker_quarantine`). Each replacement uses one of
    `cluster.max_restarts`."""

    max_faults: int = Field(default=5, ge=0)
    """Failed groups on one worker within `window_s` at which it is replaced, provided that no other
    worker has half as many. 0: no rule."""
    window_s: PositiveFloat = 600.0
    """Seconds over which the failed groups of a worker are counted."""
    straggler_factor: float = Field(default=5.0, ge=0)
    """Factor that defines a straggler: its time per token is more than this many times that of the
    other workers, by the medians of the last `straggler_groups` groups, and it takes seconds more
    per group. 0: no rule."""
    straggler_groups: PositiveInt = 20
    """Last groups of a worker whose median time per token is compared. A worker with fewer is not
    judged by speed."""

    @field_validator("straggler_factor")
    @classmethod
    def _check_factor(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(
                f"straggler_factor = {value:g} would drain workers that are as fast as the others. "
                "Give a factor greater than 1, or 0 for no rule"
            )
        return value


Priority = Literal["uniform", "reward_spread"]


class Replay(Section):
    """Replay: train groups more than once. Without this section each is trained exactly once."""

    fraction: float = Field(default=0.25, gt=0, lt=1)
    """Part of `run.groups_per_step` that was trained before, rounded to a number of groups. The others
    are fresh. A step with too few groups to replay is smaller: its number of fresh groups stays."""
    max_uses: int = Field(default=2, ge=2)
    """Largest number of steps that may train one group."""
    priority: Priority = "uniform"
    """Probability of replaying a group. `uniform`: equal for all groups that may be replayed.
    `reward_spread`: grows with the mean absolute deviation of the group's rewards from their mean."""
    alpha: float = Field(default=0.6, gt=0)
    """Exponent of the spread. Only with priority = "reward_spread"."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """Exponent of the importance weight that corrects for unequal probabilities. 1: the gradient of
    replayed groups is, on average, that of uniform replay. Only with priority = "reward_spread"."""

    def problems(self) -> Iterator[str]:
        default = type(self)()
        if self.priority == "uniform" and (self.alpha, self.beta) != (default.alpha, default.beta):
            yield (
                "{alpha} and {beta} with {priority}: they shape a priority. Remove them, or set "
                "priority = 'reward_spread'"
            )

    def num_replayed(self, groups_per_step: int) -> int:
        """Return how many groups of a step should be replayed ones."""
        return round(self.fraction * groups_per_step)


class Run(RunSection):
    """Name, length and output of an RL run."""

    steps: PositiveInt
    """Number of steps of reinforcement learning, each on one batch of groups."""
    groups_per_step: PositiveInt
    """Groups of rollouts (prompts) that one step trains on."""
    stall_timeout_s: PositiveFloat = 300.0
    """Seconds without groups to train on after which the run fails."""


class Data(Section):
    """Source of prompts: a built-in task, or a JSONL or Parquet file."""

    task: Literal["sort_digits"] | None = None
    """Built-in task that generates verifiable prompts."""
    path: str | None = None
    """A .jsonl or .parquet file. `${NAME}` is replaced by the environment variable."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} messages."""
    drop_answer: bool = False
    """Remove the assistant's answer at the end of each dialogue; the turns before it are the
    prompt. For a column of whole dialogues, as messages or as text like hh-rlhf's ("\\n\\nHuman:
    ..."). Only with template = "chat"."""
    template: Literal["none", "chat"] = "none"
    """`chat` renders prompts with the tokenizer's chat template (text becomes a user turn)."""
    system_prompt: str | None = None
    """System turn put before every prompt. Only with template = "chat"."""
    max_prompt_tokens: PositiveInt = 512
    """Largest number of tokens of a rendered prompt."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """Treatment of a prompt longer than `max_prompt_tokens`. `error`: refuse the data set. `skip`: skip
    and count the prompt."""
    shuffle: bool = True
    """Whether each epoch has its own random order of the rows. False: the order of the file in every
    epoch. A built-in task ignores it."""
    limit: PositiveInt | None = None
    """Number of rows to use, from the first. Default: all."""

    def problems(self) -> Iterator[str]:
        if (self.task is None) == (self.path is None):
            yield (
                f"data.task and data.path: {'both' if self.path else 'neither'} given. Give data.path "
                "(a .jsonl or .parquet file) or data.task (a built-in task), not both"
            )
        if self.template == "chat":
            return
        if self.system_prompt is not None:
            yield (
                "data.system_prompt needs data.template = 'chat', found {template}. Set the template, "
                "or remove the system prompt"
            )
        if self.drop_answer:
            yield (
                "{drop_answer} with {template}: what is left is messages. Set data.template = 'chat'"
            )


class Sft(Section):
    """Supervised warm-up before reinforcement learning. `steps = 0`: no warm-up."""

    steps: int = Field(default=0, ge=0)
    """Optimizer steps of the warm-up. 0: no warm-up."""
    batch_size: PositiveInt = 128
    """Examples of one warm-up step."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of the warm-up, constant after its `warmup_steps`."""
    warmup_steps: int = Field(default=20, ge=0)
    """Optimizer steps in which the rate rises linearly to `learning_rate`. 0: it starts there."""
    target_column: str = "answer"
    """Column with the text that follows the prompt."""


NEVER_STARTS = (
    "{min_workers} is over {workers}: the pool would never start. Lower it, or raise workers"
)
"""Problem of a pool that needs more workers than it starts with."""
_WEIGHTLESS, _DRAFT = ("ngram", "ngram_gpu", "suffix"), "draft_model"
_REFUSED_ENGINE_ARGS = {
    *("top_p", "top_k", "min_p", "repetition_penalty"),
    *("logprobs_mode", "seed", "model", "max_model_len"),
}
_CHECKED_ENGINE_ARGS = {
    "speculative_config": "speculative",
    "quantization": "quantization",
    "enable_prefix_caching": "prefix_caching",
    "enable_lora": "lora",
}


class Generation(Section):
    """Generation pool of vLLM workers. Keys map onto vLLM's engine arguments."""

    workers: PositiveInt = 1
    """Generation workers at the start of the run, each with a separate vLLM engine."""
    min_workers: PositiveInt | None = None
    """Least number of live workers. The pool needs them to start, and to continue once it may
    replace no worker. The others may join later. Default: half of `workers`, rounded up."""
    max_response_tokens: PositiveInt
    """Largest number of tokens of a response. A longer one is cut there."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of the responses that are trained on. The learner's log-probabilities use
    the same one."""
    dtype: Dtype = "bfloat16"
    """Compute type of the engine. Also the default type of published weights, `weights.dtype`."""
    quantization: str | None = None
    """Quantisation of the engine. `int8`: weights and activations in 8 bits, made from each published
    version by the worker that loads it. Else vLLM's name, such as "fp8_per_channel". Training,
    published versions and scoring stay unchanged; the correction metrics show the mismatch that it
    adds."""
    tensor_parallel_size: PositiveInt = 1
    """Parts that one engine divides the model into, one per GPU. 1: it is not divided."""
    max_num_seqs: PositiveInt = 256
    """Largest number of sequences that one engine processes at once. More wait in its queue."""
    kv_cache_bytes: PositiveInt | None = None
    """Bytes for the paged KV cache. Default: vLLM's share of the device."""
    block_size: PositiveInt | None = None
    """Tokens of one block of the KV cache. Default: vLLM's own on a GPU, 32 on the CPU."""
    prefix_caching: bool = True
    """Whether the engine keeps KV caches of prompts, so that the responses of a group share them."""
    lora: Literal["merged", "served"] = "merged"
    """Form in which engines hold what [learner.lora] trains. `merged`: in the weights, each version in
    place of the one before. `served`, with weights.format = "adapter": as an adapter, in addition to
    the weights of the model folder; a response keeps the adapter that it began with. In bfloat16
    `served` loses most of a small update (`rlhf-cluster doctor CONFIG`). LoRA only."""
    speculative: dict[str, Any] | None = None
    """vLLM's speculative_config, such as {method = "ngram", num_speculative_tokens = 3}. The
    tensors of a draft model must be tensors of the policy (all, or its first layers), and every
    pull updates them. The draft's folder is `model`; every node must see it."""
    enforce_eager: bool = False
    """Whether vLLM runs without compiled graphs: a faster start and slower tokens. Always so on the
    CPU."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Additional vLLM engine arguments by name."""
    num_cpus: PositiveFloat = 1.0
    """Logical CPUs that one worker reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker: 0, `tensor_parallel_size`, or a share of one GPU; see
    `sections.values`."""
    segment_tokens: PositiveInt | None = None
    """Tokens that a worker samples of each response of a group in one segment. It then returns the
    group, and a next segment continues it, so a worker's death costs one segment only. Each segment
    costs a call and, without `prefix_caching`, processing the tokens so far again. Default:
    complete responses."""
    request_timeout_s: PositiveFloat = 600.0
    """Deadline in seconds of one group, or of one segment of it. Past it the worker is treated as
    failed, and the group goes to another one."""
    max_retries: int = Field(default=3, ge=0)
    """Retries of a group, or of one segment of it, on another worker before the group is discarded."""
    pull_timeout_s: PositiveFloat = 120.0
    """Deadline in seconds for a worker to load a version, plus the time for its bytes at
    `pull_bytes_per_s`. Twice as long with the relay of `weights.transport`."""
    pull_bytes_per_s: PositiveFloat = 2e8
    """Slowest rate, in bytes per second, at which a worker may read weights before it is late."""
    quarantine: Quarantine = Quarantine()
    """[generation.quarantine]: rules for replacing workers that still answer."""
    cache_on_update: Literal["recompute", "salt", "keep"] = "recompute"
    """Treatment of KV caches when new weights arrive in flight. `recompute`: compute all of them again.
    `salt`: running requests keep theirs, and new requests use only caches of their own version. `keep`:
    keep all caches and share them across versions. docs/architecture.md has the cost of each."""

    def problems(self) -> Iterator[str]:
        if self.segment_tokens is not None and self.segment_tokens >= self.max_response_tokens:
            yield (
                "{segment_tokens} is not under {max_response_tokens}: no response would be cut. Lower "
                "it, or remove it"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            yield NEVER_STARTS
        if self.cache_on_update == "salt" and not self.prefix_caching:
            yield (
                "{cache_on_update} with {prefix_caching}: there is no prefix cache to keep apart by "
                "version. Use 'keep', which is the same there, or turn prefix_caching on"
            )
        yield from self._problems_of_devices()
        yield from self._problems_of_engine_args()
        if self.speculative is not None:
            yield from _problems_of_speculation(self.speculative)

    def _problems_of_devices(self) -> Iterator[str]:
        shared = is_share(self.num_gpus) and self.tensor_parallel_size == 1
        if self.num_gpus and self.num_gpus != self.tensor_parallel_size and not shared:
            yield (
                "{num_gpus} and {tensor_parallel_size}: a worker needs one GPU a tensor-parallel part. "
                "Make them equal (or num_gpus = 0 for CPU, or a share of a GPU with one part)"
            )
        if shared and self.kv_cache_bytes is None:
            yield (
                "{num_gpus} without generation.kv_cache_bytes: vLLM measures what is free for its "
                "cache, and finds what other processes of the GPU have not taken yet. Set "
                "generation.kv_cache_bytes, so that weights and cache fit this share"
            )

    def _problems_of_engine_args(self) -> Iterator[str]:
        found = sorted(_REFUSED_ENGINE_ARGS & self.engine_args.keys())
        if found:
            yield (
                f"generation.engine_args.{found[0]}: not allowed here. Truncated or penalised sampling "
                "cannot be replayed by the learner, and model, max_model_len, seed and logprobs_mode "
                "are set by the run. Remove it"
            )
        for name, key in _CHECKED_ENGINE_ARGS.items():
            if name in self.engine_args:
                yield (
                    f"generation.engine_args.{name} = {self.engine_args[name]!r} passes by what is "
                    f"checked of generation.{key}. Set generation.{key} instead"
                )

    @property
    def draft_folder(self) -> str | None:
        """Folder of the draft model; None without one."""
        return (self.speculative or {}).get("model")

    def take_deadline_s(self, num_bytes: int) -> float:
        """Return the seconds that an engine has to read and apply a version of `num_bytes` bytes."""
        return self.pull_timeout_s + num_bytes / self.pull_bytes_per_s


def _problems_of_speculation(settings: dict[str, Any]) -> Iterator[str]:
    method, key = settings.get("method"), "generation.speculative"
    if method not in (*_WEIGHTLESS, _DRAFT):
        yield (
            f"{key}.method = {method!r}: what proposes tokens has weights that are neither trained "
            "nor published, and would stay as they are while the policy moves away from them. Use "
            f"one of {', '.join(map(repr, _WEIGHTLESS))} (no weights), or {_DRAFT!r} with a folder "
            "of the policy's own tensors"
        )
    elif (method == _DRAFT) != ("model" in settings):
        yield (
            f"{key}.method = {method!r} with {key}.model = {settings.get('model')!r}: a draft model "
            f"needs a folder, and nothing else takes one. Set method = {_DRAFT!r} and model, or "
            "remove model"
        )
    if settings.get("rejection_sample_method") == "synthetic":
        yield (
            f"{key}.rejection_sample_method = 'synthetic' accepts drafts by a given rate and not by "
            "their probability, so that responses are not the policy's. Remove it"
        )


class Critic(Section):
    """Value model of algorithms that need one (PPO). Settings that are not listed here are those of
    `learner`."""

    kind: Literal["separate", "head"] = "separate"
    """Kind of the value model. `separate`: a second model in every learner rank, with the policy's
    architecture and a scalar head. `head`: a scalar head on the policy's last hidden states, trained in
    the same passes."""
    coef: PositiveFloat = 0.5
    """Weight of the value loss in the policy's loss. Only with kind = "head"."""
    learning_rate: PositiveFloat = 1e-5
    """Learning rate of a separate critic. A head is trained with the policy's."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up. The rate is constant after it."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest norm of a separate critic's gradients. Larger ones are scaled down to it."""

    def problems(self) -> Iterator[str]:
        if self.kind == "separate" and self.coef != type(self)().coef:
            yield (
                "{coef} with {kind}: a separate critic has a learning rate instead of a weight. Remove "
                "it, or set critic.kind = 'head'"
            )


class AdaptiveDepth(Section):
    """Adaptation of `staleness.pipeline_depth` to measurements; see `buffer.adaptive_depth`."""

    ess_low: float = Field(default=0.5, gt=0, lt=1)
    """Effective sample size (share of the tokens) below which the depth is reduced."""
    ess_high: float = Field(default=0.8, gt=0, le=1)
    """Effective sample size from which on the depth may grow."""
    wait_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of a step above which time spent waiting for groups means that the learner waits."""
    steps: PositiveInt = 4
    """Number of steps whose mean decides. Steps trained on groups of an earlier depth are excluded."""

    def problems(self) -> Iterator[str]:
        if self.ess_low >= self.ess_high:
            yield "{ess_low} is not under {ess_high}. Lower the first"


class Staleness(Section):
    """Bound on the age of trained tokens, and how far generation runs ahead."""

    max_staleness: int = Field(default=1, ge=0)
    """Largest learner version minus sampling version of a trained token. 0 is synchronous training."""
    pipeline_depth: int = Field(default=1, ge=0)
    """Steps that generation may run ahead of the learner, within the bound."""
    max_in_flight_groups: PositiveInt | None = None
    """Groups being generated or scored at once. Default: no limit but the two above."""
    look_ahead: PositiveInt = 1
    """Number of oldest groups among which the learner may take finished ones, so that a slow group
    holds up fewer. 1 is strict admission order. Admission accounts for it, so the staleness bound
    holds."""
    on_stale: OnStale = "wait"
    """Policy when publishing is slow. `wait`: admission waits for live weights, so no group ever
    exceeds `max_staleness`. `drop`: admission continues, and groups that become too old are
    discarded and replaced. `reweight`: admission continues, and groups up to `stale_limit` are
    trained with the algorithm's correction."""
    stale_limit: PositiveInt | None = None
    """Staleness bound with on_stale = "reweight", greater than `max_staleness`."""
    adaptive: AdaptiveDepth | None = None
    """[staleness.adaptive]: adapt the depth to measurements, starting from `pipeline_depth`."""

    def problems(self) -> Iterator[str]:
        if self.on_stale != "wait" and self.max_staleness == 0:
            yield (
                "{on_stale} with {max_staleness}: exactly on-policy training has to wait for every "
                "publish. Use on_stale = 'wait', or allow staleness"
            )
        if self.on_stale == "drop" and self.look_ahead > 1:
            yield (
                "{on_stale} with {look_ahead}: a group gets old by being overtaken, so the slow ones "
                "(long answers) would be discarded. Use look_ahead = 1, or on_stale = 'wait'"
            )
        if self.on_stale != "reweight" and self.stale_limit is not None:
            yield (
                "{stale_limit} with {on_stale}: it is the bound of on_stale = 'reweight' only. Remove "
                "it, or set on_stale = 'reweight'"
            )
        if self.on_stale == "reweight" and (self.stale_limit or 0) <= self.max_staleness:
            yield (
                "{on_stale} needs a staleness.stale_limit over {max_staleness}, found "
                f"{self.stale_limit}. Set it to the largest staleness that may be trained, or use "
                "on_stale = 'wait'"
            )
        moves = self.adaptive is not None
        if moves and (self.pipeline_depth > self.max_staleness or self.max_staleness == 0):
            yield (
                "staleness.adaptive with {pipeline_depth} and {max_staleness}: the depth moves between "
                "0 and max_staleness, and starts at pipeline_depth. Raise max_staleness, or lower the "
                "depth"
            )

    @property
    def bound(self) -> int:
        """Largest staleness that is trained."""
        return self.max_staleness if self.stale_limit is None else self.stale_limit

    @property
    def oldest_in_flight(self) -> int:
        """Largest difference between the learner's version and one that sampled a token of a group in
        flight; see `scoring.exact_logprobs`."""
        return 2 * self.max_staleness if self.on_stale == "drop" else self.bound


REMOVED_TRANSPORTS = ("ray", "gloo", "nccl", "ipc")
IN_MEMORY = "/dev/shm"


class Weights(Section):
    """Weight store: where and how versions are published."""

    root: str | None = None
    """Folder of the versions. Default: `weights` in the run directory. /dev/shm suits one machine."""
    transport: Literal["auto", "files", "relay"] = "auto"
    """Way of a version to the workers that generate. `files`: each worker reads the folder above, which
    every node must see. `relay`: each file is brought once to every node, from the learner's memory
    or from another node, and from the folder above if neither has it. `auto`: `relay` if `mirror`
    is set, or if a version is larger than `relay_above_bytes` and several processes read it."""
    relay_above_bytes: int = Field(default=8 << 30, ge=0)
    """Largest version, in bytes, that each reader takes from the folder with transport = "auto"."""
    mirror: str | None = None
    """Folder on every node, in memory or on a fast disk, for the relay's copies. Default: /dev/shm, or
    the folder for temporary files if there is none. Needs space for a version as stored with the
    versions that it builds on, twice while a new one arrives. On a node without the space, the
    workers read the storage. Must not be inside or above `run.root` or `root`."""
    mirror_streams: PositiveInt = 8
    """Files that the relays of all nodes together read from the storage at once."""
    dtype: Dtype | None = None
    """Type of the published tensors. Default: the generation pool's."""
    rounding: Rounding | None = None
    """Rounding to bfloat16 of weights merged from adapters. `stochastic`, the default: up or down
    with the probability that makes the mean exact, and with the same bits each time. `nearest`
    loses most of a
    small update: a weight that changes by less than half a unit does not change."""
    format: Literal["full", "delta", "adapter"] = "full"
    """Format of stored versions. Readers get bitwise identical weights in all formats.
    `full`: all tensors.
    `delta`: only the changes since the previous version, without loss. Suits small steps in
    bfloat16 and slow file systems. Each learner rank keeps its share of the last version in host
    memory, and each part of a generation worker keeps all of it.
    `adapter`: adapters only, after a first full version. Only with [learner.lora]. Each part of a
    generation worker keeps the base weights in host memory."""
    anchor_every: int = Field(default=8, ge=2, le=64)
    """Versions between two full ones with format = "delta". Bounds how many versions a worker that
    joins late has to read."""
    publish_every: PositiveInt = 1
    """Steps between two published versions. A step is learner.epochs * learner.minibatches optimizer
    steps."""
    publish_timeout_s: PositiveFloat = 300.0
    """Deadline in seconds for writing a version, on all ranks. Past it the version is abandoned."""

    @field_validator("transport", mode="before")
    @classmethod
    def _check_transport(cls, transport: Any) -> Any:
        if transport in REMOVED_TRANSPORTS:
            raise ValueError(
                f"weights.transport = {transport!r} does not exist. Set 'relay', which carries "
                "versions from the learner's memory to the workers and between these, or 'files', with "
                "weights.root under /dev/shm on one machine; or leave it out"
            )
        return transport

    def problems(self) -> Iterator[str]:
        if self.mirror is not None and self.transport == "files":
            yield (
                "{mirror} with {transport}: readers read the store, and nothing is copied. Set "
                "weights.transport = 'relay', or remove weights.mirror"
            )

    @property
    def is_relayed(self) -> bool:
        """Whether the workers that generate take versions from each other."""
        return self.transport == "relay" or (self.transport == "auto" and self.mirror is not None)

    @property
    def mirror_folder(self) -> str:
        """Folder in which the relay keeps copies on this node."""
        if self.mirror is not None:
            return self.mirror
        return IN_MEMORY if Path(IN_MEMORY).is_dir() else tempfile.gettempdir()


class Buffer(Section):
    """Storage of finished groups on disk, for a resumed run and for a learner that needs one again."""

    durable: bool = True
    """Write every group to `experience/` in the run directory before it is treated as finished. A group
    that cannot be written ends the run."""
    fsync: Literal["group", "never"] = "never"
    """Durability of a finished group. `never`: it survives the death of any process. `group`: it
    survives a power cut too, and each group waits for the disk."""
    write_timeout_s: PositiveFloat = 60.0
    """Deadline in seconds for writing one group. Past it the run ends, as with a full disk. To
    resume it, run the same command again."""
    keep_steps: int = Field(default=2, ge=0)
    """Number of last steps whose groups are kept for `rlhf-cluster inspect`, in addition to the groups
    that a checkpoint on disk may still need."""
    replay: Replay | None = None
    """[buffer.replay]: train part of each step on groups of earlier steps. Default: every group is
    trained exactly once."""
