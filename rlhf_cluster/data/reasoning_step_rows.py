"""Responses with labelled reasoning steps, parsed from the rows of a data file.

    listed    prompt, steps, labels       steps: a list of texts; the response is these, with the
                                          separator between them
    split     prompt, completion, labels  completion: a text, cut at the separator

A label is true, false, or a probability in [0, 1] that the step is right, such as the share of
completions from there that reach the right answer. A step without a label has null. There are as many
labels as steps; blank segments are not steps (`data.reasoning_steps`).

Promises: a row that does not fit is refused with file and line. A row without any label raises
`UnusableRow`. No text is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cluster.data.dialogue_text import (
    Messages,
    parse_messages,
)
from rlhf_cluster.data.preferences import (
    REASONS,
    UnusableRow,
)
from rlhf_cluster.data.reasoning_steps import step_spans
from rlhf_cluster.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSteps:
    """A response and the labels of its steps."""

    prompt: str | Messages
    completion: str
    labels: tuple[float | None, ...]  # one per step, at least one of them a number


def parse_steps(columns: Mapping[str, Any], where: str, separator: str) -> LabelledSteps:
    """Parse a row in either layout. Raises `DataError`, `UnusableRow`."""
    missing = [name for name in ("prompt", "labels") if columns.get(name) is None]
    texts = [name for name in ("steps", "completion") if columns.get(name) is not None]
    if missing or len(texts) != 1:
        found = ", ".join(repr(name) for name, value in columns.items() if value is not None)
        raise DataError(
            f"{where}: expected the columns prompt, labels, and steps or completion; found {found}. "
            "Name them with the source's columns"
        )
    prompt = columns["prompt"]
    if not isinstance(prompt, str) or not prompt:
        prompt = parse_messages(prompt, f"{where}, column 'prompt'")
    if texts == ["steps"]:
        completion = _join(columns["steps"], f"{where}, column 'steps'", separator)
    else:
        completion = columns["completion"]
        if not isinstance(completion, str):
            raise DataError(
                f"{where}, column 'completion': found {type(completion).__name__}, expected text. "
                "Correct the row"
            )
    if not completion.strip():
        raise UnusableRow(f"{where}: {REASONS['empty']}. Correct or remove the row")
    labels = _labels(columns["labels"], f"{where}, column 'labels'")
    if len(labels) != (num_steps := len(step_spans(completion, separator))):
        raise DataError(
            f"{where}: {len(labels)} labels and {num_steps} steps, with the separator {separator!r}. "
            "Give one label per step, null where there is none, or set stage.step_separator"
        )
    if all(label is None for label in labels):
        raise UnusableRow(f"{where}: {REASONS['unlabelled']}. Correct or remove the row")
    return LabelledSteps(prompt=prompt, completion=completion, labels=labels)


def _join(steps: Any, where: str, separator: str) -> str:
    if not isinstance(steps, list) or not steps:
        raise DataError(f"{where}: found {steps!r:.60}, expected a list of texts. Correct the row")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip() or separator in step:
            raise DataError(
                f"{where}: step {number} is {step!r:.60}, expected a text that is not blank and does "
                f"not hold the separator {separator!r}. Correct it, or set stage.step_separator"
            )
    return separator.join(steps)


def _labels(values: Any, where: str) -> tuple[float | None, ...]:
    if not isinstance(values, list):
        raise DataError(
            f"{where}: found {values!r:.60}, expected a list of labels. Correct the row"
        )
    for number, value in enumerate(values):
        is_label = isinstance(value, bool | int | float) and 0 <= value <= 1
        if value is not None and not is_label:
            raise DataError(
                f"{where}: label {number} is {value!r:.60}, expected true, false, a number from 0 to "
                "1, or null. Correct it"
            )
    return tuple(None if value is None else float(value) for value in values)
