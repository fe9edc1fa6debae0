"""The sections of a run file, each with its own bounds. What two sections must agree on is checked
in `rlhf_cluster.config.run`; algorithms and rewards keep their sections beside their code."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rlhf_cluster.config.base import Section

Dtype = Literal["float32", "bfloat16"]


class Run(Section):
    """What is run, how long, and where it leaves its files."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Folder name of the run below `root`."""
    root: str = "runs"
    """Folder that holds the runs; on a cluster one that every node sees."""
    seed: int = Field(default=0, ge=0)
    steps: PositiveInt
    """Optimizer steps of reinforcement learning."""
    groups_per_step: PositiveInt
    """Prompts (groups of rollouts) that one optimizer step trains on."""
    stall_timeout_s: PositiveFloat = 300.0
    """The run fails when the learner got nothing to train on for this long."""
    start_timeout_s: PositiveFloat = 600.0
    """The run fails when the services are not up after this long."""


class ModelInit(Section):
    """A small causal LM built from numbers: no download, random weights, character tokenizer."""

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
    max_response_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    dtype: Dtype = "bfloat16"
    quantization: str | None = None
    """vLLM's name of a quantisation of the weights, such as "fp8_per_channel"."""
    tensor_parallel_size: PositiveInt = 1
    max_num_seqs: PositiveInt = 256
    kv_cache_bytes: PositiveInt | None = None
    """Bytes for the paged KV cache; default: vLLM's share of the device."""
    block_size: PositiveInt | None = None
    prefix_caching: bool = True
    speculative: dict[str, Any] | None = None
    """vLLM's speculative_config, such as {method = "ngram", num_speculative_tokens = 3}."""
    enforce_eager: bool = False
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments by name."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one worker; `tensor_parallel_size` of them on a GPU machine."""
    request_timeout_s: PositiveFloat = 600.0
    """Deadline of one group; then the worker counts as failed and the group goes elsewhere."""
    max_retries: int = Field(default=3, ge=0)
    """How often a group is tried again on another worker before it is discarded."""
    pull_timeout_s: PositiveFloat = 120.0
    cache_on_update: Literal["recompute", "keep"] = "recompute"
    """What happens to KV caches when new weights arrive in flight."""


class Learner(Section):
    """The learner: FSDP2 ranks with fp32 master weights."""

    ranks: PositiveInt = 1
    learning_rate: PositiveFloat
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    min_learning_rate: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    dtype: Dtype = "bfloat16"
    """Compute type of the forward and backward pass; master weights and moments are float32."""
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
    collective_timeout_s: PositiveFloat = 60.0
    step_timeout_s: PositiveFloat = 1800.0


class Staleness(Section):
    """How old a token may be when it is trained, and how far generation runs ahead."""

    max_staleness: int = Field(default=1, ge=0)
    """The bound: learner version minus the version that sampled. 0 is synchronous training."""
    pipeline_depth: int = Field(default=1, ge=0)
    """Steps that generation may run ahead of the learner, within the bound."""
    max_in_flight_groups: PositiveInt | None = None
    """Groups being generated or scored at once; default: no limit but the two above."""


class Weights(Section):
    """The weight store."""

    root: str | None = None
    """Folder of the versions; default: `weights` in the run directory. /dev/shm suits one box."""
    dtype: Dtype | None = None
    """Type of the published tensors; default: the generation pool's."""
    publish_every: PositiveInt = 1
    """Optimizer steps between two published versions."""
    publish_timeout_s: PositiveFloat = 300.0


class ClusterSection(Section):
    """The Ray cluster: the one at `address`, or one started on this machine."""

    address: str | None = None
    """Address to join; default: RAY_ADDRESS, else a local cluster of this run alone."""
    num_cpus: PositiveFloat | None = None
    """Logical CPUs of a local cluster; default: this machine's cores."""
    object_store_bytes: PositiveInt | None = None
    """Shared memory of a local cluster for objects; default: Ray's share of the machine."""
    dashboard: bool = False
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    placement_timeout_s: PositiveFloat = 60.0
    heartbeat_s: PositiveFloat = 5.0
    """How often every worker is asked whether it can serve."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """A worker that does not answer for this long is replaced."""
    max_restarts: int = Field(default=10, ge=0)
    """Replacements that one pool may use up before the run fails with the first cause."""


class Observe(Section):
    """What a run leaves behind."""

    samples_per_step: int = Field(default=16, ge=0)
    """Rollouts of each step written to samples/*.parquet; 0 for none."""
    live: bool = True
    """A live view on a terminal; plain lines otherwise."""

    @field_validator("samples_per_step")
    @classmethod
    def _bounded(cls, value: int) -> int:
        if value > 100_000:
            raise ValueError(f"samples_per_step = {value} is over 100000; it is a sample, lower it")
        return value
