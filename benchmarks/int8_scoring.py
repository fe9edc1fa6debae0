"""What INT8 changes in the scoring pool's frozen models, against bfloat16 and float32.

A small Llama is trained for each of three seeds on real human preferences (hh-rlhf): as a language
model on the preferred dialogues, then, from there, as a Bradley-Terry reward model. Both are written
and loaded again by the scoring pool's own classes in each precision, and asked about both answers of
pairs that neither model nor tokenizer has seen:

reward     Spearman's rank correlation of the scores over all answers, and the share of pairs whose
           two answers change their order
reference  mean and largest absolute difference of the answers' log-probabilities, nats a token
bytes      of the decoder's linear layers, and of the whole model

`int8` computes in bfloat16, `int8_float32` in float32. One thread, CPU; about six
minutes a seed on a loaded machine.

    RLHF_REAL_DATA=FOLDER python benchmarks/int8_scoring.py

FOLDER holds hh-rlhf/harmless-base-2000.jsonl.gz.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.harness import ENVIRONMENT, machine, write_result
from rlhf_cluster.data.preferences import UnusableRow, parse_pair
from rlhf_cluster.data.rows import expand, read_rows
from rlhf_cluster.models.int8_linear import Linear8bit
from rlhf_cluster.models.make_model import make_bpe
from rlhf_cluster.records import FinishReason, Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.sections.every_run import BpeTokenizer

DATA = "${RLHF_REAL_DATA}/hh-rlhf/harmless-base-2000.jsonl.gz"
SEEDS = (0, 1, 2)
TRAINED_ROWS = 1400  # the rest of the 2000 is held out
LONGEST = 160  # tokens of a dialogue; longer ones are left out
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
}
VOCABULARY = 2048
LM_STEPS, LM_RATE = 60, 2e-3
REWARD_STEPS, REWARD_RATE = 45, 5e-4
DIALOGUES, PAIRS = 16, 16  # a step
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int8_float32": {"dtype": "float32", "quantization": "int8"},
}
COMPARED = (
    ("bfloat16", "float32"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
    ("int8_float32", "float32"),
)

Example = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def main() -> None:
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    before = machine()
    tokenizer = make_bpe(BpeTokenizer(path=DATA, vocab_size=VOCABULARY, limit=TRAINED_ROWS))
    rows = read_rows(expand(DATA))
    trained = list(_examples(rows[:TRAINED_ROWS], tokenizer))
    held_out = list(_examples(rows[TRAINED_ROWS:], tokenizer))
    print(f"{len(trained)} pairs to train on, {len(held_out)} held out", flush=True)
    runs = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            _train(trained, tokenizer, seed, Path(folder))
            runs[f"seed-{seed}"] = measured(held_out, Path(folder))
        print(seed, runs[f"seed-{seed}"], flush=True)
        figures = {
            f"{name}/{kind}": kind_of(run[name] for run in runs.values())
            for name in runs["seed-0"]
            for kind, kind_of in (("mean", statistics.mean), ("min", min), ("max", max))
        }
        figures |= {
            "seeds": len(runs),
            "pairs_trained": len(trained),
            "pairs_held_out": len(held_out),
        }
        write_result("int8_scoring", figures, list(runs.items()), machine=before, model=MODEL)


def measured(held_out: Sequence[Example], folder: Path) -> dict[str, float]:
    """All numbers of one seed's two models, by name."""
    scores, logprobs, found = {}, {}, {}
    for name, keys in PRECISIONS.items():
        reward = RewardModel(
            RewardModelConfig(path=str(folder / "reward"), tokens_per_batch=2048, **keys),
            RewardContext(),
        )
        reference = FrozenPolicy(
            "reference",
            str(folder / "lm"),
            keys["dtype"],
            "cpu",
            2048,
            quantization=keys.get("quantization"),
        )
        scores[name] = np.array([reward.score(p, r, ["", ""]) for p, r in map(_group, held_out)])
        answers = [reference.logprobs(r) for _, r in map(_group, held_out)]
        logprobs[name] = np.concatenate([values for pair in answers for values in pair])
        found[f"reward/accuracy/{name}"] = float((scores[name][:, 0] > scores[name][:, 1]).mean())
        found[f"reference/logprob/{name}"] = float(logprobs[name].mean())
        for key, value in _bytes(reward._model).items():
            found[f"bytes/{key}/{name}"] = value
    found["reward/score_std"] = float(scores["float32"].std())
    for name, other in COMPARED:
        versus, difference = f"{name}_vs_{other}", np.abs(logprobs[name] - logprobs[other])
        found[f"reward/spearman/{versus}"] = spearman(scores[name].ravel(), scores[other].ravel())
        found[f"reward/order_changed/{versus}"] = order_changed(scores[name], scores[other])
        found[f"reference/mean_abs_difference/{versus}"] = float(difference.mean())
        found[f"reference/max_abs_difference/{versus}"] = float(difference.max())
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of ranks, equal values sharing the mean of theirs."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def order_changed(first: np.ndarray, second: np.ndarray) -> float:
    """Share of pairs [N, 2] that the two score in another order."""
    return float(
        (np.sign(first[:, 0] - first[:, 1]) != np.sign(second[:, 0] - second[:, 1])).mean()
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _bytes(model: nn.Module) -> dict[str, int]:
    linear = 0
    for layer in model.base_model.modules():  # pyright: ignore
        if isinstance(layer, Linear8bit):
            linear += layer.codes.nbytes + layer.scale.nbytes
        elif type(layer) is nn.Linear:
            linear += layer.weight.nbytes
    return {
        "linear": linear,
        "model": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
    }


def _examples(rows: Sequence[Any], tokenizer: Any) -> Iterator[Example]:
    for row in rows:
        try:
            pair = parse_pair(row.columns, row.place)
        except UnusableRow:
            continue
        prompt, *answered = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=opens, return_dict=False)
            for messages, opens in (
                (pair.prompt, True),
                ([*pair.prompt, {"role": "assistant", "content": pair.chosen}], False),
                ([*pair.prompt, {"role": "assistant", "content": pair.rejected}], False),
            )
        )
        if max(map(len, answered)) <= LONGEST:
            yield prompt, answered[0][len(prompt) :], answered[1][len(prompt) :]


