"""Which stored groups a run uses again, and which files go.

A run that goes on from the checkpoint of step c has open tickets, and admits others that an earlier
attempt admitted too. `recover` gives the stored group of a ticket when it is what generation could
give now:
- it is of this ticket's number and prompt, token by token, and was made under the same settings;
- no token is of a version before the ticket's;
- nothing in it depends on a version after c: those are of a timeline that was rewound. `rewind`
  deletes such files when the run goes on, so that they can never pass for what the new timeline makes;
- it was there when the run went on. An attempt writes under a number of its own, and `rewind` makes
  what stays of the attempt before it its own. So a call of that one which ends later leaves a file that
  is never used, and goes with the next `rewind`.
A damaged file is told, and its group generated again.

`trained` notes the step of each group and deletes what nobody needs. A group trained (or seen
discarded) at step s, when t steps are done, stays
- for people, while s > t - keep_steps;
- for checkpoint c, while c < s <= c + span. At c the group was open or not admitted. One of a later
  step holds tokens of versions after c: by the staleness bound, which `span` is made from.
Checkpoints are those on disk, complete or not, and the last that was due, whose folder may not be there
yet. A group that is open is never deleted: its number is within the
look-ahead window of the last one trained, or after it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from rlhf_cluster.errors import StoreError
from rlhf_cluster.experience.store import ATTEMPT, ExperienceStore, StoredGroup, read_attempt
from rlhf_cluster.records import GroupSummary, Prompt, Ticket
from rlhf_cluster.rundir import write_json

if TYPE_CHECKING:
    from rlhf_cluster.config import RunConfig

TRAINED = "trained.json"
"""The step of every group that has a file and is trained, or was seen discarded."""
HARMLESS = (
    *("workers", "num_cpus", "num_gpus", "kv_cache_bytes", "max_num_seqs", "max_retries"),
    *("request_timeout_s", "pull_timeout_s", "max_error_rate", "quarantine"),
)
"""Settings of the pools that a group does not depend on."""


class Recovery:
    """One process of a run has one. Methods block on the file system: call them in a thread.

    `checkpoints` is the folder of checkpoints, `step` that of the one from which the run goes on.
    `store` reads files of this attempt from now on.
    """

    def __init__(
        self,
        store: ExperienceStore,
        checkpoints: Path,
        *,
        every: int,
        span: int,
        look_ahead: int,
        keep_steps: int,
        step: int | None,
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._checkpoints = store, checkpoints
        self.attempt = store.attempt = read_attempt(store.root) + 1
        self._every, self._span, self._look_ahead = every, span, look_ahead
        self._keep_steps, self._step, self._tell = keep_steps, step, tell
        self._steps = read_trained(store.root)
        self._last = -1  # the largest number that was trained

    def rewind(self) -> None:
        """Bring the store to the checkpoint's step, and to this attempt. Call before anything is
        generated. Dying anywhere in it, it is the same when it is done again. Raises `StoreError`."""
        step, store = -1 if self._step is None else self._step, self._store
        store.remove_partial()
        for number, attempt in store.files():
            ours = attempt in (self.attempt, self.attempt - 1)
            if not ours or self._newest(number, attempt) > step:
                store.remove([number], attempt)
            elif attempt != self.attempt:
                store.adopt(number, attempt)
        self._steps = {number: s for number, s in self._steps.items() if s <= step}
        self._write_trained()
        self._write(ATTEMPT, {"attempt": self.attempt})

    def recover(self, ticket: Ticket, prompt: Prompt) -> tuple[StoredGroup, GroupSummary] | None:
        """The finished group of `ticket`, if there is one that can be used."""
        number = ticket.number
        if self._step is None or not self._store.has(number):
            return None
        try:
            group, header = self._store.read_with_header(number)
        except StoreError as error:
            self._tell(f"group {ticket.group_id} is generated again: {error}")
            return None
        summary = group.summary()
        same_prompt = group.prompt.prompt_id == prompt.prompt_id and np.array_equal(
            group.prompt.token_ids, prompt.token_ids
        )
        usable = (
            same_prompt
            and header.made_by == self._store.made_by
            and summary.oldest_version >= ticket.version
            and header.newest_version <= self._step
        )
        return (StoredGroup(number), summary) if usable else None

    def trained(self, step: int, numbers: Sequence[int]) -> None:
        """The groups `numbers` were trained at `step`: note it, and delete what nobody needs.

        Raises `StoreError` when that cannot be noted, or a file cannot be deleted.
        """
        self._last = max(self._last, *numbers)
        there = self._store.numbers()
        closed = [n for n in there if n <= self._last - self._look_ahead]
        for number in (*closed, *numbers):
            self._steps.setdefault(number, step)
        kept, checkpoints = set(there), self._checkpoint_steps(step)
        for number in there:
            own = self._steps.get(number)
            if own is None or own > step - self._keep_steps:
                continue
            if not any(c < own <= c + self._span for c in checkpoints):
                kept.discard(number)
        self._steps = {n: s for n, s in self._steps.items() if n in kept}
        self._write_trained()
        self._store.remove(n for n in there if n not in kept)

    def _newest(self, number: int, attempt: int) -> int:
        try:
            return self._store.header(number, attempt).newest_version
        except StoreError:  # `recover` will tell, should anyone ask for it
            return -1

    def _checkpoint_steps(self, step: int) -> set[int]:
        names = [p.name for p in self._checkpoints.glob("step-*")]
        complete = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))]
        partial = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)\..*", name))]
        due = {step // self._every * self._every} if self._every else set()
        return {*complete, *partial, *due} - {0}

    def _write_trained(self) -> None:
        self._write(TRAINED, {str(number): step for number, step in self._steps.items()})

    def _write(self, name: str, values: Mapping[str, int]) -> None:
        path = self._store.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, values)
        except OSError as error:
            raise StoreError(
                f"{path}: {len(values)} entries cannot be written ({error}). Free space there, or set "
                "buffer.durable = false"
            ) from error


def read_trained(root: Path) -> dict[int, int]:
    """The step of every stored group that is trained; empty where that is not known."""
    try:
        steps = json.loads((root / TRAINED).read_bytes())
        return {int(number): int(step) for number, step in steps.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def store_of(config: RunConfig) -> ExperienceStore | None:
    """The run's store; None with buffer.durable = false."""
    if not config.buffer.durable:
        return None
    return ExperienceStore(
        config.run_dir / "experience", made_by=made_by(config), fsync=config.buffer.fsync
    )


