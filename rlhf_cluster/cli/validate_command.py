"""Checks of `validate`: inputs as `run` checks them, the resulting numbers, and all that is wrong.

Promises: the checks of a stage that do not depend on each other are all made, those of the other
stages too, and every problem is reported once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cluster.cli.summaries import derived_generation, derived_stage
from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.config.check_scoring import kl_notes
from rlhf_cluster.config.load import AnyConfig, needs
from rlhf_cluster.errors import Gathered, problems_of
from rlhf_cluster.planning import doctor
from rlhf_cluster.planning.deep_validation import deep
from rlhf_cluster.planning.doctor import Finding
from rlhf_cluster.planning.local_models import find_without_network, with_local_model
from rlhf_cluster.planning.placement import derived
from rlhf_cluster.planning.run_inputs import check_inputs, check_stage_inputs

TRIED_PROMPTS = 10_000
"""Prompts from the first on that rules are tried on, so that a row that none can score is found."""


@dataclass(slots=True, kw_only=True)
class Checked:
    """What was found of one run or stage. `waits_for`: stages whose results it needs first."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    waits_for: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def lines(self, where: str) -> Iterator[str]:
        """Yield what `validate` prints. `where`: the file and the stage in it."""
        if not self.problems and self.waits_for:
            yield f"{where}: valid, but for what {self.waits_for[0]} leaves, which is yet to come"
        elif not self.problems:
            yield f"{where}: valid"
        width = max(map(len, self.facts), default=0)
        yield from (f"  {name:<{width}}  {text}" for name, text in self.facts.items())
        yield from (f"note: {note}" for note in self.notes)
        if self.findings:
            yield from doctor.report(self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.name,
            "valid": not self.problems,
            "waits_for": self.waits_for,
            "facts": self.facts,
            "notes": self.notes,
            "findings": [
                {"name": f.name, "verdict": f.verdict, "value": f.value, "cure": f.cure}
                for f in self.findings
            ],
            "problems": self.problems,
        }


def check_all(
    loaded: Sequence[AnyConfig],
    check_engine: Callable[[RunConfig], None],
    placement: Callable[[AnyConfig], Finding] | None,
) -> list[Checked]:
    """Check all runs of a file. Return what was found of each; raises no `RlhfError`.

    Args:
        check_engine: raises `ConfigError` for settings that the engine refuses.
        placement: judges the place of a run, for the checks of --deep; None without them.
    """
    found = []
    for number, written in enumerate(loaded):
        earlier, gathered = loaded[:number], Gathered()
        local = gathered.attempt(with_local_model, written, find_without_network)
        config = local or written
        checked = Checked(name=config.run.name, waits_for=needs(config, earlier))
        if not isinstance(config, StageConfig):
            own = config.as_run if isinstance(config, GenerateConfig) else config
            gathered.attempt(check_engine, own)
        if local is not None and not checked.waits_for:
            inputs = gathered.attempt(_facts_of, config)
            checked.facts, checked.notes = inputs or ({}, [])
        if local is not None and placement is not None:
            checked.findings += gathered.attempt(_deep, config, earlier) or []
            place = gathered.attempt(placement, config)
            checked.findings += [] if place is None else [place]
        texts = [text for error in gathered.errors for text in problems_of(error)]
        texts += [f"{f.name}: {f.value}. {f.cure}" for f in checked.findings if f.is_wrong]
        checked.problems = list(dict.fromkeys(texts))
        found.append(checked)
    return found


def _facts_of(config: AnyConfig) -> tuple[dict[str, str], list[str]]:
    """Check the inputs of a run or stage. Return facts by name, and notes.

    Inputs are made in a folder that is deleted again.

    Raises `DataError`, `WeightError` or `ConfigError` for inputs that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-validate-") as scratch:
        facts, notes = _check(config, Path(scratch))
    if config.run_dir.exists():
        notes.append(f"{config.run_dir} exists: run continues what is there, or says why it cannot")
    return facts, notes


def _check(config: AnyConfig, scratch: Path) -> tuple[dict[str, str], list[str]]:
    if isinstance(config, StageConfig):
        inputs = check_stage_inputs(config, scratch)
        return derived_stage(config, inputs), inputs.notes
    if isinstance(config, GenerateConfig):
        prompts = check_inputs(config.as_run, scratch, TRIED_PROMPTS).prompts
        return derived_generation(config, prompts.epoch_size or 0), _note_skips(prompts.num_skipped)
    skipped = _note_skips(check_inputs(config, scratch, TRIED_PROMPTS).prompts.num_skipped)
    return derived(config), [*kl_notes(config), *skipped]


def _deep(config: AnyConfig, earlier: Sequence[AnyConfig]) -> list[Finding]:
    with tempfile.TemporaryDirectory(prefix="rlhf-validate-") as scratch:
        return deep(config, Path(scratch), earlier)


def _note_skips(skipped: int) -> list[str]:
    text = f"{skipped} prompts are over data.max_prompt_tokens and are left out"
    return [text] if skipped else []
