"""Sections of an RL run file, and the tokenizers of a model made from numbers.

Each section checks its bounds. `rlhf_cluster.config.run_config` checks what two sections must
agree on. Algorithms and rewards keep their sections next to their code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rlhf_cluster.sections.every_run import RunSection
from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import Dtype, HeadDtype, OnStale, Rounding


class Quarantine(Section):
    """When a generation worker that still answers is drained and replaced
    (`rlhf_cluster.generation.worker_quarantine`). Each costs one of `cluster.max_restarts`."""

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


Priority = Literal["uniform", "reward_spread"]


class Replay(Section):
    """Groups are trained more than once. Without this section each is trained exactly once."""

    fraction: float = Field(default=0.25, gt=0, lt=1)
    """Part of `run.groups_per_step` that was trained before, rounded to whole groups. The others are
    fresh; a step that finds too few groups to replay is smaller, and has as many fresh ones."""
    max_uses: int = Field(default=2, ge=2)
    """How many steps may train a group in all."""
    priority: Priority = "uniform"
    """`uniform`: each group that may be replayed is as likely. `reward_spread`: one is likelier, the
    further its rewards are from their mean (their mean absolute deviation)."""
    alpha: float = Field(default=0.6, gt=0)
    """With priority = "reward_spread" only: the exponent of the spread."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """With priority = "reward_spread" only: exponent of the importance weight that makes up for being
    likelier. 1: the gradient of replayed groups is, on average, that of uniform replay."""

    def num_replayed(self, groups_per_step: int) -> int:
        """Groups of a step that are to be replayed ones."""
        return round(self.fraction * groups_per_step)


class CharacterTokenizer(Section):
    """One token for each printable ASCII character and the newline."""

    type: Literal["characters"] = "characters"


class BpeTokenizer(Section):
    """Byte pairs learned from the texts of a data file, with a chat template."""

    type: Literal["bpe"] = "bpe"
    path: str
    """The data file, any that prompts or preferences can come from; `${NAME}` is replaced by the
    environment variable."""
    vocab_size: int = Field(default=2048, ge=512)
    """Tokens at most, the 256 bytes and special tokens among them; a small file may give fewer."""
    limit: PositiveInt | None = None
    """Learn from the first `limit` rows only."""


TokenizerInit = Annotated[CharacterTokenizer | BpeTokenizer, Field(discriminator="type")]


class Run(RunSection):
    """What is run, how long, and where it leaves its files."""

    steps: PositiveInt
    """Steps of reinforcement learning, each on one batch of groups."""
    groups_per_step: PositiveInt
    """Prompts (groups of rollouts) that one step trains on."""
    stall_timeout_s: PositiveFloat = 300.0
    """The run fails when the learner got nothing to train on for this long."""


class ModelInit(Section):
    """A small causal LM built from numbers: no download, random weights, a tokenizer of its own."""

    architecture: Literal["llama", "qwen3"] = "llama"
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt | None = None
    intermediate_size: PositiveInt = 336
    max_position: PositiveInt = 64
    init_scale: PositiveFloat = 0.5
    """Standard deviation of the weights times sqrt(hidden_size)."""
    tie_embeddings: bool = True
    tokenizer: TokenizerInit = CharacterTokenizer()
    """One token a character, or byte pairs learned from a data file."""


class Model(Section):
    """The policy: a Hugging Face folder, or one made from `init`."""

    path: str | None = None
    """Folder (or hub id, where the hub can be reached) of a causal LM with its tokenizer."""
    tokenizer: str | None = None
    """Folder of another tokenizer than the model's own."""
    init: ModelInit | None = None


class Data(Section):
    """Where prompts come from: a built-in task, or a JSONL / Parquet file."""

    task: Literal["sort_digits"] | None = None
    """A built-in task that makes its own verifiable prompts."""
    path: str | None = None
    """A .jsonl or .parquet file; `${NAME}` is replaced by the environment variable."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of {role, content} messages."""
    drop_answer: bool = False
    """The column has whole dialogues, messages or text as in hh-rlhf ("\\n\\nHuman: ..."): the
    assistant's answer at the end is left out, and the turns before it are the prompt. Needs
    template = "chat"."""
    template: Literal["none", "chat"] = "none"
    """`chat` renders prompts with the tokenizer's chat template (text becomes a user turn)."""
    system_prompt: str | None = None
    """Put before every prompt, with template = "chat" only."""
    max_prompt_tokens: PositiveInt = 512
    on_long_prompt: Literal["error", "skip"] = "error"
    """A prompt over `max_prompt_tokens`: refuse the data set, or leave it out and count it."""
    shuffle: bool = True
    limit: PositiveInt | None = None
    """Use only the first `limit` rows."""


