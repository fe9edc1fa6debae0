"""Data set of sampled answers: which of them become rows, the file, and the report on it.

    all               every response                               {prompt, completion, reward}
    best_of_n         the `keep` of highest reward                 the same
    threshold         those of at least `threshold`                the same
    pairs             the best against the worst, the second best  {prompt, chosen, rejected, margin}
                      against the second worst, `keep` at most
    step_labels       every response                               {prompt, completion, labels}
    revisions         every last revision                          {prompt, completion, reward, rounds}
    revision_pairs    the last revision and the response           {prompt, chosen, rejected, rounds}

`best_of_n` and `threshold` are rejection sampling: RFT (Yuan et al. 2023, arXiv:2308.01825), RAFT (Dong
et al. 2023, arXiv:2304.06767), and the fine-tuning of Llama 2 (Touvron et al. 2023, arXiv:2307.09288).
A step's label is the share of its completions whose reward is at least `threshold` (Wang et al. 2023,
Math-Shepherd, arXiv:2312.08935). `prefer` says which of a revision and its response is chosen: the
revision (the purpose of revising), or the one of higher reward. With a judge of principles as reward,
that is the judge's preference.

Promises:
- rows depend on the answers alone, and those of a prompt are in the order of its answers;
- of equal rewards the earlier answer is the better one;
- a row of a revision holds the response, and each round's principle, critique and revision, as the
  model wrote them;
- the file appears as a whole, in the order of the prompts, whatever the order in which these were
  finished;
- the report accounts for every response and every prompt: those without a row are counted under their
  reason (`LEFT_OUT`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_cluster.config.dataset_config import GenerateSection
from rlhf_cluster.errors import DataError
from rlhf_cluster.synthetic_data.answers_file import Answer, Answers, Revised, in_order
from rlhf_cluster.util.durable_files import write_atomically

Row = dict[str, Any]

REVISION_SELECTIONS = ("revisions", "revision_pairs")

LEFT_OUT = {
    "empty": "responses without text",
    "cut": "responses that reached the limit of tokens",
    "duplicates": "responses equal to an earlier one to the same prompt",
    "not_selected": "responses that the selection did not take",
    "ties": "prompts whose responses all have the same reward",
    "close": "prompts whose pairs are all under stage.min_margin",
    "unrevised": "responses without a last revision",
    "unchanged": "responses that their last revision left as they were",
    "undecided": "revisions whose reward is not far enough from their response's",
    "no_row": "prompts without any row",
}


def rows_of_revisions(
    group: Answers, section: GenerateSection
) -> tuple[list[Row], list[Answer], Counter[str]]:
    """Return what `rows_of` does, for revisions. A revision is a separate answer."""
    counts: Counter[str] = Counter(unrevised=len(group.unrevised))
    rows: list[Row] = []
    taken: list[Answer] = []
    seen: set[tuple[str, ...]] = set()
    pairs = section.select == "revision_pairs"
    for answer in group.answers:
        revised = revised_of(answer)
        content = (answer.text, revised.text) if pairs else (revised.text,)
        reason = _find_reason(answer, revised, section) if pairs else None
        if reason is None and section.deduplicate and content in seen:
            reason = "duplicates"
        if reason is not None:
            counts[reason] += 1
            continue
        seen.add(content)
        rows.append(
            (_revised_pair_row if pairs else _revision_row)(group, answer, revised, section)
        )
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


def _find_reason(first: Answer, revised: Revised, section: GenerateSection) -> str | None:
    if first.cut and section.cut == "skip":
        return "cut"
    if first.text == revised.text:
        return "unchanged"
    apart = abs(revised.reward - first.reward)
    if section.prefer == "reward" and (not apart or apart < (section.min_margin or 0.0)):
        return "undecided"
    return None


def _revision_row(group: Answers, first: Answer, revised: Revised, section: GenerateSection) -> Row:
    return {
        "prompt": group.prompt,
        "completion": revised.text,
        "reward": revised.reward,
        "first": first.text,
        "first_reward": first.reward,
        "rounds": [asdict(each) for each in revised.rounds],
        "prompt_id": group.prompt_id,
    }


def _revised_pair_row(
    group: Answers, first: Answer, revised: Revised, section: GenerateSection
) -> Row:
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


def rows_of(
    group: Answers, section: GenerateSection
) -> tuple[list[Row], list[Answer], Counter[str]]:
    """Return the rows of a prompt, the answers in them, and counts of unused answers by reason."""
    if section.select in REVISION_SELECTIONS:
        return rows_of_revisions(group, section)
    counts: Counter[str] = Counter()
    usable = _usable(group.answers, section, counts)
    if section.select == "pairs":
        pairs = _pairs(usable, section, counts)
        rows = [_pair_row(group, better, worse) for better, worse in pairs]
        taken = [answer for pair in pairs for answer in pair]
    else:
        taken = _select(usable, section)
        as_row = _labelled_row if section.select == "step_labels" else _completion_row
        rows = [as_row(group, answer, section) for answer in taken]
    counts["not_selected"] += len(usable) - len(taken)
    counts["no_row"] += not rows
    return rows, taken, counts


def step_labels(answer: Answer, threshold: float) -> list[float]:
    """Return the label of each step, in [0, 1]. Raises `DataError` for an answer without them."""
    if answer.step_rewards is None:
        raise DataError(
            "stage.select = 'step_labels', and the answers were made without completions of their "
            "steps. Start another stage with --set run.name=NEW"
        )
    return [sum(r >= threshold for r in each) / len(each) for each in answer.step_rewards]


def _usable(
    answers: Sequence[Answer], section: GenerateSection, counts: Counter[str]
) -> list[Answer]:
    found: list[Answer] = []
    seen: set[str] = set()
    for answer in answers:
        reason = None
        if not answer.text.strip():
            reason = "empty"
        elif answer.cut and section.cut == "skip":
            reason = "cut"
        elif section.deduplicate and answer.text in seen:
            reason = "duplicates"
        if reason is not None:
            counts[reason] += 1
            continue
        seen.add(answer.text)
        found.append(answer)
    return found


def _select(usable: list[Answer], section: GenerateSection) -> list[Answer]:
    """Return the answers that become rows, for every selection but pairs and revisions."""
    if section.select in ("all", "step_labels"):
        return usable
    least = section.threshold
    able = [answer for answer in usable if least is None or answer.reward >= least]
    if section.select == "best_of_n" or section.keep is not None:
        able = _best_first(able)[: section.rows_per_prompt]
    return able


def _pairs(
    usable: list[Answer], section: GenerateSection, counts: Counter[str]
) -> list[tuple[Answer, Answer]]:
    order = _best_first(usable)
    pairs = [(order[i], order[-1 - i]) for i in range(min(section.keep or 1, len(order) // 2))]
    apart = [(b, w) for b, w in pairs if b.reward > w.reward]
    kept = [(b, w) for b, w in apart if b.reward - w.reward >= (section.min_margin or 0.0)]
    if pairs and not apart:
        counts["ties"] += 1
    elif pairs and not kept:
        counts["close"] += 1
    return kept


def _best_first(answers: list[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda answer: -answer.reward)


def _completion_row(group: Answers, answer: Answer, section: GenerateSection) -> Row:
    own = {"reward": answer.reward, "prompt_id": group.prompt_id}
    return {"prompt": group.prompt, "completion": answer.text, **own}


def _labelled_row(group: Answers, answer: Answer, section: GenerateSection) -> Row:
    assert section.threshold is not None
    labels = step_labels(answer, section.threshold)
    return {**_completion_row(group, answer, section), "labels": labels}


def _pair_row(group: Answers, better: Answer, worse: Answer) -> Row:
    return {
        "prompt": group.prompt,
        "chosen": better.text,
        "rejected": worse.text,
        "margin": better.reward - worse.reward,
        "chosen_reward": better.reward,
        "rejected_reward": worse.reward,
        "prompt_id": group.prompt_id,
    }


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True, kw_only=True)
class Report:
    """Sums over all prompts that `write_dataset` reads."""

    section: GenerateSection
    prompts: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    highest: float | None = None
    means: dict[str, _Mean] = field(default_factory=dict)
    samples: int = 0
    revisions: RevisionReport = field(default_factory=RevisionReport)

    def add(self, group: Answers, rows: list[Row], taken: list[Answer], left: Counter[str]) -> None:
        self.prompts += 1
        self.rows += len(rows)
        self.left_out += left
        for name, answers in (("", group.answers), ("selected_", taken)):
            for answer in answers:
                self._mean(f"{name}reward", answer.reward)
                self._mean(f"{name}tokens", answer.num_tokens)
                for part, value in answer.parts.items():
                    self._mean(f"{name}part/{part}", value)
        self.samples += len(group.answers) + len(group.unrevised)
        rewards = [answer.reward for answer in group.answers]
        if rewards:
            self._mean("best_reward", max(rewards))
            self.highest = max(rewards if self.highest is None else [*rewards, self.highest])
        if self.section.select in REVISION_SELECTIONS:
            self.revisions.add(group)
        for row in rows:
            if "margin" in row:
                self._mean("margin", row["margin"])
        if self.section.select == "step_labels":
            for answer in taken:
                for label in step_labels(answer, self.section.threshold or 0.0):
                    self._mean("label", label)

    def document(self, discarded: Mapping[str, int]) -> dict[str, Any]:
        """Return counts and means for report.json; `discarded` counts prompts by reason."""

        def mean(name: str) -> float | None:
            return self.means[name].value if name in self.means else None

        parts = sorted(name for name in self.means if name.startswith("part/"))
        return {
            "select": self.section.select,
            "prompts": self.prompts,
            "discarded": dict(discarded),
            "samples": self.samples,
            "rows": self.rows,
            "left_out": {name: self.left_out[name] for name in LEFT_OUT},
            "reward_mean": mean("reward"),
            "best_reward_mean": mean("best_reward"),
            "selected_reward_mean": mean("selected_reward"),
            "tokens_mean": mean("tokens"),
            "selected_tokens_mean": mean("selected_tokens"),
            "margin_mean": mean("margin"),
            "labels": self.means["label"].count if "label" in self.means else 0,
            "label_mean": mean("label"),
            "parts": {
                name.removeprefix("part/"): {
                    "mean": mean(name),
                    "selected": mean(f"selected_{name}"),
                }
                for name in parts
            },
            "revisions": self.revisions.document()
            if self.section.select in REVISION_SELECTIONS
            else None,
        }

    def _mean(self, name: str, value: float) -> None:
        self.means.setdefault(name, _Mean()).add(value)


def write_dataset(
    groups: Path, target: Path, section: GenerateSection, discarded: Mapping[str, int]
) -> dict[str, Any]:
    """Write the rows of all answers in `groups` to `target`, and return the report.

    Raises `DataError` for a damaged file, a file that cannot be written, or no row at all.
    """
    report = Report(section=section)
    try:
        with write_atomically(target) as file:
            for group in in_order(groups):
                rows, taken, left = rows_of(group, section)
                report.add(group, rows, taken, left)
                for row in rows:
                    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                    file.write(text.encode())
            if not report.rows:
                raise DataError(_explain_nothing(report, discarded))
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error}). Free space there, and give the same command "
            "again: no prompt is sampled again"
        ) from error
    return report.document(discarded)


def _explain_nothing(report: Report, discarded: Mapping[str, int]) -> str:
    left = ", ".join(
        f"{count} {LEFT_OUT[name]}" for name, count in report.left_out.items() if count
    )
    lost = ", ".join(f"{count} by {name}" for name, count in discarded.items()) or "none"
    highest = "no reward" if report.highest is None else f"highest reward {report.highest:g}"
    return (
        f"stage.select = {report.section.select!r} took nothing of {report.prompts} prompts "
        f"({highest}; left out: {left or 'nothing'}; discarded prompts: {lost}). Change [stage] and "
        "give the command again with --accept-changes: the answers that are there are kept"
    )
