"""A frozen sequence-classification model as a reward: its output, or a weighted sum of several.

The score of a sequence is the model's output at its LAST REAL TOKEN, found by length alone. Token
ids are never compared with a padding id, so a model whose padding token is also its end token is
read at its end token, and padding changes nothing.

With `tokenizer = "shared"` the model reads the ids that were sampled (prompt and response), and
must have the policy's vocabulary. With "own" it reads the decoded text through its own tokenizer,
as a chat when that has a chat template.

A score does not depend on the rest of its batch: a model whose rotary positions follow the longest
sequence of a batch is refused (`dynamic`), or takes no longer ones than have fixed ones (`longrope`).

Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from rlhf_cluster.data.packing import plan
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.models.make_model import longest_alone
from rlhf_cluster.models.shared_passes import SharedPasses
from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext, RewardSection
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.sections.values import Dtype, FrozenQuantization
from rlhf_cluster.util.tensor_hashing import compute_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray


class ModelSection(RewardSection):
    """Keys of every reward that loads reward models."""

    dtype: Dtype = "bfloat16"
    """Type of a model; its score head always computes in float32."""
    quantization: FrozenQuantization | None = None
    """`int8`: the decoder's linear layers in 8 bits, computed in `dtype`; see `models.int8_linear`."""
    tokens_per_batch: PositiveInt = 16384
    """Token budget of one forward pass of a model, padding included."""

    @property
    def scores_alone(self) -> bool:
        return True

    def of_model(self, path: str) -> RewardModelConfig:
        """Return the settings of the one model in the folder `path`."""
        keys = ModelSection.model_fields.keys() - RewardSection.model_fields.keys()
        return RewardModelConfig(path=path, **{key: getattr(self, key) for key in keys})


class RewardModelConfig(ModelSection):
    """A reward model in a Hugging Face folder."""

    type: Literal["reward_model"] = "reward_model"
    path: str
    """Folder (or hub id, where the hub can be reached) of a sequence-classification model with as
    many outputs as `output_weights` has, one by default."""
    tokenizer: Literal["shared", "own"] = "shared"
    """`shared`: it reads the policy's token ids. `own`: the text, tokenized its own way."""
    output_weights: list[float] = Field(default_factory=lambda: [1.0], min_length=1)
    """Weight of each output of the model in the score."""

    @property
    def model_paths(self) -> tuple[str, ...]:
        return (self.path,)


