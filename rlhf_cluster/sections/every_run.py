"""Sections that every run file has: [run], [cluster], [observe] and [model].

This module alone defines the paths of the run directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator

from rlhf_cluster.sections.extensions import Table
from rlhf_cluster.sections.section import Section

SinkName = Literal["tensorboard", "wandb", "mlflow"]
SINK_NAMES: Table[Any] = Table("sink", "rlhf_cluster.sinks", dict.fromkeys(get_args(SinkName)))


def _check_sink(name: str) -> str:
    SINK_NAMES.check_name(name)
    _ = SINK_NAMES[name]  # imports the class of another package
    return name


class ClusterSection(Section):
    """Ray cluster to join at `address`, or to start on this machine."""

    address: str | None = None
    """Address of the cluster to join. Default: RAY_ADDRESS, else a new local cluster for this run."""
    num_cpus: PositiveFloat | None = None
    """Logical CPUs of a local cluster. Default: this machine's cores."""
    object_store_bytes: PositiveInt | None = None
    """Bytes of shared memory for objects of a local cluster. Default: Ray's share of the machine."""
    dashboard: bool = False
    """Whether a local cluster serves Ray's dashboard, on the loopback address."""
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    """Port of a local cluster's dashboard. Only with dashboard = true."""
    placement_timeout_s: PositiveFloat = 60.0
    """Seconds that a placement waits for free resources. A longer `node_timeout_s` counts instead."""
    node_timeout_s: float = Field(default=0.0, ge=0)
    """Seconds that a placement which does not fit the present nodes waits for nodes that the cluster's
    autoscaler starts. 0: the placement is refused at once."""
    recovery_timeout_s: PositiveFloat = 3600.0
    """Seconds that a run waits for free resources after a failure of the learner or of the buffer. Past
    it the run ends; the same command resumes it."""
    worker_groups: bool = False
    """Place each kind of worker on its own group of nodes, by a resource that these nodes offer:
    rlhf_generation, rlhf_scoring, rlhf_training. deploy/kuberay and deploy/slurm set up such nodes."""
    heartbeat_s: PositiveFloat = 5.0
    """Seconds between two health checks of a worker."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """Seconds without an answer after which a worker is replaced."""
    max_restarts: int = Field(default=10, ge=0)
    """Replacements that a pool may make within `restart_window_s`, or one per worker if that is more.
    With none left, the pool continues with the live workers until the window allows another. With fewer
    than `min_workers` live, the run fails with the first cause. 0: no worker is ever replaced."""
    restart_window_s: PositiveFloat = 3600.0
    """Seconds over which restarts are counted, those of `learner.max_restarts` too."""

    @property
    def room_timeout_s(self) -> float:
        """Seconds that a placement may wait for free resources, new nodes included."""
        return max(self.placement_timeout_s, self.node_timeout_s)


class Observe(Section):
    """Records that a run writes: samples, metrics, live view."""

    samples_per_step: int = Field(default=16, ge=0)
    """Rollouts per step that are written to samples/*.parquet; 0 for none."""
    live: bool = True
    """Show a live view on a terminal. False, or without a terminal: plain lines."""
    sinks: tuple[Annotated[str, AfterValidator(_check_sink)], ...] = ()
    """Destinations of metrics in addition to metrics.jsonl: "tensorboard", "wandb", "mlflow". Each
    needs the extra of that name (pip install 'rlhf-cluster[wandb]'). W&B stays offline unless
    WANDB_MODE is set. MLflow writes into the run directory unless MLFLOW_TRACKING_URI is set. Also the
    name of a sink that another package installs, or the path of a class, "package.module:Class"."""

    write_timeout_s: PositiveFloat = 60.0
    """Deadline in seconds for writing a line of metrics.jsonl. Until then lines wait in memory, in
    order, and the run continues. Past it the run ends."""
    slow_write_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of its deadline after which a write to disk (a group, a line, a checkpoint, a version) is
    logged as slow."""

    @field_validator("samples_per_step")
    @classmethod
    def _check_sample_size(cls, value: int) -> int:
        if value > 100_000:
            raise ValueError(
                f"samples_per_step = {value} is greater than 100000; it is a sample, lower it"
            )
        return value


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class RunSection(Section):
    """Name, folder and seed of a run."""

    name: str = Field(pattern=NAME_PATTERN)
    """Folder name of the run below `root`."""
    root: str = "runs"
    """Folder that holds the runs. On a cluster every node must see it."""
    seed: int = Field(default=0, ge=0)
    """Seed of all random choices: order of prompts, sampling, parts of a batch, new weights."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds after which the run fails if its services or ranks are not up. The time to read the model
    is added: its files at `generation.pull_bytes_per_s` (200 MB/s in an offline stage)."""


R = TypeVar("R", bound=RunSection)


class RunFile(Section, Generic[R]):
    """Sections that a run file of any kind has."""

    run: R
    cluster: ClusterSection = ClusterSection()
    observe: Observe = Observe()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def weights_dir(self) -> Path:
        return self.run_dir / "weights"

    def with_absolute_paths(self) -> Self:
        """Return a copy with an absolute `run.root`, valid in every process. Other settings stay."""
        root = str(Path(self.run.root).absolute())
        return self.model_copy(update={"run": self.run.model_copy(update={"root": root})})


class CharacterTokenizer(Section):
    """One token for each printable ASCII character and the newline."""

    type: Literal["characters"] = "characters"


class BpeTokenizer(Section):
    """Byte-pair tokenizer learned from the texts of a data file, with a chat template."""

    type: Literal["bpe"] = "bpe"
    path: str
    """Data file, of any format that prompts or preferences may have. `${NAME}` is replaced by the
    environment variable."""
    vocab_size: int = Field(default=2048, ge=512)
    """Largest number of tokens, including the 256 bytes and the special tokens. A small file may give
    fewer."""
    limit: PositiveInt | None = None
    """Number of rows to learn from, from the first. Default: all."""


TokenizerInit = Annotated[CharacterTokenizer | BpeTokenizer, Field(discriminator="type")]


class ModelInit(Section):
    """Small causal LM with random weights and its own tokenizer, made without a download."""

    architecture: Literal["llama", "qwen3"] = "llama"
    """Architecture of the model, as transformers implements it."""
    hidden_size: PositiveInt = 128
    """Width of the hidden states. A multiple of `num_heads`; the engine runs only some sizes of a
    head."""
    num_layers: PositiveInt = 2
    """Number of decoder layers."""
    num_heads: PositiveInt = 4
    """Attention heads of a layer."""
    num_kv_heads: PositiveInt | None = None
    """Heads of keys and values, which divide `num_heads`. Default: as many as `num_heads`."""
    intermediate_size: PositiveInt = 336
    """Width of the hidden layer of each MLP."""
    max_position: PositiveInt = 64
    """Longest sequence that the model takes, in tokens of prompt and response."""
    init_scale: PositiveFloat = 0.5
    """Standard deviation of the weights times sqrt(hidden_size)."""
    tie_embeddings: bool = True
    """Whether the output projection shares the weights of the token embeddings."""
    tokenizer: TokenizerInit = CharacterTokenizer()
    """One token per character, or byte pairs learned from a data file."""

    def problems(self) -> Iterator[str]:
        if self.hidden_size % self.num_heads:
            yield "{hidden_size} is not a multiple of {num_heads}. Change one of them"
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            yield "{num_heads} is not a multiple of {num_kv_heads}. Change one of them"


class Model(Section):
    """Model of the policy: a Hugging Face folder, or one made from `init`."""

    path: str | None = None
    """Folder of a causal LM with its tokenizer, or its Hub id (OWNER/NAME). A Hub id is resolved once,
    when the run starts: to the folder in this machine's Hugging Face cache, after a download if it is
    not there and HF_HUB_OFFLINE is not set. On a cluster every node must see the folder."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use instead of the model's own."""
    init: ModelInit | None = None
    """[model.init]: make a small model instead of reading `path`."""

    def problems(self) -> Iterator[str]:
        if (self.path is None) == (self.init is None):
            yield (
                f"model.path and model.init: {'both' if self.path else 'neither'} given. Give "
                "model.path (a Hugging Face folder) or a [model.init] section (a small model made from "
                "numbers), not both"
            )
        if self.init is not None and self.tokenizer is not None:
            yield (
                "{tokenizer} with [model.init]: a made model comes with its tokenizer. Remove "
                "model.tokenizer, or give model.path"
            )
