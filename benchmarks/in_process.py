"""Reinforcement learning in one process, for learning curves: exact staleness, no Ray, no vLLM.

    prompts -> sampler (weights of version v - staleness) -> ScoringWorker -> LearnerRank.train_step

Everything that decides what is learned is the project's own: inputs, rewards, `LearnerRank` with
warm-up, sharding, packing and the algorithm. Only the sampler is a plain one: transformers with a
cache, float32, one batch of all prompts, which must be equally long. It holds back weights, so the
batch of step v was sampled by version max(0, v - staleness), every token of it: the worst case of a
run with `max_staleness = staleness`, and the same in every run, where real runs differ in timing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf_cluster.config import RunConfig
from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.models.policy_model import checkpoint_name
from rlhf_cluster.planning.run_inputs import check_inputs
from rlhf_cluster.records import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Ticket,
)
from rlhf_cluster.scoring.scoring_worker import ScoringWorker

Weights = dict[str, Tensor]


def train(
    config: RunConfig, folder: Path, staleness: int, look_every: int | None = None
) -> dict[str, Any]:
    """Train from warm-up to the last step, on one CPU thread.

    Args:
        config: its model is made from numbers; no reference.
        folder: empty; the model is written into it.
        staleness: at most `staleness.max_staleness`.
        look_every: steps between two looks; None takes none.

    Returns:
        `reward_before` and `reward_after` (greedy, held-out prompts), `rewards` (mean of each
        step's rollouts), `staleness` (largest of each step, as the learner met it), `seconds`;
        `looks`, each with the `step` after which it was taken, its greedy `reward`, and `kl` and
        `effective_sample_size` of that step's batch before it was trained on.
    """
    started = time.perf_counter()
    inputs = check_inputs(config, folder)
    held_out = list(inputs.evaluation_prompts.get("held_out", ()))
    learner = LearnerRank(config, str(inputs.model_dir), 0, 1, None)
    scorer = ScoringWorker(config, str(inputs.model_dir), "in-process")
    try:
        learner.setup()
        scorer.start()
        for examples in inputs.warmup_batches():
            learner.sft_step(examples)
        sampler = PlainSampler(str(inputs.model_dir), config.run.seed)
        versions = deque([_weights(learner)], maxlen=staleness + 1)
        sampler.load(versions[-1], 0)
        before = _evaluate(sampler, scorer, held_out, config)
        rewards, met, looks = [], [], []
        for step in range(config.run.steps):
            sampler.load(versions[0], max(0, step - staleness))
            prompts = [inputs.prompts.next() for _ in range(config.run.groups_per_step)]
            tickets = [
                Ticket(number=step * len(prompts) + i, version=sampler.version)
                for i in range(len(prompts))
            ]
            sampled = sampler.sample(tickets, prompts, config.sampling)
            groups = [scorer.score(group)[1] for group in sampled]
            rewards.append(float(np.mean([s.reward for g in groups for s in g.scored])))
            look: dict[str, float] = {"step": step + 1}
            if is_look := look_every is not None and (step + 1) % look_every == 0:
                sampler.load(versions[-1], step)
                look |= sampler.distance(sampled)
            report = learner.train_step(groups)
            met.append(int(report.metrics["staleness/max"]))
            versions.append(_weights(learner))
            if is_look:
                sampler.load(versions[-1], step + 1)
                look["reward"] = _evaluate(sampler, scorer, held_out, config)
                looks.append(look)
        sampler.load(versions[-1], config.run.steps)
        after = _evaluate(sampler, scorer, held_out, config)
    finally:
        scorer.close()
        learner.close()
    return {
        "reward_before": before,
        "reward_after": after,
        "rewards": [round(r, 4) for r in rewards],
        "staleness": met,
        "looks": looks,
        "seconds": round(time.perf_counter() - started, 1),
    }


class PlainSampler:
    """Samples from a causal LM, all prompts in one batch."""

    def __init__(self, model_dir: str, seed: int) -> None:
        self._lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._end = self._lm.config.eos_token_id
        self._seed = seed
        self.version = 0

    def load(self, weights: Weights, version: int) -> None:
        """Sample with these weights from here on."""
        _, unexpected = self._lm.load_state_dict(weights, strict=False)  # tied ones are missing
        if unexpected:
            raise SystemExit(f"weights that the sampler does not know: {unexpected}")
        self.version = version

    def sample(
        self, tickets: Sequence[Ticket], prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[RolloutGroup]:
        """One group a ticket; its random numbers follow from seed and first ticket."""
        draw = torch.Generator().manual_seed((self._seed << 32) + tickets[0].number)
        rows = [p for p in prompts for _ in range(sampling.num_samples)]
        found = self._rollouts(rows, sampling.temperature, sampling.max_tokens, draw)
        greedy: list[Rollout | None] = [None] * len(prompts)
        if sampling.greedy_baseline:
            greedy = [*self._rollouts(prompts, 0.0, sampling.max_tokens, draw)]
        groups = []
        for index, (ticket, prompt) in enumerate(zip(tickets, prompts, strict=True)):
            first = index * sampling.num_samples
            own = tuple(found[first : first + sampling.num_samples])
            groups.append(
                RolloutGroup(ticket=ticket, prompt=prompt, rollouts=own, greedy=greedy[index])
            )
        return groups

    @torch.no_grad()
    def distance(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """How far these weights, pi, are from mu, which sampled the groups: `kl`, that of mu to pi a
        token in nats, estimated as the mean of r - 1 - log r, and `effective_sample_size`."""
        rollouts = [r for group in groups for r in group.rollouts]
        rows = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
        ids = pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True)
        logits = self._lm(input_ids=ids, use_cache=False).logits / (rollouts[0].temperature or 1.0)
        logs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double()
        starts, ends = [len(r.prompt_ids) - 1 for r in rollouts], [len(row) - 1 for row in rows]
        now = torch.cat([logs[i, a:b] for i, (a, b) in enumerate(zip(starts, ends, strict=True))])
        then = torch.cat([torch.from_numpy(r.sampled_logprobs) for r in rollouts]).double()
        ratio = (now - then).exp()
        return {
            "kl": float((ratio - 1 - (now - then)).mean()),
            "effective_sample_size": float(ratio.mean() ** 2 / ratio.square().mean()),
        }

    def _rollouts(
        self,
        prompts: Sequence[Prompt],
        temperature: float,
        max_tokens: int,
        draw: torch.Generator,
    ) -> list[Rollout]:
        tokens, logprobs = self._tokens(prompts, temperature, max_tokens, draw)
        return [
            self._rollout(f"r{i}", prompt, tokens[i].numpy(), logprobs[i].numpy(), temperature)
            for i, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def _tokens(
        self,
        prompts: Sequence[Prompt],
        temperature: float,
        max_tokens: int,
        draw: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and their log-probabilities, both [R, max_tokens]."""
        inputs = torch.from_numpy(np.stack([p.token_ids for p in prompts])).long()
        cache, tokens, logprobs = DynamicCache(config=self._lm.config), [], []
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        while len(tokens) < max_tokens:
            logits = self._lm(
                input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            logs = (logits / (temperature or 1.0)).log_softmax(-1)
            if temperature:
                chosen = torch.multinomial(logs.exp(), 1, generator=draw)
            else:
                chosen = logs.argmax(-1, keepdim=True)
            tokens.append(chosen)
            logprobs.append(logs.gather(-1, chosen))
            ended |= chosen[:, 0] == self._end
            if ended.all():
                break
            inputs = chosen
        return torch.cat(tokens, 1), torch.cat(logprobs, 1)

    def _rollout(
        self,
        name: str,
        prompt: Prompt,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        temperature: float,
    ) -> Rollout:
        ends = np.flatnonzero(tokens == self._end)
        length = int(ends[0]) + 1 if len(ends) else len(tokens)
        return Rollout(
            rollout_id=f"{prompt.prompt_id}-{name}",
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.token_ids,
            response_ids=tokens[:length].astype(np.int32),
            sampled_logprobs=logprobs[:length].astype(np.float32),
            versions=np.full(length, self.version, dtype=np.int32),
            response_mask=np.ones(length, dtype=bool),
            finish_reason=FinishReason.STOP if len(ends) else FinishReason.LENGTH,
            temperature=temperature,
            worker="in-process",
            started_s=0.0,
            finished_s=0.0,
        )


def _evaluate(
    sampler: PlainSampler, scorer: ScoringWorker, prompts: Sequence[Prompt], config: RunConfig
) -> float:
    tickets = [
        Ticket(number=i, version=sampler.version, purpose="evaluate") for i in range(len(prompts))
    ]
    max_tokens = config.generation.max_response_tokens
    greedy = Sampling(num_samples=1, temperature=0.0, max_tokens=max_tokens)
    groups = sampler.sample(tickets, prompts, greedy)
    return float(np.mean([scorer.score(group)[1].scored[0].reward for group in groups]))


def _weights(learner: LearnerRank) -> Weights:
    """A copy of the policy by the names of its checkpoint."""
    found = {}
    for name, parameter in learner.policy.named_parameters():
        whole: Any = parameter.detach()
        found[checkpoint_name(name)] = whole.full_tensor().clone()
    return found
