"""Asynchronous reinforcement learning on the parts of rlhf_cluster, in one process and one file.

    python docs/examples/loop.py                 # about a minute on two cores

This is the loop that a cluster runs, with Ray and vLLM left out:

    prompts -> Generation -> Scoring -> buffer -> Learner -> weight store
                   ^                                              |
                   +----------------- pull, in flight ------------+

The decisions are the project's own: `Pipeline` (who waits for what), `ExperienceBuffer` (which group
may start, which is trained next), `LearnerRank` (the training step), `store` (versions on disk that
become visible when complete), `WeightSync` (a version is published while the next step runs). What is
written here are the three services around them, each of which implements one port of
`rlhf_cluster.ports`. In a cluster `actors.services` implements the same ports over Ray.

A tiny model with random weights learns to sort six digits: `503917=` -> `013579`.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.staleness import build_gate
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.evaluation.evaluate import evaluate
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.pipeline import Pipeline, StepTimes
from rlhf_cluster.planning.run_inputs import check_inputs
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    GroupSummary,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    StepReport,
    Ticket,
    TrainingGroup,
    WeightVersion,
)
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.weights import read_version, store
from rlhf_cluster.weights.sync import WeightSync
from rlhf_cluster.weights.transports.shared_files import FileSink

# A run file as a dictionary; `rlhf-cluster run` reads the same keys from TOML.
RUN: dict[str, Any] = {
    "run": {"name": "loop", "steps": 40, "groups_per_step": 16, "seed": 0},
    "model": {"init": {"hidden_size": 128, "num_layers": 2, "num_heads": 4}},
    "data": {"task": "sort_digits", "max_prompt_tokens": 8},
    "algorithm": {"type": "grpo", "group_size": 8},
    "generation": {"max_response_tokens": 8, "dtype": "float32"},
    "scoring": {"rewards": [{"type": "exact_match"}], "dtype": "float32"},
    "learner": {"learning_rate": 3e-4, "dtype": "float32"},
    "sft": {"steps": 60, "batch_size": 32, "learning_rate": 3e-3},  # a supervised warm-up
    # Generation may run one step ahead. No trained token is older than two steps.
    "staleness": {"max_staleness": 2, "pipeline_depth": 1},
    "evaluation": {"num_prompts": 64},
}
DEADLINE_S = 120.0


class Generation:
    """`GenerationPort`: samples from the newest weights that it has pulled.

    One group is sampled at a time, one token of all its rollouts per pass. A pull takes effect
    between two tokens, so a rollout may hold tokens of several versions; each token records its own.
    """

    def __init__(self, model_dir: Path, seed: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._weights = threading.Lock()  # held for one token, or for one pull
        self._one_group = asyncio.Lock()
        self._seed = seed
        self._version = -1

    async def generate(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> RolloutGroup:
        async with asyncio.timeout(DEADLINE_S), self._one_group:
            return await run_in_thread(self._sample, ticket, prompt, sampling)

    async def pull(self, version: WeightVersion) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await run_in_thread(self._load, version)

    def _load(self, version: WeightVersion) -> None:
        # Every tensor's hash is verified before the first one is used.
        tensors = dict(read_version.read(version.path, expected_digest=version.digest))
        with self._weights:
            self._model.load_state_dict(tensors, strict=False)  # tied weights are stored once
            self._version = version.version

    @torch.no_grad()
    def _sample(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> RolloutGroup:
        started_s = time.time()
        draw = torch.Generator().manual_seed((self._seed << 32) + ticket.number)
        tokens = torch.tensor(prompt.token_ids).long().repeat(sampling.num_samples, 1)
        num_prompt_tokens = tokens.shape[1]
        logprobs: list[torch.Tensor] = []
        versions: list[int] = []
        for _ in range(sampling.max_tokens):
            with self._weights:
                logits = self._model(input_ids=tokens).logits[:, -1]
                versions.append(self._version)
            # The distribution that is sampled from is the one whose log-probability is recorded.
            logs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
            chosen = (
                torch.multinomial(logs.exp(), 1, generator=draw)
                if sampling.temperature
                else logs.argmax(-1, keepdim=True)
            )
            logprobs.append(logs.gather(-1, chosen))
            tokens = torch.cat([tokens, chosen], 1)
        responses = tokens[:, num_prompt_tokens:].numpy().astype(np.int32)  # [G, T]
        sampled = torch.cat(logprobs, 1).numpy()  # [G, T]
        rollouts = []
        for i, response in enumerate(responses):
            # A response ends after its end token, which belongs to it and is trained.
            ends = np.flatnonzero(response == self._model.config.eos_token_id)
            length = int(ends[0]) + 1 if len(ends) else len(response)
            rollouts.append(
                Rollout(
                    rollout_id=f"{ticket.group_id}-{i}",
                    prompt_id=prompt.prompt_id,
                    prompt_ids=prompt.token_ids,
                    response_ids=response[:length],
                    sampled_logprobs=sampled[i, :length],
                    versions=np.array(versions[:length], dtype=np.int32),
                    response_mask=np.ones(length, dtype=bool),
                    finish_reason=FinishReason.STOP if len(ends) else FinishReason.LENGTH,
                    temperature=sampling.temperature,
                    worker="loop",
                    started_s=started_s,
                    finished_s=time.time(),
                )
            )
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))


class Scoring:
    """`ScoringPort`: the run's rewards, in a thread."""

    def __init__(self, scorer: ScoringWorker) -> None:
        self._scorer = scorer

    async def score(self, group: RolloutGroup) -> tuple[ExperienceGroup, GroupSummary]:
        async with asyncio.timeout(DEADLINE_S):
            summary, scored = await run_in_thread(self._scorer.score, group)
        return scored, summary


