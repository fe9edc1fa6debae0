"""`validate --deep`: whether the tokenizers of a run's models agree, and what memory the roles need.

Reads configurations, tokenizers and the shapes of tensors, never the weights. `memory` is pure.

The estimate, in bytes, for P parameters of w bytes each and R ranks:

    learner rank   16 P / R       float32 weights, gradients and two moments, and the same for a critic;
                                  with adapters 4 P / R, in 4 bits 0.63 P / R
                   34 w/2 T H L   passes: T tokens of a micro-batch, hidden size H, L layers;
                                  2 w/2 T H L with gradient checkpointing (Korthikanti et al. 2022,
                                  arXiv 2205.05198, without the attention scores)
    generation     w P / t        of each of t tensor-parallel parts, and the KV cache, of which a token
                                  takes 2 w L times the size of its keys
    scoring        w P            of each frozen model: reference, teacher, reward models

It leaves out what libraries keep for themselves, so it is what a role needs at least. Hosts hold
12 P / R more for each rank while a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster import doctor
from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_cluster.doctor import GIB, Finding, Verdict
from rlhf_cluster.errors import DataError, WeightError
from rlhf_cluster.inputs import model_dir_of
from rlhf_cluster.weights.checkpoint import checkpoint_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = {"float32": 4, "bfloat16": 2}
STATE_BYTES = 16  # of a trained parameter
FROZEN_BYTES = 4.0  # of one under adapters
QUANTIZED_BYTES = 0.63
ACTIVATIONS, RECOMPUTED = 34, 2  # bytes of a token, hidden unit and layer, in 16 bits
GPU_SHARE = 0.9  # of a GPU that is there to be filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of the policy. `key_size` is heads of keys times their size."""

    num_parameters: int
    hidden_size: int
    num_layers: int
    key_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes of one process of a role on its device. `parts` say of what."""

    role: str
    processes: int
    gpus: float  # of one process
    parts: Mapping[str, float]

    @property
    def num_bytes(self) -> float:
        return sum(self.parts.values())


def deep(config: RunConfig, scratch: Path) -> list[Finding]:
    """All findings; a made model is made in `scratch`. Raises `DataError`, `WeightError`."""
    model_dir = model_dir_of(config, scratch)
    needs = memory(config, _shape(model_dir), _frozen(config))
    return [
        *_tokenizers(config, model_dir),
        *judge_memory(needs, [size for _, size in doctor.gpus()], doctor.memory_bytes(), config),
    ]


def memory(config: RunConfig, shape: Shape, frozen: Mapping[str, int]) -> list[Need]:
    """What each role needs. `frozen`: parameters of the scoring pool's models, by what they are."""
    learner, generation, scoring = config.learner, config.generation, config.scoring
    width = BYTES[learner.dtype]
    critic = ALGORITHMS[config.algorithm.type](config.algorithm).needs_critic
    models = 2 if critic and config.critic.kind == "separate" else 1
    state = float(STATE_BYTES)
    if learner.lora is not None:
        state = QUANTIZED_BYTES if learner.lora.quantize_base else FROZEN_BYTES
    of_a_token = RECOMPUTED if learner.gradient_checkpointing else ACTIVATIONS
    tokens = min(
        learner.tokens_per_micro_batch,
        config.run.groups_per_step * config.algorithm.group_size * config.max_sequence_tokens,
    )
    passes = of_a_token * width / 2 * tokens * shape.hidden_size * shape.num_layers
    width = 1 if generation.quantization is not None else BYTES[generation.dtype]
    cache = BYTES[generation.dtype] * 2 * shape.num_layers * shape.key_size
    longest = config.max_sequence_tokens / generation.tensor_parallel_size
    parts = {
        "weights": width * shape.num_parameters / generation.tensor_parallel_size,
        "KV cache": generation.kv_cache_bytes or cache * longest,  # one sequence at the least
    }
    return [
        Need(
            role="learner rank",
            processes=learner.ranks,
            gpus=learner.num_gpus,
            parts={
                "state": models * state * shape.num_parameters / learner.ranks,
                "passes": passes,
            },
        ),
        Need(
            role="generation worker",
            processes=generation.workers,
            gpus=generation.num_gpus,
            parts=parts,
        ),
        Need(
            role="scoring worker",
            processes=scoring.workers,
            gpus=scoring.num_gpus,
            parts={name: _width(config, name) * count for name, count in frozen.items()},
        ),
    ]


def judge_memory(
    needs: Sequence[Need], gpus: Sequence[int], host_bytes: int | None, config: RunConfig
) -> Iterator[Finding]:
    """A finding a role, against the smallest GPU here or, without GPUs, all roles against this host."""
    on_host = 0.0
    for need in needs:
        value = f"{_gib(need.num_bytes)} each ({_parts(need)}), {need.processes} of them"
        cure, verdict = "", "ok"
        if need.gpus == 0:
            on_host += need.processes * need.num_bytes
        elif gpus and need.num_bytes > GPU_SHARE * min(gpus):
            verdict, cure = "wrong", f"{_gib(min(gpus))} on a GPU here. {_CURES[need.role]}"
        elif not gpus:
            value += "; no GPU here to compare it with"
        yield _finding(f"memory, {need.role}", verdict, value, cure)
    if on_host and host_bytes is not None and config.cluster.address is None:
        full = on_host > host_bytes
        yield _finding(
            "memory of this host",
            "wrong" if full else "ok",
            f"{_gib(on_host)} of {_gib(host_bytes)} that are free, for what runs without a GPU",
            "Fewer workers or ranks, a smaller model, or a larger machine" if full else "",
        )


