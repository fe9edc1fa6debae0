"""Rows of a data set from revised answers, and the report on all revisions.

    revisions         every last revision                   {prompt, completion, reward, rounds}
    revision_pairs    the last revision and the response    {prompt, chosen, rejected, rounds}

`prefer` says which of a pair is chosen: the revision (the purpose of revising), or the one of higher
reward. With a judge of principles as reward, that is the judge's preference.

Promises: those of `synthetic_data.select_rows`. Every row holds the response, and each round's
principle, critique and revision, as the model wrote them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlhf_cluster.config.dataset_config import GenerateSection
from rlhf_cluster.errors import DataError
from rlhf_cluster.synthetic_data.answers_file import (
    Answer,
    Answers,
    Revised,
)

Row = dict[str, Any]
SELECTIONS = ("revisions", "revision_pairs")


def rows_of_revisions(
    group: Answers, section: GenerateSection
) -> tuple[list[Row], list[Answer], Counter[str]]:
    """Return what `select_rows.rows_of` does, for revisions. A revision is a separate answer."""
    counts: Counter[str] = Counter(unrevised=len(group.unrevised))
    rows: list[Row] = []
    taken: list[Answer] = []
    seen: set[tuple[str, ...]] = set()
    pairs = section.select == "revision_pairs"
    for answer in group.answers:
        revised = revised_of(answer)
        content = (answer.text, revised.text) if pairs else (revised.text,)
        reason = _unusable(answer, revised, section) if pairs else None
        if reason is None and section.deduplicate and content in seen:
            reason = "duplicates"
        if reason is not None:
            counts[reason] += 1
            continue
        seen.add(content)
        rows.append((_pair if pairs else _completion)(group, answer, revised, section))
        taken += [answer] * pairs + [_as_answer(answer, revised)]
    counts["no_row"] += not rows
    return rows, taken, counts


def revised_of(answer: Answer) -> Revised:
    """Return the revision of an answer. Raises `DataError` where it has none."""
    if answer.revised is None:
        raise DataError(
            "stage.select asks for revisions, and the answers were made without. Start another stage "
            "with --set run.name=NEW"
        )
    return answer.revised


@dataclass(slots=True)
class RevisionReport:
    """Sums over the responses to be revised: rewards, changes and problems."""

    revised: int = 0
    first_reward: float = 0.0
    reward: float = 0.0
    better: float = 0.0
    unchanged: int = 0
    unrevised: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)

    def add(self, group: Answers) -> None:
        for answer in group.answers:
            own = revised_of(answer)
            self.revised += 1
            self.first_reward += answer.reward
            self.reward += own.reward
            self.better += 0.5 if own.reward == answer.reward else float(own.reward > answer.reward)
            self.unchanged += own.text == answer.text
            self.unusable.update(own.unusable)
        for lost in group.unrevised:
            self.unrevised[lost.problem] += 1
            self.unusable.update(lost.unusable)

    def document(self) -> dict[str, Any]:
        """Return the report for report.json.

        `better_fraction` is the share of revisions whose reward is above the first response's; an
        equal one is half.
        """

        def mean(total: float) -> float | None:
            return total / self.revised if self.revised else None

        return {
            "revised": self.revised,
            "first_reward_mean": mean(self.first_reward),
            "reward_mean": mean(self.reward),
            "better_fraction": mean(self.better),
            "unchanged": self.unchanged,
            "unrevised": dict(sorted(self.unrevised.items())),
            "unusable_replies": dict(sorted(self.unusable.items())),
        }


def _unusable(first: Answer, revised: Revised, section: GenerateSection) -> str | None:
    if first.cut and section.cut == "skip":
        return "cut"
    if first.text == revised.text:
        return "unchanged"
    apart = abs(revised.reward - first.reward)
    if section.prefer == "reward" and (not apart or apart < (section.min_margin or 0.0)):
        return "undecided"
    return None


def _completion(group: Answers, first: Answer, revised: Revised, section: GenerateSection) -> Row:
    return {
        "prompt": group.prompt,
        "completion": revised.text,
        "reward": revised.reward,
        "first": first.text,
        "first_reward": first.reward,
        "rounds": [asdict(each) for each in revised.rounds],
        "prompt_id": group.prompt_id,
    }


def _pair(group: Answers, first: Answer, revised: Revised, section: GenerateSection) -> Row:
    by_reward = section.prefer == "reward"
    both = [(revised.text, revised.reward), (first.text, first.reward)]
    if by_reward and first.reward > revised.reward:
        both.reverse()
    (chosen, chosen_reward), (rejected, rejected_reward) = both
    margin = {"margin": chosen_reward - rejected_reward} if by_reward else {}
    return {
        "prompt": group.prompt,
        "chosen": chosen,
        "rejected": rejected,
        **margin,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "first": first.text,
        "rounds": [asdict(each) for each in revised.rounds],
        "prompt_id": group.prompt_id,
    }


def _as_answer(first: Answer, revised: Revised) -> Answer:
    return replace(
        first,
        text=revised.text,
        reward=revised.reward,
        parts=revised.parts,
        num_tokens=revised.num_tokens,
        cut=False,
    )