class Sft(Section):
    """Supervised warm-up before reinforcement learning. `steps = 0` leaves it out."""

    steps: int = Field(default=0, ge=0)
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    warmup_steps: int = Field(default=20, ge=0)
    target_column: str = "answer"
    """Column with the text that follows the prompt."""


class Evaluation(Section):
    """Greedy answers to held-out prompts, scored like any rollout, before and after training."""

    num_prompts: int = Field(default=0, ge=0)
    path: str | None = None
    """Held-out file with the same columns; a built-in task makes its own."""


class Generation(Section):
    """The generation pool: vLLM workers. Keys map onto vLLM's engine arguments."""

    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    """Live workers without which the pool does not start, and cannot live on once it may replace none;
    default: half of `workers`, rounded up. The others may join later."""
    max_response_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    dtype: Dtype = "bfloat16"
    quantization: str | None = None
    """`int8`: weights and activations in 8 bits, made from each published version by the worker that
    loads it. Else vLLM's name of a quantisation, such as "fp8_per_channel". Training, published
    versions and scoring stay as they are; the correction metrics show the mismatch it adds."""
    tensor_parallel_size: PositiveInt = 1
    max_num_seqs: PositiveInt = 256
    kv_cache_bytes: PositiveInt | None = None
    """Bytes for the paged KV cache; default: vLLM's share of the device."""
    block_size: PositiveInt | None = None
    prefix_caching: bool = True
    lora: Literal["merged", "served"] = "merged"
    """How engines hold what [learner.lora] trains. `merged`: in the weights, each version in the place
    of the one before. `served`, with weights.format = "adapter": as an adapter beside the weights of
    the model folder, of which an engine reads nothing else; a response keeps the adapter it began with.
    In bfloat16 that loses most of a small update (`rlhf-cluster doctor CONFIG`). LoRA only."""
    speculative: dict[str, Any] | None = None
    """vLLM's speculative_config, such as {method = "ngram", num_speculative_tokens = 3}. A draft model
    must hold tensors of the policy's (all, or its first layers), and moves with it at every pull;
    its folder is `model`, seen by every node."""
    enforce_eager: bool = False
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments by name."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker: 0, or `tensor_parallel_size`, or a share of one; see
    `sections.gpu_shares`."""
    segment_tokens: PositiveInt | None = None
    """A worker samples at most this many tokens more of each response of a group, then hands the
    group back, to be continued from there: a worker's death costs one segment. Each costs a call and,
    without `prefix_caching`, the tokens so far again. Default: whole responses."""
    request_timeout_s: PositiveFloat = 600.0
    """Deadline of one group, or of one segment of it; then the worker counts as failed and the group
    goes elsewhere."""
    max_retries: int = Field(default=3, ge=0)
    """How often a group, or one segment of it, is tried again on another worker before the group is
    discarded."""
    pull_timeout_s: PositiveFloat = 120.0
    """Deadline for a worker to take a version, beside what its bytes take at `pull_bytes_per_s`;
    twice as long with the relay of `weights.transport`."""
    pull_bytes_per_s: PositiveFloat = 2e8
    """The slowest rate at which weights are still read for a worker; one that is slower is late."""
    quarantine: Quarantine = Quarantine()
    """[generation.quarantine]: which workers are replaced although they answer."""
    cache_on_update: Literal["recompute", "salt", "keep"] = "recompute"
    """What happens to KV caches when new weights arrive in flight. `recompute`: all are computed
    again. `salt`: running requests go on from theirs, and others start from none of another version.
    `keep`: nothing is dropped or kept apart. docs/architecture.md has what each costs."""

    @property
    def draft_folder(self) -> str | None:
        """Folder of the model that proposes tokens, where one does."""
        return (self.speculative or {}).get("model")

    def take_deadline_s(self, num_bytes: int) -> float:
        """Seconds for an engine to read and apply a version of so many bytes."""
        return self.pull_timeout_s + num_bytes / self.pull_bytes_per_s


class Lora(Section):
    """Adapters by peft: only they are trained, and versions are published with them merged."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The adapter's product counts alpha / rank times."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of linear layers, such as ["q_proj", "v_proj"]; `all-linear`: all but the output's."""
    dora: bool = False
    """Learn the size of each row apart from its direction (DoRA)."""
    quantize_base: bool = False
    """Hold the decoder's frozen linear layers in 4 bits (QLoRA), by bitsandbytes. The policy and its
    reference start as the model with these layers rounded, which is version 0."""


