"""What it costs to bring weights from a learner to a generation worker.

store   one rank: bytes, snapshot, publish and pull of full versions and of differences, after real
        AdamW steps at several learning rates, beside a plain copy of the same bytes
engine  vLLM: how long sampling stands still for a pull, and whether a request is lost,
        with full versions, differences, and INT8

    python benchmarks/weight_sync.py store --millions 10 100 500
    python benchmarks/weight_sync.py store --device cuda --millions 600 1700 --rates 1e-6
    python benchmarks/weight_sync.py engine

Every repeat runs all its sides, one after the other, on the same weights. Steps train float32
masters on random tokens, from the usual random start (standard deviation 0.02); what is published
is their bfloat16 copy.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import machine, results, spread, write_result

WARM_UP_STEPS = 3  # the first steps of AdamW move every weight by the whole learning rate
STEP_TOKENS = (8, 256)  # few for a real step, which makes the stall look large
FORMATS = ("full", "delta", "int8")
NUM_REQUESTS, NUM_UPDATES = 16, 6
SHAPES = {  # millions of parameters: hidden size, layers, vocabulary
    10: (256, 8, 8192),
    50: (512, 12, 16384),
    100: (768, 10, 32768),
    500: (1536, 14, 32768),
    600: (1024, 36, 151_936),
    1700: (2048, 28, 151_936),
    7000: (4096, 32, 32768),  # float32 with AdamW: 105 GB
}


@dataclass
class Published:
    """The two stores of one size and learning rate, and what the last publish left in memory."""

    full: Path
    delta: Path
    base: Any = None
    held: Any = None


def store(millions: list[int], rates: list[float], repeats: int, root: Path, device: str) -> None:
    before = machine()
    runs = []
    for size in millions:
        for rate in rates:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                runs += _train_and_publish(size, rate, repeats, Path(folder), device)
            gc.collect()
    name = _result(device)
    found = {
        f"store_{size}M": {"machine": before, "runs": [r for r in runs if r["millions"] == size]}
        for size in millions
    }
    figures = store_figures({**results(name).get("runs", {}), **found})
    print(figures)
    write_result(name, figures, found, machine=before)


def store_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Medians of each size and learning rate, and of the largest model at the smallest rate."""
    figures, here = dict[str, float](), ""
    runs = [run for name, part in found.items() if name != "engine" for run in part["runs"]]
    for size, rate in sorted({(run["millions"], -run["learning_rate"]) for run in runs}):
        mine = [r for r in runs if (r["millions"], r["learning_rate"]) == (size, -rate)]
        here = f"{size}M_lr{-rate:g}"
        figures |= {
            f"publish_pull_over_copy_{here}": _median(mine, "full_over_copy"),
            f"delta_publish_pull_over_copy_{here}": _median(mine, "delta_over_copy"),
            f"delta_bytes_ratio_{here}": _median(mine, "delta_bytes_ratio"),
            f"learner_stall_fraction_{here}": _median(mine, "stall_fraction"),
        }
    headline = {key.removesuffix(f"_{here}"): v for key, v in figures.items() if key.endswith(here)}
    return figures | headline


