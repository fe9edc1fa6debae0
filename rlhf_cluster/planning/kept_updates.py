"""Share of an adapter's small update that reaches an engine, by how versions are published and held.

Measured on a small model (benchmarks/lora_rounding.py). `served` is measured with vLLM's computation.
A test compares the numbers with benchmarks/results/lora_rounding.json.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cluster.config import RunConfig

SIZES = (1e-4, 3e-4, 1e-3, 4e-3)
"""Sizes of the update, relative to the size of the weights."""
KEPT = {
    "nearest": (0.06, 0.17, 0.53, 0.97),
    "served": (0.06, 0.22, 0.61, 0.98),
    "stochastic": (0.99, 1.00, 1.00, 1.00),
    "float32": (1.00, 1.00, 1.00, 1.00),
    "int8_of_nearest": (0.06, 0.18, 0.53, 0.97),
    "int8_of_stochastic": (1.00, 1.00, 0.99, 0.99),
    "int8_of_float32": (1.08, 1.03, 1.01, 1.00),
}
"""Share of the learner's move that the engine makes, at each size."""
_WIDTH = max(map(len, KEPT))


def way_of(config: RunConfig) -> str | None:
    """Return the row of `KEPT` of a run with adapters, or None where it was not measured."""
    generation, published = config.generation, config.publish_dtype
    if generation.lora == "served":
        return "served" if generation.dtype == "bfloat16" else "float32"
    rounded = generation.dtype == "bfloat16" and generation.quantization is None
    if published == "bfloat16":
        held: str = config.publish_rounding
    else:
        held = "nearest" if rounded else "float32"  # by the engine, as it loads a version
    if generation.quantization is not None:
        held = f"{generation.quantization}_of_{held}"
    return held if held in KEPT else None


def kept_lines(config: RunConfig) -> Iterator[str]:
    """Yield the table as text, with this run's row marked. Nothing without [learner.lora]."""
    if config.learner.lora is None:
        return
    own = way_of(config)
    yield "share of an adapter's update that engines get, by its size over that of the weights:"
    yield f"  {'':<{_WIDTH}}" + "".join(f"  {size:4.0e}".replace("e-0", "e-") for size in SIZES)
    for way, kept in KEPT.items():
        mark = "  <- this run" if way == own else ""
        yield f"  {way:<{_WIDTH}}" + "".join(f"  {share:.2f}" for share in kept) + mark
    if own is None:
        yield "  this run's quantization was not measured"
