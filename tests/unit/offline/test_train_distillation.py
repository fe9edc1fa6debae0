"""Divergences against slow loops, and the stage that lowers them against a plain loop of two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cluster.config import StageConfig, validate
from rlhf_cluster.data.units import (
    Unit,
    flatten_units,
)
from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.learner.offline_rank import StageRank
from rlhf_cluster.models.divergence import (
    Divergence,
    Kind,
)
from rlhf_cluster.models.logprobs import linear_logprobs
from rlhf_cluster.models.make_model import make_tokenizer
from rlhf_cluster.planning.run_inputs import check_stage_inputs
from tests.support.builders.offline_stages import (
    random_units,
    stage_config,
    stage_tree,
)
from tests.support.builders.preference_ranks import gradients
from tests.support.builders.tiny_learner import (
    VOCABULARY,
    build_llama,
    full_parameters,
)
from tests.support.fakes.checked_metrics import CheckedMetrics

DIVERGENCES = [
    Divergence(kind="forward_kl"),
    Divergence(kind="reverse_kl"),
    Divergence(kind="js"),
    Divergence(kind="js", alpha=0.1),
]
IDS = ["forward_kl", "reverse_kl", "js", "js 0.1"]
N, V = 9, 13


def logs_of(row: Sequence[float]) -> list[float]:
    largest = max(row)
    total = largest + math.log(math.fsum(math.exp(v - largest) for v in row))
    return [v - total for v in row]


def slow(divergence: Divergence, student: Sequence[float], teacher: Sequence[float]) -> float:
    """Of two rows of logits, token by token, in Python's floats."""
    s, t = logs_of(student), logs_of(teacher)
    if divergence.kind == "forward_kl":
        return math.fsum(math.exp(b) * (b - a) for a, b in zip(s, t, strict=True))
    if divergence.kind == "reverse_kl":
        return math.fsum(math.exp(a) * (a - b) for a, b in zip(s, t, strict=True))
    alpha, total = divergence.alpha, 0.0
    for a, b in zip(s, t, strict=True):
        mixture = math.log(alpha * math.exp(b) + (1 - alpha) * math.exp(a))
        total += alpha * math.exp(b) * (b - mixture) + (1 - alpha) * math.exp(a) * (a - mixture)
    return total


