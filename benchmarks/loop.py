"""The whole loop, measured. Parts, each alternating its sides within one run:

pool      tokens/s of the generation pool over raw vLLM, same prompts, parameters, seeds and tokens
overlap   asynchronous step time over the slower of generation and training, and over synchronous
user      what a new user sees: installation, first step, quick start, reward before and after

    python benchmarks/loop.py pool overlap          # needs the environment of `make install`
    python benchmarks/loop.py user                  # clones the repository and runs its commands
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import (
    machine,
    run_parts,
    run_steps,
    spread,
    step_times,
    write_result,
)

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.toml"
REPEATS = 5
OVERLAP_STEPS = 14


class RawVllm:
    """Offline vLLM in an actor of its own: what the pool is measured against."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments

    def start(self) -> None:
        from vllm import LLM

        self._llm = LLM(**self._arguments)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], num_samples: int, max_tokens: int
    ) -> tuple[float, list[list[list[int]]]]:
        """Seconds and token ids, by prompt and sample."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = [
            SamplingParams(
                n=num_samples,
                temperature=1.0,
                seed=seed,
                logprobs=0,
                max_tokens=max_tokens,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for seed in seeds
        ]
        start = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False
        )
        seconds = time.perf_counter() - start
        return seconds, [[list(c.token_ids) for c in o.outputs] for o in outputs]


def pool() -> None:
    from actors.cluster.ray_cluster import connected
    from rlhf_cluster.config import load_run

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run.root={folder}",
            "generation.max_response_tokens=56",
            "generation.kv_cache_bytes=134217728",
        ]
        config = load_run(QUICKSTART, overrides).with_absolute_paths()
        (config.run_dir / "logs").mkdir(parents=True)
        before = machine()
        with connected(config):
            runs = asyncio.run(_pool_repeats(config))
    ratios = [run["pool_tokens_per_s"] / run["raw_tokens_per_s"] for run in runs]
    figures = {"pool_over_raw_vllm": statistics.median(ratios)}
    print(figures, spread(ratios))
    write_result("loop", figures, {"pool": runs}, machine=before)


async def _pool_repeats(config: Any) -> list[dict[str, float]]:
    import ray

    from actors.cluster.calls import answer
    from actors.services.start_services import (
        Launcher,
        generation_pool,
    )
    from actors.vllm.vllm_arguments import (
        engine_arguments,
        engine_environment,
    )
    from rlhf_cluster.data.prompts import PromptSource
    from rlhf_cluster.data.tokenizer import load_tokenizer
    from rlhf_cluster.generation.segments import group_seed
    from rlhf_cluster.models.make_model import make_model
    from rlhf_cluster.planning.placement import Bundle
    from rlhf_cluster.records import Sampling, Ticket

    model_dir = make_model(config.model.init, config.run_dir / "model", 0)
    environment = engine_environment(on_gpu=False)
    launcher = Launcher(
        config=config,
        model_dir=str(model_dir),
        engine_factory="actors.vllm.vllm_engine:make_engine",
        engine_environment=environment,
    )
    workers, generation = generation_pool(launcher)
    drop = ("weight_transfer_config", "worker_extension_cls")
    arguments = engine_arguments(config, str(model_dir), "raw")
    arguments = {key: value for key, value in arguments.items() if key not in drop}
    raw, group = await launcher.actor(
        RawVllm,
        [arguments],
        Bundle(owner="raw", cpus=0.5, gpus=0.0),
        environment={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    await asyncio.gather(workers.start(1), answer(raw.start.remote(), 300, "raw.start"))
    source = PromptSource(config.data, load_tokenizer(model_dir), 0)
    sampling = Sampling(num_samples=8, temperature=1.0, max_tokens=56)
    runs = []
    for repeat in range(REPEATS + 1):
        prompts = [source.next() for _ in range(64)]
        tickets = [Ticket(number=repeat * 64 + i, version=-1) for i in range(64)]
        start = time.perf_counter()
        handles = await asyncio.gather(
            *(generation.generate(t, p, sampling) for t, p in zip(tickets, prompts, strict=True))
        )
        pool_s = time.perf_counter() - start
        groups = ray.get(handles)
        seeds = [group_seed(config.run.seed, t.group_id) for t in tickets]
        ids = [p.token_ids.tolist() for p in prompts]
        raw_s, expected = await answer(raw.generate.remote(ids, seeds, 8, 56), 300, "raw.generate")
        found = [[r.response_ids.tolist() for r in g.rollouts] for g in groups]
        if found != expected:
            raise SystemExit("the pool and raw vLLM sampled different tokens; no speed to report")
        num_tokens = sum(len(r) for g in found for r in g)
        if repeat:  # the first one warms up
            runs.append(
                {
                    "num_tokens": num_tokens,
                    "pool_tokens_per_s": num_tokens / pool_s,
                    "raw_tokens_per_s": num_tokens / raw_s,
                }
            )
    workers.close()
    ray.kill(raw)
    ray.util.remove_placement_group(group)
    return runs


def overlap() -> None:
    before = machine()
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            sync = _times(folder, f"sync-{repeat}", max_staleness=0)
            asynchronous = _times(folder, f"async-{repeat}", max_staleness=2)
            slower = max(sync["generation_s"], sync["train_s"])
            runs.append(
                {
                    "sync_step_s": sync["step_s"],
                    "sync_generation_s": sync["generation_s"],
                    "sync_train_s": sync["train_s"],
                    "async_step_s": asynchronous["step_s"],
                    "async_over_slower_side": asynchronous["step_s"] / slower,
                    "async_over_sync": asynchronous["step_s"] / sync["step_s"],
                }
            )
            print(runs[-1], flush=True)
    names = ("async_over_slower_side", "async_over_sync")
    figures = {name: statistics.median(run[name] for run in runs) for name in names}
    split = ("sync_generation_s", "sync_train_s", "sync_step_s", "async_step_s")
    figures |= {name: statistics.median(run[name] for run in runs) for name in split}
    print(figures)
    write_result("loop", figures, {"overlap": runs}, machine=before)


def _times(folder: str, name: str, max_staleness: int) -> dict[str, float]:
    depth = min(1, max_staleness)
    settings = [
        f"run.steps={OVERLAP_STEPS}",
        f"staleness.max_staleness={max_staleness}",
        f"staleness.pipeline_depth={depth}",
    ]
    return step_times(run_steps(QUICKSTART, folder, name, settings))


def user() -> None:
    """A clone in a new folder, and the two commands of the README."""
    repository = Path(__file__).parents[1]
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(repository), str(clone)], check=True)
        start = time.perf_counter()
        subprocess.run(["make", "install"], cwd=clone, check=True, capture_output=True)
        installed = time.perf_counter()
        subprocess.run(["make", "quickstart"], cwd=clone, check=True, capture_output=True)
        done = time.perf_counter()
        picture = repository / "docs" / "quickstart.png"
        shutil.copyfile(clone / "runs" / "quickstart" / "curve.png", picture)
        summary = json.loads((clone / "runs" / "quickstart" / "summary.json").read_text())
    figures = {
        "install_s": installed - start,
        "quickstart_s": done - installed,
        "first_step_s": summary["first_step_s"],
        "reward_before": summary["reward_before"],
        "reward_after": summary["reward_after"],
    }
    print(figures)
    write_result("loop", figures, {"user": [summary]}, machine=before)


PARTS = {"pool": pool, "overlap": overlap, "user": user}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
