"""Rewards: one file each, one entry in `REWARDS`. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from rlhf_cluster.rewards.http_reward import Http, HttpConfig
from rlhf_cluster.rewards.judge import Judge, JudgeConfig
from rlhf_cluster.rewards.process_reward_model import ProcessReward, ProcessRewardConfig
from rlhf_cluster.rewards.programs.code_tests import Code, CodeConfig
from rlhf_cluster.rewards.programs.python_function import PythonFunction, PythonFunctionConfig
from rlhf_cluster.rewards.reward import Reward, RewardContext, RewardSection, StepReward
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.rewards.reward_model_ensemble import Ensemble, EnsembleConfig
from rlhf_cluster.rewards.rules.equations import Equations, EquationsConfig
from rlhf_cluster.rewards.rules.exact_match import ExactMatch, ExactMatchConfig
from rlhf_cluster.rewards.rules.format import Format, FormatConfig
from rlhf_cluster.rewards.rules.json_schema import JsonSchema, JsonSchemaConfig
from rlhf_cluster.rewards.rules.length import Length, LengthConfig
from rlhf_cluster.rewards.rules.math_answer import Maths, MathsConfig
from rlhf_cluster.rewards.rules.multiple_choice import MultipleChoice, MultipleChoiceConfig
from rlhf_cluster.rewards.rules.numeric import Numeric, NumericConfig
from rlhf_cluster.sections.extensions import FromOtherPackages, Table

_BUILT_IN: Mapping[str, Any] = {
    "code": Code,
    "ensemble": Ensemble,
    "equations": Equations,
    "exact_match": ExactMatch,
    "format": Format,
    "http": Http,
    "json_schema": JsonSchema,
    "judge": Judge,
    "length": Length,
    "maths": Maths,
    "multiple_choice": MultipleChoice,
    "numeric": Numeric,
    "process_reward_model": ProcessReward,
    "python": PythonFunction,
    "reward_model": RewardModel,
}
REWARDS = Table("reward", "rlhf_cluster.rewards", _BUILT_IN, RewardSection)
"""Classes by the `type` of their section; each is built as `cls(section, context)`."""

RewardConfig = Annotated[
    CodeConfig
    | EnsembleConfig
    | EquationsConfig
    | ExactMatchConfig
    | FormatConfig
    | HttpConfig
    | JsonSchemaConfig
    | JudgeConfig
    | LengthConfig
    | MathsConfig
    | MultipleChoiceConfig
    | NumericConfig
    | ProcessRewardConfig
    | PythonFunctionConfig
    | RewardModelConfig,
    Field(discriminator="type"),
    FromOtherPackages(REWARDS),
]

__all__ = ["REWARDS", "RewardConfig", "build_rewards"]


def build_rewards(
    configs: Sequence[RewardConfig],
    tokenizer_dir: str,
    device: str,
    wait_timeout_s: float = 300.0,
    step_separator: str = "\n",
    batch_groups: int = 1,
) -> dict[str, tuple[Reward | StepReward, float]]:
    """Each reward, ready to score, and its weight, by name and in the order of `configs`.

    Args:
        tokenizer_dir: folder of the policy's tokenizer.
        device: torch device of reward models.
        wait_timeout_s: how long a group may wait for a reward that other groups hold.
        step_separator: of the reasoning steps of a response.
        batch_groups: how many may share the passes of a model.

    Raises:
        ConfigError, DataError: one cannot serve; those already built are closed.
    """
    context = RewardContext(
        tokenizer_dir=tokenizer_dir,
        device=device,
        wait_timeout_s=wait_timeout_s,
        step_separator=step_separator,
        batch_groups=batch_groups,
    )
    built: dict[str, tuple[Reward | StepReward, float]] = {}
    try:
        for config in configs:
            built[config.name or config.type] = (
                REWARDS[config.type](config, context),
                config.weight,
            )
    except BaseException:
        for reward, _ in built.values():
            reward.close()
        raise
    return built