def case(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states and projection of a student, those of a wider teacher, and labels."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((N, 4), (V, 4), (N, 6), (V, 6))
    found = [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return *found, torch.randint(0, V, (N,), generator=draw)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=IDS)
def test_a_divergence_matches_a_slow_loop_whatever_the_chunks(
    divergence: Divergence, chunk_tokens: int
) -> None:
    hidden, weight, other, projection, labels = case()
    found = linear_logprobs(
        hidden, weight, labels, 0.7, chunk_tokens, False, (other, projection), divergence
    )
    rows = zip(
        (hidden @ weight.T / 0.7).tolist(), (other @ projection.T / 0.7).tolist(), strict=True
    )
    expected = [slow(divergence, a, b) for a, b in rows]
    torch.testing.assert_close(found[2], hidden.new_tensor(expected), rtol=0, atol=1e-12)
    assert (found[2] > 0.01).all()
    plain = linear_logprobs(hidden, weight, labels, 0.7, chunk_tokens)
    assert all(torch.equal(a, b) for a, b in zip(found[:2], plain, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=IDS)
def test_its_gradient_agrees_with_finite_differences_beside_the_others(
    divergence: Divergence,
) -> None:
    hidden, weight, other, projection, labels = case(1)
    frozen = other.requires_grad_(), projection.requires_grad_()
    student = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, labels, 0.7, 4, True, frozen, divergence), student
    )
    linear_logprobs(*student, labels, reference=frozen, divergence=divergence)[2].sum().backward()
    assert all(tensor.grad is None for tensor in frozen)
    # in closed form, of the logits alone
    s, t = ((x @ y.T).detach() for x, y in (student, frozen))
    s.requires_grad_()
    value = divergence.values(s.log_softmax(-1), t.log_softmax(-1)).sum()
    (expected,) = torch.autograd.grad(value, s)
    found = divergence.gradient(s.log_softmax(-1).detach(), t.log_softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_js_becomes_both_kls_at_its_ends() -> None:
    s, t = (torch.randn(5, V, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    near, far = 1e-6, 1 - 1e-6
    forward, reverse = (Divergence(kind=kind).values(s, t) for kind in ("forward_kl", "reverse_kl"))
    js = Divergence(kind="js", alpha=near).values(s, t) / near
    torch.testing.assert_close(js, forward, rtol=1e-4, atol=0)
    js = Divergence(kind="js", alpha=far).values(s, t) / (1 - far)
    torch.testing.assert_close(js, reverse, rtol=1e-4, atol=0)


@given(
    kind=st.sampled_from(["forward_kl", "js"]),
    scale=st.sampled_from([1e-4, 1.0, 30.0, 3e3]),
    other_scale=st.sampled_from([1e-4, 1.0, 30.0, 3e3]),
    seed=st.integers(min_value=0, max_value=99),
)
def test_it_is_right_in_float32_and_finite_for_any_logits(
    kind: Kind, scale: float, other_scale: float, seed: int
) -> None:
    hidden, weight, other, projection, labels = (
        t if t.dtype == torch.int64 else t.float() for t in case(seed)
    )
    hidden, other = (hidden * scale).requires_grad_(), other * other_scale
    divergence = Divergence(kind=kind)
    found = linear_logprobs(hidden, weight, labels, 1.0, 4, False, (other, projection), divergence)[
        2
    ]
    s, t = (
        (x.double() @ y.double().T).log_softmax(-1)
        for x, y in ((hidden, weight), (other, projection))
    )
    largest = max(1.0, s.abs().max().item(), t.abs().max().item())
    torch.testing.assert_close(
        found, divergence.values(s, t).float(), rtol=1e-5, atol=1e-6 * largest
    )
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert torch.isfinite(gradient).all()


# The stage


def save_teacher(folder: Path, vocabulary: int = VOCABULARY, positions: int = 64) -> str:
    """Another model than the student, and of another width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def start(tiny_model_dir: str) -> Any:
    started: list[StageRank] = []

    def begin(teacher: str, learner: Any = None, **keys: Any) -> StageRank:
        for rank in started:
            rank.close()
        section = {"type": "distillation", "teacher": teacher, **keys}
        config = stage_config(tiny_model_dir, stage=section, learner=learner or {})
        rank = StageRank(config, tiny_model_dir, 0, 1, None, num_steps=20)
        started.append(rank)
        rank.setup()
        return rank

    yield begin
    for rank in started:
        rank.close()


def teacher_of(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_loss(
    student: Any,
    teacher: Any,
    units: Sequence[Unit],
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    nll_coef: float = 0.0,
) -> torch.Tensor:
    """One sequence at a time by the models' own logits; the mean over the trained tokens."""
    found = []
    for sequence in flatten_units(units)[0]:
        ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids])).long()
        places = slice(len(sequence.prompt_ids) - 1, -1)
        s = student(input_ids=ids[None]).logits[0, places].log_softmax(-1)
        t = teacher(input_ids=ids[None]).logits[0, places, : s.shape[-1]].detach().log_softmax(-1)
        nll = -s.gather(1, ids[len(sequence.prompt_ids) :, None]).squeeze(1)
        values = of(s, t) + nll_coef * nll
        found.append(values[torch.from_numpy(np.asarray(sequence.target_mask))])
    return torch.cat(found).mean()


