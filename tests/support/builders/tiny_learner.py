"""A tiny Llama in a folder, random experience, and run configurations for tests of the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.algorithms.algorithm import LossInputs
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    Prompt,
    Rollout,
    ScoredRollout,
    Ticket,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from rlhf_cluster.learner.learner_rank import LearnerRank

VOCABULARY = 48
MAX_PROMPT_TOKENS = 8
MAX_RESPONSE_TOKENS = 24


def build_llama(seed: int = 0, tie: bool = True, std: float = 0.25) -> LlamaForCausalLM:
    """Hidden 32, 2 layers, weights large enough that every token matters to the next ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=std,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save_llama(folder: Path, tie: bool = True) -> str:
    build_llama(tie=tie).save_pretrained(folder)
    return str(folder)


def learner_config(model_dir: str, **sections: dict[str, Any]) -> RunConfig:
    """A float32 learner on the CPU. `sections` change single keys of single sections."""
    tree: dict[str, dict[str, Any]] = {
        "run": {
            "name": "tiny",
            "root": str(Path(model_dir).parent),
            "steps": 10,
            "groups_per_step": 4,
            "start_timeout_s": 120.0,
        },
        "model": {"path": model_dir},
        "data": {"task": "sort_digits", "max_prompt_tokens": MAX_PROMPT_TOKENS},
        "algorithm": {"type": "grpo", "group_size": 4},
        "generation": {"max_response_tokens": MAX_RESPONSE_TOKENS, "dtype": "float32"},
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "learner": {"learning_rate": 1e-4, "dtype": "float32", "logprob_chunk_tokens": 16},
    }
    merged = {n: {**tree.get(n, {}), **sections.get(n, {})} for n in {*tree, *sections}}
    return validate(RunConfig, merged, source="test")