def _train_and_publish(
    millions: int, rate: float, repeats: int, folder: Path, device: str
) -> list[dict[str, float]]:
    import torch

    model = _model(millions).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), foreach=True)
    vocabulary = model.config.vocab_size
    published = Published(full=folder / "full", delta=folder / "delta")
    runs = []
    for step in range(WARM_UP_STEPS + repeats):
        ids = torch.randint(vocabulary, STEP_TOKENS, generator=torch.Generator().manual_seed(step))
        ids = ids.to(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        step_s = time.perf_counter() - start
        if step < WARM_UP_STEPS - 1:
            continue
        run = _publish_once(model, step, published, folder / "copy")
        if step >= WARM_UP_STEPS:  # the one before is the base, stored in full
            run |= {"millions": millions, "learning_rate": rate, "step_s": step_s}
            runs.append({**run, "stall_fraction": run["snapshot_s"] / step_s})
            print({key: f"{value:.4g}" for key, value in runs[-1].items()}, flush=True)
    return runs


def _publish_once(model: Any, version: int, published: Published, copy: Path) -> dict[str, float]:
    import torch

    from rlhf_cluster.learner.publish import host_copy
    from rlhf_cluster.weights import store
    from rlhf_cluster.weights.manifest import LocalPart
    from rlhf_cluster.weights.read_version import Held
    from rlhf_cluster.weights.shards import ShardBase

    live = [
        LocalPart(name=name, shape=tuple(p.shape), offset=0, tensor=p.detach().reshape(-1))
        for name, p in model.named_parameters()
    ]
    start = time.perf_counter()
    parts = {part.name: part for part in host_copy(live, torch.bfloat16)}
    snapshot_s = time.perf_counter() - start

    def publish(root: Path, base: Any) -> Any:
        report = store.write_shard(root, version, 0, parts.values(), base=base)
        return store.commit(root, version, [report], keep=1)

    sides: dict[str, Callable[[], Any]] = {
        "copy_write": lambda: _write(copy, parts),
        "copy_read": lambda: _read(copy),
        "full_publish": lambda: publish(published.full, None),
        "full_pull": lambda: dict(store.read(published.full / f"v{version:06d}")),
        "delta_publish": lambda: publish(published.delta, published.base),
        "delta_pull": lambda: dict(
            store.read(published.delta / f"v{version:06d}", held=published.held)
        ),
    }
    times, results = {}, {}
    for name, side in sides.items():
        start = time.perf_counter()
        result = side()
        times[f"{name}_s"] = time.perf_counter() - start
        if name not in ("copy_read", "full_pull"):
            results[name] = result
        del result
    full, delta = results["full_publish"], results["delta_publish"]
    assert full.digest == delta.digest
    published.base = ShardBase(version=version, parts=parts)
    published.held = Held(version=version, digest=delta.digest, tensors=results["delta_pull"])
    copy_s = times["copy_write_s"] + times["copy_read_s"]
    return {
        **times,
        "snapshot_s": snapshot_s,
        "num_bytes": full.num_bytes,
        "delta_bytes": delta.stored_bytes,
        "delta_bytes_ratio": delta.stored_bytes / full.num_bytes,
        "full_over_copy": (times["full_publish_s"] + times["full_pull_s"]) / copy_s,
        "delta_over_copy": (times["delta_publish_s"] + times["delta_pull_s"]) / copy_s,
    }


def _write(path: Path, parts: dict[str, Any]) -> None:
    from rlhf_cluster.util.tensor_hashing import tensor_bytes

    partial = path.with_suffix(".partial")  # a new file, as a published version is
    with partial.open("wb", buffering=0) as file:
        for part in parts.values():
            data = tensor_bytes(part.tensor)
            while data:
                data = data[file.write(data) :]
    partial.replace(path)


def _read(path: Path) -> bytearray:
    data = bytearray(path.stat().st_size)
    view = memoryview(data)
    with path.open("rb", buffering=0) as file:
        while view:
            view = view[file.readinto(view) :]
    return data


def _model(millions: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, vocabulary = SHAPES[millions]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def engine(device: str) -> None:
    before = machine()
    context = multiprocessing.get_context("spawn")
    runs = []
    for name in FORMATS:
        # vLLM's environment must stand before it is imported: a process each.
        with context.Pool(1, _prepare_engine_process, (device,)) as pool:
            runs.append(pool.apply(_pull_under_load, (name, device)))
        print(runs[-1])
    figures = {f"generation_pause_s_{run['format']}": run["pause_s"]["median"] for run in runs}
    figures |= {
        "generation_pause_s": figures["generation_pause_s_full"],
        "requests_lost": sum(run["requests_lost"] for run in runs),
    }
    write_result(_result(device), figures, {"engine": runs}, machine=before)


def _result(device: str) -> str:
    return "weight_sync" if device == "cpu" else f"weight_sync_{device}"


def _prepare_engine_process(device: str) -> None:
    from actors.vllm.vllm_arguments import engine_environment

    os.environ.update(engine_environment(on_gpu=device != "cpu"))


def _pull_under_load(name: str, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_pulls(name, device, Path(folder)))


async def _pulls(name: str, device: str, folder: Path) -> dict[str, Any]:
    from actors.vllm.vllm_engine import make_engine
    from rlhf_cluster.config import RunConfig, validate
    from rlhf_cluster.models.make_model import make_model

    tree = {
        "run": {"name": "pulls", "root": str(folder), "steps": 1, "groups_per_step": 1},
        "model": {"init": {"hidden_size": 512, "num_layers": 8, "num_heads": 8,
                           "intermediate_size": 1408, "max_position": 1024}},
        "data": {"task": "sort_digits", "max_prompt_tokens": 16},
        "generation": {"max_response_tokens": 400, "kv_cache_bytes": 256 << 20,
                       "num_gpus": 0 if device == "cpu" else 1,
                       "quantization": "int8" if name == "int8" else None},
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "learner": {"learning_rate": 1e-3},
        "weights": {"format": "full" if name == "full" else "delta"},
    }  # fmt: skip
    config = validate(RunConfig, tree, source="benchmark")
    assert config.model.init is not None
    model_dir = make_model(config.model.init, folder / "model", 0)
    engine = make_engine(config, str(model_dir), "benchmark")
    await engine.start()
    try:
        return {"format": name, **await _update_while_sampling(engine, name, model_dir, folder)}
    finally:
        await engine.close()


async def _update_while_sampling(
    engine: Any, name: str, model_dir: Path, folder: Path
) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from rlhf_cluster.generation.engine import Request
    from rlhf_cluster.weights import store
    from rlhf_cluster.weights.manifest import LocalPart
    from rlhf_cluster.weights.shards import ShardBase

    weights = {k: v.bfloat16() for k, v in load_file(model_dir / "model.safetensors").items()}
    requests = [
        Request(
            request_id=f"{i}", prompt_ids=[2, 3, 4], num_samples=1, max_tokens=400,
            temperature=1.0, seed=i,
        )
        for i in range(NUM_REQUESTS)
    ]  # fmt: skip
    running = [asyncio.create_task(engine.generate(request)) for request in requests]
    pauses, pulls, in_flight, base = [], [], [], None
    for version in range(NUM_UPDATES + 1):
        for tensor in weights.values():
            chosen = torch.rand(tensor.shape) < 0.02
            tensor[chosen] *= 1.01
        parts = {
            name: LocalPart(name=name, shape=tuple(t.shape), offset=0, tensor=t.clone().reshape(-1))
            for name, t in weights.items()
        }
        report = store.write_shard(folder / "weights", version, 0, parts.values(), base=base)
        published = store.commit(folder / "weights", version, [report], keep=2)
        base = ShardBase(version=version, parts=parts) if name != "full" else None
        in_flight.append(sum(not task.done() for task in running))
        start = time.perf_counter()
        loaded = await engine.load_weights(published)
        pulls.append(time.perf_counter() - start)
        pauses.append(loaded.pause_s)
    answers = await asyncio.gather(*running, return_exceptions=True)
    whole = [a for a in answers if isinstance(a, list) and a[0].finish_reason in ("stop", "length")]
    return {
        "num_bytes": sum(t.numel() * t.element_size() for t in weights.values()),
        "pause_s": spread(pauses[1:]),
        "pull_s": spread(pulls[1:]),
        "in_flight_at_updates": in_flight,
        "requests": len(requests),
        "requests_lost": len(requests) - len(whole),
    }


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("store", "engine"))
    parser.add_argument("--millions", type=int, nargs="+", choices=SHAPES, default=[10, 100, 500])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--root", type=Path, default=Path("/dev/shm"), help="where versions go")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the learner, or of the engine"
    )
    given = parser.parse_args()
    if given.part == "store":
        store(given.millions, given.rates, given.repeats, given.root, given.device)
    else:
        engine(given.device)


if __name__ == "__main__":
    main()