class Learner(Section):
    """The learner: sharded ranks with fp32 master weights."""

    ranks: PositiveInt = 1
    backend: Literal["fsdp2", "zero3"] = "fsdp2"
    """What shards weights, gradients and moments: torch FSDP2, or DeepSpeed ZeRO-3. Equal results."""
    lora: Lora | None = None
    """A section of its own, [learner.lora], trains adapters instead of the weights themselves."""
    epochs: PositiveInt = 1
    """How often a step goes over its batch."""
    minibatches: PositiveInt = 1
    """Random parts of a batch with an optimizer step each; a step makes epochs * minibatches."""
    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Of the learning rate, in optimizer steps. `wsd`: constant, and a decay in a line at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: PositiveInt | None = None
    """Optimizer steps of the decay at the end, with schedule = "wsd" only."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment. Where it is near the size of the gradients, weights
    with small ones make smaller steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    dtype: Dtype = "bfloat16"
    """Compute type of the forward and backward pass; master weights and moments are float32."""
    head_dtype: HeadDtype = "float32"
    """Type of the logits, of this policy and of the frozen models that it is compared with, and of the
    engine's where `generation.quantization` is not set. `float32` does not round them to 16 bits, which
    would cost up to 0.06 nats a token; `model` is as the model's own head."""
    gradient_checkpointing: bool = False
    batching: Literal["packed", "padded"] = "packed"
    """`packed` lays sequences end to end in rows, `padded` one a row. Equal results."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Budget of one forward pass on one rank, padding included; more tokens make more passes."""
    tokens_per_row: PositiveInt | None = None
    """Length of a packed row; default: the longest sequence that the run allows."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Log-probabilities are computed for this many tokens at once, never for all."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    """Of one rank: 0, 1, or a share of one; see `sections.gpu_shares`."""
    max_restarts: int = Field(default=3, ge=0)
    """How often within `cluster.restart_window_s` a run starts its ranks and the buffer again, from the
    newest checkpoint, after one of these processes was lost. The loss after that ends the run with the
    first cause."""
    on_loss: Literal["restart", "shrink"] = "restart"
    """When a rank is lost and there is no room for all of them within `cluster.placement_timeout_s`,
    or `cluster.node_timeout_s` where that is longer. `restart`: a loss more. `shrink`: the run goes on
    with the ranks that fit, and with all of them again from the first checkpoint after which there is
    room. Results do not depend on their number."""
    spares: int = Field(default=0, ge=0)
    """Hot spares: processes with the place (CPUs, GPUs) of a rank each, which have imported all that a
    rank needs and wait. After a loss they become ranks, the lost ones first, before room is sought for
    new processes; others are started behind the steps that follow. All ranks begin anew after a loss,
    so that with as many spares as ranks none has to start. `max_restarts` of them are replaced
    within `cluster.restart_window_s` when they die while they wait; that never ends a run."""
    min_ranks: PositiveInt = 1
    """With on_loss = "shrink" only: the fewest ranks to go on with. The fewer, the more of the model
    each of them holds."""
    collective_timeout_s: PositiveFloat = 60.0
    step_timeout_s: PositiveFloat = 1800.0


class Critic(Section):
    """What learns the values of algorithms that need them (PPO). What is not here is as in
    `learner`."""

    kind: Literal["separate", "head"] = "separate"
    """`separate`: the policy's architecture with a scalar head, a model of its own in every learner
    rank. `head`: a scalar head on the policy's own last hidden states, trained in the same passes."""
    coef: PositiveFloat = 0.5
    """With kind = "head" only: weight of the value loss in the policy's loss."""
    learning_rate: PositiveFloat = 1e-5
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up; the rate is constant after it."""
    max_grad_norm: PositiveFloat = 1.0


class AdaptiveDepth(Section):
    """`staleness.pipeline_depth` follows what is measured; see `buffer.adaptive_depth`."""

    ess_low: float = Field(default=0.5, gt=0, lt=1)
    """Effective sample size (a share of the tokens) under which generation runs less far ahead."""
    ess_high: float = Field(default=0.8, gt=0, le=1)
    """Effective sample size from which generation may run further ahead."""
    wait_share: float = Field(default=0.1, gt=0, lt=1)
    """The learner waits when it spends more than this share of a step waiting for groups."""
    steps: PositiveInt = 4
    """Steps whose mean decides. Those trained on groups of an earlier depth do not count."""


class Staleness(Section):
    """How old a token may be when it is trained, and how far generation runs ahead."""

    max_staleness: int = Field(default=1, ge=0)
    """The bound: learner version minus the version that sampled. 0 is synchronous training."""
    pipeline_depth: int = Field(default=1, ge=0)
    """Steps that generation may run ahead of the learner, within the bound."""
    max_in_flight_groups: PositiveInt | None = None
    """Groups being generated or scored at once; default: no limit but the two above."""
    look_ahead: PositiveInt = 1
    """The learner may take finished groups among this many from the oldest on, so that a slow one
    holds up fewer. 1 is strict admission order. Admission allows for it: the bound stays."""
    on_stale: OnStale = "wait"
    """What happens when publishing is slow. `wait`: admission waits for live weights, no group is
    ever over `max_staleness`. `drop`: admission goes on, groups that get too old are discarded and
    replaced. `reweight`: admission goes on, groups up to `stale_limit` are trained, with the
    algorithm's correction."""
    stale_limit: PositiveInt | None = None
    """The bound with on_stale = "reweight", over `max_staleness`."""
    adaptive: AdaptiveDepth | None = None
    """Makes `pipeline_depth` the start of a depth that follows what is measured."""

    @property
    def bound(self) -> int:
        """The largest staleness that is trained."""
        return self.max_staleness if self.stale_limit is None else self.stale_limit

    @property
    def oldest_in_flight(self) -> int:
        """How far a version that sampled a token of a group in flight can be behind the learner's;
        see `scoring.exact_logprobs`."""
        return 2 * self.max_staleness if self.on_stale == "drop" else self.bound


