"""Trace of one rollout, or of all of one step, from what was recorded: `rlhf-cluster trace`.

    stored groups    every field, token by token; of the last steps (`buffer.keep_steps`)
    samples          text, rewards, sampled log-probabilities, first and last version, and the
                     learner's log-probabilities and correction weights; whole run

When a stored group passed each stage:

    sampled   from the rollout's first to its last token              the record itself
    stored    scored, and complete on disk                            the time of its file
    trained   from the learner's taking the batch to the step's end   the step's line in metrics.jsonl

Promises:
- a stored file is verified before it is used, and a damaged one is named;
- missing data is reported with a reason and is not guessed;
- a column of the learner (`observe.record.samples`) is shown only if it belongs to this response,
  in a step that trained it;
- a copied or rewritten file has another time: a time that is not between sampling and training is
  not shown;
- the advantage is not recorded. The algorithm computes it again from all groups of the step, if
  all are still stored and nothing else determines it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.buffer.group_recovery import read_trained
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import RlhfError, RunError, StoreError
from rlhf_cluster.observe.list_groups import Decode, align, escape_control, short
from rlhf_cluster.observe.record.samples import Row, read_samples
from rlhf_cluster.records import ExperienceGroup
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import read_metrics

if TYPE_CHECKING:
    from rlhf_cluster.config import RunConfig


Column = list[float | None]
Value = float | int | bool | None

SLACK_S = 1.0
"""Largest difference between the clocks of two machines at which a time is still believed."""
OPEN = "none did: it is open, or was discarded"

_ID = re.compile(r"g(\d{8,})/\d+")
_OF_STEP = (
    *("reward/mean", "learner/loss", "learner/grad_norm", "learner/entropy", "learner/kl_ref"),
    *("importance/effective_sample_size", "staleness/max", "time/step_s", "time/learner_wait_s"),
)


def learner_facts(
    row: Row | None, step: int | None, uses: Sequence[int], response_ids: Sequence[int]
) -> tuple[dict[str, str], dict[str, Column]]:
    """Return the facts `learner` and `correction`, and their token columns.

    Args:
        row: row of the rollout in the samples; None without one.
        step: step of that row.
        uses: steps that trained the rollout, in order.
        response_ids: [T], tokens of the traced rollout.

    Returns:
        Facts as text; columns, each [T], None at tokens that are not trained.
    """
    why = _reason(row, step, uses, response_ids)
    if row is None or why:
        return {"learner": why, "correction": why}, {}
    logprobs, weights = row["learner_logprobs"], row["correction_weights"]
    untrained = ", - at a token that is not trained" if None in logprobs else ""
    columns = {"learner_logprob": logprobs}
    correction = "none: the algorithm's loss has no weight for the distance to the sampler"
    if weights is not None:
        columns["correction_weight"] = weights
        correction = f"{_range(weights)}, the weight at the first pass of step {step}"
    return {
        "learner": f"log-probabilities at the first pass of step {step}{untrained}",
        "correction": correction,
    }, columns


def _reason(
    row: Row | None, step: int | None, uses: Sequence[int], response_ids: Sequence[int]
) -> str:
    """Return the reason why nothing can be shown; empty where something can."""
    if not uses:
        return "not known: no step has trained it"
    if row is None:
        return (
            f"not recorded: not among the samples of step {uses[-1]}, which are of the first rollouts "
            "of a step (observe.samples_per_step)"
        )
    if step not in uses:
        return f"not recorded: the sample is of step {step}, which no longer counts as its training"
    if list(row["response_ids"]) != list(response_ids):
        return f"not known: the sample of step {step} is of another response"
    if "learner_logprobs" not in row:
        return f"not recorded: the samples of step {step} have no such column"
    if row["learner_logprobs"] is None:
        return (
            f"none: step {step} left it out of its passes, since no token of it is trained or all its "
            "advantages are 0, and so its loss"
        )
    return ""


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "no token"
    low, high = min(known), max(known)
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def find_stored_time(path: Path, finished_s: float, trained_from_s: float | None) -> float | None:
    """Return the unix time at which the group's file was complete; None where unknown."""
    written_s = path.stat().st_mtime
    latest = float("inf") if trained_from_s is None else trained_from_s
    return written_s if finished_s - SLACK_S <= written_s <= latest + SLACK_S else None


