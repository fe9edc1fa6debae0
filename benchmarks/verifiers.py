r"""How often the verifiers `numeric` and `maths` are right about GSM8K's test answers in the words of
chat models.

Each answer is written in each of `presentations.ALL`, right and wrong: off by one, another number of
the solution, two digits swapped, and the problem restated (`40 + 32`). Right must score 1 and wrong 0.
`numeric` has the whole split, `maths` a sample of `MATHS_PROBLEMS`. Accuracies are over right and wrong
texts alike, `*_accuracy_min` of the worst presentation.

The presentations are the ones that the readers were written against. `counted_*` are measured on the
half of `verifier_cases.py` that nobody looks at by case: accuracy of both readers, the share of wrong
answers and of restated problems that score 1, and the upper end of a 95 % interval of the former.

    RLHF_REAL_DATA=folder python benchmarks/verifiers.py      # folder/gsm8k/test.jsonl
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import write_result
from benchmarks.presentations import ALL, Answer
from benchmarks.verifier_cases import Case, formula_cases, numeric_cases
from rlhf_cluster.records import FinishReason, Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.rules.math_answer import (
    Maths,
    MathsConfig,
)
from rlhf_cluster.rewards.rules.numeric import (
    Numeric,
    NumericConfig,
)

MATHS_PROBLEMS = 300
SEED = 0
FALSE = ("wrong", "restated", "refused")
"""Variants of a case that are to score 0."""
_CALCULATION = re.compile(r"<<[^>]*>>")
_NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?![\d.]|,\d)")

Score = Callable[[Prompt, Sequence[str]], list[float]]


def problems(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "gsm8k" / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def variants(row: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, Answer]]:
    """The right answer and wrong ones, each with its name."""
    work, _, gold = row["answer"].rpartition("\n#### ")
    work, value = _CALCULATION.sub("", work), int(gold.replace(",", ""))
    yield "right", Answer(work=work, value=value)
    yield "off_by_one", Answer(work=work, value=value + rng.choice((-1, 1)))
    others = {int(n.replace(",", "")) for n in _NUMBER.findall(work)} - {value}
    if others:
        yield "other_number", Answer(work=work, value=rng.choice(sorted(others)))
    swapped = _swapped(value, rng)
    if swapped is not None:
        yield "digits_swapped", Answer(work=work, value=swapped)
    part = rng.randint(1, max(2, abs(value) // 2))
    restated = rng.choice(
        (f"{value - part} + {part}", f"{value + part} - {part}", f"{2 * value} / 2")
    )
    yield "restated", Answer(work=work, value=value, restated=restated)


def _swapped(value: int, rng: random.Random) -> int | None:
    digits = list(str(abs(value)))
    places = [i for i in range(len(digits) - 1) if digits[i] != digits[i + 1]]
    if not places:
        return None
    i = rng.choice(places)
    digits[i], digits[i + 1] = digits[i + 1], digits[i]
    return int("".join(digits)) * (1 if value >= 0 else -1)


def measure(rows: Sequence[dict[str, Any]], score: Score) -> tuple[dict[str, Counter[str]], float]:
    """For each presentation what was right and what was seen, by variant; and seconds a text."""
    found: dict[str, Counter[str]] = {name: Counter() for name in ALL}
    seconds, texts_scored = 0.0, 0
    for number, row in enumerate(rows):
        answers = list(variants(row, random.Random(f"{SEED} {number}")))
        texts = [write(answer) for write in ALL.values() for _, answer in answers]
        prompt = Prompt(
            prompt_id=f"row-{number}",
            token_ids=np.array([1], dtype=np.int32),
            source=row["question"],
            columns={"answer": row["answer"]},
        )
        started = time.perf_counter()
        scores = iter(score(prompt, texts))
        seconds += time.perf_counter() - started
        texts_scored += len(texts)
        for name in ALL:
            for variant, _ in answers:
                found[name][f"{variant}_seen"] += 1
                found[name][variant] += next(scores) == (variant == "right")
    return found, seconds / texts_scored


def accuracy(counts: Counter[str]) -> float:
    seen = {name: number for name, number in counts.items() if name.endswith("_seen")}
    return sum(counts[name.removesuffix("_seen")] for name in seen) / sum(seen.values())


def count(cases: Iterable[Case], score: Score) -> Counter[str]:
    """By variant, how many cases were seen and how many scored as they should; by count only."""
    counts: Counter[str] = Counter()
    for number, case in enumerate(cases):
        prompt = Prompt(
            prompt_id=f"case-{number}",
            token_ids=np.array([1], dtype=np.int32),
            source="",
            columns={"answer": case.target},
        )
        [given] = score(prompt, [case.completion])
        counts[f"{case.variant}_seen"] += 1
        counts[case.variant] += given == (case.variant == "right")
    return counts


def upper_bound(events: int, trials: int) -> float:
    """Upper end of Wilson's 95 % interval of a share."""
    share, z = events / trials, 1.96
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    return (middle + spread) / (1 + z * z / trials)


