"""The learner on one GPU: tokens/s and model FLOPs utilisation of whole steps, full fine-tuning.

The model has the shape of Qwen3-0.6B and random weights; a step trains 16k tokens of long-tailed
lengths in bfloat16 with float32 master weights, through `LearnerRank.train_step`.

    flops = 6 P T + 6 layers heads head_dim sum(L_i^2)        mfu = flops / (seconds * peak)

with P the parameters in matrix products (the tied output projection once, the embedding's look-up
not), T all tokens, L_i the positions of each sequence; causal attention counts half its square,
and forward and backward count three times the forward. What is computed twice counts once.

    python benchmarks/gpu/learner.py                              # needs one CUDA device
    python benchmarks/gpu/learner.py --peak-tflops 989 --gradient-checkpointing
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.harness import machine, spread, write_result
from benchmarks.learner_sides import GROUP_SIZE, PROMPT_TOKENS, make_groups

QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
NUM_TOKENS = 16_384
MEDIAN_RESPONSE_TOKENS = 400
LONGEST = 4096
REPEATS = 10
WARM_UP_STEPS = 3
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16 of the SXM parts, by what the device's name contains."""


def measure(
    shape: Mapping[str, Any],
    lengths: Sequence[int],
    learner: Mapping[str, Any],
    peak_flops: float,
    repeats: int,
) -> list[dict[str, float]]:
    """Tokens/s, utilisation and phases of each step, after steps that warm up.

    Args:
        shape: arguments of `Qwen3Config`.
        lengths: response tokens of each rollout, a multiple of `GROUP_SIZE` of them.
        learner: keys of the learner's section.
    """
    import numpy as np

    from rlhf_cluster.learner.learner_rank import LearnerRank

    draw = np.random.default_rng(0)
    groups = make_groups(draw, lengths, shape["vocab_size"])
    positions = [PROMPT_TOKENS + n for n in lengths]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder, max(lengths), learner)
        rank = LearnerRank(config, _make_model(shape, folder), 0, 1, None)
        try:
            facts = rank.setup()
            print({**facts, "positions": sum(positions), "rollouts": len(lengths)}, flush=True)
            flops = _flops(rank.policy, positions)
            for step in range(WARM_UP_STEPS + repeats):
                started = time.perf_counter()
                report = rank.train_step(groups)  # ends with numbers on the host: all is done
                seconds = time.perf_counter() - started
                if step >= WARM_UP_STEPS:
                    runs.append(
                        _figures(report.metrics, seconds, sum(positions), flops, peak_flops)
                    )
        finally:
            rank.close()
    return runs


def long_tailed(num_tokens: int, median: int, longest: int) -> list[int]:
    """Response lengths, log-normal, whole groups of them, about `num_tokens` positions in all."""
    import numpy as np

    draw = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) + PROMPT_TOKENS * len(lengths) < num_tokens or len(lengths) % GROUP_SIZE:
        length = int(np.exp(np.log(median) + 0.9 * draw.standard_normal()))
        lengths.append(min(max(length, 8), longest - PROMPT_TOKENS))
    return lengths


def _figures(
    metrics: Mapping[str, float], seconds: float, num_tokens: int, flops: float, peak: float
) -> dict[str, float]:
    phases = ("learner/prepare_s", "learner/forward_backward_s", "learner/optimizer_s")
    return {
        "tokens_per_s": num_tokens / seconds,
        "mfu": flops / seconds / peak,
        "step_s": seconds,
        **{name: metrics[name] for name in phases},
    }


def _flops(policy: Any, positions: Sequence[int]) -> float:
    """Floating-point operations that forward and backward of these sequences need."""
    config = policy.config
    matrices = {id(p): p.numel() for _, p in policy.named_parameters() if p.ndim >= 2}
    if not config.tie_word_embeddings:
        del matrices[id(policy.lm.get_input_embeddings().weight)]
    width = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * width * sum(n * n for n in positions)
    return 6.0 * sum(matrices.values()) * sum(positions) + attention


def _make_model(shape: Mapping[str, Any], folder: str) -> str:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model_dir = Path(folder) / "model"
    Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(model_dir)
    return str(model_dir)


def _config(folder: str, longest: int, learner: Mapping[str, Any]) -> Any:
    from rlhf_cluster.config import RunConfig, validate

    tree = {
        "run": {"name": "gpu", "root": folder, "steps": 1000, "groups_per_step": 1},
        "model": {"path": str(Path(folder) / "model")},
        "data": {"task": "sort_digits", "max_prompt_tokens": PROMPT_TOKENS},
        "algorithm": {"type": "grpo", "group_size": GROUP_SIZE},
        "generation": {"max_response_tokens": longest},
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "learner": {"learning_rate": 1e-6, **learner},
        "staleness": {"max_staleness": 1000},
    }
    return validate(RunConfig, tree, source="benchmark")


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: by its name")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device; this benchmark measures one")
    device = torch.cuda.get_device_name(0)
    peak = args.peak_tflops or next((v for k, v in PEAK_TFLOPS.items() if k in device), None)
    if peak is None:
        parser.error(f"{device}: peak unknown; give --peak-tflops")
    before = {**machine(), "device": device, "peak_tflops": peak}
    learner = {"num_gpus": 1, "gradient_checkpointing": args.gradient_checkpointing}
    lengths = long_tailed(NUM_TOKENS, MEDIAN_RESPONSE_TOKENS, LONGEST)
    runs = measure(QWEN3_0_6B, lengths, learner, peak * 1e12, REPEATS)
    suffix = "_checkpointing" if args.gradient_checkpointing else ""
    figures = {f"learner_peak_memory_gib{suffix}": torch.cuda.max_memory_allocated() / 2**30}
    for name in ("tokens_per_s", "mfu"):
        values = [run[name] for run in runs]
        figures[f"learner_{name}{suffix}"] = statistics.median(values)
        print(name, spread(values))
    print(figures)
    write_result("learner_gpu", figures, {f"learner{suffix}": runs}, machine=before)


if __name__ == "__main__":
    main()