class Learner:
    """`LearnerPort`: one rank. A snapshot is copied between two steps and published during the next."""

    def __init__(self, rank: LearnerRank, root: Path) -> None:
        self._rank = rank
        self._root = root
        self._names = rank.tensor_shapes()  # not during a step, which gathers parameters
        self._writer = store.begin_attempt(root)  # from here on no other learner publishes there

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        async with asyncio.timeout(DEADLINE_S):
            return await run_in_thread(self._rank.train_step, [group.handle for group in groups])

    async def snapshot(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            return await run_in_thread(self._rank.snapshot)

    async def publish(self) -> WeightVersion:
        async with asyncio.timeout(DEADLINE_S):
            return await run_in_thread(self._publish)

    def _publish(self) -> WeightVersion:
        sink = FileSink(str(self._root), attempt=self._writer.attempt)
        shard = self._rank.write_snapshot([sink])
        return store.commit(self._root, shard.version, [shard], 3, self._names, writer=self._writer)

    async def refused(self, version: int, reason: str) -> None:
        """Versions are stored in full here: the next one builds on none."""


class Printer:
    """`ObserverPort`: one line per step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []  # mean reward, largest staleness

    def step(self, report: StepReport, taken: Sequence[TrainingGroup], times: StepTimes) -> None:
        reward = float(np.mean([reward for group in taken for reward in group.summary.rewards]))
        staleness = report.metrics["staleness/max"]
        self.steps.append((reward, staleness))
        print(
            f"step {report.step:3d}  reward {reward:.3f}  staleness max {staleness:.0f}  "
            f"{times.step_s:.2f} s, of which {times.learner_wait_s:.2f} s waiting for groups"
        )

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None:
        print(f"{ticket.group_id} discarded: {error}")

    def group_recovered(self, ticket: Ticket) -> None:
        print(f"{ticket.group_id} was on disk")

    def event(self, text: str) -> None:
        print(text)


async def train(config: RunConfig, folder: Path) -> tuple[float, float, Printer]:
    """Train in `folder`. Returns the held-out reward before and after, and what was printed."""
    inputs = check_inputs(config, folder)
    rank = LearnerRank(config, str(inputs.model_dir), 0, 1, None)
    scorer = ScoringWorker(config, str(inputs.model_dir), "loop")
    rank.setup()
    scorer.start()
    for examples in inputs.warmup_batches():
        rank.sft_step(examples)

    generation, scoring = Generation(inputs.model_dir, config.run.seed), Scoring(scorer)
    learner = Learner(rank, folder / "weights")
    buffer = BufferService(ExperienceBuffer(build_gate(config)), DEADLINE_S, 1.0, time.monotonic)
    sync = WeightSync(learner, generation, buffer, config.weights.publish_every, time.monotonic)
    observer = Printer()
    pipeline = Pipeline(
        generation=generation,
        scoring=scoring,
        buffer=buffer,
        learner=learner,
        sync=sync,
        prompts=inputs.prompts,
        observer=observer,
        sampling=config.sampling,
        num_steps=config.run.steps,
        groups_per_step=config.run.groups_per_step,
        max_error_rate=config.scoring.max_error_rate,
        live_timeout_s=DEADLINE_S,
        trains_on=config.algorithm.trains_on,
    )

    async def held_out_reward(version: int) -> float:
        prompts, longest = inputs.evaluation_prompts["held_out"], config.sampling.max_tokens
        greedy = Sampling(num_samples=1, temperature=0.0, max_tokens=longest)
        found = await evaluate(generation, scoring, prompts, greedy, version)
        return float(np.mean([answer.rewards[0] for answer in found.answers]))

    try:
        await sync.publish_last(0, DEADLINE_S)  # nothing is admitted before a version is live
        before = await held_out_reward(0)
        steps = await pipeline.run()
        await sync.publish_last(steps, DEADLINE_S)
        return before, await held_out_reward(steps), observer
    finally:
        scorer.close()
        rank.close()


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        before, after, _ = asyncio.run(train(validate(RunConfig, RUN, "loop.py"), Path(folder)))
    print(f"reward on held-out prompts: {before:.3f} before, {after:.3f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
