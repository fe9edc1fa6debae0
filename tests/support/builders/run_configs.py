"""Run configurations for tests."""

from __future__ import annotations

from typing import Any

from rlhf_cluster.config import RunConfig, validate

TINY: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny", "steps": 3, "groups_per_step": 4},
    "model": {"init": {"hidden_size": 128, "num_layers": 1, "num_heads": 4}},
    "data": {"task": "sort_digits", "max_prompt_tokens": 8},
    "algorithm": {"type": "grpo", "group_size": 4},
    "generation": {
        "max_response_tokens": 8,
        "dtype": "float32",
        "num_cpus": 0.25,
        "kv_cache_bytes": 32 << 20,
        "enforce_eager": True,
    },
    "scoring": {"rewards": [{"type": "exact_match"}], "dtype": "float32", "num_cpus": 0.25},
    "learner": {"learning_rate": 1e-3, "dtype": "float32", "num_cpus": 0.25},
}


def tiny_tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """The tree of a run file. `sections` change single keys of single sections."""
    names = {*TINY, *sections}
    return {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in names}


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, tiny_tree(**sections), source="test")
