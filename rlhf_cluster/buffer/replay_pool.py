"""Groups that are trained again: their choice and their weights.

    a step = fresh groups (always as many) + up to n replayed ones

Candidates for the step at learner version v are groups that a step has trained before. Fewer than
`max_uses` steps have trained them, and their oldest token is of version v - max_staleness or later. n
of them are drawn without replacement, or all if there are not more than n. Candidate i of N is in the
draw with probability

    pi_i  ~  (1 - FLOOR) s_i^alpha / sum_k s_k^alpha + FLOOR / N      s_i: its reward spread
    w_i   =  (n / N / pi_i)^beta                                     the weight of its tokens' losses

scaled so that the pi sum to n, none greater than 1. With "uniform" pi_i = n / N and w_i = 1. This is
proportional prioritisation with its importance weight (Schaul et al. 2015, arXiv 1511.05952, sections
3.3 and 3.4), with two changes. First, the probability is exactly that of being in the draw, by the
pivotal method (Deville and Tille 1998, Biometrika 85); theirs is not, if draws are without replacement.
Second, a uniform part, instead of their constant added to each priority, keeps every weight within
(1 / FLOOR)^beta, so that no weight has to be divided by the largest. With beta = 1 the expected sum of
the replayed groups' losses is that of uniform replay.

Promises:
- the choice is determined by candidates, version and seed alone, so a run that resumes from a
  checkpoint repeats it;
- no group is in a step twice, or trained by more than `max_uses` steps;
- a replayed group is read from its file, so no object of a trained group stays in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import (
    TrainedGroup,
    TrainingGroup,
)

if TYPE_CHECKING:
    from rlhf_cluster.sections.rl_run import Replay, Run, Staleness

FLOOR = 0.1
"""Share of the draw that is uniform, whatever the priorities."""
_STREAM = 2
"""Number that separates the draws from others with the same seed and version."""


def inclusion(priorities: Sequence[float], num: int) -> np.ndarray:
    """Return the probabilities of being among `num` of N, in proportion to `priorities`.

    Priorities are positive. No probability is greater than 1.

    Returns:
        [N] float64 that sum to `num`.
    """
    left = np.asarray(priorities, dtype=np.float64)
    found, open_ = np.ones(len(left)), np.ones(len(left), dtype=bool)
    while open_.any():
        share = left * ((num - (~open_).sum()) / left[open_].sum())
        over = open_ & (share >= 1)
        if not over.any():
            found[open_] = share[open_]
            break
        open_ &= ~over
    return found


def draw(probabilities: Sequence[float], random: np.random.Generator) -> list[int]:
    """Draw indices, each with its probability; return them rising.

    Their number is the sum of the probabilities, which is a whole number.

    This is the pivotal method: two indices settle which of them keeps what both have together, until
    each index is in or out.
    """
    chosen: list[int] = []
    holder, held = -1, 0.0
    order, numbers = random.permutation(len(probabilities)), random.random(len(probabilities))
    for place, number in zip(order.tolist(), numbers.tolist(), strict=True):
        own = probabilities[place]
        if holder < 0:
            holder, held = place, own
        elif held + own < 1:
            holder = place if number * (held + own) < own else holder
            held += own
        elif number * (2 - held - own) < 1 - own:
            chosen.append(holder)
            holder, held = place, held + own - 1
        else:
            chosen.append(place)
            held += own - 1
    if held > 0.5:
        chosen.append(holder)
    return sorted(chosen)


def choose(
    candidates: Sequence[TrainedGroup], num: int, settings: Replay, random: np.random.Generator
) -> list[TrainingGroup]:
    """Choose up to `num` of the candidates to be trained once more; return them in their order."""
    num, total = min(num, len(candidates)), len(candidates)
    if num == 0:
        return []
    if settings.priority == "uniform":
        probabilities, weights = np.full(total, num / total), np.ones(total)
    else:
        powers = np.array([used.spread for used in candidates]) ** settings.alpha
        shares = powers / powers.sum() if powers.any() else np.full(total, 1 / total)
        probabilities = inclusion(((1 - FLOOR) * shares + FLOOR / total).tolist(), num)
        weights = (num / total / probabilities) ** settings.beta
    places = draw(probabilities.tolist(), random)
    return [candidates[place].taken(float(weights[place])) for place in places]


@dataclass(slots=True)
class ReplayPool:
    """Trained groups that may be trained again. `num` groups of a step are to be replayed ones."""

    settings: Replay
    num: int
    seed: int
    max_staleness: int
    _used: dict[int, TrainedGroup] = field(default_factory=dict)
    replayed: int = 0

    def candidates(self, version: int) -> list[TrainedGroup]:
        """Return the candidates for the step at learner version `version`, by number."""
        return [
            used
            for _, used in sorted(self._used.items())
            if version - used.summary.oldest_version <= self.max_staleness
            and len(used.steps) < self.settings.max_uses
        ]

    def take(self, version: int) -> list[TrainingGroup]:
        """Return the replayed groups of the step at learner version `version`.

        Call once per step.
        """
        self._used = {used.ticket.number: used for used in self.candidates(version)}
        random = np.random.default_rng((self.seed, version, _STREAM))
        found = choose(list(self._used.values()), self.num, self.settings, random)
        for taken in found:
            self._use(taken, version + 1)
        self.replayed += len(found)
        return found

    def record_trained(self, fresh: Iterable[TrainingGroup], version: int) -> None:
        """Record that the step at learner version `version` trains these groups the first time."""
        for taken in fresh:
            self._use(taken, version + 1)

    def exclude(self, numbers: Iterable[int]) -> None:
        """Drop these groups, which cannot be read any more."""
        for number in numbers:
            self._used.pop(number, None)

    def state(self, version: int) -> tuple[TrainedGroup, ...]:
        """Return the state for `load_state`, between two steps, at learner version `version`."""
        return tuple(self.candidates(version))

    def load_state(self, used: Iterable[TrainedGroup], replayed: int) -> None:
        """Restore `state`, and the count of replayed groups."""
        self._used = {each.ticket.number: each for each in used}
        self.replayed = replayed

    def _use(self, taken: TrainingGroup, step: int) -> None:
        """Count a use. Raises `RecordError` for a group that may not be trained by `step`."""
        number, before = taken.ticket.number, self._used.get(taken.ticket.number)
        steps = () if before is None else before.steps
        if (
            taken.uses != len(steps)
            or step <= max(steps, default=0)
            or (len(steps) >= self.settings.max_uses)
        ):
            raise RecordError(
                f"group {taken.ticket.group_id} would be trained by step {step} as its use "
                f"{taken.uses + 1}, and steps {list(steps)} trained it; buffer.replay.max_uses = "
                f"{self.settings.max_uses}. The group was not trained; this is a fault of the system"
            )
        self._used[number] = TrainedGroup(
            ticket=replace(taken.ticket, attempt=0),
            summary=replace(taken.summary, step_rewards=(), parts={}),
            steps=(*steps, step),
        )


def build_replay_pool(settings: Replay | None, run: Run, staleness: Staleness) -> ReplayPool | None:
    """Build the pool of a run; None if every group is trained once."""
    if settings is None:
        return None
    num = settings.num_replayed(run.groups_per_step)
    return ReplayPool(settings, num, run.seed, staleness.max_staleness)


def replay_metrics(
    taken: Sequence[TrainingGroup], settings: Replay | None, groups_per_step: int
) -> dict[str, float]:
    """Return the replay metrics of one step; none without replay."""
    if settings is None:
        return {}
    num = settings.num_replayed(groups_per_step)
    again = [each for each in taken if each.uses]
    values = {
        "replay/groups": float(len(again)),
        "replay/missing_groups": float(num - len(again)),
    }
    if again:
        values["replay/uses_mean"] = float(np.mean([each.uses + 1 for each in again]))
        values["replay/weight_mean"] = float(np.mean([each.weight for each in again]))
    return values
