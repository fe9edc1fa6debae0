"""Checks of `generation.lora = "served"` against the other sections; `config.run_config` calls them."""

from __future__ import annotations

from rlhf_cluster.config.run_sections import RunSections

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's max_lora_rank."""
_OWNED = ("max_lora_rank", "max_cpu_loras", "lora_target_modules", "default_mm_loras")
_KEY = "generation.lora = 'served'"


def check_served_adapters(c: RunSections) -> None:
    """Check that the engine can serve the adapter, and samples from the policy that is trained.

    Raises `ValueError` for settings that no engine serves as an adapter, or would serve as another
    policy than the rest of the run expects.
    """
    if c.generation.lora != "served":
        return
    _check_adapter(c)
    _check_engine(c)
    if c.scoring.exact_logprobs and c.publish_dtype != "float32":
        raise ValueError(
            f"{_KEY} with scoring.exact_logprobs = true and versions in {c.publish_dtype}: the engine "
            "samples with the adapter itself, and scoring computes with what was merged and rounded "
            "to that type, another policy. Set weights.dtype = 'float32', or exact_logprobs = false"
        )


def _check_adapter(c: RunSections) -> None:
    lora = c.learner.lora
    if lora is None:
        raise ValueError(
            f"{_KEY} without [learner.lora]: all weights are trained, and there is no adapter to "
            "serve. Add the section, or remove generation.lora"
        )
    if c.weights.format != "adapter":
        raise ValueError(
            f"{_KEY} with weights.format = {c.weights.format!r}: such versions hold merged weights, "
            "and no adapter. Set weights.format = 'adapter'"
        )
    if lora.dora:
        raise ValueError(
            f"{_KEY} with learner.lora.dora = true: vLLM serves LoRA alone, and refuses DoRA. Set "
            "generation.lora = 'merged', or dora = false"
        )
    if lora.quantize_base:
        raise ValueError(
            f"{_KEY} with learner.lora.quantize_base = true: the adapter is trained over weights that "
            "were rounded to 4 bits, and the engine would add it to those of the model folder. Set "
            "generation.lora = 'merged', or quantize_base = false"
        )
    if lora.rank > SERVED_RANKS[-1]:
        raise ValueError(
            f"{_KEY} with learner.lora.rank = {lora.rank}: vLLM serves ranks up to "
            f"{SERVED_RANKS[-1]}. Lower it, or set generation.lora = 'merged'"
        )


def _check_engine(c: RunSections) -> None:
    generation = c.generation
    if generation.quantization is not None:
        raise ValueError(
            f"{_KEY} with generation.quantization = {generation.quantization!r}: the engine would add "
            "the adapter to rounded weights, which no version describes. Set generation.lora = "
            "'merged', which rounds what was merged, or remove quantization"
        )
    if generation.speculative is not None:
        raise ValueError(
            f"{_KEY} with generation.speculative = {generation.speculative}: what proposes tokens "
            "would never follow the adapter. Remove it, or set generation.lora = 'merged'"
        )
    if generation.cache_on_update != "recompute":
        raise ValueError(
            f"{_KEY} with generation.cache_on_update = {generation.cache_on_update!r}: a response "
            "keeps its adapter to its end, and each adapter has separate caches, so that there is "
            "nothing to choose. Remove cache_on_update"
        )
    owned = sorted(set(_OWNED) & set(generation.engine_args))
    if owned:
        raise ValueError(
            f"{_KEY} with generation.engine_args.{owned[0]}: [learner.lora] determines it. Remove it"
        )
    parallel, rank = generation.tensor_parallel_size, c.learner.lora.rank if c.learner.lora else 0
    held = next((served for served in SERVED_RANKS if served >= rank), 0)
    if generation.engine_args.get("fully_sharded_loras") and held % parallel:
        raise ValueError(
            f"{_KEY} with generation.engine_args.fully_sharded_loras and generation."
            f"tensor_parallel_size = {parallel}: vLLM cuts max_lora_rank = {held} (learner.lora.rank = "
            f"{rank}) into that many equal parts. Remove fully_sharded_loras"
        )
