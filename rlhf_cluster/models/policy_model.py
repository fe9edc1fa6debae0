"""A causal language model that answers with log-probabilities instead of logits.

    logprobs[b, s] = log p(labels[b, s] | the sequence up to and with input_ids[b, s])

Promises:
- Sequences packed end to end in a row do not see each other: position ids that start again at 0
  separate their attention, which holds only without a KV cache and without an attention mask.
  `load_policy` tests this and the next point on the model that it loads, or refuses the model.
- `forward` returns the distribution of the model's own logits: a model that caps, scales or biases
  its logits after the output projection is refused, as it would be trained on another distribution.
- No dropout: the learner's probabilities depend on weights and tokens alone. A model that still
  draws random numbers in training mode, such as a router with jitter, is refused.
- The output projection is used inside its owner's `forward`, so it can be sharded. Embeddings tied
  to it remain one parameter.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlhf_cluster.errors import ConfigError, WeightError
from rlhf_cluster.models import varlen_attention
from rlhf_cluster.models.divergence import (
    REVERSE_KL,
    Divergence,
)
from rlhf_cluster.models.logprobs import linear_logprobs
from rlhf_cluster.models.model_folder import checkpoint_shapes, read_index
from rlhf_cluster.sections.values import HeadDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX = "model.safetensors.index.json"


class LogprobHead(nn.Linear):
    """Output projection that can return log-probabilities of labels instead of logits."""

    float32_logits = True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        entropy_gradient: bool = False,
        reference: tuple[Tensor, Tensor | None] | None = None,
        divergence: Divergence = REVERSE_KL,
    ) -> Any:
        """Return logits [..., V], or with labels the results of `linear_logprobs` in their shape."""
        if labels is None:
            return self._logits(hidden)
        if reference is not None:
            other, weight = reference
            weight = self.weight.detach() if weight is None else weight
            reference = other.reshape(-1, other.shape[-1]), weight
        found = linear_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight,
            labels.reshape(-1),
            temperature,
            chunk_tokens,
            entropy_gradient,
            reference,
            divergence,
            self.float32_logits,
        )
        return tuple(values.view(labels.shape) for values in found)

    def _logits(self, hidden: Tensor) -> Tensor:
        if not self.float32_logits:
            return super().forward(hidden)
        kind, weight = hidden.device.type, self.weight
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(kind, enabled=False):
            return nn.functional.linear(hidden.float(), weight.float())


class PolicyLM(nn.Module):
    """Wrapper of a Hugging Face causal LM, the root for sharding. Replaces its output projection."""

    def __init__(self, lm: PreTrainedModel, head_dtype: HeadDtype = "float32") -> None:
        super().__init__()
        self.lm = lm
        self.config = lm.config
        self.config.use_cache = False
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise ConfigError(
                f"{type(lm).__name__}: the output projection is {head!r}, expected a linear map "
                "without bias. Use another model"
            )
        replacement = LogprobHead(head.in_features, head.out_features, bias=False, device="meta")
        replacement.weight = head.weight
        replacement.float32_logits = head_dtype == "float32"
        lm.set_output_embeddings(replacement)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        entropy_gradient: bool = False,
        with_hidden: bool = False,
        reference: tuple[Tensor, Tensor | None] | None = None,
        divergence: Divergence = REVERSE_KL,
        own_logits: bool = False,
    ) -> Any:
        """Compute log-probabilities of `labels` (shifted by the caller) and entropies, in nats.

        Args:
            input_ids: [B, S] int64.
            position_ids: [B, S] int64, from 0 for each sequence, 0 on padding.
            labels: [B, S] int64, the token that follows each position; None asks for the hidden
                states alone.
            temperature: divides the logits before the softmax.
            chunk_tokens: positions whose logits exist at once.
            entropy_gradient: whether the entropy carries a gradient.
            with_hidden: whether the last hidden states are returned too.
            reference: last hidden states [B, S, H] and output projection [V, H] (None: this one's)
                of the policy that the KL is to.
            divergence: divergence that is computed as the KL.
            own_logits: return the logits [B, S, V] of the wrapped model alone, which are for a check of
                this wrapper and need all of their memory.

        Returns:
            (logprobs [B, S], entropy [B, S]), with a reference the KL [B, S], all float32, and with
            `with_hidden` last of all hidden [B, S, H] in the type of the passes. Without labels
            hidden alone.

        Raises:
            ConfigError: `config.use_cache` was turned on; packed sequences would mix.
        """
        if self.config.use_cache:
            raise ConfigError(
                "config.use_cache = True: with a cache, sequences packed in one row attend to each "
                "other. Set it to False"
            )
        if own_logits:
            return self.lm(input_ids=input_ids, use_cache=False).logits.float()
        hidden = hidden_states(self.lm.base_model, input_ids, position_ids)
        if labels is None:
            return hidden.clone()
        head = cast(LogprobHead, self.lm.get_output_embeddings())
        found = head(
            hidden, labels, temperature, chunk_tokens, entropy_gradient, reference, divergence
        )
        # FSDP hooks the outputs and warns of views
        return tuple(v.clone() for v in (*found, *([hidden] if with_hidden else [])))


def hidden_states(decoder: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Compute the last hidden states [B, S, H] of packed sequences.

    `input_ids` and `position_ids` are [B, S]; position ids separate the sequences of a row.
    """
    shape = input_ids.shape
    attention = str(getattr(decoder.config, "_attn_implementation", ""))
    bounds = {}
    if "flash" in attention or attention == varlen_attention.NAME:
        # both separate sequences in a batch of one row only
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        bounds = varlen_attention.bounds(position_ids) if attention == varlen_attention.NAME else {}
    hidden = decoder(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=None,
        use_cache=False,
        **bounds,
    ).last_hidden_state
    return hidden.reshape(*shape, -1)


def load_policy(
    model_dir: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    trainable: bool,
    compute_dtype: torch.dtype | None = None,
    head_dtype: HeadDtype = "float32",
) -> PolicyLM:
    """Load a causal LM, without code from the model folder, and check that it can be packed.

    Args:
        model_dir: a Hugging Face model folder (or hub id where the hub can be reached).
        dtype: type of the parameters; float32 for master weights.
        device: where the parameters live.
        trainable: False freezes every parameter.
        compute_dtype: type of forward passes where it differs (mixed precision); default `dtype`.
        head_dtype: type of the logits (`learner.head_dtype`).

    Raises:
        ConfigError: the model cannot be loaded, or does not keep the promises above.
    """
    from transformers import AutoModelForCausalLM

    compute_dtype = compute_dtype or dtype
    with _loading(model_dir):
        config, attention = _read_config(model_dir, device, compute_dtype)
        lm = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    policy = PolicyLM(lm, head_dtype).to(device)
    policy.eval()
    policy.requires_grad_(trainable)
    check_policy(policy, compute_dtype, trainable)
    return policy


def outline_policy(
    model_dir: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    trainable: bool,
    compute_dtype: torch.dtype | None = None,
    head_dtype: HeadDtype = "float32",
) -> PolicyLM | None:
    """Build the model of a folder with parameters on the meta device, without reading weights.

    The arguments are those of `load_policy`; buffers, such as rotary tables, are on the CPU as the
    configuration makes them. `learner.sharding.sharded_loading` reads the weights, and the buffers that
    the files hold, once the model is sharded; then `check_policy` must follow.

    Returns:
        None for a model whose parameters are not what its files hold, one tensor each (merged experts,
        quantised weights), or that is not a local folder: `load_policy` is for those.
    Raises:
        ConfigError: the folder holds no causal LM.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if not Path(model_dir).is_dir():
        return None
    with _loading(model_dir):
        config, attention = _read_config(model_dir, device, compute_dtype or dtype)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with init_empty_weights(include_buffers=False):
            lm = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    if dtype != torch.float32 and lm._keep_in_fp32_modules:
        return None
    lm.tie_weights()  # a parameter that is put on the meta device is no longer the one it was tied to
    policy = PolicyLM(lm, head_dtype)
    policy.eval()
    policy.requires_grad_(trainable)
    with _loading(model_dir):
        stored = checkpoint_shapes(model_dir)
    own = {checkpoint_name(n): tuple(p.shape) for n, p in policy.named_parameters()}
    return policy if all(stored.get(name) == shape for name, shape in own.items()) else None


@contextmanager
def _loading(model_dir: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError, WeightError) as error:
        raise ConfigError(
            f"{model_dir}: cannot load a causal LM ({error}). Give a folder with config.json and "
            "safetensors weights"
        ) from error


def _read_config(
    model_dir: str | Path, device: torch.device | str, compute_dtype: torch.dtype
) -> tuple[Any, str]:
    """Return the folder's configuration without dropout, and the attention that runs on `device`."""
    from transformers import AutoConfig

    if (Path(model_dir) / "adapter_config.json").exists():
        raise ConfigError(
            f"{model_dir} holds an adapter, which would be loaded on top of another model's weights. "
            "Merge it (peft's merge_and_unload), save the result, and give that folder: training "
            "starts from it, and it is the reference"
        )
    if (index := Path(model_dir) / _INDEX).is_file():
        _files_of(index)
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    for key in list(vars(config)):
        if key.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(config, key, 0.0)
    config.use_cache = False
    return config, _attention(torch.device(device), compute_dtype, config)


def check_policy(policy: PolicyLM, compute_dtype: torch.dtype, trainable: bool) -> None:
    """Raise `ConfigError` unless the policy, whole or sharded, keeps the promises of this module.

    Every rank of a sharded policy must take part.
    """
    was_training = policy.training
    policy.eval()
    check_distribution(policy, compute_dtype)
    if trainable:
        check_training_mode(policy, compute_dtype)
    policy.train(was_training)


def checkpoint_name(name: str) -> str:
    """Return the name of a `PolicyLM` parameter in the Hugging Face checkpoint.

    The base weight of an adapter has the name of the adapted weight.
    """
    return name.removeprefix("lm.").replace(".base_layer.", ".")


def check_names(policy: PolicyLM, model_dir: str | Path) -> None:
    """Raise `ConfigError` unless the parameters have the names of their checkpoint.

    Published weights carry these names, and an engine loads them as it would load the checkpoint.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        return  # a hub id: the files are in a cache whose layout is not documented
    stored = _stored_names(folder)
    own = {checkpoint_name(n) for n, _ in policy.named_parameters(remove_duplicate=False)}
    unique = {checkpoint_name(n) for n, _ in policy.named_parameters()}
    buffers = {checkpoint_name(n) for n, _ in policy.named_buffers()}
    missing = sorted(unique - stored)
    extra = sorted(n for n in stored - own - buffers if "rotary_emb" not in n)
    if missing or extra:
        raise ConfigError(
            f"{folder}: parameter names differ from the checkpoint's; only in the model: "
            f"{missing[:3]}, only in the checkpoint: {extra[:3]}. An engine could not load what "
            "this learner publishes; use a model whose names agree"
        )


def _stored_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    index = folder / _INDEX
    if index.is_file():
        return set(_files_of(index))
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(
            f"{folder}: neither model.safetensors nor its index exists. Save the model as "
            "safetensors"
        )
    with safe_open(single, framework="pt") as file:
        return set(file.keys())


def _files_of(index: Path) -> dict[str, str]:
    try:
        return read_index(index)
    except WeightError as error:
        raise ConfigError(str(error)) from error


def _attention(device: torch.device, compute_dtype: torch.dtype, config: Any) -> str:
    half = compute_dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and half and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    if (
        half
        and varlen_attention.supports(config)
        and varlen_attention.available(device, compute_dtype)
    ):
        varlen_attention.register()
        return varlen_attention.NAME
    return "sdpa"


@torch.no_grad()
def check_distribution(policy: PolicyLM, compute_dtype: torch.dtype) -> None:
    """Raise `ConfigError` unless the policy keeps the promises of this module.

    Two short sequences packed in one row must have the log-probabilities that the model's own logits
    give each of them alone.
    """
    device = next(policy.parameters()).device
    vocabulary = policy.config.get_text_config().vocab_size
    first, second = (torch.arange(a, a + n) % vocabulary for a, n in ((3, 5), (11, 4)))
    labels = torch.cat([first.roll(-1), second.roll(-1)]).to(device)[None]
    positions = torch.cat([torch.arange(5), torch.arange(4)]).to(device)[None]
    row = torch.cat([first, second]).to(device)[None]
    half = compute_dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device.type, compute_dtype, enabled=half):
        packed = policy(row, positions, labels)[0]
        alone = [
            policy(s.to(device)[None], torch.arange(len(s), device=device)[None], own_logits=True)
            for s in (first, second)
        ]
    expected = torch.cat(alone, 1).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    distance = (packed - expected).abs().max().item()
    bound = 0.2 if half else 1e-3
    if not distance <= bound:
        raise ConfigError(
            f"{type(policy.lm).__name__}: log-probabilities of packed sequences are {distance:.3g} "
            f"nats from the model's own, more than the bound {bound}. Its attention mixes packed "
            "sequences, or its logits are capped or scaled; use another model"
        )


PROBE_TOKENS = 512
"""Tokens of the probe. A router that draws only between nearly equal experts does so rarely."""
PROBE_SEEDS = (1, 2, 3)


@torch.no_grad()
def check_training_mode(
    policy: Any,
    compute_dtype: torch.dtype,
    answer: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Raise `ConfigError` if log-probabilities in training mode differ from evaluation, or vary.

    `answer` computes what is compared of a row and its positions, by default log-probabilities.

    Afterwards the model is in the mode that it was in, and the state of the random numbers is
    unchanged.
    """
    device = next(policy.parameters()).device
    text = policy.config.get_text_config()
    num_tokens = min(PROBE_TOKENS, getattr(text, "max_position_embeddings", None) or PROBE_TOKENS)
    row = (7 * torch.arange(num_tokens, device=device) % text.vocab_size)[None]
    positions = torch.arange(num_tokens, device=device)[None]
    half = compute_dtype in (torch.bfloat16, torch.float16)

    def probe(seed: int, training: bool) -> Tensor:
        torch.manual_seed(seed)
        policy.train(training)
        with torch.autocast(device.type, compute_dtype, enabled=half):
            return answer(row, positions) if answer else policy(row, positions, row)[0]

    was_training = policy.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        plain, repeated = probe(0, False), probe(0, False)
        trained = [probe(seed, True) for seed in PROBE_SEEDS]
    policy.train(was_training)
    # an accelerator may sum in another order each time
    noise = 10 * (plain - repeated).abs().max().item()
    bound = noise + (1e-2 if half else 1e-5)
    distance = max((logprobs - plain).abs().max().item() for logprobs in trained)
    if not distance <= bound:
        raise ConfigError(
            f"{type(policy.lm).__name__}: log-probabilities in training mode are {distance:.3g} nats "
            f"from those in evaluation, more than the bound {bound:.3g}. It draws random numbers while "
            "it trains (jitter of a router, skipped layers) or routes otherwise, so that the learner "
            "would train another policy than the one that samples. Set what draws them to 0 in "
            "config.json (router_jitter_noise of Mixtral, layerdrop of OPT); PhiMoE has no such "
            "setting, take another model"
        )
