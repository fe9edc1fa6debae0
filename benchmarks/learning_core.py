"""The learner's inner loops, measured against the plain way. Parts, each alternating its sides:

logprobs  log-probabilities by chunks over those from full logits, at a vocabulary of 128k: peak
          memory and time of forward and backward, each repeat in a fresh process
packing   tokens/s of packed rows over one sequence a row, long-tailed lengths: over this project's
          own padded batching (sorted by length), and over padding in order of arrival
loop      tokens/s of the learner's whole step (`LearnerRank.train_step`, sharded, with its metrics)
          over a bare transformers forward / backward / AdamW loop on the same rollouts, padded in
          order of arrival, and over one whose rows are sorted by length first

Before a speed is reported, the gradients of all sides are compared. One thread, CPU.

    python benchmarks/learning_core.py logprobs packing loop
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import chunked_logprobs
from benchmarks.checks import RELATIVE_BOUND, check_equal
from benchmarks.harness import machine, run_parts, spread, write_result
from benchmarks.learner_sides import (
    LONGEST,
    MODEL,
    PROMPT_TOKENS,
    TOKENS_PER_MICRO_BATCH,
    BareLoop,
    LearnerSide,
    learner_config,
    long_tailed_lengths,
    make_groups,
)
from rlhf_cluster.data.packing import (
    MicroBatchPlan,
    TokenSequence,
    collate,
    plan,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.models.policy_model import PolicyLM

REPEATS = 5


def logprobs() -> None:
    before = machine()
    figures, runs = chunked_logprobs.measure(REPEATS)
    print(figures)
    write_result("learning_core", figures, runs, machine=before)


def packing() -> None:
    import numpy as np

    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        policy = _policy(folder)
        sequences = _sequences(np.random.default_rng(0))
        lengths = [s.num_inputs for s in sequences]
        plans = {
            "packed": plan(lengths, 1, TOKENS_PER_MICRO_BATCH, LONGEST, "packed")[0],
            "padded": plan(lengths, 1, TOKENS_PER_MICRO_BATCH, LONGEST, "padded")[0],
            "arrival": _in_order_of_arrival(lengths),
        }
        expected = _gradients(policy, sequences, plans["packed"])
        for side in ("padded", "arrival"):
            found = _gradients(policy, sequences, plans[side])
            check_equal(found, expected, RELATIVE_BOUND["float32"])
        sides = {n: partial(_backward, policy, sequences, p) for n, p in plans.items()}
        runs = _alternate(sides, sum(lengths))
    figures = {
        "packed_over_padded": _ratio(runs, "packed", "padded"),
        "packed_over_padded_in_order_of_arrival": _ratio(runs, "packed", "arrival"),
    }
    print(figures)
    write_result("learning_core", figures, {"packing": runs}, machine=before)


def _alternate(sides: Mapping[str, Callable[[], Any]], num_tokens: int) -> list[dict[str, float]]:
    """Tokens/s of every side, `REPEATS` times in turn, after one round that warms up."""
    runs = []
    for repeat in range(REPEATS + 1):
        speeds = {}
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            speeds[side] = num_tokens / (time.perf_counter() - start)
        if repeat:
            runs.append(speeds)
            print(speeds, flush=True)
    return runs


def _ratio(runs: Sequence[Mapping[str, float]], side: str, other: str) -> float:
    ratios = [run[side] / run[other] for run in runs]
    print(f"{side} over {other}", spread(ratios))
    return statistics.median(ratios)


def _policy(folder: str) -> PolicyLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_cluster.models.policy_model import load_policy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model_dir = Path(folder) / "model"
    if not model_dir.exists():
        LlamaForCausalLM(LlamaConfig(**MODEL, initializer_range=0.05)).save_pretrained(model_dir)
    return load_policy(model_dir, torch.float32, "cpu", trainable=True).train()


def _sequences(draw: Any) -> list[TokenSequence]:
    vocabulary = MODEL["vocab_size"]
    return [
        TokenSequence(
            prompt_ids=draw.integers(0, vocabulary, PROMPT_TOKENS),
            target_ids=draw.integers(0, vocabulary, length),
        )
        for length in long_tailed_lengths(draw)
    ]


def _in_order_of_arrival(lengths: Sequence[int]) -> list[MicroBatchPlan]:
    """One sequence a row, rows as they come, each pass as wide as its longest row."""
    batches: list[list[tuple[int]]] = [[]]
    width = 0
    for index, length in enumerate(lengths):
        width = max(width, length)
        if batches[-1] and width * (len(batches[-1]) + 1) > TOKENS_PER_MICRO_BATCH:
            batches.append([])
            width = length
        batches[-1].append((index,))
    return [tuple(batch) for batch in batches]


def _backward(
    policy: PolicyLM, sequences: Sequence[TokenSequence], plans: Sequence[MicroBatchPlan]
) -> None:
    import torch

    num_targets = sum(len(s.target_ids) for s in sequences)
    for planned in plans:
        batch = collate(planned, sequences)
        arrays = (batch.input_ids, batch.position_ids, batch.labels)
        logprobs, _ = policy(*(torch.from_numpy(a) for a in arrays))
        (logprobs[torch.from_numpy(batch.mask)].sum() / num_targets).backward()


def _gradients(
    policy: PolicyLM, sequences: Sequence[TokenSequence], plans: Sequence[MicroBatchPlan]
) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    _backward(policy, sequences, plans)
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def loop() -> None:
    import numpy as np

    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        _policy(folder)  # makes the model
        draw = np.random.default_rng(1)
        groups = make_groups(draw, long_tailed_lengths(draw), MODEL["vocab_size"])
        learner = LearnerSide(learner_config(folder), groups)
        sides = {"bare": BareLoop(folder, groups), "sorted": BareLoop(folder, groups, sort=True)}
        expected = learner.first_gradients()
        for side in sides.values():
            check_equal(side.first_gradients(), expected, RELATIVE_BOUND["float32"])
        steps = {"learner": learner.step} | {name: side.step for name, side in sides.items()}
        runs = _alternate(steps, sides["bare"].num_tokens)
        learner.close()
    figures = {
        "learner_over_bare_loop": _ratio(runs, "learner", "bare"),
        "learner_over_sorted_bare_loop": _ratio(runs, "learner", "sorted"),
    }
    print(figures)
    write_result("learning_core", figures, {"loop": runs}, machine=before)


PARTS = {"logprobs": logprobs, "packing": packing, "loop": loop}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
