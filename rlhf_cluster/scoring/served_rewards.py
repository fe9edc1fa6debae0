"""Rewards that one worker serves: calls them one after the other, and checks their answers.

`scoring.score_parts` computes rewards from the answers. Several threads may call `answers` at once;
`Totals` are sums that they share.

Promises:
- A reward that returns no score fails its group with a `ScoringError` that names the reward, the
  group and the reason: an error is never a score. A watched reward does not fail the group: its
  failure is counted and logged, and its answer is None.
- A score is cached only for rewards that declare it to be deterministic.
- `versions` are equal if the rewards' settings and their models are.

Shapes: B rollouts, S steps.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, cast

from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.errors import RlhfError, ScoringError
from rlhf_cluster.records import Prompt, Rollout, RolloutGroup
from rlhf_cluster.rewards import RewardConfig, build_rewards
from rlhf_cluster.rewards.reward import (
    CountsOutcomes,
    Detailed,
    Reward,
    StepReward,
    Versioned,
)
from rlhf_cluster.rewards.reward_failure import (
    RewardFailure,
    check_scores,
    check_step_scores,
)
from rlhf_cluster.scoring.score_parts import (
    RewardAnswer,
    Row,
    digest,
)

log = logging.getLogger(__name__)

_NO_PART_OF_VERSION = {"name", "timeout_s", "weight", "watch", "clip"}

_PLACES = {"path", "paths"}


class Totals:
    """Sums by name. Several threads may add to them."""

    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(float)
        self._adding = threading.Lock()  # held for an addition only

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._adding:
            self._values[name] += amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add to `seconds/<name>` the time that the block takes, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"seconds/{name}", time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        with self._adding:
            return dict(self._values)


class ScoreCache:
    """Cached rows of all rewards of one worker. `max_entries` = 0 keeps nothing.

    Promises:
    - A row is found only by its key: a digest of the scorer's version, the prompt with all its
      columns, the token ids and the text of the response.
    - There are never more than `max_entries` rows. The least recently used are evicted first.
    - A row that could not be computed is not kept.

    Two threads that miss the same key at once both compute it. A reward model reads the responses of
    a group in one padded batch, and the rounding of its last bits depends on the rest of the batch. A
    score from the cache was computed in a batch with other responses.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._rows: OrderedDict[bytes, Row] = OrderedDict()
        self._changing = threading.Lock()  # held for a look-up or an insertion only
        self.hits = self.misses = 0

    def fetch(
        self, keys: Sequence[bytes], compute: Callable[[list[int]], Sequence[Row]]
    ) -> list[Row]:
        """Return the row of each key, in order, from the cache or from `compute`.

        `compute` gets the indices in `keys` of those that are not cached, each key once, and returns
        their rows. It is not called when all are cached. Its errors are raised, and nothing is kept.
        """
        known = self._look_up(keys)
        places = {key: place for place, key in reversed([*enumerate(keys)]) if key not in known}
        missing = sorted(places.values())
        with self._changing:
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            rows = compute(missing)
            known |= {keys[place]: row for place, row in zip(missing, rows, strict=True)}
            self._keep({keys[place]: known[keys[place]] for place in missing})
        return [known[key] for key in keys]

    def __len__(self) -> int:
        return len(self._rows)

    def _look_up(self, keys: Sequence[bytes]) -> dict[bytes, Row]:
        with self._changing:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
        return found

    def _keep(self, rows: dict[bytes, Row]) -> None:
        with self._changing:
            for key, row in rows.items():
                self._rows[key] = row
                self._rows.move_to_end(key)
            while len(self._rows) > self._max_entries:
                self._rows.popitem(last=False)


