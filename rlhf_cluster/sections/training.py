"""Sections of every run file that trains, an RL run or an offline stage: [learner], [checkpoint]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.sections.section import Section
from rlhf_cluster.sections.values import Dtype, HeadDtype, is_share


class Lora(Section):
    """LoRA by peft: only adapters are trained, and published versions have them merged."""

    rank: PositiveInt = 16
    """Rank of each adapter. More: more trained parameters, and larger updates can be expressed."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of linear layers, such as ["q_proj", "v_proj"]. `all-linear`: all but the output layer."""
    dora: bool = False
    """Learn the magnitude of each row separately from its direction (DoRA)."""
    quantize_base: bool = False
    """Store the decoder's frozen linear layers in 4 bits (QLoRA), by bitsandbytes. The policy and its
    reference start as the model with these layers rounded, which is version 0."""


class Learner(Section):
    """Learner: sharded ranks with fp32 master weights."""

    ranks: PositiveInt = 1
    """Processes that divide the model and every batch among them."""
    backend: Literal["fsdp2", "zero3"] = "fsdp2"
    """Sharding of weights, gradients and moments: torch FSDP2 or DeepSpeed ZeRO-3. Equal results."""
    lora: Lora | None = None
    """[learner.lora]: train adapters instead of the weights themselves."""
    epochs: PositiveInt = 1
    """Passes of a step over its batch."""
    minibatches: PositiveInt = 1
    """Random parts of a batch with one optimizer step each, so epochs * minibatches per step."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW, reached after `warmup_steps`."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning-rate schedule over optimizer steps. `wsd` (warmup-stable-decay): constant, then linear
    decay over the last `decay_steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the rate rises linearly to `learning_rate`. 0: it starts there."""
    decay_steps: PositiveInt | None = None
    """Optimizer steps of the decay at the end. Only with schedule = "wsd"."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Rate towards which `linear`, `cosine` and `wsd` decay. A constant schedule ignores it."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment, the running mean of the gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment, the running mean of the squared gradients."""
    adam_eps: PositiveFloat = 1e-8
    """Term added to the root of AdamW's second moment. If it is near the size of the gradients, weights
    with small gradients make smaller steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay of matrices. Biases and norms are never decayed. 0: none."""
    max_grad_norm: PositiveFloat = 1.0
    """Largest norm of the gradients of an optimizer step. Larger ones are scaled down to it."""
    dtype: Dtype = "bfloat16"
    """Compute type of the forward and backward pass; master weights and moments are float32."""
    head_dtype: HeadDtype = "float32"
    """Type of the logits: of this policy, of the frozen models that it is compared with, and of the
    engine if `generation.quantization` is not set. `float32` avoids rounding them to 16 bits, which
    would cost up to 0.06 nats per token. `model`: the type of the model's own head."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass: less memory, slower steps."""
    batching: Literal["packed", "padded"] = "packed"
    """Layout of sequences. `packed`: end to end in rows. `padded`: one per row. Equal results."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens, including padding, of one forward pass on one rank. A larger batch takes more passes."""
    tokens_per_row: PositiveInt | None = None
    """Length of a packed row in tokens. Default: the longest sequence that the run allows."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose log-probabilities are computed at once, which bounds the memory of the logits."""
    num_cpus: PositiveFloat = 1.0
    """Logical CPUs that one rank reserves."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of one rank: 0, 1, or a share of one; see `sections.values`."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of the ranks and the buffer from the newest checkpoint, within
    `cluster.restart_window_s`, after one of these processes failed. The next failure ends the run with
    the first cause."""
    on_loss: Literal["restart", "shrink"] = "restart"
    """Policy when a rank fails and the cluster cannot place all ranks within the larger of
    `cluster.placement_timeout_s` and `cluster.node_timeout_s`. `restart`: count another failure.
    `shrink`: continue with the ranks that fit, and return to the full number at the first checkpoint
    after resources are free again. Results do not depend on the number of ranks."""
    spares: int = Field(default=0, ge=0)
    """Number of hot spares: processes that wait with the resources (CPUs, GPUs) of one rank each
    and have imported everything that a rank needs. After a failure they become ranks, the failed
    ones first, before new processes are placed. New spares start in the background during the next
    steps. All ranks are restarted after a failure, so with as many spares as ranks no new process
    is needed. At most `max_restarts` spares that die while waiting are replaced within
    `cluster.restart_window_s`; their deaths never end a run."""
    min_ranks: PositiveInt = 1
    """Least number of ranks to continue with. With fewer ranks each holds more of the model. Only with
    on_loss = "shrink"."""
    collective_timeout_s: PositiveFloat = 60.0
    """Deadline in seconds of one collective operation among the ranks. Past it the ranks fail."""
    step_timeout_s: PositiveFloat = 1800.0
    """Deadline in seconds of one training step of the ranks. Past it the learner is treated as
    failed."""

    def problems(self) -> Iterator[str]:
        if self.spares > self.ranks:
            yield (
                "{spares} is over {ranks}: as many are used after a failure as there are ranks, and "
                "the others would never be. Lower it"
            )
        if self.spares and not self.max_restarts:
            yield (
                "{spares} with {max_restarts}: the first loss ends the run, and no spare would ever be "
                "used. Remove it, or raise learner.max_restarts"
            )
        if self.min_ranks > self.ranks:
            yield (
                "{min_ranks} is over {ranks}: no number of ranks is both. Lower it, or raise "
                "learner.ranks"
            )
        elif self.on_loss == "restart" and self.min_ranks > 1:
            yield (
                "{min_ranks} with {on_loss}: a run never continues with fewer ranks then. Remove it, "
                "or set on_loss = 'shrink'"
            )
        if self.num_gpus > 1:
            yield (
                "{num_gpus}: a rank drives one GPU (1), a share of one, or none (0). Set learner.ranks "
                "for more GPUs"
            )
        if is_share(self.num_gpus) and self.ranks > 1:
            yield (
                "{num_gpus} with {ranks}: NCCL connects whole GPUs, one for each rank. Set "
                "learner.ranks = 1, or learner.num_gpus = 1"
            )
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            yield (
                "{schedule} with {decay_steps}: the steps of the decay belong to schedule = 'wsd', and "
                "it needs them. Set both, or neither"
            )


