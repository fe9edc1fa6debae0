"""Cases for the verifiers `numeric` and `maths`, made from a seed and split in two halves.

A case is a target, a completion and whether it is right. Templates (`verifier_templates.py`) and
targets (`verifier_targets.py`, GSM8K's test answers where `RLHF_REAL_DATA` has them, else arithmetic)
each go to the `work` half or the `counted` half by their own text, so the halves share neither. A
reader is written against the work half; of the counted half only the counts are ever looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.verifier_targets import formulas
from benchmarks.verifier_templates import REFUSED, REFUSED_FORMULA, STATED, STATED_FORMULA

Half = Literal["work", "counted"]
Variant = Literal["right", "wrong", "restated", "refused"]

TARGETS_OF_A_TEMPLATE = 40
FORMULAS_OF_A_TEMPLATE = 80
BUILT_IN_TARGETS = 600
_CALCULATION = re.compile(r"<<[^>]*>>")
_NUMBER = re.compile(r"(?<![\d.,])\d[\d,]*(?![\d.]|,\d)")


@dataclass(frozen=True, slots=True)
class Case:
    target: str
    completion: str
    variant: Variant
    """Only `right` is to score 1; `refused` names the target and states no answer."""
    template: str


@dataclass(frozen=True, slots=True)
class Problem:
    work: str
    value: int


def numeric_cases(seed: int, half: Half, each: int = TARGETS_OF_A_TEMPLATE) -> Iterator[Case]:
    """Cases with one number as their target."""
    problems = [p for p in _problems(seed) if half_of(f"{p.value} {p.work}") == half]
    for template in _of_half(STATED, half):
        rng = random.Random(f"{seed} {template}")
        for problem in rng.sample(problems, min(each, len(problems))):
            yield from _stated(template, problem, rng)
    for template in _of_half(REFUSED, half):
        rng = random.Random(f"{seed} {template}")
        for problem in rng.sample(problems, min(each, len(problems))):
            target = str(problem.value)
            yield Case(target, _written(template, problem, target, rng), "refused", template)


def formula_cases(seed: int, half: Half, each: int = FORMULAS_OF_A_TEMPLATE) -> Iterator[Case]:
    """Cases with an expression, a set, an interval, a tuple or a matrix as their target."""
    targets = [f for f in formulas(seed) if half_of(f.target) == half]
    for template in _of_half((*STATED_FORMULA, *REFUSED_FORMULA), half):
        rng = random.Random(f"{seed} {template}")
        for formula in rng.sample(targets, min(each, len(targets))):
            wrong = rng.choice(formula.wrong)
            written: Sequence[tuple[Variant, str]] = [("right", rng.choice(formula.right))]
            if template in REFUSED_FORMULA:
                written = [("refused", formula.target)]
            else:
                written = [*written, ("wrong", wrong), ("restated", rng.choice(formula.restated))]
            for variant, answer in written:
                text = template.replace("@w", "We solve it step by step.")
                text = text.replace("@v", rng.choice(formula.wrong)).replace("@l", answer)
                yield Case(formula.target, text, variant, template)


def half_of(text: str) -> Half:
    """The half of a template or a target."""
    return "work" if hashlib.sha256(text.encode()).digest()[0] % 2 else "counted"


def _of_half(templates: Sequence[str], half: Half) -> list[str]:
    return [template for template in templates if half_of(template) == half]


def _stated(template: str, problem: Problem, rng: random.Random) -> Iterator[Case]:
    target, value = str(problem.value), problem.value
    yield Case(target, _written(template, problem, target, rng), "right", template)
    wrong = {value + rng.choice((-1, 1)), value * 10, -value}
    wrong |= {int(n.replace(",", "")) for n in _NUMBER.findall(problem.work)}
    swapped = "".join(reversed(str(abs(value))))
    wrong.add(int(swapped))
    for answer in rng.sample(sorted(wrong - {value}), 2):
        yield Case(target, _written(template, problem, str(answer), rng), "wrong", template)
    if "@e" not in template:
        restated = _arithmetic(value, rng)
        yield Case(target, _written(template, problem, restated, rng), "restated", template)


def _written(template: str, problem: Problem, answer: str, rng: random.Random) -> str:
    whole = re.fullmatch(r"-?\d+", answer) is not None
    grouped = f"{int(answer):,}" if whole else answer
    others = rng.sample([n for n in range(2, 60) if n != problem.value], 2)
    fields = {
        "@w": problem.work,
        "@n": answer,
        "@t": grouped,
        "@b": grouped.replace(",", "{,}"),
        "@l": answer.replace("*", r"\times").replace("/", r"\div"),
        "@e": _arithmetic(int(answer), rng) if whole else answer,
        "@o": str(others[0]),
        "@p": str(others[1]),
    }
    return re.sub("@[wntbleop]", lambda field: fields[field[0]], template)


def _arithmetic(value: int, rng: random.Random) -> str:
    part = rng.randint(2, max(3, abs(value) // 2))
    choices = [f"{value - part} + {part}", f"{value + part} - {part}", f"{2 * value} / 2"]
    factors = [n for n in range(2, 20) if value and value % n == 0 and abs(value) > n]
    choices += [f"{value // n} * {n}" for n in factors[:2]]
    return rng.choice(choices)


def _problems(seed: int) -> list[Problem]:
    folder = os.environ.get("RLHF_REAL_DATA")
    path = Path(folder) / "gsm8k" / "test.jsonl" if folder else None
    if path is None or not path.exists():
        return _built_in(seed)
    found = []
    for line in path.read_text().splitlines():
        work, _, gold = json.loads(line)["answer"].rpartition("\n#### ")
        found.append(Problem(_CALCULATION.sub("", work), int(gold.replace(",", ""))))
    return found


def _built_in(seed: int) -> list[Problem]:
    rng, found = random.Random(seed), []
    for _ in range(BUILT_IN_TARGETS):
        a, b = rng.randint(2, 9000), rng.randint(2, 400)
        found.append(
            Problem(f"First there are {a}.\nThen {b} more come.\n{a} + {b} = {a + b}", a + b)
        )
    return found