def find_training_times(
    records: Sequence[Mapping[str, Any]], step: int | None
) -> tuple[float, float] | None:
    """Return the unix times between which the learner trained `step`; None without its line."""
    for record in records:
        if record["step"] == step and record.get("time/train_s") is not None:
            end = record["time_s"] - (record.get("time/publish_wait_s") or 0.0)
            return end - record["time/train_s"], end
    return None


def station_facts(
    path: Path,
    finished_s: float,
    records: Sequence[Mapping[str, Any]],
    step: int | None,
) -> dict[str, str]:
    """Return when a group was stored and trained, as text.

    `finished_s`: end of sampling; `step`: the first that trained it, None where none did.
    """
    trained = find_training_times(records, step)
    stored_s = find_stored_time(path, finished_s, None if trained is None else trained[0])
    facts = {"scored and stored": "not known" if stored_s is None else _time(stored_s)}
    if step is not None:
        facts["trained"] = (
            "not known" if trained is None else f"{_time(trained[0])} to {_time(trained[1])}"
        )
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTrace:
    """Trace of a rollout. `step` is the last that trained it; None where none did.

    `facts` are in order. `tokens` are the columns of the token table, each [T], None where a token has
    no value.
    """

    rollout_id: str
    step: int | None
    facts: dict[str, str]
    prompt: str
    response: str | None
    tokens: Mapping[str, Sequence[Value]] = field(default_factory=dict)

    def lines(self, places: range | None = None) -> Iterator[str]:
        """Yield the trace as text. `places`: only these tokens of the table, and no texts.

        Raises `RunError` where the table has none of them.
        """
        yield from align(list(self.facts.items()))
        for name, text in (("prompt", self.prompt), ("response", self.response)):
            if text is not None and places is None:
                yield f"{name}:"
                yield from (f"    {line}" for line in escape_control(text).splitlines() or [""])
        yield from _table(self.tokens, self._choose(places))

    def _choose(self, places: range | None) -> range:
        num_tokens = min((len(column) for column in self.tokens.values()), default=0)
        if places is None:
            return range(num_tokens)
        found = range(num_tokens)[places.start : places.stop]
        if not found:
            raise RunError(
                f"{self.rollout_id} has no token {places.start}: its {num_tokens} response tokens are "
                "counted from 0"
            )
        return found


def trace_sample(run: RunDir, rollout_id: str, decode: Decode | None = None) -> RolloutTrace:
    """Return the trace of a rollout. `decode` turns the token ids of a stored response into text.

    Raises `RunError` for a rollout of which nothing is kept, `StoreError` for a damaged file.
    """
    named = _ID.fullmatch(rollout_id)
    if named is None:
        raise RunError(
            f"{rollout_id!r} is not the id of a rollout, such as g00000012/3: group and number in it. "
            "rlhf-cluster inspect lists the groups"
        )
    sampled = _find_sample(run, rollout_id)
    store = ExperienceStore(run.path / "experience")
    number = int(named[1])
    if store.has(number):
        group = store.read(number)
        steps = read_trained(store.root)
        for index, scored in enumerate(group.scored):
            if scored.rollout.rollout_id == rollout_id:
                found = _trace_from_store(run, store, group, index, steps, sampled)
                if found.response is None and decode is not None:
                    text = decode(scored.rollout.response_ids.tolist())
                    return replace(found, response=text)
                return found
        raise RunError(f"group {group.group_id} has {len(group.scored)} rollouts, no {rollout_id}")
    if sampled is None:
        raise RunError(
            f"{rollout_id}: neither among the stored groups of {store.root} (buffer.keep_steps) nor "
            f"among the samples (observe.samples_per_step). rlhf-cluster inspect lists what is kept"
        )
    return _trace_from_sample(*sampled)