class Checkpoint(Section):
    """Checkpoints of the whole run. Running the same command again resumes from the newest one."""

    every: int = Field(default=50, ge=0)
    """Steps between two checkpoints; the last step has one too. 0: only when the run is stopped. A
    checkpoint is written in the background during the next steps, from a copy in host memory of 12
    bytes per trained parameter, divided among the ranks."""
    keep: PositiveInt = 2
    """Number of checkpoints on disk. An older one is deleted once a newer one is complete."""
    keep_best: int = Field(default=0, ge=0, le=1)
    """1: keep in addition the checkpoint whose last 10 steps had the highest mean reward. A run resumes
    from the newest in any case."""
    copy_to: str | None = None
    """URL of a folder for a second copy of the checkpoints on disk, such as file:///mnt/copies or
    s3://bucket/runs. Any storage of fsspec; each run has a folder in it. A run that has no complete
    checkpoint where it is started resumes from the copy. Put credentials into the storage's own
    environment variables."""
    timeout_s: PositiveFloat = 600.0
    """Deadline in seconds for writing a checkpoint, for reading all of it before a run resumes from it,
    for copying it, and for fetching a copy; each has this time."""
    notice_s: float = Field(default=45.0, gt=0, le=3600)
    """Seconds in which the run finishes its step and writes a checkpoint after SIGTERM, Ctrl-C or stop.
    Set it to more than both take. A second signal ends the run at once. A job gets this time. A pod of
    Kubernetes has terminationGracePeriodSeconds, 120 in the files of deploy/kuberay: for values greater
    than 100 raise that too."""
