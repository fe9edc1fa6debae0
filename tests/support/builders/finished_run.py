"""Whole runs of the shipped quickstart with nothing faked, and what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.observe.record.samples import Row, read_samples
from rlhf_cluster.run.run_record import read_metrics
from rlhf_cluster.weights import store

REPOSITORY = Path(__file__).parents[3]
QUICKSTART = REPOSITORY / "configs" / "quickstart.toml"
RUN_DEADLINE_S = 600
FLOOR = 1e-4
"""Nats. Two implementations of the same float32 weights differ by 2e-5 at worst."""
COMMON = [
    "observe.live=false",
    "observe.samples_per_step=100000",
    "sft.steps=35",
    "algorithm.group_size=8",
    "learner.learning_rate=3e-4",
    "learner.num_cpus=0.25",
]


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended well, and what it left behind."""

    config: RunConfig

    @property
    def path(self) -> Path:
        return self.config.run_dir

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Metrics of each step."""
        return [r for r in read_metrics(self.path / "metrics.jsonl") if "reward/mean" in r]

    @cached_property
    def samples(self) -> list[list[Row]]:
        """All rollouts of each step, in the order they were trained."""
        return [read_samples(p) for p in sorted((self.path / "samples").glob("step-*.parquet"))]

    @property
    def final(self) -> Path:
        return self.path / "final"


def run_to_the_end(root: Path, settings: list[str]) -> FinishedRun:
    """`rlhf-cluster run` as a user starts it, on a local Ray cluster of its own."""
    settings = [*settings, f"run.root={root}"]
    command = [str(Path(sys.executable).with_name("rlhf-cluster")), "run", str(QUICKSTART)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        cwd=root,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (resolved,) = root.glob("*/resolved.json")
    return FinishedRun(validate(RunConfig, json.loads(resolved.read_text()), str(resolved)))


def logprobs_of(model: Any, rows: list[Row]) -> list[np.ndarray]:
    """[T] float32 for each row: log-probabilities of its response under `model`, padded right."""
    import torch

    ids = [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(batch).logits[:, :-1], dim=-1)
    chosen = logprobs.gather(-1, batch[:, 1:, None])[:, :, 0].numpy()
    starts = [len(row["prompt_ids"]) - 1 for row in rows]
    lengths = [len(row["response_ids"]) for row in rows]
    return [chosen[i, s : s + n] for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]


def load_policy(run: FinishedRun, version: int) -> Any:
    """A published version in transformers, by way of the weight store."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.final)
    tensors = dict(store.read(run.config.weights_dir / f"v{version:06d}"))
    result = model.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}, "tied to the embedding"
    return model.eval()
