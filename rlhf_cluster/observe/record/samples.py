"""Samples of experience for reading and for tools: one Parquet file per step.

Promises:
- token ids, log-probabilities, versions and step rewards are those that were trained on;
- `learner_logprobs` and `correction_weights` are those of the step's first pass
  (`learner.token_samples`), null without one and at a token that is not trained;
- a file appears as a whole. The process that holds the experience writes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster.errors import StalledError, StoreError
from rlhf_cluster.records import ExperienceGroup, ScoredRollout, TokenSample
from rlhf_cluster.util.durable_files import write_all
from rlhf_cluster.util.slow_disk import run_within

log = logging.getLogger(__name__)

Row = dict[str, Any]
WRITE_S = 10.0
"""Longest time that a step waits for its samples to be written."""


def write_samples(
    folder: str | Path,
    step: int,
    groups: Sequence[ExperienceGroup],
    learner_version: int,
    decode: Callable[[np.ndarray], str],
    limit: int,
    kept: Mapping[str, TokenSample] | None = None,
) -> Path | None:
    """Write the first `limit` rollouts of a step, whole groups first. None when there are none.

    `learner_version` is the version before the step. `decode` turns token ids into text;
    the ids themselves are written as sampled. `kept` is by rollout id. Raises `StoreError`, and
    leaves nothing half written.
    """
    pairs = [(group, scored) for group in groups for scored in group.scored][:limit]
    if not pairs:
        return None
    rows = [
        _row(group, scored, learner_version, decode) | _learnt(scored, kept or {})
        for group, scored in pairs
    ]
    path = Path(folder) / f"step-{step:06d}.parquet"
    _write_parquet(path, rows)
    return path


def keep_samples(write: Callable[[], object], within_s: float = WRITE_S) -> None:
    """Call `write`, which is `write_samples` of a trained step, and survive a bad disk.

    An error or a slow disk is logged, and the run continues without the file.

    Waits for: the write, `within_s` at most.
    """
    try:
        run_within(within_s, "samples of a step", write)
    except (StoreError, StalledError) as error:
        log.warning("%s; the step has no samples, and the run continues", error)


def read_samples(path: str | Path) -> list[Row]:
    """Return the rows of a samples file."""
    import pyarrow.parquet as parquet

    return parquet.read_table(Path(path)).to_pylist()


def _row(
    group: ExperienceGroup,
    scored: ScoredRollout,
    learner_version: int,
    decode: Callable[[np.ndarray], str],
) -> Row:
    rollout, source = scored.rollout, group.prompt.source
    return {
        "rollout_id": rollout.rollout_id,
        "group_id": group.group_id,
        "prompt_id": rollout.prompt_id,
        "prompt": source if isinstance(source, str) else json.dumps(source, ensure_ascii=False),
        "response": decode(rollout.response_ids),
        "reward": float(scored.reward),
        "reward_parts": json.dumps({k: float(v) for k, v in scored.reward_parts.items()}),
        "watched": json.dumps({k: float(v) for k, v in scored.watched.items()}),
        "version_min": rollout.oldest_version,
        "version_max": int(rollout.versions.max()),
        "staleness": learner_version - rollout.oldest_version,
        "finish_reason": str(rollout.finish_reason),
        "worker": rollout.worker,
        "scorer": scored.scorer,
        "scorer_version": scored.scorer_version,
        "generate_s": rollout.finished_s - rollout.started_s,
        "prompt_ids": rollout.prompt_ids.tolist(),
        "response_ids": rollout.response_ids.tolist(),
        "sampled_logprobs": rollout.sampled_logprobs.tolist(),
        "step_ends": None if scored.step_ends is None else scored.step_ends.tolist(),
        "step_rewards": None if scored.step_rewards is None else scored.step_rewards.tolist(),
    }


def _learnt(scored: ScoredRollout, kept: Mapping[str, TokenSample]) -> Row:
    found = kept.get(scored.rollout.rollout_id)
    weights = None if found is None else found.correction_weights
    return {
        "learner_logprobs": None if found is None else _mask(found.learner_logprobs, found),
        "correction_weights": None if found is None or weights is None else _mask(weights, found),
    }


def _mask(values: np.ndarray, kept: TokenSample) -> list[float | None]:
    pairs = zip(values.tolist(), kept.trained.tolist(), strict=True)
    return [value if trained else None for value, trained in pairs]


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = {
        "reward": pa.float64(),
        "generate_s": pa.float64(),
        "version_min": pa.int32(),
        "version_max": pa.int32(),
        "staleness": pa.int32(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "sampled_logprobs": pa.list_(pa.float32()),
        "learner_logprobs": pa.list_(pa.float32()),
        "correction_weights": pa.list_(pa.float32()),
        "step_ends": pa.list_(pa.int32()),
        "step_rewards": pa.list_(pa.float64()),
    }
    schema = pa.schema([(name, types.get(name, pa.string())) for name in rows[0]])
    image = pa.BufferOutputStream()  # pyarrow leaves a file open that it cannot write
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), image)
    data = image.getvalue()
    try:
        write_all(path, data)
    except OSError as error:
        raise StoreError(
            f"{path}: {len(rows)} samples of {data.size} bytes cannot be written ({error}). Free "
            "space there, or do without them: observe.samples_per_step = 0"
        ) from error
