"""What `[generation]` must agree on with itself and the other sections; called by `config.run`.

What depends on the device is refused in `actors.vllm_arguments`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig

_WEIGHTLESS = ("ngram", "ngram_gpu", "suffix")
_DRAFT = "draft_model"
_KEYS_OF_THEIR_OWN = {
    "speculative_config": "speculative",
    "quantization": "quantization",
    "enable_prefix_caching": "prefix_caching",
}


def check_generation(c: RunConfig) -> None:
    """Raises `ValueError` for settings under which an engine would serve other weights, caches or
    probabilities than the rest of the run takes them for."""
    _check_caches(c)
    _check_speculation(c)
    for name, key in _KEYS_OF_THEIR_OWN.items():
        if name in c.generation.engine_args:
            raise ValueError(
                f"generation.engine_args.{name} = {c.generation.engine_args[name]!r} passes by what "
                f"is checked of generation.{key}. Set generation.{key} instead"
            )


def _check_caches(c: RunConfig) -> None:
    how = c.generation.cache_on_update
    if how == "salt" and not c.generation.prefix_caching:
        raise ValueError(
            "generation.cache_on_update = 'salt' with generation.prefix_caching = false: there is no "
            "prefix cache to keep apart by version. Use 'keep', which is the same there, or turn "
            "prefix_caching on"
        )
    if how != "recompute" and getattr(c.algorithm, "sampler", None) == "exact":
        raise ValueError(
            f"generation.cache_on_update = {how!r} with algorithm.sampler = 'exact': a response under "
            "way at an update goes on from keys and values of the old weights, so no version alone "
            "has sampled its later tokens. Use cache_on_update = 'recompute', or sampler = 'sampled'"
        )


def _check_speculation(c: RunConfig) -> None:
    settings = c.generation.speculative
    if settings is None:
        return
    method, key = settings.get("method"), "generation.speculative"
    if method not in (*_WEIGHTLESS, _DRAFT):
        raise ValueError(
            f"{key}.method = {method!r}: what proposes tokens has weights that are neither trained "
            "nor published, and would stay as they are while the policy moves away from them. Use "
            f"one of {', '.join(map(repr, _WEIGHTLESS))} (no weights), or {_DRAFT!r} with a folder "
            "of the policy's own tensors"
        )
    if (method == _DRAFT) != ("model" in settings):
        raise ValueError(
            f"{key}.method = {method!r} with {key}.model = {settings.get('model')!r}: a draft model "
            f"needs a folder, and nothing else takes one. Set method = {_DRAFT!r} and model, or "
            "remove model"
        )
    if settings.get("rejection_sample_method") == "synthetic":
        raise ValueError(
            f"{key}.rejection_sample_method = 'synthetic' accepts drafts by a given rate and not by "
            "their probability, so that responses are not the policy's. Remove it"
        )