@pytest.mark.parametrize(
    ("keys", "learner"),
    [
        ({"divergence": "forward_kl", "nll_coef": 0.3}, {}),
        ({"divergence": "reverse_kl"}, {"batching": "padded", "logprob_chunk_tokens": 3}),
        ({"divergence": "js", "alpha": 0.2}, {"tokens_per_micro_batch": 40, "tokens_per_row": 40}),
    ],
    ids=["forward_kl", "reverse_kl", "js"],
)
def test_loss_and_gradient_are_those_of_a_plain_loop_in_any_layout(
    start: Any, teacher: str, keys: dict[str, Any], learner: dict[str, Any]
) -> None:
    rank, units, lm = start(teacher, learner, **keys), random_units(8), build_llama()
    divergence = Divergence(kind=keys["divergence"], alpha=keys.get("alpha", 0.5))
    expected = plain_loss(
        lm, teacher_of(teacher), units, divergence.values, keys.get("nll_coef", 0.0)
    )
    expected.backward()
    found = rank.evaluate(units)
    assert found["stage/loss"] == pytest.approx(expected.item(), rel=1e-5)
    own = gradients(rank, units)
    parameters = {f"lm.{name}": p.grad for name, p in lm.named_parameters()}
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, parameters[name], rtol=1e-3, atol=1e-6)


def test_a_student_comes_near_its_teacher_and_the_teacher_stays(start: Any, teacher: str) -> None:
    rank = start(teacher, {"learning_rate": 1e-2}, divergence="js")
    before = full_parameters(rank._teacher._policy)
    held_out = random_units(16, seed=99)
    first = rank.evaluate(held_out)["distillation/divergence"]
    for seed in range(8):
        metrics = rank.train(random_units(24, seed=seed)).metrics
        CheckedMetrics().record(metrics)
    assert metrics["distillation/tokens"] == sum(u.num_trained for u in random_units(24, seed=7))
    assert rank.evaluate(held_out)["distillation/divergence"] < 0.85 * first
    for name, weight in full_parameters(rank._teacher._policy).items():
        assert torch.equal(weight, before[name])
    assert all("teacher" not in name for name in rank.tensor_shapes())


def test_a_student_that_is_its_teacher_has_a_divergence_of_zero(
    start: Any, tiny_model_dir: str
) -> None:
    for kind in ("forward_kl", "reverse_kl"):
        rank = start(tiny_model_dir, divergence=kind)
        assert rank.train(random_units(4)).metrics["distillation/divergence"] == 0.0


def test_padding_of_the_teachers_vocabulary_is_left_out_and_a_smaller_one_is_refused(
    start: Any, tmp_path: Path
) -> None:
    padded = save_teacher(tmp_path / "padded", VOCABULARY + 16)
    units = random_units(6)
    with torch.no_grad():
        expected = plain_loss(
            build_llama(), teacher_of(padded), units, Divergence(kind="forward_kl").values
        )
    found = start(padded).evaluate(units)["distillation/divergence"]
    assert found == pytest.approx(expected.item(), rel=1e-5)
    smaller = save_teacher(tmp_path / "smaller", VOCABULARY - 8)
    with pytest.raises(ConfigError, match="smaller: has 40 logits, .* 48"):
        start(smaller)


# The run file


def staged(tmp_path: Path, **keys: Any) -> StageConfig:
    tree = stage_tree(run={"root": str(tmp_path)})
    tree["stage"] = {"type": "distillation", "teacher": str(tmp_path / "teacher"), **keys}
    return validate(StageConfig, tree, source="run.toml")


def test_a_teacher_with_other_tokens_or_too_few_positions_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    config = staged(tmp_path)
    with pytest.raises(ConfigError, match=r"stage.teacher: .*teacher: no such folder"):
        check_stage_inputs(config, tmp_path / "a")
    tokenizer = make_tokenizer()
    save_teacher(folder, len(tokenizer), positions=16)
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match="max_position_embeddings = 16.*Lower data.max_tokens"):
        check_stage_inputs(config, tmp_path / "b")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"stage.teacher = .*differ in 1 tokens, such as '<new>'"):
        check_stage_inputs(config, tmp_path / "c")


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage.distillation.alpha"):
        staged(tmp_path, alpha=1.0)
    tree = stage_tree(learner={"backend": "zero3"})
    tree["stage"] = {"type": "distillation", "teacher": "t"}
    with pytest.raises(ConfigError) as error:
        validate(StageConfig, tree, source="run.toml")
    for word in ("stage.type = 'distillation'", "learner.backend = 'zero3'", "'fsdp2'"):
        assert word in str(error.value)
