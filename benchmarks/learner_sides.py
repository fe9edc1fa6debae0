"""The learner's step and a bare transformers loop over the same rollouts, for `learning_core`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cluster.config import RunConfig
    from rlhf_cluster.records import ExperienceGroup

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
PROMPT_TOKENS = 16
LONGEST = 512  # positions of a sequence
NUM_SEQUENCES = 48
TOKENS_PER_MICRO_BATCH = 2048
ROWS_PER_PASS = 8  # of the bare loop
GROUP_SIZE = 8
LEARNING_RATE = 1e-5
UNBOUNDED_NORM = 1e9  # gradients are compared as they are; the norm is still computed


def long_tailed_lengths(draw: Any) -> list[int]:
    """Response lengths: log-normal, median 64, most under 200, a few at the bound."""
    import numpy as np

    lengths = np.exp(np.log(64) + 0.9 * draw.standard_normal(NUM_SEQUENCES)).astype(int)
    return np.clip(lengths, 4, LONGEST - PROMPT_TOKENS + 1).tolist()


def make_groups(draw: Any, lengths: Sequence[int], vocabulary: int) -> list[ExperienceGroup]:
    """Rollouts of these lengths, `GROUP_SIZE` a group; rewards differ, so no advantage is 0."""
    import numpy as np

    from rlhf_cluster.records import (
        ExperienceGroup,
        FinishReason,
        Prompt,
        Rollout,
        ScoredRollout,
        Ticket,
    )

    groups = []
    for number, first in enumerate(range(0, len(lengths), GROUP_SIZE)):
        ids = draw.integers(0, vocabulary, PROMPT_TOKENS).astype(np.int32)
        prompt = Prompt(prompt_id=f"p{number}", token_ids=ids, source="")
        scored = []
        for index, length in enumerate(lengths[first : first + GROUP_SIZE]):
            rollout = Rollout(
                rollout_id=f"{number}/{index}",
                prompt_id=prompt.prompt_id,
                prompt_ids=ids,
                response_ids=draw.integers(0, vocabulary, length).astype(np.int32),
                sampled_logprobs=np.full(length, -9.0, dtype=np.float32),
                versions=np.zeros(length, dtype=np.int32),
                response_mask=np.ones(length, dtype=bool),
                finish_reason=FinishReason.STOP,
                temperature=1.0,
                worker="benchmark",
                started_s=0.0,
                finished_s=0.0,
            )
            reward = float(draw.random())
            scored.append(
                ScoredRollout(
                    rollout=rollout, reward=reward, reward_parts={}, ref_logprobs=None, scorer=""
                )
            )
        ticket = Ticket(number=number, version=0)
        groups.append(ExperienceGroup(ticket=ticket, prompt=prompt, scored=tuple(scored)))
    return groups


def learner_config(folder: str) -> RunConfig:
    """Plain policy gradient with the mean of the group as baseline; clipping never acts."""
    from rlhf_cluster.config import RunConfig, validate

    tree = {
        "run": {"name": "loop", "root": folder, "steps": 100, "groups_per_step": 1},
        "model": {"path": str(Path(folder) / "model")},
        "data": {"task": "sort_digits", "max_prompt_tokens": PROMPT_TOKENS},
        "algorithm": {
            "type": "grpo",
            "group_size": GROUP_SIZE,
            "normalize_std": False,
            "correction": {"type": "none"},
        },
        "generation": {"max_response_tokens": LONGEST - PROMPT_TOKENS},
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "learner": {
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": UNBOUNDED_NORM,
            "dtype": "float32",
            "tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
        },
        "staleness": {"max_staleness": 100},
    }
    return validate(RunConfig, tree, source="benchmark")


class LearnerSide:
    """One learner rank and the batch that it trains on again and again."""

    def __init__(self, config: RunConfig, groups: list[ExperienceGroup]) -> None:
        from rlhf_cluster.learner.learner_rank import LearnerRank

        self._rank = LearnerRank(config, str(config.model.path), 0, 1, None)
        self._rank.setup()
        self.make_groups = groups

    def step(self) -> None:
        self._rank.train_step(self.make_groups)

    def first_gradients(self) -> dict[str, Tensor]:
        """Gradients of the loss as the optimizer gets them, in its first step."""
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        found: dict[str, Tensor] = {}

        def copy(*_: Any) -> None:
            for name, parameter in self._rank.policy.named_parameters():
                gradient: Any = parameter.grad
                found[name.removeprefix("lm.")] = gradient.full_tensor().clone()

        hook = register_optimizer_step_pre_hook(copy)
        self.step()
        hook.remove()
        return found

    def close(self) -> None:
        self._rank.close()


class BareLoop:
    """What one writes first: pad, forward with a mask, full logits, backward, clip, AdamW."""

    def __init__(self, folder: str, groups: list[ExperienceGroup], sort: bool = False) -> None:
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model.train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
        )
        rows = []
        for group in groups:
            mean = np.mean([s.reward for s in group.scored])
            for scored in group.scored:
                response = scored.rollout.response_ids
                ids = np.concatenate([group.prompt.token_ids, response])
                rows.append((ids, len(response), scored.reward - mean))
        rows.sort(key=lambda row: -len(row[0]) if sort else 0)
        self.num_tokens = sum(len(ids) - 1 for ids, _, _ in rows)
        self._num_targets = sum(length for _, length, _ in rows)
        self._passes = [
            self._padded(rows[i : i + ROWS_PER_PASS]) for i in range(0, len(rows), ROWS_PER_PASS)
        ]

    def _padded(self, rows: Sequence[tuple[Any, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask, and the weight of each next token: [B, S], [B, S], [B, S-1]"""
        import torch

        width = max(len(ids) for ids, _, _ in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask, weights = torch.zeros_like(tokens), torch.zeros(len(rows), width - 1)
        for row, (ids, num_targets, advantage) in enumerate(rows):
            tokens[row, : len(ids)] = torch.from_numpy(ids)
            mask[row, : len(ids)] = 1
            weights[row, len(ids) - 1 - num_targets : len(ids) - 1] = advantage / self._num_targets
        return tokens, mask, weights

    def _backward(self) -> None:
        for tokens, mask, weights in self._passes:
            logits = self._model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            logs = logits[:, :-1].float().log_softmax(-1)
            chosen = logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
            (-(chosen * weights).sum()).backward()

    def first_gradients(self) -> dict[str, Tensor]:
        self._backward()
        found = {n: p.grad.clone() for n, p in self._model.named_parameters()}
        self._optimizer.zero_grad()
        return found

    def step(self) -> None:
        import torch

        self._backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), UNBOUNDED_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