def counted_figures(counts: Mapping[str, Counter[str]]) -> dict[str, float]:
    """The figures of the counted half."""
    figures: dict[str, float] = {}
    for kind, own in counts.items():
        figures[f"counted_{kind}_accuracy"] = accuracy(own)
        figures[f"counted_{kind}_right_seen"] = own["right_seen"]
        figures[f"counted_{kind}_wrong_seen"] = sum(own[f"{name}_seen"] for name in FALSE)
    both = sum(counts.values(), Counter[str]())
    seen = sum(both[f"{name}_seen"] for name in FALSE)
    accepted = seen - sum(both[name] for name in FALSE)
    return figures | {
        "wrong_accepted": accepted / seen,
        "wrong_accepted_upper_bound": upper_bound(accepted, seen),
        "restated_accepted": 1 - both["restated"] / both["restated_seen"],
    }


def rollout() -> Rollout:
    one = np.ones(1, dtype=np.int32)
    return Rollout(
        rollout_id="0",
        prompt_id="0",
        prompt_ids=one,
        response_ids=one,
        sampled_logprobs=np.zeros(1, dtype=np.float32),
        versions=one,
        response_mask=one.astype(np.bool_),
        finish_reason=FinishReason.STOP,
        temperature=1.0,
        worker="",
        started_s=0.0,
        finished_s=0.0,
    )


def main() -> None:
    folder = os.environ.get("RLHF_REAL_DATA")
    if folder is None:
        raise SystemExit(
            "RLHF_REAL_DATA is not set. Set it to the folder that holds gsm8k/test.jsonl"
        )
    rows, one = problems(Path(folder)), rollout()
    sample = random.Random(SEED).sample(rows, MATHS_PROBLEMS)
    figures, runs = {}, {}
    counted: dict[str, Counter[str]] = {}
    accepted, restated = 0, 0
    verifiers = {
        "numeric": (Numeric(NumericConfig(), RewardContext()), rows),
        "maths": (Maths(MathsConfig(compare_s=60), RewardContext()), sample),
    }
    cases = {"numeric": numeric_cases, "maths": formula_cases}
    for kind, (reward, given) in verifiers.items():
        score: Score = lambda p, t, r=reward: r.score(p, [one] * len(t), t)  # noqa: E731
        try:
            found, seconds = measure(given, score)
            counted[kind] = count(cases[kind](SEED, "counted"), score)
        finally:
            reward.close()
        worst = min(ALL, key=lambda name: accuracy(found[name]))
        figures[f"{kind}_accuracy_min"] = accuracy(found[worst])
        figures[f"{kind}_accuracy_mean"] = sum(accuracy(c) for c in found.values()) / len(ALL)
        figures[f"{kind}_microseconds_per_text"] = seconds * 1e6
        accepted += sum(c["restated_seen"] - c["restated"] for c in found.values())
        restated += sum(c["restated_seen"] for c in found.values())
        runs[kind] = {
            name: {"accuracy": round(accuracy(counts), 5), **dict(sorted(counts.items()))}
            for name, counts in found.items()
        }
        print(
            kind, {name: run["accuracy"] for name, run in runs[kind].items() if run["accuracy"] < 1}
        )
    figures["restated_problem_accepted"] = accepted / restated
    figures |= counted_figures(counted)
    runs |= {f"counted_{kind}": dict(sorted(own.items())) for kind, own in counted.items()}
    figures["presentations"] = len(ALL)
    figures["numeric_problems"], figures["maths_problems"] = len(rows), len(sample)
    print(json.dumps(figures, indent=2))
    write_result("verifiers", figures, list(runs.items()))


if __name__ == "__main__":
    main()