class Rewards:
    """Served rewards of one worker. Call `build` first; `close` when done."""

    def __init__(
        self, scoring: Scoring, totals: Totals, served: Collection[str] | None = None
    ) -> None:
        """Load nothing yet. `served`: names of the rewards that this worker has; None: all."""
        self._scoring, self._totals = scoring, totals
        named = {r.name or r.type: r for r in scoring.rewards}
        self._configs = {n: r for n, r in named.items() if served is None or n in served}
        self._built: dict[str, Reward | StepReward] = {}
        self._cache = ScoreCache(scoring.cache_entries)
        self.versions: dict[str, str] = {}

    def build(self, tokenizer_dir: str, device: str) -> None:
        """Load the models and start what the rewards need. Raises `ConfigError`, `DataError`."""
        scoring = self._scoring
        built = build_rewards(
            list(self._configs.values()),
            tokenizer_dir,
            device,
            scoring.request_timeout_s,
            scoring.step_separator,
            scoring.batch_groups,
        )
        self._built = {name: reward for name, (reward, _) in built.items()}
        self.versions = {n: reward_version(self._configs[n], r) for n, r in self._built.items()}

    def answers(
        self, group: RolloutGroup, completions: Sequence[str], steps: Sequence[Sequence[str]]
    ) -> dict[str, RewardAnswer | None]:
        """Return the answer of each reward, by name, for the [B] rollouts of the group.

        `completions`: the text of each rollout. `steps`: the reasoning steps of each text. Raises
        `ScoringError`.
        """
        return {name: self._answer(name, group, completions, steps) for name in self._configs}

    def stats(self) -> dict[str, float]:
        """Return `outcomes/<reward>/<outcome>`, and `cache_hits`, `cache_misses` with a cache."""
        totals: dict[str, float] = {}
        if self._scoring.cache_entries:
            totals |= {"cache_hits": self._cache.hits, "cache_misses": self._cache.misses}
        for name, reward in self._built.items():
            if isinstance(reward, CountsOutcomes):
                totals |= {f"outcomes/{name}/{own}": n for own, n in reward.outcomes().items()}
        return totals

    def close(self) -> None:
        built, self._built = self._built, {}
        for reward in built.values():
            reward.close()

    def _answer(
        self,
        name: str,
        group: RolloutGroup,
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> RewardAnswer | None:
        """Return the answer of reward `name`; None for a watched reward that failed.

        Raises `ScoringError`.
        """
        try:
            with self._totals.timed(name):
                if self._configs[name].scores_steps:
                    return self._score_steps(name, group, completions, steps)
                return RewardAnswer(rows=self._score_responses(name, group, completions))
        except RlhfError as error:
            reason = error.reason if isinstance(error, RewardFailure) else type(error).__name__
            text = f"reward {name!r}, group {group.group_id}: [{reason}] {error}"
            self._totals.add(f"errors/{name}/{reason}")
            if self._configs[name].watch:
                self._totals.add(f"watched_errors/{name}")
                log.warning("watched %s", text)
                return None
            raise ScoringError(text) from error

    def _score_steps(
        self,
        name: str,
        group: RolloutGroup,
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> RewardAnswer:
        reward = cast("StepReward", self._built[name])
        found = reward.score_steps(group.prompt, group.rollouts, completions, steps)
        checked = check_step_scores(found, [len(own) for own in steps])
        return RewardAnswer(rows=[(sum(own),) for own in checked], steps=checked)

    def _score_responses(
        self, name: str, group: RolloutGroup, completions: Sequence[str]
    ) -> Sequence[Row]:
        config, reward = self._configs[name], cast("Reward", self._built[name])

        def ask(places: Sequence[int]) -> list[Row]:
            rollouts = [group.rollouts[place] for place in places]
            return _ask(reward, config, group, rollouts, [completions[place] for place in places])

        if not (self._scoring.cache_entries and config.scores_alone):
            return ask(range(len(completions)))
        version = f"{name}/{self.versions[name]}"
        keys = [
            content_key(version, group.prompt, rollout, text)
            for rollout, text in zip(group.rollouts, completions, strict=True)
        ]
        return self._cache.fetch(keys, ask)


def content_key(version: str, prompt: Prompt, rollout: Rollout, completion: str) -> bytes:
    """Return the key of a row, 32 bytes: a digest of the scorer's version and of all its inputs."""
    digest = blake2b(digest_size=32)
    parts = (
        version.encode(),
        # Equal values may be pickled in different ways. Then the score is computed again.
        pickle.dumps((prompt.source, dict(prompt.columns)), protocol=5),
        rollout.prompt_ids.tobytes(),
        rollout.response_ids.tobytes(),
        completion.encode("utf-8", "surrogatepass"),
    )
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def reward_version(config: RewardConfig, reward: Any) -> str:
    """Return a digest of everything that the reward's scores depend on.

    It covers the settings, and the version that the reward reports, if it does. With such a version,
    the folders of its models are not covered.
    """
    left_out = _NO_PART_OF_VERSION | (_PLACES if isinstance(reward, Versioned) else set())
    settings = config.model_dump(mode="json", exclude=left_out)
    return digest([settings, reward.version if isinstance(reward, Versioned) else ""])


def _ask(
    reward: Reward,
    config: RewardConfig,
    group: RolloutGroup,
    rollouts: Sequence[Any],
    completions: Sequence[str],
) -> list[Row]:
    """Score the [B] rollouts, and return their rows, with each number checked."""
    if not isinstance(reward, Detailed):
        found = reward.score(group.prompt, rollouts, completions)
        return [(score,) for score in check_scores(found, len(rollouts))]
    found, details = reward.score_in_detail(group.prompt, rollouts, completions)
    if details.keys() != set(config.details):
        raise RewardFailure(
            f"told {sorted(details)} beside its scores, expected {sorted(config.details)}", "reply"
        )
    columns = [found, *(details[name] for name in config.details)]
    return [*zip(*(check_scores(column, len(rollouts)) for column in columns), strict=True)]