_CURES = {
    "learner rank": "More learner.ranks, fewer learner.tokens_per_micro_batch, "
    "learner.gradient_checkpointing = true, or [learner.lora]",
    "generation worker": "A larger generation.tensor_parallel_size, fewer "
    "generation.kv_cache_bytes, or generation.quantization",
    "scoring worker": "scoring.dtype = 'bfloat16', scoring.quantization = 'int8', smaller reward "
    "models, or larger GPUs",
}


def _tokenizers(config: RunConfig, model_dir: Path) -> Iterator[Finding]:
    own = config.model.tokenizer or str(model_dir)
    policy = load_tokenizer(own)
    template = policy.chat_template
    if config.model.tokenizer is not None:
        yield _compared(f"tokenizer of {model_dir}", policy, str(model_dir), "model.tokenizer")
    outside = [i for i in end_token_ids(policy, model_dir) if i >= len(policy)]
    yield _finding(
        "end tokens",
        "wrong" if outside else "ok",
        f"{list(end_token_ids(policy, model_dir))}",
        f"{outside} are no tokens: correct eos_token_id in generation_config.json"
        if outside
        else "",
    )
    plain = config.data.template == "none" and template is not None
    yield _finding(
        "chat template",
        "note" if plain else "ok",
        f"data.template = {config.data.template!r}, the tokenizer has {'one' if template else 'none'}",
        "A model trained on chats answers plain text badly: set data.template = 'chat'"
        if plain
        else "",
    )
    if config.scoring.teacher is not None:
        yield _compared("tokenizer of the teacher", policy, config.scoring.teacher, "a teacher")
    for reward in config.scoring.rewards:
        shared = getattr(reward, "tokenizer", "shared") == "shared"
        for path in reward.model_paths if shared else ():
            key = f"tokenizer of {reward.name or reward.type}"
            yield _compared(key, policy, path, "tokenizer = 'shared'")


def _compared(name: str, policy: PreTrainedTokenizerBase, path: str, why: str) -> Finding:
    """A model that reads the policy's ids must know them, and ought to have its template."""
    try:
        other = load_tokenizer(path)
    except DataError as error:
        cure = "Nothing can be compared: see that it reads the policy's tokens"
        return _finding(name, "note", str(error).partition(". ")[0], cure)
    differing = sorted({t for t, _ in other.get_vocab().items() ^ policy.get_vocab().items()})
    if differing:
        cure = f"{why} reads the policy's token ids: use a model with the policy's tokenizer"
        value = f"{len(differing)} tokens differ from the policy's, such as {differing[0]!r}"
        return _finding(name, "wrong", value, cure)
    if other.chat_template is not None and other.chat_template != policy.chat_template:
        cure = "It reads prompts as the policy's template writes them, and was trained on its own"
        return _finding(name, "note", "the policy's tokens, another chat template", cure)
    return _finding(name, "ok", "the policy's")


def _shape(model_dir: Path) -> Shape:
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False).get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        num_parameters=_count(str(model_dir)),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        key_size=head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
    )


def _frozen(config: RunConfig) -> dict[str, int]:
    """Parameters of the scoring pool's models. Those that cannot be counted are left out."""
    paths: dict[str, str] = {}
    if config.scoring.reference and config.model.path is not None:
        paths["reference"] = config.model.path
    if config.scoring.teacher is not None:
        paths["teacher"] = config.scoring.teacher
    for reward in config.scoring.rewards:
        for number, path in enumerate(reward.model_paths):
            paths[f"{reward.name or reward.type} {number}".removesuffix(" 0")] = path
    return {name: _count(path) for name, path in paths.items() if Path(path).is_dir()}


def _width(config: RunConfig, name: str) -> int:
    """Bytes of a parameter of the scoring pool's model `name`."""
    rounded = config.scoring.quantization is not None and name in ("reference", "teacher")
    return 1 if rounded else BYTES[config.scoring.dtype]


def _count(path: str) -> int:
    """Raises `WeightError` where there are no safetensors."""
    try:
        return sum(prod(shape) for shape in checkpoint_shapes(path).values())
    except OSError as error:
        raise WeightError(f"{path}: its tensors cannot be read ({error})") from error


def _finding(name: str, verdict: str, value: str, cure: str = "") -> Finding:
    known: Verdict = "wrong" if verdict == "wrong" else "note" if verdict == "note" else "ok"
    return Finding(name=name, verdict=known, value=value, cure=cure)


def _parts(need: Need) -> str:
    found = [f"{name} {_gib(size)}" for name, size in need.parts.items()]
    return ", ".join(found) or "no model"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g} GiB"
