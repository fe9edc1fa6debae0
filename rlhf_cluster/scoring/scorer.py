"""Scorer of one worker: scores group after group with the rewards and models that a pool serves.

    RolloutGroup  -->  decode, rewards, reference, teacher, exact log-probabilities  -->  ScorePart
    RolloutGroup, the parts of all pools  -->  ExperienceGroup

Promises:
- Responses are decoded for the rewards only. The token ids pass through unchanged.
- A rollout's reward is computed from its parts as in `scoring.score_parts`, or the group fails: an
  error is never a score.
- The part of a reward that scores reasoning steps is the sum of its steps' scores. The steps are split
  in the decoded text, and their ends are located among the sampled ids (`data.reasoning_steps`).
- Several threads may score at once. A reward that waits for its child process delays neither another
  group's rewards nor the models.
- A rollout that is too long for the learner fails its group, with the reason, before anything is
  computed. It is never truncated.
- Where the reference is not the model folder's policy (after a warm-up, or when it moves), no group
  is scored before `load_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import (
    EXACT,
    MODELS,
    REFERENCE,
    SCORING,
    TEACHER,
)
from rlhf_cluster.data.reasoning_steps import (
    step_ends,
    step_spans,
)
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import ScoringError, WorkerError
from rlhf_cluster.models.gpu_share import limit_memory
from rlhf_cluster.records import (
    ExperienceGroup,
    Rollout,
    RolloutGroup,
    ScoredRollout,
    WeightVersion,
)
from rlhf_cluster.scoring.score_parts import (
    InfiniteSum,
    ScorePart,
    Scores,
    joined,
    scorer_version,
    scores,
)
from rlhf_cluster.scoring.served_rewards import Rewards, Totals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.scoring.exact_logprobs import ExactLogprobs
    from rlhf_cluster.scoring.reference_policy import Reference, Teacher


class Scorer:
    """Rewards and models of one pool in one worker. Call `setup` first; `close` when done."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        name: str,
        pool: str = SCORING,
    ) -> None:
        """Set up a scorer of `pool`. Only the rewards and models that the pool serves are loaded."""
        self._config = config
        self._scoring = config.scoring.of_pool(pool)
        self._served = config.scoring.served_by(pool)
        self._model_dir = model_dir
        self._name = name
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._totals = Totals()
        self._rewards = Rewards(self._scoring, self._totals, self._served)
        self._device = "cuda" if self._scoring.num_gpus else "cpu"
        self._reference: Reference | None = None
        self._reference_is_given = not config.stored_reference
        self._exact: ExactLogprobs | None = None
        self._teacher: Teacher | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the served rewards, with their models, by name; empty before `setup`."""
        return self._rewards.versions

    def setup(self) -> None:
        """Load the tokenizer, the models and the rewards. Raises `ConfigError`, `DataError`."""
        limit_memory(self._scoring.num_gpus, self._device)
        tokenizer_dir = self._config.model.tokenizer or self._model_dir
        tokenizer = load_tokenizer(tokenizer_dir)
        if REFERENCE in self._served:
            self._reference = self._new_reference()
        if EXACT in self._served:
            self._exact = self._new_exact()
        if TEACHER in self._served:
            from rlhf_cluster.scoring.reference_policy import Teacher

            folder = self._scoring.teacher
            assert folder is not None
            self._teacher = Teacher(
                folder,
                self._scoring,
                tokenizer,
                self._device,
                self._config.learner.head_dtype,
            )
        self._rewards.build(tokenizer_dir, self._device)
        self._tokenizer = tokenizer

    def bring_version(self, version: WeightVersion) -> None:
        """Call `ExactLogprobs.bring`, if this pool serves exact log-probabilities."""
        if self._exact is not None:
            self._exact.bring(version)

    def forget_versions(self) -> None:
        """Call `ExactLogprobs.forget`, if this pool serves exact log-probabilities."""
        if self._exact is not None:
            self._exact.forget()

    def load_reference(self, version: WeightVersion) -> None:
        """Make `version` the reference, between two groups.

        Raises `WeightError`, `StalledError`; the reference is as before then. `WorkerError`: this
        run has no reference, or `setup` has not been called.
        """
        if self._reference is None:
            raise WorkerError(
                f"{self._name}: no reference model is loaded; scoring.reference = "
                f"{self._config.scoring.reference}"
            )
        self._reference.load(version)
        self._reference_is_given = True

    def score(self, group: RolloutGroup, with_logprobs: bool = True) -> ExperienceGroup:
        """Call `part`, then `join`. For runs in which one pool serves everything."""
        return self.join(group, [self.part(group, with_logprobs)], with_logprobs)

    def part(self, group: RolloutGroup, with_logprobs: bool = True) -> ScorePart:
        """Score one group with this pool's rewards and models.

        Args:
            group: its rollouts belong to its prompt. The rewards score its greedy response like an
                additional rollout; the models do not score it.
            with_logprobs: False skips the log-probabilities of reference, teacher and exact versions,
                which are for training only.

        Raises:
            ScoringError: a reward or a model gave no usable answer.
            StalledError: other groups held a model past the deadline.
            WeightError: a version that sampled a token cannot be loaded; see `scoring.exact_logprobs`.
            WorkerError: `setup` has not been called.
        """
        if with_logprobs:
            self._check_lengths(group)
        answers = _with_greedy(group)
        completions = self._decode(answers)
        steps = [
            [text[begin:end] for begin, end in step_spans(text, self._scoring.step_separator)]
            for text in completions
        ]
        rewards = self._rewards.answers(answers, completions, steps)
        return ScorePart(
            rewards=rewards,
            versions=self._rewards.versions,
            logprobs=self._model_logprobs(group) if with_logprobs else {},
        )

    def join(
        self, group: RolloutGroup, parts: Sequence[ScorePart], with_logprobs: bool = True
    ) -> ExperienceGroup:
        """Return the group with the answers of all pools.

        Raises `ScoringError` where the sum of the rewards is not finite, `RecordError` where an answer
        is missing or of another group, `WorkerError` before `setup`.
        """
        scoring = self._config.scoring
        found = joined(parts, scoring, group.group_id, with_logprobs)
        completions = self._decode(_with_greedy(group))
        spans = [step_spans(text, scoring.step_separator) for text in completions]
        all_scores = self._scores(found, [len(own) for own in spans], group)
        version = scorer_version(scoring, found.versions)
        nothing = [None] * len(group.rollouts)
        logprobs = {name: found.logprobs.get(name, nothing) for name in MODELS}
        scored = []
        for index, rollout in enumerate(group.rollouts):
            own = all_scores[index]
            ends = self._step_ends(rollout, completions[index], spans[index])
            scored.append(
                ScoredRollout(
                    rollout=rollout,
                    reward=own.reward,
                    reward_parts=own.parts,
                    watched=own.watched,
                    ref_logprobs=logprobs[REFERENCE][index],
                    exact_logprobs=logprobs[EXACT][index],
                    teacher_logprobs=logprobs[TEACHER][index],
                    scorer=self._name,
                    scorer_version=version,
                    step_ends=ends,
                    step_rewards=None if ends is None else own.step_rewards,
                )
            )
        self._totals.add("num_groups")
        self._totals.add("num_rollouts", len(scored))
        return ExperienceGroup(
            ticket=group.ticket,
            prompt=group.prompt,
            scored=tuple(scored),
            greedy_reward=None if group.greedy is None else all_scores[-1].reward,
        )

    def _scores(
        self, found: ScorePart, num_steps: Sequence[int], group: RolloutGroup
    ) -> list[Scores]:
        try:
            return scores(found, self._config.scoring, num_steps, group.group_id)
        except InfiniteSum:
            self._totals.add("errors/sum/infinite")
            raise

    def stats(self) -> dict[str, float]:
        """Return totals since the start.

        They are groups, rollouts, seconds, hits and misses of the cache, and for each kind that
        occurred `errors/<reward>/<reason>`, `watched_errors/<reward>` and
        `outcomes/<reward>/<outcome>`.
        """
        return self._totals.read() | self._rewards.stats()

    def close(self) -> None:
        """Release the rewards. Calls that are running may fail."""
        self._tokenizer = None
        self._rewards.close()

    def _check_lengths(self, group: RolloutGroup) -> None:
        """Raise `ScoringError` on a rollout that is too long for the learner.

        A rollout of several turns may be longer than one response. An error here fails its group; the
        same error in the learner would fail the run.
        """
        together = self._config.algorithm.unit_size
        row = self._config.tokens_per_row // together
        longest = self._config.generation.max_response_tokens
        fixed = self._config.algorithm.aggregation == "fixed_length"
        for rollout in group.rollouts:
            num_positions = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
            num_trained = int(rollout.response_mask.sum())
            if num_positions > row:
                reason, detail = (
                    "row",
                    f"takes {num_positions} positions, over learner.tokens_per_row"
                    f"{f' / {together}' if together > 1 else ''} = {row}. Raise it",
                )
            elif fixed and num_trained > longest:
                reason, detail = (
                    "fixed_length",
                    f"has {num_trained} trained tokens, over generation.max_response_tokens = "
                    f"{longest}, which algorithm.aggregation = 'fixed_length' divides by. Raise it",
                )
            else:
                continue
            detail = f"rollout {rollout.rollout_id} {detail}, or shorten the turns"
            raise self._count_error("the length of a rollout", "length", group, reason, detail)

    def _decode(self, group: RolloutGroup) -> list[str]:
        return [self._text(rollout.response_ids.tolist()) for rollout in group.rollouts]

    def _text(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            raise WorkerError(f"{self._name}: nothing is loaded; call setup before score")
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _step_ends(
        self, rollout: Rollout, text: str, spans: Sequence[tuple[int, int]]
    ) -> np.ndarray | None:
        if not self._config.scoring.step_rewards or self._tokenizer is None:
            return None
        silent = frozenset(self._tokenizer.all_special_ids)
        return step_ends(self._text, rollout.response_ids.tolist(), silent, text, spans)

    def _model_logprobs(self, group: RolloutGroup) -> dict[str, list[np.ndarray]]:
        """Return the log-probabilities of the group's rollouts, by served model."""
        if self._reference is not None and not self._reference_is_given:
            raise WorkerError(
                f"{self._name}: no reference was given to this worker; call load_reference first"
            )
        models = {REFERENCE: self._reference, EXACT: self._exact, TEACHER: self._teacher}
        return {
            name: self._logprobs(name, model.logprobs, group)
            for name, model in models.items()
            if model is not None
        }

    def _logprobs(
        self,
        name: str,
        compute: Callable[[Sequence[Rollout]], list[np.ndarray]],
        group: RolloutGroup,
    ) -> list[np.ndarray]:
        try:
            with self._totals.timed(name):
                return compute(group.rollouts)
        except ScoringError as error:
            raise self._count_error(name, name, group, "sequence", str(error)) from error

    def _new_reference(self) -> Reference:
        from rlhf_cluster.scoring.reference_policy import Reference

        scoring = self._scoring
        return Reference(
            self._model_dir,
            scoring.dtype,
            self._device,
            scoring.tokens_per_batch,
            scoring.request_timeout_s,
            scoring.quantization,
            scoring.batch_groups,
            self._config.run.start_timeout_s,
            self._config.learner.head_dtype,
        )

    def _new_exact(self) -> ExactLogprobs:
        from rlhf_cluster.scoring.exact_logprobs import ExactLogprobs
        from rlhf_cluster.scoring.frozen_policy import FrozenPolicy

        scoring = self._scoring
        model = FrozenPolicy(
            "exact log-probabilities",
            self._model_dir,
            self._config.learner.dtype,
            self._device,
            scoring.tokens_per_batch,
            scoring.request_timeout_s,
            head_dtype=self._config.learner.head_dtype,
        )
        folder = self._config.weights_dir
        return ExactLogprobs(
            model, folder, scoring.cached_versions, wait_timeout_s=scoring.request_timeout_s
        )

    def _count_error(
        self, what: str, name: str, group: RolloutGroup, reason: str, detail: str
    ) -> ScoringError:
        """Count an error in the totals, and return it for the caller to raise."""
        self._totals.add(f"errors/{name}/{reason}")
        return ScoringError(f"{what}, group {group.group_id}: [{reason}] {detail}")


def _with_greedy(group: RolloutGroup) -> RolloutGroup:
    """Return the group with its greedy response, if it has one, as its last rollout."""
    if group.greedy is None:
        return group
    return replace(group, rollouts=(*group.rollouts, group.greedy), greedy=None)
