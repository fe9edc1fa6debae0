"""A whole run file, and the checks between its sections.

What one section alone decides, its `problems` refuses. Checks between sections belong here and in
`config.check_*`, nowhere else. Each message names both keys, their values and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import model_validator

from rlhf_cluster.config.check_rollouts import (
    check_autoscale,
    check_generation,
    check_replay,
    check_served_adapters,
    check_staleness,
)
from rlhf_cluster.config.check_scoring import (
    check_exact_logprobs,
    check_kl,
    check_rewards,
    check_steps,
    check_teacher,
)
from rlhf_cluster.config.check_training import (
    check_batch,
    check_checkpoint,
    check_critic,
    check_weights,
)
from rlhf_cluster.config.run_sections import RunSections
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


def _check_data(c: RunSections) -> Iterator[str]:
    init = c.model.init
    if c.data.template == "chat" and init is not None and init.tokenizer.type == "characters":
        yield (
            "{data.template} with [model.init]: the made character tokenizer has no chat template. Use "
            "data.template = 'none', or give model.path"
        )
    if c.evaluation.num_prompts and c.data.path and c.evaluation.path is None:
        yield (
            "{evaluation.num_prompts} with data.path: held-out prompts need a separate file. Set "
            "evaluation.path, or evaluation.num_prompts = 0"
        )


def _check_evaluation(c: RunSections) -> Iterator[str]:
    names = [reward.name or reward.type for reward in c.scoring.rewards]
    if any(each.every for each in c.evaluation.sets) and (
        2 * c.evaluation.hold_s >= c.run.stall_timeout_s  # the pull and new groups take time too
    ):
        yield (
            "{evaluation.hold_s} is not under half of {run.stall_timeout_s}: a learner that waits "
            "for the next version would fail the run first. Lower hold_s"
        )
    for each in c.evaluation.sets:
        where = f"evaluation.sets: the set {each.name!r}"
        path, task = c.evaluation.path, c.data.task
        if each.data is not None:
            path, task = each.data.path, each.data.task
        if path is None and task is None:
            yield (
                f"{where} has no data, and {{data.path}} has no held-out split. Give it data = "
                '{ path = "..." }, or set evaluation.path'
            )
        elif path is None and each.num_prompts is None:
            yield f"{where} is of the task {task!r}, which has no end. Give it num_prompts"
        longest = c.generation.max_response_tokens
        if each.max_response_tokens is not None and each.max_response_tokens > longest:
            yield (
                f"{where} has max_response_tokens = {each.max_response_tokens}, over "
                "{generation.max_response_tokens}, for which the engines have room. Lower it, or "
                "raise that one"
            )
        for name in sorted(set(each.rewards) - set(names)):
            yield (
                f"{where} names the reward {name!r}; scoring.rewards has {names}. Name one of them, "
                "or add it there with watch = true"
            )


def _check_lengths(c: RunSections) -> Iterator[str]:
    longest = c.max_sequence_tokens
    terms = (
        f"data.max_prompt_tokens + generation.max_response_tokens = {c.data.max_prompt_tokens} + "
        f"{c.generation.max_response_tokens} = {longest}"
    )
    if c.model.init is not None and longest > c.model.init.max_position:
        yield (
            f"{terms} is over {{model.init.max_position}}. Lower the lengths, or raise max_position"
        )
    if c.max_unit_tokens > c.tokens_per_row:
        several = f", {c.algorithm.unit_size} times (a pair)" if c.algorithm.unit_size > 1 else ""
        yield (
            f"{terms}{several} is over {{learner.tokens_per_row}}: the longest sequence would fit no "
            "row. Raise tokens_per_row or lower the lengths"
        )
    if c.tokens_per_row > c.learner.tokens_per_micro_batch:
        yield (
            f"learner.tokens_per_row = {c.tokens_per_row} (default: the longest sequence) is over "
            "{learner.tokens_per_micro_batch}. Raise the latter"
        )
    if longest > c.scoring.tokens_per_batch:
        yield (
            f"{terms} is over {{scoring.tokens_per_batch}}: the longest sequence would fit no batch. "
            "Raise tokens_per_batch or lower the lengths"
        )


def _check_algorithm(c: RunSections) -> Iterator[str]:
    algorithm = c.algorithm
    if (
        algorithm.type == "dapo"
        and algorithm.overlong_buffer_tokens > c.generation.max_response_tokens
    ):
        yield (
            "{algorithm.overlong_buffer_tokens} is over {generation.max_response_tokens}: the buffer "
            "is its last part. Lower the buffer, or allow longer responses"
        )
    if getattr(algorithm, "proximal", None) == "interpolate" and c.staleness.bound == 0:
        yield (
            "{algorithm.proximal} with {staleness.max_staleness}: between equal policies there is "
            "nothing to interpolate. Use proximal = 'bypass', whose ratio is to the sampler, or "
            "'recompute', or allow staleness"
        )


_CHECKS: Sequence[Callable[[RunSections], Iterator[str]]] = (
    _check_data,
    _check_evaluation,
    _check_lengths,
    check_staleness,
    check_batch,
    check_kl,
    check_exact_logprobs,
    check_critic,
    _check_algorithm,
    check_weights,
    check_generation,
    check_rewards,
    check_steps,
    check_teacher,
    check_served_adapters,
    check_replay,
    check_autoscale,
    lambda c: check_checkpoint(c.checkpoint, c.run_dir),
)