REMOVED_TRANSPORTS = ("ray", "gloo", "nccl", "ipc")
IN_MEMORY = "/dev/shm"


class Weights(Section):
    """The weight store."""

    root: str | None = None
    """Folder of the versions; default: `weights` in the run directory. /dev/shm suits one box."""
    transport: Literal["auto", "files", "relay"] = "auto"
    """What carries versions to the workers that generate. `files`: each reads the folder above, which
    every node sees. `relay`: each file is brought once to every node, from the learner's memory or
    from another node, and from that folder where neither has it. `auto`: `relay` where `mirror` is
    set, or a version is larger than `relay_above_bytes` and read by more than one process."""
    relay_above_bytes: int = Field(default=8 << 30, ge=0)
    """With transport = "auto": the largest version that each reader takes from the folder."""
    mirror: str | None = None
    """Where the relay keeps its copies: a folder that each node has for itself, in memory or on a fast
    disk; default: /dev/shm, or the folder for temporary files where there is none. Needs room for a
    version as stored, twice while a new one comes, with what it builds on: where there is none, the
    workers of that node read the storage. Not in `run.root` or `root`, nor around them."""
    mirror_streams: PositiveInt = 8
    """Files that the relay reads from the storage at once, over all nodes."""
    dtype: Dtype | None = None
    """Type of the published tensors; default: the generation pool's."""
    rounding: Rounding | None = None
    """How weights merged from adapters become bfloat16. `stochastic`, the default: up or down by the
    chance that makes the mean exact, the same bits each time. `nearest` loses most of a small update:
    a weight that moves by less than half a unit does not move."""
    format: Literal["full", "delta", "adapter"] = "full"
    """`delta` writes only what changed since the version before, without loss. Suits small steps in
    bfloat16 and slow file systems. Each learner rank then keeps its share of the last version in
    host memory, and each part of a generation worker the whole of it. `adapter`, with [learner.lora],
    writes adapters only, after a first version in full; each part of a generation worker keeps the
    weights under them in host memory. What readers get is the same in all formats, to the bit."""
    anchor_every: int = Field(default=8, ge=2, le=64)
    """With format = "delta" one version in this many is written in full, which bounds how many a
    worker that joins late has to read."""
    publish_every: PositiveInt = 1
    """Steps between two published versions; a step is learner.epochs * learner.minibatches optimizer
    steps."""
    publish_timeout_s: PositiveFloat = 300.0

    @field_validator("transport", mode="before")
    @classmethod
    def _not_removed(cls, transport: Any) -> Any:
        if transport in REMOVED_TRANSPORTS:
            raise ValueError(
                f"weights.transport = {transport!r} does not exist. Set 'relay', which carries "
                "versions from the learner's memory to the workers and between these, or 'files', with "
                "weights.root under /dev/shm on one machine; or leave it out"
            )
        return transport

    @property
    def is_relayed(self) -> bool:
        """Whether the workers that generate take versions from each other."""
        return self.transport == "relay" or (self.transport == "auto" and self.mirror is not None)

    @property
    def mirror_folder(self) -> str:
        """Where the relay keeps copies on the node that asks."""
        if self.mirror is not None:
            return self.mirror
        return IN_MEMORY if Path(IN_MEMORY).is_dir() else tempfile.gettempdir()


