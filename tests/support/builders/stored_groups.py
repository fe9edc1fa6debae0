"""Groups on disk, the recovery of a run's groups, and what comes back compared to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster.buffer.group_recovery import Recovery
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.records import (
    ExperienceGroup,
    Ticket,
)
from tests.support.fakes.services import (
    make_group,
    make_prompt,
)


def write(
    store: ExperienceStore, number: int, version: int = 0, reference: int = -1, attempt: int = 0
) -> None:
    ticket = Ticket(number=number, version=version, attempt=attempt)
    store.write(make_group(ticket, make_prompt(number), [1.0, 0.0], version), reference)


def recovery(root: Path, **settings: Any) -> Recovery:
    made = {
        "every": 0,
        "span": 2,
        "look_ahead": 1,
        "keep_steps": 1,
        "step": None,
        "tell": lambda text: None,
    }
    store = settings.pop("store", ExperienceStore(root / "experience"))
    return Recovery(store, root / "checkpoints", **{**made, **settings})


def run_steps(root: Path, run: Recovery, num_steps: int, groups: int = 2) -> list[list[int]]:
    """The numbers on disk after each step, of a run that is two steps ahead with its groups."""
    store = ExperienceStore(root / "experience")
    there = []
    for step in range(1, num_steps + 1):
        for number in range((step - 1) * groups, (step + 2) * groups):
            if number >= (step + 1) * groups or step == 1:
                write(store, number, step)
        run.record_trained(step, list(range((step - 1) * groups, step * groups)))
        there.append(store.numbers())
    return there


def assert_same(left: Any, right: Any, where: str = "group") -> None:
    """Equal field by field, arrays by type and bits, floats by bits."""
    assert type(left) is type(right), where
    if dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            name = field.name
            assert_same(getattr(left, name), getattr(right, name), f"{where}.{name}")
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, where
        assert left.tobytes() == right.tobytes(), where
    elif isinstance(left, Mapping):
        assert list(left) == list(right), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(left, float):
        assert np.float64(left).tobytes() == np.float64(right).tobytes(), where
    else:
        assert left == right, where


def sample(number: int = 12, version: int = 3) -> ExperienceGroup:
    ticket = Ticket(number=number, version=version)
    return make_group(ticket, make_prompt(number), [0.0, 1.0, 0.5], version)
