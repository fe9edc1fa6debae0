"""How much of a small adapter's update reaches an engine in bfloat16, by how versions are rounded.

A Llama whose weights lie on the bfloat16 grid gets an adapter (rank 16, all linear layers of the
decoder). Its A and B come from a few steps that make random answers likelier, as a learner's first
steps would; B is then scaled so that |dW| / |W|, over all adapted weights, has each of the sizes. The
learner's move is the change of the log-probabilities of tokens from the start to there, in float32;
the engine's that of the published weights. Told of each way of publishing:

kept       regression coefficient of the engine's move on the learner's, over all tokens, with a pass
           in float32: 1 is all of the update. Mean, least and most over seeds and versions, of which
           each has draws of its own
noise      what is left of the engine's move, its deviation over the learner's
weights    the same coefficient for the weights themselves
bfloat16_pass    `kept` where the engine also computes in bfloat16, whose own noise it has in it

nearest             merged, rounded to nearest to bfloat16
stochastic          merged, rounded by the stream of version and tensor (`stochastic_rounding`)
float32             merged, an engine in float32
served              W and the adapter apart in bfloat16, the product added to an output that is already
                    rounded, as engines serve adapters
int8_of_nearest, int8_of_stochastic    `generation.quantization = "int8"`: those versions, to INT8
int8_of_float32     the merged float32 weights, to INT8. The move is from INT8 of the start

CPU, one thread; a few minutes.

    python benchmarks/lora_rounding.py measure
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import machine, run_parts, write_result
from rlhf_cluster.models.int8_linear import round_to_int8 as to_int8
from rlhf_cluster.weights.formats.lora_factors import merge
from rlhf_cluster.weights.formats.stochastic_rounding import round_stochastically, stream_key

SIZES = (1e-4, 3e-4, 1e-3, 4e-3)
SEEDS = (0, 1, 2)
VERSIONS = 3  # of each size, where the draws differ
RANK, SCALE = 16, 2.0
SEQUENCES, TOKENS = 24, 64  # whose log-probabilities are compared
STEPS, RATE = 8, 1e-3  # that give the adapter its direction
MODEL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}

Weights = dict[str, Tensor]


class Policy:
    """A model on the bfloat16 grid, an adapter with a direction, and tokens to ask about."""

    def __init__(self, seed: int, sizes: Mapping[str, Any] = MODEL, batch: int = SEQUENCES) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().float().eval()
        self.start: Weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        length = sizes["max_position_embeddings"]
        self.tokens = torch.randint(sizes["vocab_size"], (batch, length))
        self._adapted = {
            name + ".weight": layer
            for name, layer in self.model.model.named_modules(prefix="model")
            if isinstance(layer, nn.Linear)
        }
        self._down = {
            n: nn.init.kaiming_uniform_(torch.empty(RANK, w.in_features), a=5**0.5)
            for n, w in self._adapted.items()
        }
        self._up = {n: torch.zeros(w.out_features, RANK) for n, w in self._adapted.items()}
        self._train()

    def factor(self, size: float) -> float:
        """What B is multiplied by so that the update has this size, relative to the weights."""
        updates = {n: SCALE * self._up[n] @ self._down[n] for n in self._adapted}
        return size * _norm(self.adapted) / _norm(updates)

    def merged(self, size: float) -> Weights:
        """The adapted weights in float32 with an update of this size."""
        factor = self.factor(size)
        return {
            n: merge(w.view(-1), 0, self._down[n], factor * self._up[n], SCALE).view(w.shape)
            for n, w in self.adapted.items()
        }

    @property
    def adapted(self) -> Weights:
        """The same weights at the start."""
        return {n: self.start[n] for n in self._adapted}

    @torch.no_grad()
    def logprobs(self, weights: Weights, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of each token after the first, flat, with `weights` in place of the model's own."""
        model = self.model.to(dtype)
        with _replaced(model, weights):
            hidden = model.model(self.tokens).last_hidden_state
        logits = hidden.float() @ self.start["model.embed_tokens.weight"].T
        self.model.float()
        picked = logits[:, :-1].log_softmax(-1).gather(-1, self.tokens[:, 1:, None])
        return picked.flatten().double()

    def _train(self) -> None:
        trained = [*self._down.values(), *self._up.values()]
        for tensor in trained:
            tensor.requires_grad_()
        optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
        hooks = [
            layer.register_forward_hook(_adding(self._down[n], self._up[n], SCALE))
            for n, layer in self._adapted.items()
        ]
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for _ in range(STEPS):
            loss = self.model(input_ids=self.tokens[:16], labels=self.tokens[:16]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for hook in hooks:
            hook.remove()
        for tensor in trained:
            tensor.requires_grad_(False)

    @torch.no_grad()
    def served(self, size: float) -> Tensor:
        """`logprobs` of an engine in bfloat16 that adds the adapter's product layer by layer."""
        factor, hooks = self.factor(size), []
        for name, layer in self._adapted.items():
            down, up = self._down[name].bfloat16(), (SCALE * factor * self._up[name]).bfloat16()
            hooks.append(layer.register_forward_hook(_adding(down, up)))
        found = self.logprobs({}, torch.bfloat16)
        for hook in hooks:
            hook.remove()
        return found


def _adding(
    down: Tensor, up: Tensor, scale: float = 1.0
) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + scale * (inputs[0] @ down.T) @ up.T

    return add


def regressed(engine: Tensor, learner: Tensor) -> tuple[float, float]:
    """Coefficient of the one move on the other, and the deviation of the rest over the learner's."""
    kept = (engine @ learner / (learner @ learner)).item()
    return kept, ((engine - kept * learner).std() / learner.std()).item()


def nearest(weights: Weights, version: int) -> Weights:
    return {n: w.bfloat16().float() for n, w in weights.items()}


def stochastic(weights: Weights, version: int) -> Weights:
    return {
        n: round_stochastically(w.reshape(-1), 0, stream_key(version, n)).float().view(w.shape)
        for n, w in weights.items()
    }


def float32(weights: Weights, version: int) -> Weights:
    return weights


def _int8_after(way: Callable[[Weights, int], Weights]) -> Callable[[Weights, int], Weights]:
    def rounded(weights: Weights, version: int) -> Weights:
        pairs = {n: to_int8(w) for n, w in way(weights, version).items()}
        return {n: codes.float() * scale for n, (codes, scale) in pairs.items()}

    return rounded


WAYS: Mapping[str, Callable[[Weights, int], Weights]] = {
    "float32": float32,
    "nearest": nearest,
    "stochastic": stochastic,
    "int8_of_nearest": _int8_after(nearest),
    "int8_of_stochastic": _int8_after(stochastic),
    "int8_of_float32": _int8_after(float32),
}


class Start:
    """What the engines of every way are at the start, and the learner."""

    def __init__(self, policy: Policy) -> None:
        self.weights = {way: publish(policy.adapted, 0) for way, publish in WAYS.items()}
        self.logprobs = {way: policy.logprobs(weights) for way, weights in self.weights.items()}
        self.in_bfloat16 = policy.logprobs({}, torch.bfloat16)


def measured(policy: Policy, start: Start, size: float, versions: int) -> dict[str, dict[str, Any]]:
    """All numbers of an update of one size, by way of publishing."""
    merged = policy.merged(size)
    learner = policy.logprobs(merged) - start.logprobs["float32"]
    moved = _flat(merged) - _flat(policy.adapted)
    found: dict[str, dict[str, Any]] = {}
    for way, publish in WAYS.items():
        rows: list[dict[str, float]] = []
        for version in range(1, 1 + (versions if "stochastic" in way else 1)):
            weights = publish(merged, version)
            kept, noise = regressed(policy.logprobs(weights) - start.logprobs[way], learner)
            own, _ = regressed(_flat(weights) - _flat(start.weights[way]), moved)
            row = {"kept": kept, "noise": noise, "weights": own}
            if way in ("nearest", "stochastic"):
                engine = policy.logprobs(weights, torch.bfloat16) - start.in_bfloat16
                row["bfloat16_pass"], _ = regressed(engine, learner)
            rows.append(row)
        found[way] = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        found[way]["kept_of_versions"] = [row["kept"] for row in rows]
    kept, _ = regressed(policy.served(size) - start.in_bfloat16, learner)
    return found | {"served": {"bfloat16_pass": kept}}


def measure() -> None:
    torch.set_num_threads(1)
    before, began = machine(), time.monotonic()
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in SEEDS:
        policy = Policy(seed)
        start = Start(policy)
        for size in SIZES:
            runs[f"seed-{seed}/{size:g}"] = measured(policy, start, size, VERSIONS)
            print(seed, size, f"{time.monotonic() - began:.0f} s", flush=True)
    figures: dict[str, float] = {"seeds": len(SEEDS), "versions": VERSIONS}
    figures["tokens"] = SEQUENCES * (TOKENS - 1)
    for size in SIZES:
        for way in (*WAYS, "served"):
            rows = [runs[f"seed-{seed}/{size:g}"][way] for seed in SEEDS]
            for key in rows[0].keys() - {"kept_of_versions"}:
                figures[f"{way}/{size:g}/{key}"] = statistics.mean(row[key] for row in rows)
            every = [kept for row in rows for kept in row.get("kept_of_versions", [])]
            if every:
                figures[f"{way}/{size:g}/kept_min"] = min(every)
                figures[f"{way}/{size:g}/kept_max"] = max(every)
    write_result("lora_rounding", figures, list(runs.items()), machine=before, model=MODEL)


@contextmanager
def _replaced(model: nn.Module, weights: Weights) -> Iterator[None]:
    """`weights` stand in the place of the model's own, in its type, until the end."""
    own = {name: model.get_parameter(name) for name in weights}
    kept = {name: parameter.data for name, parameter in own.items()}
    for name, parameter in own.items():
        parameter.data = weights[name].to(parameter.dtype)
    try:
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]


def _flat(weights: Weights) -> Tensor:
    return torch.cat([w.reshape(-1) for w in weights.values()]).double()


def _norm(weights: Weights) -> float:
    return _flat(weights).norm().item()


if __name__ == "__main__":
    run_parts(__doc__ or "", {"measure": measure})