def full_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the whole parameters by name, gathered by the library that shards them.

    Of ZeRO-3 these are the working copies. Every rank must take part.
    """
    found = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor"):
            found[name] = parameter.full_tensor().detach().clone()  # type: ignore[operator]
        else:
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
    return found


def sft_examples(num: int = 8) -> list[SftExample]:
    """Random prompts of 3 tokens with targets of 1 to 7."""
    draw = np.random.default_rng(0)
    return [
        SftExample(
            prompt_ids=draw.integers(0, VOCABULARY, 3).astype(np.int32),
            target_ids=draw.integers(0, VOCABULARY, int(n)).astype(np.int32),
        )
        for n in draw.integers(1, 8, num)
    ]


def make_scored(
    rollout_id: str,
    prompt: Prompt,
    response_ids: Sequence[int],
    sampled_logprobs: Sequence[float],
    reward: float,
    version: int | Sequence[int] = 0,
    mask: Sequence[bool] | None = None,
    ref_logprobs: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> ScoredRollout:
    num_tokens = len(response_ids)
    rollout = Rollout(
        rollout_id=rollout_id,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        response_ids=np.asarray(response_ids, dtype=np.int32),
        sampled_logprobs=np.asarray(sampled_logprobs, dtype=np.float32),
        versions=np.broadcast_to(np.asarray(version, dtype=np.int32), num_tokens).copy(),
        response_mask=np.ones(num_tokens, bool) if mask is None else np.asarray(mask, bool),
        finish_reason=FinishReason.STOP,
        temperature=temperature,
        worker="test",
        started_s=0.0,
        finished_s=1.0,
    )
    ref = None if ref_logprobs is None else np.asarray(ref_logprobs, dtype=np.float32)
    return ScoredRollout(
        rollout=rollout,
        reward=reward,
        reward_parts={"exact_match": reward},
        ref_logprobs=ref,
        scorer="test",
    )


def make_prompt(number: int, token_ids: Sequence[int]) -> Prompt:
    ids = np.asarray(token_ids, dtype=np.int32)
    return Prompt(prompt_id=f"p{number}", token_ids=ids, source="")


def make_group(number: int, prompt: Prompt, scored: Sequence[ScoredRollout]) -> ExperienceGroup:
    ticket = Ticket(number=number, version=0)
    return ExperienceGroup(ticket=ticket, prompt=prompt, scored=tuple(scored))


def random_groups(
    seed: int,
    num_groups: int = 4,
    group_size: int = 4,
    lengths: Sequence[int] | None = None,
    version: int = 0,
    with_reference: bool = False,
    rewards: Sequence[float] | None = None,
) -> list[ExperienceGroup]:
    """Groups of random tokens; `lengths` fixes the response lengths in order."""
    draw = np.random.default_rng(seed)
    groups, taken = [], 0
    for number in range(num_groups):
        size = int(draw.integers(1, MAX_PROMPT_TOKENS + 1))
        prompt = make_prompt(number, draw.integers(0, VOCABULARY, size).tolist())
        scored = []
        for index in range(group_size):
            count = int(draw.integers(1, MAX_RESPONSE_TOKENS + 1))
            count = lengths[taken] if lengths is not None else count
            mask = draw.random(count) > 0.1
            mask[-1] = True
            scored.append(
                make_scored(
                    f"{number}/{index}",
                    prompt,
                    draw.integers(0, VOCABULARY, count).tolist(),
                    (-4 + 0.5 * draw.standard_normal(count)).tolist(),
                    float(draw.random()) if rewards is None else rewards[taken],
                    version=version,
                    mask=mask.tolist(),
                    ref_logprobs=(-4 + 0.5 * draw.standard_normal(count)).tolist()
                    if with_reference
                    else None,
                )
            )
            taken += 1
        groups.append(make_group(number, prompt, scored))
    return groups


def with_teacher(groups: Sequence[ExperienceGroup], seed: int) -> list[ExperienceGroup]:
    """The same with a teacher's log-probabilities, drawn as the reference's are."""
    draw = np.random.default_rng(seed)

    def rated(one: ScoredRollout) -> ScoredRollout:
        values = -4 + 0.5 * draw.standard_normal(len(one.rollout.response_ids))
        return replace(one, teacher_logprobs=values.astype(np.float32))

    return [replace(g, scored=tuple(rated(one) for one in g.scored)) for g in groups]


def loss_inputs(
    learner: torch.Tensor,
    sampled: torch.Tensor,
    advantages: torch.Tensor,
    *,
    proximal: torch.Tensor | None = None,
    ref: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    staleness: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    unit_size: int = 1,
) -> LossInputs:
    """Inputs of a loss over N tokens; `lengths` cuts them into sequences (default: one)."""
    import torch

    lengths = [len(learner)] if lengths is None else lengths
    return LossInputs(
        learner_logprobs=learner,
        proximal_logprobs=learner.detach() if proximal is None else proximal,
        sampled_logprobs=sampled,
        ref_logprobs=ref,
        advantages=advantages,
        entropy=torch.zeros_like(advantages) if entropy is None else entropy,
        staleness=torch.zeros_like(advantages) if staleness is None else staleness,
        sequence=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long()),
        num_sequences=len(lengths),
        unit_sizes=(unit_size,) * (len(lengths) // unit_size),
    )


def response_logprobs(learner: LearnerRank, groups: Sequence[ExperienceGroup]) -> list[np.ndarray]:
    """What a single learner rank gives each response token, [T] of every rollout."""
    from rlhf_cluster.data.packing import TokenSequence
    from rlhf_cluster.learner.step.passes import score

    sequences = [
        TokenSequence(prompt_ids=s.rollout.prompt_ids, target_ids=s.rollout.response_ids)
        for g in groups
        for s in g.scored
    ]
    found = score(learner.model, sequences, 1.0, learner._layout)
    # a pass without a backward leaves the root's parameters gathered
    learner.model.module.reshard()  # type: ignore[operator]
    return [found[i] for i in range(len(sequences))]


CHANGED = "learner/params_changed_fraction_bf16"


def check_changed_share(learner: LearnerRank) -> None:
    """The share that is reported is that of the step between two snapshots, whatever the backend."""
    learner.snapshot()
    before = full_parameters(learner.policy)
    assert CHANGED not in learner.train_step(random_groups(0)).metrics
    learner.snapshot()
    after = full_parameters(learner.policy)
    found = learner.train_step(random_groups(1, version=1)).metrics[CHANGED]
    changed = sum(int((before[n].bfloat16() != w.bfloat16()).sum()) for n, w in after.items())
    assert found == changed / sum(w.numel() for w in after.values())
    assert 0.02 < found < 0.98
    assert CHANGED not in learner.train_step(random_groups(2, version=2)).metrics
