"""A user's Python function as a reward, with the signature that TRL's trainers use.

    def reward(prompts, completions, **columns) -> list[float]

`prompts` and `completions` have one entry per rollout. When the data set's prompt is text both are
texts; when it is chat messages, a prompt is the list of messages and a completion is
`[{"role": "assistant", "content": ...}]`. Every other column of the data set comes as a list with
one entry per rollout, and the configured `kwargs` as they are.

With `per_step` the function also gets `steps`, the list of each completion's steps as texts, and
returns a list of floats for each completion, one per step.

The function runs in a separate child process: it may crash or hang without harm to the worker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.programs.function_pool import FunctionPool
from rlhf_cluster.rewards.reward import RewardContext, RewardSection
from rlhf_cluster.rewards.reward_failure import RewardFailure, check_scores, check_step_scores

_OWN_ARGUMENTS = ("prompts", "completions")
_STEPS = "steps"


class PythonFunctionConfig(RewardSection):
    """A function in a Python module."""

    type: Literal["python"] = "python"
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """"module:function", importable from the working directory or PYTHONPATH."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of every call."""
    per_step: bool = False
    """It scores reasoning steps: a list of floats for each completion, one for each of `steps`."""
    processes: PositiveInt = 1
    """Child processes of each scoring worker: groups whose function runs at once."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of starting a child, the import of the module included."""

    @property
    def scores_steps(self) -> bool:
        return self.per_step

    @property
    def own_arguments(self) -> tuple[str, ...]:
        """Arguments that neither a column nor a key of `kwargs` may be named like."""
        return (*_OWN_ARGUMENTS, _STEPS) if self.per_step else _OWN_ARGUMENTS


class PythonFunction:
    def __init__(self, config: PythonFunctionConfig, context: RewardContext) -> None:
        """Starts a child and imports the function. Raises `ConfigError` when that fails."""
        self._config = config
        _check_kwargs(config)
        self._pool = FunctionPool(
            config.function, config.processes, config.start_timeout_s, context.wait_timeout_s
        )
        self._pool.check()

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """The function's scores. Raises `RewardFailure` for whatever else it does."""
        arguments = self._arguments(prompt, completions)
        return check_scores(self._pool.call(arguments, self._config.timeout_s), len(rollouts))

    def score_steps(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """The function's scores of the steps. Raises `RewardFailure` for whatever else it does."""
        arguments = self._arguments(prompt, completions)
        arguments[_STEPS] = [list(own) for own in steps]
        found = self._pool.call(arguments, self._config.timeout_s)
        return check_step_scores(found, [len(own) for own in steps])

    def close(self) -> None:
        self._pool.close()

    def _arguments(self, prompt: Prompt, completions: Sequence[str]) -> dict[str, Any]:
        for name, value in prompt.columns.items():
            self._check_column(name, value)
        count = len(completions)
        is_text = isinstance(prompt.source, str)
        answers: list[Any] = [
            text if is_text else [{"role": "assistant", "content": text}] for text in completions
        ]
        columns = {name: [value] * count for name, value in prompt.columns.items()}
        own = {"prompts": [prompt.source] * count, "completions": answers}
        return {**columns, **self._config.kwargs, **own}

    def _check_column(self, name: str, value: Any) -> None:
        own = self._config.own_arguments
        if name in own or name in self._config.kwargs:
            taken = "the function's own" if name in own else "also in kwargs"
            raise RewardFailure(
                f"column {name!r} of the data set: this argument is {taken}. Rename one of them",
                "column",
            )
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise RewardFailure(
                f"column {name!r} cannot be handed to the function as JSON ({error}). Convert it "
                "in the data set, or remove it",
                "column",
            ) from error


def _check_kwargs(config: PythonFunctionConfig) -> None:
    for name, value in config.kwargs.items():
        if name in config.own_arguments:
            raise ConfigError(
                f"kwargs.{name} of {config.function}: this argument is the function's own. Remove "
                "it"
            )
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"kwargs.{name} of {config.function} cannot be handed over as JSON ({error}). Give "
                "text, numbers, lists or tables"
            ) from error
