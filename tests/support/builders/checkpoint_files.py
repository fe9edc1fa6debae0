"""Checkpoint folders with made-up content."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_cluster.buffer.adaptive_depth import DepthState
from rlhf_cluster.records import BufferState, LearnerState, Ticket
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import LocalPart


def make_state(step: int, score: float | None = None) -> RunState:
    return RunState(
        step=step,
        learner=LearnerState(
            version=step, num_bytes=8, skips={"policy": (1, 0)}, algorithm={"kl_coef": 0.1}
        ),
        buffer=BufferState(
            learner_version=step,
            admitted=9,
            finished=7,
            taken=6,
            reweighted=0,
            discarded={"stale": 1},
            open=(Ticket(number=7, version=2), Ticket(number=8, version=3)),
        ),
        live_version=step - 1,
        publishes_skipped=2,
        depth=DepthState(depth=1, seen=((0.5, 0.1),), to_skip=0),
        first_prompt=32,
        reference=0,
        reward_before=0.1 + 0.2,
        packages={"torch": "2.0", "vllm": None},
        score=score,
    )


def write(root: Path, step: int, score: float | None = None) -> Path:
    partial = checkpoint_folder.begin(root, step, 8)
    version = partial / "learner" / f"v{step:06d}"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(f'{{"step": {step}}}')
    (version / "shard-00000.safetensors").write_bytes(bytes([step]) * (1 << 21))
    return checkpoint_folder.complete(partial, make_state(step, score)).folder


def write_whole(root: Path, step: int, num_ranks: int = 2, score: float | None = None) -> Path:
    """A checkpoint whose tensors can be read, in a few kilobytes."""
    partial = checkpoint_folder.begin(root, step, 8)
    generator = torch.Generator().manual_seed(step)
    values = torch.randn(60, generator=generator)
    tensors = {
        "policy/weight/a": values[:40].view(8, 5),
        "policy/exp_avg/a": values[:40].view(8, 5) ** 2,
        "policy/step/a": values[:1],
        "policy/weight/b": values[40:],
    }
    reports = []
    for rank in range(num_ranks):
        parts = []
        for name, tensor in tensors.items():
            a, b = (tensor.numel() * r // num_ranks for r in (rank, rank + 1))
            piece = tensor.reshape(-1)[a:b].clone()
            parts.append(LocalPart(name=name, shape=tuple(tensor.shape), offset=a, tensor=piece))
        reports.append(store.write_shard(partial / checkpoint_folder.LEARNER, step, rank, parts))
    store.commit(partial / checkpoint_folder.LEARNER, step, reports, keep=1)
    return checkpoint_folder.complete(partial, make_state(step, score)).folder