def trace_step(run: RunDir, step: int, decode: Decode | None = None) -> list[str]:
    """Return the metrics of a step and a line per kept rollout of it. Raises `RunError`.

    `decode` turns the token ids of stored responses into text.
    """
    records = [record for record in read_metrics(run.metrics) if record["step"] == step]
    store = ExperienceStore(run.path / "experience")
    rows = {row["rollout_id"]: row for row in _rows(run, step)}
    for number, trained_at in read_trained(store.root).items():
        if step in trained_at and store.has(number):
            rows |= {row["rollout_id"]: row for row in _stored_rows(store.read(number), step)}
    if not records and not rows:
        last = max((record["step"] for record in read_metrics(run.metrics)), default=0)
        raise RunError(f"{run.path}: nothing is recorded of step {step}; the last one is {last}")
    lines = [f"step {step}"]
    for record in records:
        lines.append(f"  ended at {_time(record['time_s'])}")
        values = ((name, record.get(name)) for name in _OF_STEP)
        lines += [f"  {name:<34} {value:.6g}" for name, value in values if value is not None]
    cells = [
        ("rollout", "reward", "versions", "staleness", "tokens", "ended by", "worker", "response")
    ]
    for name, row in sorted(rows.items(), key=lambda item: _number_of(item[0])):
        versions = f"{row['version_min']}..{row['version_max']}"
        numbers = (f"{row['reward']:.4g}", versions, str(row["staleness"]))
        end = (str(len(row["response_ids"])), row["finish_reason"], row["worker"])
        text = row.get("response")
        if text is None and decode is not None:
            text = decode(list(map(int, row["response_ids"])))
        cells.append((name, *numbers, *end, short(text)))
    lines.append(f"  {len(rows)} rollouts are kept; rlhf-cluster trace RUN --sample ID shows one")
    return [*lines, *(f"  {line}" for line in align(cells))]


def _number_of(rollout_id: str) -> tuple[int, ...]:
    """Return the numbers of group and rollout, by which rollouts are sorted."""
    return tuple(map(int, re.findall(r"\d+", rollout_id)))


def _trace_from_store(
    run: RunDir,
    store: ExperienceStore,
    group: ExperienceGroup,
    index: int,
    steps: dict[int, tuple[int, ...]],
    sampled: tuple[Row, int] | None,
) -> RolloutTrace:
    scored = group.scored[index]
    rollout, uses = scored.rollout, steps.get(group.ticket.number, ())
    step = uses[-1] if uses else None
    advantages, why = _advantages(run, store, group, step, steps)
    row, row_step = sampled or (None, None)
    learnt, columns = learner_facts(row, row_step, uses, rollout.response_ids.tolist())
    facts = {
        "rollout": rollout.rollout_id,
        "group": f"{group.group_id}, admitted with version {group.ticket.version}",
        "prompt id": rollout.prompt_id,
        "trained at step": ", ".join(map(str, uses)) or OPEN,
        "worker": rollout.worker,
        "sampled": f"{_time(rollout.started_s)}, {rollout.finished_s - rollout.started_s:.3g} s",
        **station_facts(
            store.path(group.ticket.number),
            rollout.finished_s,
            read_metrics(run.metrics),
            uses[0] if uses else None,
        ),
        "versions": f"{rollout.oldest_version}..{int(rollout.versions.max())}",
        "staleness": ", ".join(str(s - 1 - rollout.oldest_version) for s in uses) or "-",
        "temperature": f"{rollout.temperature:g}",
        "ended by": str(rollout.finish_reason),
        "reward": f"{scored.reward:.6g}, {_parts(scored.reward_parts)}",
        "watched": _parts(scored.watched),
        "scorer": f"{scored.scorer}, version {scored.scorer_version or '-'}",
        "advantage": why or f"{_range(advantages[index].tolist())} (computed again)",
        **learnt,
        "kept in": str(store.path(group.ticket.number)),
    }
    tokens: dict[str, Any] = {
        "token": rollout.response_ids,
        "trained": rollout.response_mask,
        "version": rollout.versions,
        "sampled_logprob": rollout.sampled_logprobs,
        "exact_logprob": scored.exact_logprobs,
        "ref_logprob": scored.ref_logprobs,
        "teacher_logprob": scored.teacher_logprobs,
        "advantage": advantages[index] if advantages else None,
    }
    source = group.prompt.source
    return RolloutTrace(
        rollout_id=rollout.rollout_id,
        step=step,
        facts=facts,
        prompt=source if isinstance(source, str) else json.dumps(source, ensure_ascii=False),
        response=None if sampled is None else sampled[0]["response"],
        tokens={n: column.tolist() for n, column in tokens.items() if column is not None} | columns,
    )