def _train(examples: Sequence[Example], tokenizer: Any, seed: int, folder: Path) -> None:
    """Write a language model to `folder`/lm and a reward model that began as it to `folder`/reward."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **MODEL,
    )
    lm = LlamaForCausalLM(config)
    draw = np.random.default_rng(seed)

    def lm_loss() -> Tensor:
        picked = [examples[i] for i in draw.integers(len(examples), size=DIALOGUES)]
        ids, lengths = _padded([prompt + chosen for prompt, chosen, _ in picked])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], -100)
        return lm(input_ids=ids, labels=labels).loss

    _optimise(lm, lm_loss, LM_STEPS, LM_RATE)
    lm.save_pretrained(folder / "lm")
    reward: Any = LlamaForSequenceClassification.from_pretrained(folder / "lm", num_labels=1)

    def reward_loss() -> Tensor:
        picked = [examples[i] for i in draw.integers(len(examples), size=PAIRS)]
        ids, lengths = _padded([p + c for p, c, _ in picked] + [p + r for p, _, r in picked])
        hidden = reward.model(input_ids=ids).last_hidden_state
        chosen, rejected = reward.score(hidden[torch.arange(len(ids)), lengths - 1]).chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean()

    _optimise(reward, reward_loss, REWARD_STEPS, REWARD_RATE)
    reward.save_pretrained(folder / "reward")
    for name in ("lm", "reward"):
        tokenizer.save_pretrained(folder / name)


def _optimise(model: nn.Module, loss_of: Any, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"{type(model).__name__} step {step} loss {loss.item():.3f}", flush=True)


def _padded(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """[B, S] ids with zeros behind, which no token before them sees; [B] lengths."""
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    return ids, torch.tensor([len(sequence) for sequence in sequences])


def _group(example: Example) -> tuple[Prompt, list[Rollout]]:
    ids = np.array(example[0], dtype=np.int32)
    prompt = Prompt(prompt_id="0", token_ids=ids, source="", columns={})
    rollouts = [
        Rollout(
            rollout_id=str(index),
            prompt_id="0",
            prompt_ids=ids,
            response_ids=np.array(response, dtype=np.int32),
            sampled_logprobs=np.zeros(len(response), dtype=np.float32),
            versions=np.zeros(len(response), dtype=np.int32),
            response_mask=np.ones(len(response), dtype=np.bool_),
            finish_reason=FinishReason.STOP,
            temperature=1.0,
            worker="",
            started_s=0.0,
            finished_s=0.0,
        )
        for index, response in enumerate(example[1:])
    ]
    return prompt, rollouts


if __name__ == "__main__":
    main()
