"""A whole run file, and what its sections must agree on.

Cross-checks live here and nowhere else. Each message names both keys, their values and the cure.
Values that follow from others are properties, so that every value has one owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from rlhf_cluster.algorithms import AlgorithmConfig
from rlhf_cluster.config.base import Section, load
from rlhf_cluster.config.scoring import Scoring
from rlhf_cluster.config.sections import (
    ClusterSection,
    Data,
    Dtype,
    Evaluation,
    Generation,
    Learner,
    Model,
    Observe,
    Run,
    Sft,
    Staleness,
    Weights,
)


class RunConfig(Section):
    """One reinforcement-learning run."""

    run: Run
    model: Model
    data: Data
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    generation: Generation
    scoring: Scoring
    learner: Learner
    sft: Sft = Sft()
    evaluation: Evaluation = Evaluation()
    staleness: Staleness = Staleness()
    weights: Weights = Weights()
    cluster: ClusterSection = ClusterSection()
    observe: Observe = Observe()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def weights_dir(self) -> Path:
        return (
            (Path(self.weights.root) / self.run.name)
            if self.weights.root
            else self.run_dir / "weights"
        )

    @property
    def publish_dtype(self) -> Dtype:
        return self.weights.dtype or self.generation.dtype

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.generation.max_response_tokens

    @property
    def tokens_per_row(self) -> int:
        return self.learner.tokens_per_row or self.max_sequence_tokens

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        for check in (
            _check_model,
            _check_data,
            _check_lengths,
            _check_staleness,
            _check_reference,
            _check_devices,
            _check_sampling,
            _check_rewards,
        ):
            check(self)
        return self


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run file. Raises `ConfigError`."""
    return load(RunConfig, path, overrides)


def _check_model(c: RunConfig) -> None:
    if (c.model.path is None) == (c.model.init is None):
        found = "both" if c.model.path else "neither"
        raise ValueError(
            f"model.path and model.init: {found} given. Give model.path (a Hugging Face folder) or "
            "a [model.init] section (a small model made from numbers), not both"
        )
    if c.model.init is not None:
        init = c.model.init
        if c.model.tokenizer is not None:
            raise ValueError(
                "model.tokenizer with [model.init]: a made model has a character tokenizer of its own. "
                "Remove model.tokenizer, or give model.path"
            )
        if init.hidden_size % init.num_heads:
            raise ValueError(
                f"model.init.hidden_size = {init.hidden_size} is not a multiple of "
                f"model.init.num_heads = {init.num_heads}. Change one of them"
            )
        if init.num_heads % (init.num_kv_heads or init.num_heads):
            raise ValueError(
                f"model.init.num_heads = {init.num_heads} is not a multiple of "
                f"model.init.num_kv_heads = {init.num_kv_heads}. Change one of them"
            )


def _check_data(c: RunConfig) -> None:
    if (c.data.task is None) == (c.data.path is None):
        found = "both" if c.data.path else "neither"
        raise ValueError(
            f"data.task and data.path: {found} given. Give data.path (a .jsonl or .parquet file) or "
            "data.task (a built-in task), not both"
        )
    if c.data.system_prompt is not None and c.data.template != "chat":
        raise ValueError(
            f"data.system_prompt needs data.template = 'chat', found {c.data.template!r}. Set the "
            "template, or remove the system prompt"
        )
    if c.data.template == "chat" and c.model.init is not None:
        raise ValueError(
            "data.template = 'chat' with [model.init]: the made character tokenizer has no chat "
            "template. Use data.template = 'none', or give model.path"
        )
    if c.evaluation.num_prompts and c.data.path and c.evaluation.path is None:
        raise ValueError(
            f"evaluation.num_prompts = {c.evaluation.num_prompts} with data.path: held-out prompts "
            "need a file of their own. Set evaluation.path, or evaluation.num_prompts = 0"
        )


