"""`validate --deep`: whether the tokenizers of the models agree, and what memory the roles need.

It reads configurations, tokenizers and the shapes of tensors, never the weights, for every kind of run
file. Where an earlier stage of a pipeline has not produced the model yet, the model that it starts
from is checked instead: a stage changes neither the tokenizer nor, except for a head, the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.data.tokenizer import end_token_ids, load_tokenizer
from rlhf_cluster.errors import DataError, WeightError
from rlhf_cluster.models.model_folder import checkpoint_shapes
from rlhf_cluster.planning import doctor, memory_needs
from rlhf_cluster.planning.doctor import Finding
from rlhf_cluster.planning.memory_needs import Need, Shape
from rlhf_cluster.planning.model_settings import with_transport
from rlhf_cluster.planning.run_inputs import model_dir_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def deep(config: AnyConfig, scratch: Path, earlier: Sequence[AnyConfig] = ()) -> list[Finding]:
    """Return all findings. Models made from numbers are written below `scratch`.

    `earlier`: the stages of the pipeline before this one. Raises `DataError`, `WeightError`.
    """
    sources = _Sources(earlier, scratch)
    model_dir = sources.model_of(config)
    findings = [*_tokenizers(config, model_dir, sources), *_templates(config, earlier)]
    if isinstance(config, RunConfig):
        config = with_transport(config, model_dir)
    needs = _needs(config, _shape(model_dir), sources)
    sizes = [size for _, size in doctor.gpus()]
    alone = config.cluster.address is None
    return [*findings, *memory_needs.judge(needs, sizes, doctor.memory_bytes(), alone)]


class _Sources:
    """Folders that hold the models of a pipeline before its stages have run."""

    def __init__(self, earlier: Sequence[AnyConfig], scratch: Path) -> None:
        self._scratch = scratch
        self._maker = {
            (c.run_dir / "final").absolute(): (number, c)
            for number, c in enumerate(earlier)
            if not isinstance(c, GenerateConfig)
        }

    def __getitem__(self, path: str) -> str:
        """Return `path`, or while it does not exist, the folder of the model that it is made from."""
        number, maker = self._maker.get(Path(path).absolute(), (0, None))
        if maker is None or Path(path).exists():
            return path
        return str(self.model_of(maker, str(number)))

    def model_of(self, config: AnyConfig, name: str = "own") -> Path:
        if config.model.path is not None:
            return Path(self[config.model.path]).absolute()
        folder = self._scratch / name
        made = config.as_run if isinstance(config, GenerateConfig) else config
        return folder / "model" if folder.exists() else model_dir_of(made, folder)


def _needs(config: AnyConfig, shape: Shape, sources: _Sources) -> list[Need]:
    if isinstance(config, StageConfig):
        teacher = getattr(config.stage, "teacher", None)
        return memory_needs.of_stage(
            config, shape, 0 if teacher is None else _count(sources[teacher])
        )
    frozen: dict[str, float] = {}
    for name, model in memory_needs.frozen_models(config).items():
        if model.path is None:
            frozen[name] = model.width * shape.num_parameters
        elif Path(folder := sources[model.path]).is_dir():  # a name on the hub cannot be counted
            frozen[name] = model.width * _count(folder)
    if isinstance(config, GenerateConfig):
        return memory_needs.of_pools(config, shape, frozen)
    return memory_needs.of_run(config, shape, frozen)


def _tokenizers(config: AnyConfig, model_dir: Path, sources: _Sources) -> Iterator[Finding]:
    policy = load_tokenizer(config.model.tokenizer or str(model_dir))
    if config.model.tokenizer is not None:
        yield _compare(f"tokenizer of {model_dir}", policy, str(model_dir), "model.tokenizer")
    ends = end_token_ids(policy, model_dir)
    outside = [token for token in ends if token >= len(policy)]
    cure = f"{outside} are no tokens: correct eos_token_id in generation_config.json"
    verdict = "wrong" if outside else "ok"
    yield Finding(
        name="end tokens", verdict=verdict, value=f"{list(ends)}", cure=cure if outside else ""
    )
    has_one = policy.chat_template is not None
    plain = config.data.template == "none" and has_one
    yield Finding(
        name="chat template",
        verdict="note" if plain else "ok",
        value=f"data.template = {config.data.template!r}, the tokenizer has "
        f"{'one' if has_one else 'none'}",
        cure="A model trained on chats answers plain text badly: set data.template = 'chat'"
        if plain
        else "",
    )
    for name, path, why in _readers(config):
        yield _compare(f"tokenizer of {name}", policy, sources[path], why)


def _readers(config: AnyConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the models that read the policy's token ids: name, folder, and the reason."""
    if isinstance(config, StageConfig):
        teacher = getattr(config.stage, "teacher", None)
        rewards = ()
    else:
        teacher, rewards = config.scoring.teacher, config.scoring.rewards
    if teacher is not None:
        yield "the teacher", teacher, "a teacher"
    for reward in rewards:
        if getattr(reward, "tokenizer", "shared") == "shared":
            for path in reward.model_paths:
                yield reward.name or reward.type, path, "tokenizer = 'shared'"


def _templates(config: AnyConfig, earlier: Sequence[AnyConfig]) -> Iterator[Finding]:
    """Compare the template of a run with that of each stage whose model it uses.

    A model should be used with the layout of text that it was trained on.
    """
    used = [config.model.path, *(path for _, path, _ in _readers(config))]
    folders = {Path(path).absolute() for path in used if path is not None}
    for before in earlier:
        if (before.run_dir / "final").absolute() not in folders:
            continue
        theirs, own = before.data.template, config.data.template
        differ = theirs != own
        yield Finding(
            name=f"template of {before.run.name}",
            verdict="note" if differ else "ok",
            value=f"data.template = {theirs!r}, here {own!r}",
            cure="A model reads best what it was trained on: give both the same" if differ else "",
        )


def _compare(name: str, policy: PreTrainedTokenizerBase, path: str, why: str) -> Finding:
    """Compare a tokenizer with the policy's.

    A model that reads the policy's ids must have the same tokens, and should have its template.
    """
    try:
        other = load_tokenizer(path)
    except DataError as error:
        cure = "Nothing can be compared: see that it reads the policy's tokens"
        value = str(error).partition(". ")[0]
        return Finding(name=name, verdict="note", value=value, cure=cure)
    differing = sorted({t for t, _ in other.get_vocab().items() ^ policy.get_vocab().items()})
    if differing:
        cure = f"{why} reads the policy's token ids: use a model with the policy's tokenizer"
        value = f"{len(differing)} tokens differ from the policy's, such as {differing[0]!r}"
        return Finding(name=name, verdict="wrong", value=value, cure=cure)
    if other.chat_template is not None and other.chat_template != policy.chat_template:
        cure = "It reads prompts as the policy's template writes them, and was trained on its own"
        value = "the policy's tokens, another chat template"
        return Finding(name=name, verdict="note", value=value, cure=cure)
    return Finding(name=name, verdict="ok", value="the policy's")


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


def _count(path: str) -> int:
    """Count the parameters of a model. Raises `WeightError` where there are no safetensors."""
    try:
        return sum(prod(shape) for shape in checkpoint_shapes(path).values())
    except OSError as error:
        raise WeightError(f"{path}: its tensors cannot be read ({error})") from error
