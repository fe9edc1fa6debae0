"""Checks of `generation.lora = "served"` against the other sections; `config.run_config` calls them."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.rl_run import Generation
from rlhf_cluster.sections.training import Lora

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""
_OWNED = {"max_lora_rank", "max_cpu_loras", "lora_target_modules", "default_mm_loras"}


def check_served_adapters(c: RunSections) -> Iterator[str]:
    """Refuse adapters that no engine serves, or that it would serve as another policy."""
    if c.generation.lora != "served":
        return
    lora = c.learner.lora
    if lora is None:
        yield (
            "{generation.lora} without [learner.lora]: all weights are trained, and there is no "
            "adapter to serve. Add the section, or remove generation.lora"
        )
        return
    if c.weights.format != "adapter":
        yield (
            "{generation.lora} with {weights.format}: such versions hold merged weights, and no "
            "adapter. Set weights.format = 'adapter'"
        )
    if c.scoring.exact_logprobs and c.publish_dtype != "float32":
        yield (
            f"{{generation.lora}} with {{scoring.exact_logprobs}} and versions in {c.publish_dtype}: "
            "the engine samples with the adapter itself, and scoring computes with what was merged and "
            "rounded to that type, another policy. Set weights.dtype = 'float32', or exact_logprobs = "
            "false"
        )
    yield from _check_adapter(lora)
    yield from _check_engine(c.generation, lora.rank)


def _check_adapter(lora: Lora) -> Iterator[str]:
    if lora.dora:
        yield (
            "{generation.lora} with {learner.lora.dora}: vLLM serves LoRA alone, and refuses DoRA. Set "
            "generation.lora = 'merged', or dora = false"
        )
    if lora.quantize_base:
        yield (
            "{generation.lora} with {learner.lora.quantize_base}: the adapter is trained over weights "
            "that were rounded to 4 bits, and the engine would add it to those of the model folder. "
            "Set generation.lora = 'merged', or quantize_base = false"
        )
    if lora.rank > SERVED_RANKS[-1]:
        yield (
            f"{{generation.lora}} with {{learner.lora.rank}}: vLLM serves ranks up to "
            f"{SERVED_RANKS[-1]}. Lower it, or set generation.lora = 'merged'"
        )


def _check_engine(generation: Generation, rank: int) -> Iterator[str]:
    if generation.quantization is not None:
        yield (
            "{generation.lora} with {generation.quantization}: the engine would add the adapter to "
            "rounded weights, which no version describes. Set generation.lora = 'merged', which rounds "
            "what was merged, or remove quantization"
        )
    if generation.speculative is not None:
        yield (
            "{generation.lora} with {generation.speculative}: what proposes tokens would never follow "
            "the adapter. Remove it, or set generation.lora = 'merged'"
        )
    if generation.cache_on_update != "recompute":
        yield (
            "{generation.lora} with {generation.cache_on_update}: a response keeps its adapter to its "
            "end, and each adapter has separate caches, so that there is nothing to choose. Remove "
            "cache_on_update"
        )
    owned = sorted(_OWNED & generation.engine_args.keys())
    if owned:
        yield (
            f"{{generation.lora}} with generation.engine_args.{owned[0]}: [learner.lora] determines "
            "it. Remove it"
        )
    held = next((served for served in SERVED_RANKS if served >= rank), 0)
    if generation.engine_args.get("fully_sharded_loras") and held % generation.tensor_parallel_size:
        yield (
            "{generation.lora} with generation.engine_args.fully_sharded_loras and "
            f"{{generation.tensor_parallel_size}}: vLLM cuts max_lora_rank = {held} "
            "({learner.lora.rank}) into that many equal parts. Remove fully_sharded_loras"
        )