class RewardModel:
    def __init__(self, config: RewardModelConfig, context: RewardContext) -> None:
        """Loads the model. Raises `ConfigError` or `DataError` when it cannot serve."""
        self._config = config
        self._device = context.device
        self._model = _load(config, context.device)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if config.tokenizer == "own":
            self._tokenizer = load_tokenizer(config.path)
        else:
            _check_vocabulary(config.path, context.tokenizer_dir)
        text_config = self._model.config.get_text_config()
        self._vocab_size = text_config.vocab_size
        positions = getattr(text_config, "max_position_embeddings", None)
        alone = longest_alone(f"reward model {config.path}", text_config.to_dict())
        self._max_tokens = min(config.tokens_per_batch, *(n for n in (positions, alone) if n))
        self._together: SharedPasses[tuple[Array, Array], Array] = SharedPasses(
            self._forward,
            size=lambda item: len(item[0]),
            budget=config.tokens_per_batch,
            max_calls=context.batch_groups,
            timeout_s=context.wait_timeout_s,
            late=lambda: RewardFailure(
                f"the reward model was busy for {context.wait_timeout_s:g} s. Add scoring workers",
                "busy",
            ),
        )
        self._version = compute_digest((n, t.cpu()) for n, t in self._model.state_dict().items())

    @property
    def version(self) -> str:
        """The digest of its weights, as they are loaded."""
        return self._version

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """The model's outputs. Raises `RewardFailure`: it is busy, or cannot take a sequence."""
        sequences = self._sequences(prompt, rollouts, completions)
        found = self.read(rollouts, sequences, [np.array([len(ids) - 1]) for ids in sequences])
        return [float(values[0]) for values in found]

    def read(
        self, rollouts: Sequence[Rollout], sequences: Sequence[Array], places: Sequence[Array]
    ) -> list[Array]:
        """The model's outputs after the tokens at `places` [n] of each sequence of ids, [n] float64.

        Raises `RewardFailure` as `score`.
        """
        for rollout, ids in zip(rollouts, sequences, strict=True):
            self._check_sequence(rollout, ids)
        return self._together(list(zip(sequences, places, strict=True)))

    def close(self) -> None:
        """Nothing to release: the model goes with the worker."""

    def _sequences(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[Array]:
        if self._tokenizer is None:
            return [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
        return [_encode(self._tokenizer, prompt, text) for text in completions]

    def _check_sequence(self, rollout: Rollout, ids: Array) -> None:
        if not 1 <= len(ids) <= self._max_tokens:
            raise RewardFailure(
                f"rollout {rollout.rollout_id} has {len(ids)} tokens, the reward model takes 1 to "
                f"{self._max_tokens}. Raise tokens_per_batch (within the model's positions, and within "
                "original_max_position_embeddings with longrope), or shorten the responses",
                "tokens",
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise RewardFailure(
                f"rollout {rollout.rollout_id} has token {int(ids.max())}, the reward model embeds "
                f"{self._vocab_size}. Use tokenizer = 'own'",
                "tokens",
            )

    def _forward(self, items: Sequence[tuple[Array, Array]]) -> list[Array]:
        import torch

        sequences, places = [ids for ids, _ in items], [places for _, places in items]
        budget = self._config.tokens_per_batch
        batches = plan([len(ids) for ids in sequences], 1, budget, budget, "padded")[0]
        found: dict[int, Array] = {}
        for batch in batches:
            members = [index for row in batch for index in row]
            lengths = torch.tensor([len(sequences[i]) for i in members], device=self._device)
            input_ids = torch.zeros(len(members), int(lengths.max()), dtype=torch.long)
            for row, index in enumerate(members):
                ids = torch.from_numpy(sequences[index].astype(np.int64))
                input_ids[row, : len(ids)] = ids
            input_ids = input_ids.to(self._device)
            columns = torch.arange(input_ids.shape[1], device=self._device)
            with torch.inference_mode():
                hidden = self._model.base_model(
                    input_ids=input_ids,
                    attention_mask=(columns < lengths[:, None]).long(),
                    use_cache=False,
                ).last_hidden_state
                read = [
                    hidden[row, torch.from_numpy(places[index]).to(self._device)]
                    for row, index in enumerate(members)
                ]
                outputs = self._model.score(torch.cat(read).float()).double().cpu()
            values = outputs @ torch.tensor(self._config.output_weights, dtype=torch.float64)
            ends = np.cumsum([len(places[index]) for index in members])[:-1]
            found |= dict(zip(members, np.split(values.numpy(), ends), strict=True))
        return [found[index] for index in range(len(sequences))]


def _load(config: RewardModelConfig, device: str) -> Any:
    """The model, frozen, with its score head in float32. Runs no code from its folder."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            config.path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward model {config.path}: cannot be loaded ({error}). Give the folder of a "
            "sequence-classification model with safetensors weights"
        ) from error
    head = getattr(model, "score", None)
    wanted = len(config.output_weights)
    if not isinstance(head, torch.nn.Linear) or head.out_features != wanted:
        raise ConfigError(
            f"reward model {config.path}: {type(model).__name__} has the output {head!r}, expected "
            f"a linear `score` head with {'one output' if wanted == 1 else f'{wanted} outputs'}. Give "
            "a decoder model with num_labels = 1, or set output_weights to one weight an output"
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"reward model {config.path}: the folder has no weights for {missing}, which would be "
            "random. Give a trained reward model, not a base model"
        )
    model.score = head.float()
    if config.quantization is not None:
        from rlhf_cluster.models.int8_linear import quantize_linear

        quantize_linear(model.base_model, f"reward model {config.path}")
    return model.to(device).eval().requires_grad_(False)


def _check_vocabulary(path: str, tokenizer_dir: str | None) -> None:
    """Raise `ConfigError` unless the reward model's tokenizer is the policy's."""
    if tokenizer_dir is None or not _has_tokenizer(path):
        return
    own = load_tokenizer(path).get_vocab()
    policy = load_tokenizer(tokenizer_dir).get_vocab()
    if own != policy:
        differing = sorted(token for token, _ in own.items() ^ policy.items())
        raise ConfigError(
            f"reward model {path}: its tokenizer differs from the policy's in {tokenizer_dir} "
            f"(such as {differing[0]!r}). Set tokenizer = 'own'"
        )


def _has_tokenizer(path: str) -> bool:
    try:
        load_tokenizer(path)
    except DataError:
        return False
    return True


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: str) -> Array:
    source = prompt.source
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": source}] if isinstance(source, str) else source
        messages = [*turns, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
    elif isinstance(source, str):
        ids = tokenizer(source + completion, verbose=False)["input_ids"]
    else:
        raise RewardFailure(
            f"prompt {prompt.prompt_id} is chat messages, and the reward model's tokenizer has no "
            "chat template. Add one to its tokenizer_config.json",
            "tokens",
        )
    return np.array(ids, dtype=np.int64)