class Buffer(Section):
    """Finished groups on disk, from which a resumed run and a learner that lost one take them."""

    durable: bool = True
    """Write every finished group to `experience/` in the run directory before it counts as finished.
    A group that cannot be written ends the run."""
    fsync: Literal["group", "never"] = "never"
    """`never`: a finished group survives the death of any process. `group`: a power cut as well; each
    group then waits for the disk."""
    write_timeout_s: PositiveFloat = 60.0
    """Deadline of writing one group. Past it the run ends as with a full disk, and the same command
    goes on."""
    keep_steps: int = Field(default=2, ge=0)
    """Groups of this many last steps stay to be looked at (`rlhf-cluster inspect`), beside those that
    a checkpoint on disk can still ask for."""
    replay: Replay | None = None
    """[buffer.replay]: part of each step's groups are such as earlier steps trained. Default: every
    group is trained exactly once."""


class Checkpoint(Section):
    """Checkpoints of the whole run, from which the same command continues it."""

    every: int = Field(default=50, ge=0)
    """Steps between two checkpoints; the last step has one too. 0: only when the run is stopped.
    Writing goes on behind the steps that follow, from a copy in host memory of 12 bytes a trained
    parameter, shared among the ranks."""
    keep: PositiveInt = 2
    """How many stay on disk. An older one is deleted once a newer one is complete."""
    keep_best: int = Field(default=0, ge=0, le=1)
    """1: beside the newest the one stays whose last 10 steps had the highest mean reward. A run goes on
    from the newest."""
    copy_to: str | None = None
    """URL of a folder for a second copy of what is on disk, such as file:///mnt/copies or
    s3://bucket/runs (any storage of fsspec, below it a folder a run). A run without a whole checkpoint
    where it is started goes on from there. Credentials belong into the storage's own environment."""
    timeout_s: PositiveFloat = 600.0
    """Deadline of writing one, of reading all of one before a run goes on from it, and of each of
    copying one and fetching one."""
    notice_s: float = Field(default=45.0, gt=0, le=3600)
    """After SIGTERM, Ctrl-C or stop the run ends its step and writes a checkpoint, within this: more
    than both take. A second signal ends it at once. A job is given that time; a pod of Kubernetes has
    its terminationGracePeriodSeconds, 120 in the files of deploy/kuberay: over 100 s raise that too."""
