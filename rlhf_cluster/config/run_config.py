"""A whole run file, and the checks between its sections.

Cross-checks belong here and in `config.check_*`, nowhere else. Each message names both keys, their
values and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import model_validator

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config.check_autoscale import check_autoscale
from rlhf_cluster.config.check_rollouts import check_generation, check_replay, check_staleness
from rlhf_cluster.config.check_scoring import (
    check_kl,
    check_pools,
    check_rewards,
    check_steps,
    check_teacher,
)
from rlhf_cluster.config.check_served_adapters import check_served_adapters
from rlhf_cluster.config.check_training import (
    check_checkpoint,
    check_devices,
    check_learner,
    check_model,
    check_weights,
)
from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.rl_run import Critic
from rlhf_cluster.sections.section import check_all, load


class RunConfig(RunSections):
    """One reinforcement-learning run."""

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        check_all(self, _CHECKS)
        return self


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a run file. Raises `ConfigError`."""
    return load(RunConfig, path, overrides)


def _check_data(c: RunSections) -> None:
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
    if c.data.drop_answer and c.data.template != "chat":
        raise ValueError(
            f"data.drop_answer = true with data.template = {c.data.template!r}: what is left is "
            "messages. Set data.template = 'chat'"
        )
    if c.data.template == "chat" and c.model.init is not None:
        raise ValueError(
            "data.template = 'chat' with [model.init]: the made character tokenizer has no chat "
            "template. Use data.template = 'none', or give model.path"
        )
    if c.evaluation.num_prompts and c.data.path and c.evaluation.path is None:
        raise ValueError(
            f"evaluation.num_prompts = {c.evaluation.num_prompts} with data.path: held-out prompts "
            "need a separate file. Set evaluation.path, or evaluation.num_prompts = 0"
        )