def _trace_from_sample(row: Row, step: int) -> RolloutTrace:
    """Return the trace of a rollout that only the samples have.

    They have versions only as a range, no reference, and no exact log-probabilities.
    """
    learnt, columns = learner_facts(row, step, (step,), row["response_ids"])
    facts = {
        "rollout": row["rollout_id"],
        "group": row["group_id"],
        "prompt id": row["prompt_id"],
        "trained at step": str(step),
        "worker": row["worker"],
        "sampled": f"in {row['generate_s']:.3g} s",
        "versions": f"{row['version_min']}..{row['version_max']}",
        "staleness": str(row["staleness"]),
        "ended by": row["finish_reason"],
        "reward": f"{row['reward']:.6g}, {row['reward_parts']}",
        "watched": row.get("watched", "-"),
        "scorer": f"{row['scorer']}, version {row.get('scorer_version') or '-'}",
        **learnt,
        "kept in": f"the samples of step {step}; its group is no longer stored",
    }
    tokens: dict[str, Any] = {
        "token": row["response_ids"],
        "sampled_logprob": row["sampled_logprobs"],
        **columns,
    }
    return RolloutTrace(
        rollout_id=row["rollout_id"],
        step=step,
        facts=facts,
        prompt=row["prompt"],
        response=row["response"],
        tokens=tokens,
    )


def _advantages(
    run: RunDir,
    store: ExperienceStore,
    group: ExperienceGroup,
    step: int | None,
    steps: dict[int, tuple[int, ...]],
) -> tuple[list[np.ndarray], str]:
    """Compute the advantages of the rollouts of `group`, each [T], or none and the reason."""
    if step is None:
        return [], "not trained"
    from rlhf_cluster.algorithms import build_algorithm
    from rlhf_cluster.config import RunConfig, validate

    numbers = sorted(number for number, at in steps.items() if step in at)
    try:
        config = validate(RunConfig, run.read_resolved() or {}, str(run.resolved))
        algorithm = build_algorithm(config.trained_algorithm, config.generation.max_response_tokens)
        if algorithm.needs_critic or algorithm.full_kl_in == "reward":
            return [], "not recorded: the learner's own values decide it"
        if any(reward.normalize == "running" for reward in config.scoring.rewards):
            return [], "not recorded: what the learner saw before the step decides it"
        if len(numbers) != _num_groups(run, config, step) or not all(map(store.has, numbers)):
            return [], "not known: groups of the same step are no longer stored"
        groups = [group if n == group.ticket.number else store.read(n) for n in numbers]
        found = algorithm.advantages(algorithm.trained_groups(groups))
    except RlhfError as error:
        return [], f"not known: {error}"
    return found[numbers.index(group.ticket.number)], ""


def _num_groups(run: RunDir, config: RunConfig, step: int) -> int:
    """Return the number of groups that a step trained: with replay it may be less than configured."""
    if config.buffer.replay is None:
        return config.run.groups_per_step
    records = [r for r in read_metrics(run.metrics) if r["step"] == step]
    return int(records[0].get("step/groups", 0)) if records else 0


def _parts(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items()) or "-"


def _rows(run: RunDir, step: int) -> list[Row]:
    path = run.samples / f"step-{step:06d}.parquet"
    return _read(path) if path.exists() else []


def _find_sample(run: RunDir, rollout_id: str) -> tuple[Row, int] | None:
    """Return the row of a rollout and its step: the last one, where a resumed run has it twice."""
    for path in sorted(run.samples.glob("step-*.parquet"), reverse=True):
        for row in _read(path):
            if row["rollout_id"] == rollout_id:
                return row, int(path.stem.removeprefix("step-"))
    return None


def _read(path: Path) -> list[Row]:
    try:
        return read_samples(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read as samples ({error})") from error


def _stored_rows(group: ExperienceGroup, step: int) -> Iterator[dict[str, Any]]:
    for scored in group.scored:
        rollout = scored.rollout
        yield {
            "rollout_id": rollout.rollout_id,
            "reward": scored.reward,
            "version_min": rollout.oldest_version,
            "version_max": int(rollout.versions.max()),
            "staleness": step - 1 - rollout.oldest_version,
            "response_ids": rollout.response_ids,
            "finish_reason": str(rollout.finish_reason),
            "worker": rollout.worker,
        }


def parse_places(text: str) -> range:
    """Parse "17" as one token, "10:20" as those from 10 on before 20. Raises `RunError`."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None or (found[2] is not None and int(found[2]) <= int(found[1])):
        raise RunError(f"--token {text}: expected a place such as 17, or a range such as 10:20")
    return range(int(found[1]), int(found[2]) if found[2] else int(found[1]) + 1)


def _table(columns: Mapping[str, Sequence[Value]], places: range) -> list[str]:
    if not columns:
        return []
    cells = [("", *columns)]
    for place in places:
        cells.append((str(place), *(_cell(column[place]) for column in columns.values())))
    return ["tokens:", *(f"  {line}" for line in align(cells))]


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) else f"{value:.5f}"


def _time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
