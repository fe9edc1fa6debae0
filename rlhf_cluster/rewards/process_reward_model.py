"""A frozen model of reasoning steps as a reward: the chance that each step of a response is right.

    reduce = "none"     every step is scored, a reward of steps (`data.reasoning_steps`)
    reduce = "min" ...  one score per response from its steps' chances
    (`data.reasoning_steps.reduced`)

Steps are cut and their last tokens found as everywhere (`data.reasoning_steps`), among the ids that
were sampled; the model must have the policy's vocabulary. It is a sequence-classification model
with one output, a logit, as the stage `process_reward_model` leaves it.

Promises: the chances are those of one pass over prompt and response; a response without text is one
step; an error is never a score.

Shapes: T response tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf_cluster.data.reasoning_steps import Reduction, reduce_scores, step_ends, step_spans
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import ModelSection, RewardModel


class ProcessRewardConfig(ModelSection):
    """A process reward model in a Hugging Face folder."""

    type: Literal["process_reward_model"] = "process_reward_model"
    path: str
    """Folder of a sequence-classification model with num_labels = 1 and the policy's vocabulary."""
    reduce: Literal["none"] | Reduction = "min"
    """`none`: each step is scored. Else one score per response: its weakest step, the product over the
    steps, the last step, or their mean."""

    @property
    def scores_steps(self) -> bool:
        return self.reduce == "none"

    @property
    def model_paths(self) -> tuple[str, ...]:
        return (self.path,)


class ProcessReward:
    def __init__(self, config: ProcessRewardConfig, context: RewardContext) -> None:
        """Loads the model. Raises `ConfigError` or `DataError` when it cannot serve."""
        if context.tokenizer_dir is None:
            raise ConfigError(
                f"process reward model {config.path}: needs the policy's tokenizer, and none is given"
            )
        self._config, self._separator = config, context.step_separator
        self._model = RewardModel(config.of_model(config.path), context)
        self._tokenizer = load_tokenizer(context.tokenizer_dir)
        self._silent = frozenset(self._tokenizer.all_special_ids)

    @property
    def version(self) -> str:
        """The digest of its weights, as they are loaded."""
        return self._model.version

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """Return one score per response; with `reduce` only. Raises `RewardFailure`."""
        how = self._config.reduce
        if how == "none":
            raise ConfigError(
                f"process reward model {self._config.path}: reduce = 'none' scores steps, and one "
                "score per response was requested. Set reduce"
            )
        return [reduce_scores(own, how) for own in self._chances(rollouts, completions)]

    def score_steps(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """The chance of each step. Raises `RewardFailure`."""
        return [own.tolist() for own in self._chances(rollouts, completions)]

    def close(self) -> None:
        """Nothing to release: the model goes with the worker."""

    def _chances(self, rollouts: Sequence[Rollout], completions: Sequence[str]) -> list[np.ndarray]:
        """[S] of each response, in [0, 1]."""
        places = [
            len(rollout.prompt_ids) + self._ends(rollout.response_ids.tolist(), text)
            for rollout, text in zip(rollouts, completions, strict=True)
        ]
        sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
        logits = self._model.read(rollouts, sequences, places)
        return [1 / (1 + np.exp(-np.clip(own, -700, 700))) for own in logits]

    def _ends(self, ids: list[int], text: str) -> np.ndarray:
        spans = step_spans(text, self._separator)
        return step_ends(self._text, ids, self._silent, text, spans).astype(np.int64)

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)
