"""Reuse of stored groups by a resumed run, and deletion of files that are not needed.

A run that resumes from the checkpoint of step c has open tickets, and admits others that an earlier
attempt admitted too. `recover` returns the stored group of a ticket when generation could produce it
now:
- it is of this ticket's number and prompt, token by token, and was made with the same settings;
- no token is of a version before the ticket's;
- nothing in it depends on a version after c: those are of a timeline that was rewound. `rewind` deletes
  such files when the run resumes, so that they are never mistaken for those of the new timeline;
- its file existed when the run resumed. Each attempt writes with its own number, and `rewind` renames
  the remaining files of the attempt before to the new number. A call of the earlier attempt that ends
  later therefore leaves a file that is never used, and the next `rewind` deletes it.
A damaged file is logged, and its group generated again. If the number of the attempt before cannot be
read, nothing is decided, and no file is deleted.

`record_trained` notes the steps of each group and deletes files that are not needed. It raises if a
group was trained more often than allowed. A group first trained (or seen discarded) at step s, and last
at step e, may be trained until step u: s itself, or with replay s + max_staleness, by the age of its
tokens. When t steps are done, it stays
- for the user, while e > t - keep_steps;
- for the steps that follow, while u > t;
- for checkpoint c, while s <= c + span and u > c. If s > c it was open at c, or not admitted. One with
  s > c + span holds tokens of versions after c: by the staleness bound, which `span` is made from.
Checkpoints are those on disk, complete or not, and the last that was due, whose folder may not exist
yet. A group that is open is never deleted: its number is within the look-ahead window of the last one
trained, or after it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from rlhf_cluster.buffer.group_store import ATTEMPT, ExperienceStore, read_attempt
from rlhf_cluster.config.pools import REFERENCE, TEACHER
from rlhf_cluster.errors import RecordError, StoreError
from rlhf_cluster.records import GroupSummary, Prompt, StoredGroup, Ticket
from rlhf_cluster.util.durable_files import find_storage_cause, make_folders, write_json
from rlhf_cluster.util.slow_disk import DiskDeadline
from rlhf_cluster.util.waiting import gather_or_cancel

if TYPE_CHECKING:
    from rlhf_cluster.config import RunConfig
    from rlhf_cluster.sections.every_run import Observe
    from rlhf_cluster.sections.rl_run import Buffer

TRAINED = "trained.json"
"""File with the steps that trained each stored group, or the step that saw it discarded."""
PARALLEL, FILES_AT_ONCE = 32, 32
"""Concurrent calls to the storage while a run resumes, and the number of files per call."""
HARMLESS = (
    *("workers", "num_cpus", "num_gpus", "kv_cache_bytes", "max_num_seqs", "max_retries"),
    *("request_timeout_s", "pull_timeout_s", "pull_bytes_per_s", "max_error_rate"),
    *("quarantine", "pools"),
)
"""Settings of the pools that a group does not depend on."""


class Recovery:
    """Reuse and deletion of the stored groups of a run, in one process of it.

    It and its methods block on the file system: call them in a thread. A group is trained at most
    `max_uses` times, the last of them `reuse_steps` after the first. `checkpoints` is the folder of
    checkpoints, `step` the step of the checkpoint that the run resumes from. From here on `store`
    reads files of this attempt.
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
        max_uses: int = 1,
        reuse_steps: int = 0,
    ) -> None:
        self._max_uses, self._reuse_steps = max_uses, reuse_steps
        self._store, self._checkpoints = store, checkpoints
        self.attempt = store.attempt = read_attempt(store.root) + 1
        self._every, self._span, self._look_ahead = every, span, look_ahead
        self._keep_steps, self._step, self._tell = keep_steps, step, tell
        try:
            self._steps = read_trained(store.root)
        except StoreError as error:
            if find_storage_cause(error):
                raise  # a new file would lose what it says
            tell(f"{error}. The run continues without what it said")
            self._steps = {}
        self._last = -1  # the largest number that was trained

    def rewind(self) -> None:
        """Bring the store to the checkpoint's step, and to this attempt.

        Call before anything is generated. If the process dies in it, it can be repeated. Raises
        `StoreError`.
        """
        self.settle(self.files_to_settle())
        self.commit_rewind()

    async def rewind_aside(self, on_disk: Callable[..., Awaitable[Any]]) -> None:
        """Do what `rewind` does, with `PARALLEL` concurrent calls of `on_disk`.

        Each settles `FILES_AT_ONCE` files.

        A store of ten thousand groups, each a few milliseconds away, would otherwise take minutes.

        Waits for: the storage; each call of `on_disk` has its deadline.
        """
        files = await on_disk(self.files_to_settle)
        turns = asyncio.Semaphore(PARALLEL)

        async def settle(some: Sequence[tuple[int, int]]) -> None:
            async with turns:
                await on_disk(self.settle, some)

        parts = [files[at : at + FILES_AT_ONCE] for at in range(0, len(files), FILES_AT_ONCE)]
        await gather_or_cancel(settle(part) for part in parts)
        await on_disk(self.commit_rewind)

    def files_to_settle(self) -> list[tuple[int, int]]:
        """Delete files that were never finished; return the number and attempt of every other."""
        self._store.remove_partial()
        return self._store.files()

    def settle(self, files: Sequence[tuple[int, int]]) -> None:
        """Delete the files that the new timeline must not see; rename the others to this attempt."""
        step, store = -1 if self._step is None else self._step, self._store
        for number, attempt in files:
            ours = attempt in (self.attempt, self.attempt - 1)
            if not ours or self._newest(number, attempt) > step:
                store.remove([number], attempt)
            elif attempt != self.attempt:
                store.adopt(number, attempt)

    def commit_rewind(self) -> None:
        """Store the trained steps and the attempt, once all files are settled."""
        step = -1 if self._step is None else self._step
        kept = {n: tuple(s for s in steps if s <= step) for n, steps in self._steps.items()}
        self._steps = {number: steps for number, steps in kept.items() if steps}
        # Syncs the folder too: names are on the disk before the number that they carry. With the
        # number alone the next rewind would treat them as those of an older attempt.
        self._write_training_steps()
        self._write(ATTEMPT, {"attempt": self.attempt})

    def recover(self, ticket: Ticket, prompt: Prompt) -> tuple[StoredGroup, GroupSummary] | None:
        """Return the finished group of `ticket`, if there is one that can be used."""
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

    def find_unusable(self, numbers: Sequence[int]) -> list[int]:
        """Return those of these trained groups that cannot be trained again.

        They are missing, damaged, or of other settings. Reads them all, and logs each.
        """
        found = []
        for number in numbers:
            reason = "it was made under other settings"
            try:
                _, header = self._store.read_with_header(number)
                if header.made_by == self._store.made_by:
                    continue
            except StoreError as error:
                reason = str(error)
            self._tell(f"group {number} is not replayed: {reason}")
            found.append(number)
        return found

    def record_trained(self, step: int, numbers: Sequence[int]) -> None:
        """Note that the groups `numbers` were trained at `step`, and delete files without a use.

        Raises:
            StoreError: the note cannot be written, or a file cannot be deleted.
            RecordError: one of them was trained too often.
        """
        self._last = max(self._last, *numbers)
        there = self._store.numbers()
        for number in numbers:
            self._steps[number] = (*self._steps.get(number, ()), step)
            self._check(number, self._steps[number])
        for number in there:
            if number <= self._last - self._look_ahead:
                self._steps.setdefault(number, (step,))
        checkpoints = self._checkpoint_steps(step)
        kept = {
            number
            for number in there
            if (steps := self._steps.get(number)) is None or self._needed(steps, step, checkpoints)
        }
        self._steps = {n: s for n, s in self._steps.items() if n in kept}
        self._write_training_steps()
        self._store.remove(n for n in there if n not in kept)

    def _check(self, number: int, steps: tuple[int, ...]) -> None:
        if len(steps) > self._max_uses or len(set(steps)) < len(steps):
            raise RecordError(
                f"group {number} was trained by steps {list(steps)}; allowed is once a step and "
                f"{self._max_uses} times in all (buffer.replay.max_uses, 1 without replay). This is a "
                "fault of the system; the same command resumes from the last checkpoint"
            )

    def _needed(self, steps: tuple[int, ...], done: int, checkpoints: set[int]) -> bool:
        first, last = steps[0], steps[0] + self._reuse_steps
        if steps[-1] > done - self._keep_steps or last > done:
            return True
        return any(first <= c + self._span and last > c for c in checkpoints)

    def _newest(self, number: int, attempt: int) -> int:
        try:
            return self._store.header(number, attempt).newest_version
        except StoreError:  # `recover` reports it if the group is needed
            return -1

    def _checkpoint_steps(self, step: int) -> set[int]:
        names = [p.name for p in self._checkpoints.glob("step-*")]
        complete = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))]
        partial = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)\..*", name))]
        due = {step // self._every * self._every} if self._every else set()
        return {*complete, *partial, *due} - {0}

    def _write_training_steps(self) -> None:
        self._write(TRAINED, {str(number): steps for number, steps in self._steps.items()})

    def _write(self, name: str, values: Mapping[str, int | tuple[int, ...]]) -> None:
        path = self._store.root / name
        try:
            make_folders(path.parent, self._store.fsync)
            write_json(path, values, fsync=self._store.fsync)
        except OSError as error:
            raise StoreError(
                f"{path}: {len(values)} entries cannot be written ({error}). Free space there, or set "
                "buffer.durable = false"
            ) from error


def read_trained(root: Path) -> dict[int, tuple[int, ...]]:
    """Return the steps of every stored group that is trained, in order; empty before the first.

    Raises `StoreError` if they cannot be read.
    """
    path = root / TRAINED
    try:
        found = json.loads(path.read_bytes())
        return {int(number): tuple(map(int, steps)) for number, steps in found.items() if steps}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StoreError(
            f"{path}: which groups are trained cannot be read ({type(error).__name__}: {error}). Look "
            "at that disk. Without a file that is damaged for good, stored groups stay for longer"
        ) from error


def store_of(config: RunConfig) -> ExperienceStore | None:
    """Return the run's store; None with buffer.durable = false."""
    if not config.buffer.durable:
        return None
    return ExperienceStore(
        config.run_dir / "experience",
        made_by=made_by(config),
        fsync=config.buffer.fsync,
        patience=patience_of(config.buffer, config.observe),
    )


def patience_of(buffer: Buffer, observe: Observe) -> DiskDeadline:
    """Return the deadline of one group on disk, or of one check of all files."""
    return DiskDeadline(
        limit_s=buffer.write_timeout_s,
        setting="buffer.write_timeout_s",
        told_fraction=observe.slow_write_fraction,
    )


def recovery_of(
    config: RunConfig, step: int | None, tell: Callable[[str], None]
) -> Recovery | None:
    """Return the recovery of a run, to be rewound to the checkpoint of `step`.

    `step` None means that the run begins. Blocks on the file system. `tell` is called in the threads
    that call its methods. Raises `StoreError`.
    """
    store = store_of(config)
    if store is None:
        return None
    staleness, replay = config.staleness, config.buffer.replay
    return Recovery(
        store,
        config.run_dir / "checkpoints",
        every=config.checkpoint.every,
        span=staleness.oldest_in_flight + 2 + -(-staleness.look_ahead // config.fresh_groups),
        look_ahead=staleness.look_ahead,
        keep_steps=config.buffer.keep_steps,
        step=step,
        tell=tell,
        max_uses=1 if replay is None else replay.max_uses,
        reuse_steps=0 if replay is None else staleness.max_staleness,
    )


def made_by(config: RunConfig) -> str:
    """Return a hash of all settings that decide what is made of a prompt with the same weights."""
    tree: dict[str, Any] = {
        name: getattr(config, name).model_dump(mode="json")
        for name in ("model", "data", "sft", "generation", "scoring")
    }
    for name in ("generation", "scoring"):
        tree[name] = {k: v for k, v in tree[name].items() if k not in HARMLESS}
    if config.generation.lora == "merged":
        # Groups on disk may be older than this setting, and were sampled from merged weights.
        del tree["generation"]["lora"]
    tree["precision"] = [
        [own.dtype, own.quantization]
        for model in (REFERENCE, TEACHER)
        for own in (config.scoring.of_pool(config.scoring.pool_of(model)),)
    ]
    tree |= {"seed": config.run.seed, "sampling": asdict(config.sampling)}
    return xxh3_128_hexdigest(json.dumps(tree, sort_keys=True).encode())
