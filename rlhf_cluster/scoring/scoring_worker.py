"""One scoring worker: scores groups with the rewards and models that its pool serves.

    RolloutGroup  -->  decode, rewards, reference, teacher, exact log-probabilities  -->  ScorePart
    RolloutGroup, the parts of all pools  -->  ExperienceGroup

If one pool serves everything, callers call `score`. If several pools do, callers call `score_part` of
a worker of each, and `join` of a worker of `[scoring]`. Only complete groups are stored, once.

This module does not import ray. Each of these returns something small first and the record second.
As two return values of an actor, only the first has to be fetched by the control plane.

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
- Held-out groups get rewards only, and are not stored: nothing is trained on them.
- Where the reference is not the model folder's policy (after a warm-up, or when it moves), no group
  is scored before `load_reference`.
- A teacher whose tokenizer has other tokens than the policy's is refused before a group is scored.
  Its vocabulary may have more padding. The probability of a sampled token is then lower by the
  probability of the padding, which is about zero in a trained model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import EXACT, MODELS, REFERENCE, SCORING, TEACHER
from rlhf_cluster.data.reasoning_steps import step_ends, step_spans
from rlhf_cluster.data.tokenizer import check_same_tokens, load_tokenizer
from rlhf_cluster.errors import ScoringError, WorkerError
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    Rollout,
    RolloutGroup,
    ScoredRollout,
    WeightVersion,
)
from rlhf_cluster.scoring.score_parts import (
    InfiniteSum,
    ScorePart,
    Scores,
    compute_scores,
    join_parts,
    scorer_version,
)
from rlhf_cluster.scoring.served_rewards import Rewards, Totals
from rlhf_cluster.sections.values import limit_memory
from rlhf_cluster.util.waiting import call_deadline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.scoring.exact_logprobs import ExactLogprobs
    from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
    from rlhf_cluster.sections.values import Dtype, FrozenQuantization


class ScoringWorker:
    """Rewards and models of one pool in one worker. Call `start` first; `close` when done."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        name: str,
        store: ExperienceStore | None = None,
        pool: str = SCORING,
    ) -> None:
        """Set up a worker of `pool`; `start` loads the rewards and models that the pool serves.

        `store` gets every scored group but held-out ones.
        """
        self._config = config
        self._scoring = config.scoring.of_pool(pool)
        self._served = config.scoring.served_by(pool)
        self._model_dir = model_dir
        self._name = name
        self._store = store
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._totals = Totals()
        self._rewards = Rewards(self._scoring, self._totals, self._served)
        self._device = "cuda" if self._scoring.num_gpus else "cpu"
        self._reference: FrozenPolicy | None = None
        self._reference_is_given = not config.stored_reference
        self._reference_version = -1
        self._exact: ExactLogprobs | None = None
        self._teacher: FrozenPolicy | None = None
        self._num_in_flight = 0
        self._counting = threading.Lock()  # held for an addition only

    def start(self) -> dict[str, float]:
        """Load the tokenizer, the models and the rewards. Returns the seconds that it took.

        Raises `ConfigError`, `DataError`.
        """
        started = time.perf_counter()
        scoring = self._scoring
        limit_memory(scoring.num_gpus, self._device)
        tokenizer_dir = self._config.model.tokenizer or self._model_dir
        tokenizer = load_tokenizer(tokenizer_dir)
        if REFERENCE in self._served:
            self._reference = self._load_model(
                "reference", self._model_dir, scoring.dtype, scoring.quantization
            )
        if EXACT in self._served:
            self._exact = self._new_exact()
        if TEACHER in self._served:
            assert scoring.teacher is not None
            check_same_tokens("scoring.teacher", scoring.teacher, tokenizer)
            self._teacher = self._load_model(
                "teacher", scoring.teacher, scoring.dtype, scoring.quantization
            )
        self._rewards.build(tokenizer_dir, self._device)
        self._tokenizer = tokenizer
        return {"start_s": time.perf_counter() - started}

    def load_reference(self, version: WeightVersion) -> None:
        """Make `version` the reference, between two groups.

        Raises `WeightError`, `StalledError`; the reference is as before then. `WorkerError`: this
        run has no reference, or the worker is not running.
        """
        # Groups that are being scored may use this reference or the one before.
        self._reference_version = version.version
        self._running_tokenizer()
        if self._reference is None:
            raise WorkerError(
                f"{self._name}: no reference model is loaded; scoring.reference = "
                f"{self._config.scoring.reference}"
            )
        self._reference.load(version)
        self._reference_is_given = True

    def bring_version(self, version: WeightVersion) -> None:
        """Read the policy's `version` into memory, if this pool serves exact log-probabilities.

        Raises `WeightError`, and `StalledError` at the deadline of a pull; the read then continues.
        """
        self._running_tokenizer()
        if self._exact is not None:
            with call_deadline(self._config.pull_deadline_s(version.num_bytes)):
                self._exact.bring(version)

    def forget_versions(self) -> None:
        """Drop the policy's versions: other weights will be published with their numbers."""
        self._running_tokenizer()
        if self._exact is not None:
            self._exact.forget()

    def score(self, group: RolloutGroup) -> tuple[GroupSummary, ExperienceGroup]:
        """Score one group with all rewards and models, and store it.

        Raises:
            ScoringError: a reward or a model gave no usable answer, or the sum of the rewards is not
                finite.
            StalledError: other groups held a model past the deadline.
            WeightError: a version that sampled a token cannot be loaded; see `scoring.exact_logprobs`.
            StoreError: the group cannot be stored.
            WorkerError: the worker is not running.
        """
        with self._busy():
            return self._join_and_store(group, [self._compute_part(group)])

    def score_part(self, group: RolloutGroup) -> tuple[int, ScorePart]:
        """Score the group with the rewards and models of this worker's pool.

        Its rollouts belong to its prompt. The rewards score its greedy response like an additional
        rollout; the models do not score it. Returns the number of rollouts, and the part for `join`.
        Raises as `score`.
        """
        with self._busy():
            return len(group.rollouts), self._compute_part(group)

    def join(self, group: RolloutGroup, *parts: ScorePart) -> tuple[GroupSummary, ExperienceGroup]:
        """Join the parts of all pools to the scored group, and store it.

        Raises as `score`, and `RecordError` where an answer is missing or of another group.
        """
        with self._busy():
            return self._join_and_store(group, parts)

    def health(self) -> dict[str, Any]:
        """Return the worker's name and load. Raises `WorkerError` when it cannot serve."""
        self._running_tokenizer()
        return {"worker": self._name, "num_in_flight": self._num_in_flight}

    def stats(self) -> dict[str, float]:
        """Return totals since the start, and the number of calls in progress.

        They are groups, rollouts, seconds, hits and misses of the cache, and for each kind that
        occurred `errors/<reward>/<reason>`, `watched_errors/<reward>` and
        `outcomes/<reward>/<outcome>`. Raises `WorkerError` when the worker is not running.
        """
        self._running_tokenizer()
        in_flight = {"num_in_flight": float(self._num_in_flight)}
        return self._totals.read() | self._rewards.stats() | in_flight

    def close(self) -> None:
        """Release rewards and models. Calls that are running may fail."""
        self._tokenizer = self._reference = self._exact = self._teacher = None
        self._rewards.close()

    def _compute_part(self, group: RolloutGroup) -> ScorePart:
        is_trained = _is_trained(group)
        if is_trained:
            self._check_lengths(group)
        answers = _append_greedy(group)
        completions = self._decode(answers)
        steps = [
            [text[begin:end] for begin, end in step_spans(text, self._scoring.step_separator)]
            for text in completions
        ]
        return ScorePart(
            rewards=self._rewards.answers(answers, completions, steps),
            versions=self._rewards.versions,
            logprobs=self._compute_logprobs(group) if is_trained else {},
            # read last: a reference that is loaded meanwhile may have been used
            reference_version=self._reference_version,
        )

    def _join_and_store(
        self, group: RolloutGroup, parts: Sequence[ScorePart]
    ) -> tuple[GroupSummary, ExperienceGroup]:
        is_trained = _is_trained(group)
        found = join_parts(parts, self._config.scoring, group.group_id, is_trained)
        experience = self._merge(group, found)
        if self._store is not None and is_trained:
            self._store.write(experience, found.reference_version)
        return experience.summary(), experience

    def _merge(self, group: RolloutGroup, found: ScorePart) -> ExperienceGroup:
        scoring = self._config.scoring
        completions = self._decode(_append_greedy(group))
        spans = [step_spans(text, scoring.step_separator) for text in completions]
        all_scores = self._compute_scores(found, [len(own) for own in spans], group)
        version = scorer_version(scoring, found.versions)
        nothing = [None] * len(group.rollouts)
        logprobs = {name: found.logprobs.get(name, nothing) for name in MODELS}
        scored = []
        for index, rollout in enumerate(group.rollouts):
            own = all_scores[index]
            ends = self._locate_steps(rollout, completions[index], spans[index])
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

    def _compute_scores(
        self, found: ScorePart, num_steps: Sequence[int], group: RolloutGroup
    ) -> list[Scores]:
        try:
            return compute_scores(found, self._config.scoring, num_steps, group.group_id)
        except InfiniteSum:
            self._totals.add("errors/sum/infinite")
            raise

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
        return [self._decode_ids(rollout.response_ids.tolist()) for rollout in group.rollouts]

    def _decode_ids(self, ids: Sequence[int]) -> str:
        text = self._running_tokenizer().decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _locate_steps(
        self, rollout: Rollout, text: str, spans: Sequence[tuple[int, int]]
    ) -> np.ndarray | None:
        if not self._config.scoring.step_rewards:
            return None
        silent = frozenset(self._running_tokenizer().all_special_ids)
        return step_ends(self._decode_ids, rollout.response_ids.tolist(), silent, text, spans)

    def _compute_logprobs(self, group: RolloutGroup) -> dict[str, list[np.ndarray]]:
        """Return the log-probabilities of the group's rollouts, by served model."""
        if self._reference is not None and not self._reference_is_given:
            raise WorkerError(
                f"{self._name}: no reference was given to this worker; call load_reference first"
            )
        models = {REFERENCE: self._reference, EXACT: self._exact, TEACHER: self._teacher}
        found = {}
        for name, model in models.items():
            if model is None:
                continue
            try:
                with self._totals.timed(name):
                    found[name] = model.logprobs(group.rollouts)
            except ScoringError as error:
                raise self._count_error(name, name, group, "sequence", str(error)) from error
        return found

    def _load_model(
        self,
        name: str,
        folder: str,
        dtype: Dtype,
        quantization: FrozenQuantization | None = None,
    ) -> FrozenPolicy:
        from rlhf_cluster.scoring.frozen_policy import FrozenPolicy

        return FrozenPolicy(
            name,
            folder,
            dtype,
            self._device,
            self._scoring.tokens_per_batch,
            self._scoring.request_timeout_s,
            quantization,
            self._config.learner.head_dtype,
            self._scoring.batch_groups,
            self._config.run.start_timeout_s,
        )

    def _new_exact(self) -> ExactLogprobs:
        from rlhf_cluster.scoring.exact_logprobs import ExactLogprobs

        return ExactLogprobs(
            self._load_model(
                "exact log-probabilities", self._model_dir, self._config.learner.dtype
            ),
            self._config.weights_dir,
            self._scoring.cached_versions,
            self._scoring.request_timeout_s,
        )

    def _count_error(
        self, what: str, name: str, group: RolloutGroup, reason: str, detail: str
    ) -> ScoringError:
        """Count an error in the totals, and return it for the caller to raise."""
        self._totals.add(f"errors/{name}/{reason}")
        return ScoringError(f"{what}, group {group.group_id}: [{reason}] {detail}")

    def _running_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises `WorkerError` when the worker is not running."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise WorkerError(f"{self._name}: not running; call start first")
        return tokenizer

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._running_tokenizer()
        self._add_in_flight(1)
        try:
            with call_deadline(self._config.scoring.request_timeout_s):
                yield
        finally:
            self._add_in_flight(-1)

    def _add_in_flight(self, change: int) -> None:
        with self._counting:
            self._num_in_flight += change


def _is_trained(group: RolloutGroup) -> bool:
    return group.ticket.purpose == "train"


def _append_greedy(group: RolloutGroup) -> RolloutGroup:
    """Return the group with its greedy response, if it has one, as its last rollout."""
    if group.greedy is None:
        return group
    return replace(group, rollouts=(*group.rollouts, group.greedy), greedy=None)