def _check_lengths(c: RunConfig) -> None:
    longest = c.max_sequence_tokens
    terms = (
        f"data.max_prompt_tokens + generation.max_response_tokens = {c.data.max_prompt_tokens} + "
        f"{c.generation.max_response_tokens} = {longest}"
    )
    if c.model.init is not None and longest > c.model.init.max_position:
        raise ValueError(
            f"{terms} is over model.init.max_position = {c.model.init.max_position}. Lower the "
            "lengths, or raise max_position"
        )
    if longest > c.tokens_per_row:
        raise ValueError(
            f"{terms} is over learner.tokens_per_row = {c.learner.tokens_per_row}: the longest "
            "sequence would fit no row. Raise tokens_per_row or lower the lengths"
        )
    if c.tokens_per_row > c.learner.tokens_per_micro_batch:
        raise ValueError(
            f"learner.tokens_per_row = {c.tokens_per_row} (default: the longest sequence) is over "
            f"learner.tokens_per_micro_batch = {c.learner.tokens_per_micro_batch}. Raise the latter"
        )
    if longest > c.scoring.tokens_per_batch:
        raise ValueError(
            f"{terms} is over scoring.tokens_per_batch = {c.scoring.tokens_per_batch}: the longest "
            "sequence would fit no batch. Raise tokens_per_batch or lower the lengths"
        )


def _check_staleness(c: RunConfig) -> None:
    if c.weights.publish_every > c.staleness.max_staleness + 1:
        raise ValueError(
            f"weights.publish_every = {c.weights.publish_every} is over staleness.max_staleness + 1 = "
            f"{c.staleness.max_staleness + 1}: the learner would wait for ever for a version that is "
            "never published. Publish more often, or allow more staleness"
        )
    in_flight = c.staleness.max_in_flight_groups
    if in_flight is not None and in_flight < 1:
        raise ValueError(f"staleness.max_in_flight_groups = {in_flight} must be at least 1")
    if c.run.groups_per_step * c.algorithm.group_size < c.learner.ranks:
        raise ValueError(
            f"run.groups_per_step * algorithm.group_size = {c.run.groups_per_step} * "
            f"{c.algorithm.group_size} is under learner.ranks = {c.learner.ranks}: some ranks would "
            "have nothing to train on. Raise the batch or lower the ranks"
        )


def _check_reference(c: RunConfig) -> None:
    if c.algorithm.kl_coef > 0 and not c.scoring.reference:
        raise ValueError(
            f"algorithm.kl_coef = {c.algorithm.kl_coef} needs scoring.reference = true, found false. "
            "Turn the reference on, or set kl_coef = 0"
        )


def _check_devices(c: RunConfig) -> None:
    gpus, parallel = c.generation.num_gpus, c.generation.tensor_parallel_size
    if gpus and gpus != parallel:
        raise ValueError(
            f"generation.num_gpus = {gpus} and generation.tensor_parallel_size = {parallel}: a worker "
            "needs one GPU a tensor-parallel part. Make them equal (or num_gpus = 0 for CPU)"
        )
    if c.learner.num_gpus not in (0.0, 1.0):
        raise ValueError(
            f"learner.num_gpus = {c.learner.num_gpus}: a rank drives one GPU (1) or none (0)"
        )


def _check_sampling(c: RunConfig) -> None:
    refused = {"top_p", "top_k", "min_p", "repetition_penalty", "logprobs_mode", "seed", "model"}
    found = sorted(refused & set(c.generation.engine_args))
    if found:
        raise ValueError(
            f"generation.engine_args.{found[0]}: not allowed here. Truncated or penalised sampling "
            "cannot be replayed by the learner, and model, seed and logprobs_mode are set by the run. "
            "Remove it"
        )


def _check_rewards(c: RunConfig) -> None:
    names = [r.name or r.type for r in c.scoring.rewards]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"scoring.rewards: the name {twice[0]!r} appears {names.count(twice[0])} times. Give each "
            "reward a name of its own"
        )