def recovery_of(
    config: RunConfig, step: int | None, tell: Callable[[str], None]
) -> Recovery | None:
    """The run's, rewound to the checkpoint of `step` (None: the run begins).

    Call in an event loop, in which `tell` will be called.
    """
    store = store_of(config)
    if store is None:
        return None
    loop = asyncio.get_running_loop()

    def tell_there(text: str) -> None:
        loop.call_soon_threadsafe(tell, text)

    staleness, groups = config.staleness, config.run.groups_per_step
    recovery = Recovery(
        store,
        config.run_dir / "checkpoints",
        every=config.checkpoint.every,
        span=staleness.oldest_in_flight + 2 + -(-staleness.look_ahead // groups),
        look_ahead=staleness.look_ahead,
        keep_steps=config.buffer.keep_steps,
        step=step,
        tell=tell_there,
    )
    recovery.rewind()
    return recovery


def made_by(config: RunConfig) -> str:
    """Tells whether two configurations make the same of a prompt with the same weights."""
    tree: dict[str, Any] = {
        name: getattr(config, name).model_dump(mode="json")
        for name in ("model", "data", "sft", "generation", "scoring")
    }
    for name in ("generation", "scoring"):
        tree[name] = {k: v for k, v in tree[name].items() if k not in HARMLESS}
    tree |= {"seed": config.run.seed, "sampling": asdict(config.sampling)}
    return xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())
