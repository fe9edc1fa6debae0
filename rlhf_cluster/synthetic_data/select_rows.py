"""Selection of the answers to a prompt that become rows of a data set.

    all           every response                                  {prompt, completion, reward}
    best_of_n     the `keep` of highest reward                    the same
    threshold     those of at least `threshold`                   the same
    pairs         the best against the worst, the second best     {prompt, chosen, rejected, margin}
                  against the second worst, `keep` at most
    step_labels   every response                                  {prompt, completion, labels}
    revisions, revision_pairs                                     see `synthetic_data.revision_rows`

`best_of_n` and `threshold` are rejection sampling: RFT (Yuan et al. 2023, arXiv:2308.01825), RAFT (Dong
et al. 2023, arXiv:2304.06767), and the fine-tuning of Llama 2 (Touvron et al. 2023, arXiv:2307.09288).
A step's label is the share of its completions whose reward is at least `threshold` (Wang et al. 2023,
Math-Shepherd, arXiv:2312.08935).

Promises:
- the functions are pure: rows depend on the answers alone, and are in their order;
- of equal rewards the earlier answer is the better one;
- every response or prompt without a row is counted under its reason (`LEFT_OUT`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_cluster.config.dataset_config import GenerateSection
from rlhf_cluster.errors import DataError
from rlhf_cluster.synthetic_data.answers_file import (
    Answer,
    Answers,
)
from rlhf_cluster.synthetic_data.revision_rows import (
    SELECTIONS,
    rows_of_revisions,
)

Row = dict[str, Any]

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


def rows_of(
    group: Answers, section: GenerateSection
) -> tuple[list[Row], list[Answer], Counter[str]]:
    """Return the rows of a prompt, the answers in them, and counts of unused answers by reason."""
    if section.select in SELECTIONS:
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