def _check_lengths(c: RunSections) -> None:
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
    segment, response = c.generation.segment_tokens, c.generation.max_response_tokens
    if segment is not None and segment >= response:
        raise ValueError(
            f"generation.segment_tokens = {segment} is not under generation.max_response_tokens = "
            f"{response}: no response would be cut. Lower it, or remove it"
        )
    if c.max_unit_tokens > c.tokens_per_row:
        several = f", {c.algorithm.unit_size} times (a pair)" if c.algorithm.unit_size > 1 else ""
        raise ValueError(
            f"{terms}{several} is over learner.tokens_per_row = {c.learner.tokens_per_row}: the "
            "longest sequence would fit no row. Raise tokens_per_row or lower the lengths"
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


def _check_batch(c: RunSections) -> None:
    learner = c.learner
    if c.algorithm.unit_size > 1 and c.run.groups_per_step < learner.ranks * learner.minibatches:
        raise ValueError(
            f"run.groups_per_step = {c.run.groups_per_step} is under learner.ranks * "
            f"learner.minibatches = {learner.ranks} * {learner.minibatches}, and with algorithm.type = "
            f"{c.algorithm.type!r} a group is one pair: some ranks would have nothing to train on. "
            "Raise the batch, or lower the ranks or the minibatches"
        )
    if c.run.groups_per_step * c.algorithm.group_size < learner.ranks * learner.minibatches:
        raise ValueError(
            f"run.groups_per_step * algorithm.group_size = {c.run.groups_per_step} * "
            f"{c.algorithm.group_size} is under learner.ranks * learner.minibatches = "
            f"{learner.ranks} * {learner.minibatches}: some ranks would have nothing to train on. "
            "Raise the batch, or lower the ranks or the minibatches"
        )


def _check_algorithm(c: RunSections) -> None:
    algorithm, longest = c.algorithm, c.generation.max_response_tokens
    if algorithm.type == "dapo" and algorithm.overlong_buffer_tokens > longest:
        raise ValueError(
            f"algorithm.overlong_buffer_tokens = {algorithm.overlong_buffer_tokens} is over "
            f"generation.max_response_tokens = {longest}: the buffer is its last part. Lower the "
            "buffer, or allow longer responses"
        )
    proximal = getattr(algorithm, "proximal", None)
    if proximal == "interpolate" and c.staleness.bound == 0:
        raise ValueError(
            "algorithm.proximal = 'interpolate' with staleness.max_staleness = 0: between equal "
            "policies there is nothing to interpolate. Use proximal = 'bypass', whose ratio is to the "
            "sampler, or 'recompute', or allow staleness"
        )


def _check_scoring(c: RunSections) -> None:
    update = c.scoring.reference_update
    if update.type != "fixed" and not c.scoring.reference:
        raise ValueError(
            f"scoring.reference_update.type = {update.type!r} with scoring.reference = false: there "
            "is no reference to move. Set scoring.reference = true, or remove reference_update"
        )
    if c.scoring.quantization and not (c.scoring.reference or c.scoring.teacher):
        raise ValueError(
            f"scoring.quantization = {c.scoring.quantization!r} with scoring.reference = false and no "
            "scoring.teacher: it is of these two. Remove it, or set quantization on the reward models"
        )
    if getattr(c.algorithm, "sampler", None) == "exact" and not c.scoring.exact_logprobs:
        raise ValueError(
            "algorithm.sampler = 'exact' with scoring.exact_logprobs = false: no worker computes the "
            "exact log-probabilities. Set scoring.exact_logprobs = true, or sampler = 'sampled'"
        )


def _check_schedule(c: RunSections) -> None:
    settings = c.learner
    if (settings.schedule == "wsd") != (settings.decay_steps is not None):
        raise ValueError(
            f"learner.schedule = {settings.schedule!r} with learner.decay_steps = "
            f"{settings.decay_steps}: the steps of the decay belong to schedule = 'wsd', and it needs "
            "them. Set both, or neither"
        )
    total = c.run.steps * settings.epochs * settings.minibatches
    if settings.decay_steps is not None and settings.warmup_steps + settings.decay_steps > total:
        raise ValueError(
            f"learner.warmup_steps + learner.decay_steps = {settings.warmup_steps} + "
            f"{settings.decay_steps} are over run.steps * learner.epochs * learner.minibatches = "
            f"{total} optimizer steps. Lower them, or train longer"
        )


def _check_critic(c: RunSections) -> None:
    needed = ALGORITHMS[c.algorithm.type](c.algorithm).needs_critic
    if c.critic != Critic() and not needed:
        raise ValueError(
            f"[critic] with algorithm.type = {c.algorithm.type!r}: that algorithm learns no values. "
            "Remove the section, or set algorithm.type = 'ppo'"
        )
    if c.critic.kind == "head" and c.learner.backend != "fsdp2":
        raise ValueError(
            f"critic.kind = 'head' with learner.backend = {c.learner.backend!r}: the head's "
            "passes run inside the policy's backward pass, which a DeepSpeed engine runs for its own "
            "module alone. Set learner.backend = 'fsdp2', or critic.kind = 'separate'"
        )
    if c.critic.kind == "separate" and c.critic.coef != Critic().coef:
        raise ValueError(
            f"critic.coef = {c.critic.coef:g} with critic.kind = 'separate': a separate critic has "
            "a learning rate instead of a weight. Remove it, or set critic.kind = 'head'"
        )


def _check_lora(c: RunSections) -> None:
    lora = c.learner.lora
    if lora is None:
        return
    needs_critic = ALGORITHMS[c.algorithm.type](c.algorithm).needs_critic
    if needs_critic and c.critic.kind == "separate":
        raise ValueError(
            f"[learner.lora] with algorithm.type = {c.algorithm.type!r}: the critic starts as a copy "
            "of the policy's own weights. Remove the section, or use an algorithm without a critic"
        )


def _check_weights(c: RunSections) -> None:
    if c.weights.format == "adapter" and c.learner.lora is None:
        raise ValueError(
            "weights.format = 'adapter' without [learner.lora]: all weights are trained, and there are "
            "no adapters to write. Add the section, or set weights.format = 'delta' or 'full'"
        )
    if c.weights.rounding == "stochastic" and c.learner.lora is None:
        raise ValueError(
            "weights.rounding = 'stochastic' without [learner.lora]: only what is merged from adapters "
            "is rounded by it. Remove it, or add the section"
        )
    if c.weights.rounding == "stochastic" and c.publish_dtype != "bfloat16":
        raise ValueError(
            f"weights.rounding = 'stochastic' with versions in {c.publish_dtype}, to which nothing is "
            "rounded. Remove it, or set weights.dtype = 'bfloat16'"
        )


def _check_sampling(c: RunSections) -> None:
    owned = {"logprobs_mode", "seed", "model", "max_model_len"}
    refused = {"top_p", "top_k", "min_p", "repetition_penalty", *owned}
    found = sorted(refused & set(c.generation.engine_args))
    if found:
        raise ValueError(
            f"generation.engine_args.{found[0]}: not allowed here. Truncated or penalised sampling "
            "cannot be replayed by the learner, and model, max_model_len, seed and logprobs_mode are "
            "set by the run. Remove it"
        )


def _check_model(c: RunSections) -> None:
    check_model(c.model)


def _check_checkpoint(c: RunSections) -> None:
    check_checkpoint(c.checkpoint, c.run_dir)


_CHECKS: Sequence[Callable[[RunSections], None]] = (
    _check_model,
    _check_data,
    _check_lengths,
    check_staleness,
    _check_batch,
    check_kl,
    _check_scoring,
    _check_critic,
    _check_algorithm,
    _check_schedule,
    _check_lora,
    _check_weights,
    check_devices,
    _check_sampling,
    check_generation,
    check_rewards,
    check_steps,
    check_teacher,
    check_pools,
    check_weights,
    check_served_adapters,
    check_learner,
    check_replay,
    check_autoscale,
    _check_checkpoint,
)
