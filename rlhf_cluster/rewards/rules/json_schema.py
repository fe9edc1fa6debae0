"""1.0 when the completion is JSON that a JSON Schema accepts, 0.0 otherwise.

The JSON is the last block between ``` fences that is tagged json, else the last one without a tag,
else the whole completion; what stands between `<think>` and `</think>` is left out first. NaN,
infinities and numbers over the largest float (1e999) are refused. `jsonschema` validates, by the
draft that `$schema` names (else the newest it knows); formats are not checked, and references out of
the schema are never fetched. Patterns of a schema may take for ever on some text: validation runs in
a child process that is killed at the group's deadline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.programs.function_pool import FunctionPool
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, check_scores, column
from rlhf_cluster.rewards.rules.code_fences import last_block
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection, without_reasoning


class JsonSchemaConfig(ReasoningSection):
    """The completion is JSON of a schema."""

    type: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any] | None = None
    """The schema of all completions."""
    schema_column: str | None = None
    """Column with the schema of each prompt's completions, as a table or as JSON text."""
    processes: PositiveInt = 1
    """Child processes of each scoring worker."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of starting a child."""

    @model_validator(mode="after")
    def _check(self) -> JsonSchemaConfig:
        if (self.json_schema is None) == (self.schema_column is None):
            raise ValueError("give either json_schema or schema_column")
        return self


class JsonSchema:
    def __init__(self, config: JsonSchemaConfig, context: RewardContext) -> None:
        """Starts a child. Raises `ConfigError` when that or `json_schema` fails."""
        self._config = config
        self._pool = FunctionPool(
            "rlhf_cluster.rewards.rules.json_schema:score_json",
            config.processes,
            config.start_timeout_s,
            context.wait_timeout_s,
        )
        self._pool.check()
        if config.json_schema is not None:
            try:
                self._call(config.json_schema, [])
            except RewardFailure as failure:
                self._pool.close()
                raise ConfigError(f"json_schema cannot be used: {failure}") from failure

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 per rollout. Raises `RewardFailure`: no usable schema, or no answer in time."""
        schema = self._config.json_schema
        if schema is None and self._config.schema_column is not None:
            schema = column(prompt, self._config.schema_column)
        texts = self._config.without_reasoning(completions)
        return check_scores(self._call(schema, texts), len(texts))

    def close(self) -> None:
        self._pool.close()

    def _call(self, schema: Any, completions: Sequence[str]) -> Any:
        arguments = {"schema": schema, "completions": list(completions)}
        return self._pool.call(arguments, self._config.timeout_s)


def score_json(schema: Any, completions: Sequence[str]) -> list[float]:
    """Score in the child: 1.0 or 0.0 per completion; raises what is wrong with the schema."""
    from jsonschema import validators
    from referencing import Registry

    if isinstance(schema, str):
        schema = _parse(schema)
    if not isinstance(schema, dict):
        raise TypeError(f"the schema is {type(schema).__name__}, expected a table")
    known = validators.validator_for(schema)
    known.check_schema(schema)
    validator = known(schema, registry=Registry())  # an empty registry fetches nothing
    scores = []
    for text in completions:
        try:
            value = _parse(find_json(text))
        except (ValueError, RecursionError):
            scores.append(0.0)
        else:
            scores.append(1.0 if validator.is_valid(value) else 0.0)
    return scores


def find_json(completion: str) -> str:
    """The part of a completion that should be JSON, by the rule above."""
    text = without_reasoning(completion)
    block = last_block(text, ("json",), may_be_open=False)
    return text if block is None else block


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is greater than the largest float")
    return value
