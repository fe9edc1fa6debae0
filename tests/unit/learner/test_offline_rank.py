"""One rank of an offline stage, without Ray: the loss, units, evaluation, resume, and the export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch

from rlhf_cluster.data.packing import value_sequence
from rlhf_cluster.data.units import (
    Unit,
    flatten_units,
)
from rlhf_cluster.errors import RunError
from rlhf_cluster.learner.offline_rank import StageRank
from rlhf_cluster.offline.stage import (
    Passes,
    Stage,
    StageContext,
)
from rlhf_cluster.sections.offline_stage import StageSectionBase
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from tests.support.builders.offline_stages import (
    random_units,
    stage_config,
)
from tests.support.builders.tiny_learner import (
    build_llama,
    full_parameters,
)

Start = Callable[..., StageRank]


@pytest.fixture
def start(tiny_model_dir: str) -> Iterator[Start]:
    started: list[StageRank] = []

    def begin(stage: Any = None, **sections: dict[str, Any]) -> StageRank:
        for rank in started:
            rank.close()
        config = stage_config(tiny_model_dir, **sections)
        if stage is not None:
            config = config.model_copy(update={"stage": stage.section})
        rank = StageRank(config, tiny_model_dir, 0, 1, None, num_steps=10)
        if stage is not None:
            rank.stage = stage
        rank.setup()
        started.append(rank)
        return rank

    yield begin
    for rank in started:
        rank.close()


def slow_loss(units: Sequence[Unit]) -> float:
    """Mean negative log-likelihood of the trained tokens, one sequence and one token at a time."""
    model, total, count = build_llama(), 0.0, 0
    for sequence in flatten_units(units)[0]:
        tokens = np.concatenate([sequence.prompt_ids, sequence.target_ids])
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None].long()).logits[0].double()
        for offset, trained in enumerate(sequence.target_mask):
            place = len(sequence.prompt_ids) + offset
            if trained:
                total -= float(logits[place - 1].log_softmax(-1)[tokens[place]])
                count += 1
    return total / count


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_batch(start: Start) -> None:
    units = random_units(12)
    expected = slow_loss(units)
    rank = start()
    found = rank.evaluate(units)
    assert found["sft/loss"] == pytest.approx(expected, abs=1e-5)
    assert found["stage/loss"] == pytest.approx(expected, abs=1e-5)
    report = rank.train(units)
    assert report.step == 1
    assert report.metrics["stage/loss"] == pytest.approx(expected, abs=1e-5)
    assert report.metrics["sft/tokens"] == sum(unit.num_trained for unit in units)


@pytest.mark.parametrize(
    "learner",
    [
        {"batching": "padded"},
        {"tokens_per_micro_batch": 40, "tokens_per_row": 40},
        {"tokens_per_row": 128, "logprob_chunk_tokens": 3},
    ],
)
def test_a_step_does_not_depend_on_packing_and_micro_batches(start: Start, learner: Any) -> None:
    units = random_units(10)
    found = []
    for settings in ({}, learner):
        rank = start(learner=settings)
        report = rank.train(units)
        found.append((report.metrics["learner/grad_norm"], full_parameters(rank.model.module)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, weight in found[0][1].items():
        assert torch.allclose(weight, found[1][1][name], atol=2e-5), name


def test_an_evaluation_changes_nothing(start: Start) -> None:
    units = random_units(6)
    rank = start()
    rank.train(units)
    before = full_parameters(rank.model.module)
    rank.evaluate(random_units(9, seed=1))
    assert rank.version == 1
    for name, weight in full_parameters(rank.model.module).items():
        assert torch.equal(weight, before[name])
    moved = rank.train(units).metrics["learner/grad_norm"]
    other = start()
    other.train(units)
    assert other.train(units).metrics["learner/grad_norm"] == moved


def test_a_rank_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    start: Start, tmp_path: Path
) -> None:
    batches = [random_units(6, seed=i) for i in range(4)]
    rank = start(learner={"schedule": "cosine", "warmup_steps": 1})
    for batch in batches[:2]:
        rank.train(batch)
    state = rank.copy_state()
    report = rank.write_state(str(tmp_path))
    store.commit(tmp_path, report.version, [report], keep=1)
    for batch in batches[2:]:
        rank.train(batch)
    expected = full_parameters(rank.model.module)
    again = start(learner={"schedule": "cosine", "warmup_steps": 1})
    again.load_state(str(tmp_path / "v000002"), state)
    assert again.version == 2
    for batch in batches[2:]:
        again.train(batch)
    for name, weight in full_parameters(again.model.module).items():
        assert torch.equal(weight, expected[name])
    with pytest.raises(RunError, match="before any step"):
        again.load_state(str(tmp_path / "v000002"), state)


class PairsConfig(StageSectionBase):
    type: Literal["sft"] = "sft"  # of a file; the tests put the stage itself in place

    @property
    def max_unit_size(self) -> int:
        return 2


class PairStage(Stage[PairsConfig]):
    """log p(first) - log p(second), relative to the start; notes what it was given."""

    headline = "sft/loss"
    needs_reference: ClassVar[bool] = True

    def __init__(self, section: PairsConfig, context: StageContext) -> None:
        super().__init__(section, context)
        self.seen: list[tuple[int, ...]] = []
        self.started: list[np.ndarray] = []

    def loss(self, units: Sequence[Unit], passes: Passes) -> Any:
        self.started = [
            np.array([v[s.target_mask].sum() for s, v in zip(unit.sequences, found, strict=True)])
            for unit, found in zip(units, passes.reference(units), strict=True)
        ]
        flat_started = np.concatenate(self.started)

        def share(tokens: Any) -> Any:
            assert set(tokens.unit_sizes) <= {2}
            assert all(a % 2 == 0 and b == a + 1 for a, b in self._members(tokens))
            self.seen += self._members(tokens)
            sums = tokens.sums(tokens.logprobs)
            of_start = sums.new_tensor(flat_started[list(tokens.members)])
            ratios = sums - of_start
            total = (ratios[1::2] - ratios[0::2]).sum()
            return total / len(units), {"sft/loss": (total, total.new_tensor(len(ratios) / 2))}

        return share

    def _members(self, tokens: Any) -> list[tuple[int, ...]]:
        return list(zip(tokens.members[0::2], tokens.members[1::2], strict=True))


def pair_stage() -> PairStage:
    return PairStage(PairsConfig(), StageContext(data=stage_config().data))


@pytest.mark.parametrize("sections", [{}, {"lora": {"rank": 2}}], ids=["whole", "adapters"])
def test_both_members_of_a_pair_are_in_one_micro_batch_beside_the_reference(
    start: Start, sections: Any
) -> None:
    stage, units = pair_stage(), random_units(9, size=2)
    settings = {"tokens_per_row": 64, "tokens_per_micro_batch": 64, **sections}
    rank = start(stage, learner={**settings, "learning_rate": 0.01})
    first = rank.train(units)
    assert first.metrics["stage/loss"] == pytest.approx(0, abs=1e-5), "policy equals reference"
    assert sorted(stage.seen) == [(2 * i, 2 * i + 1) for i in range(9)]
    before = stage.started
    second = rank.train(units)
    assert second.metrics["stage/loss"] < -1e-3
    for old, new in zip(before, stage.started, strict=True):
        assert np.allclose(old, new, atol=1e-5), "the reference stays"


class ScoreConfig(StageSectionBase):
    type: Literal["sft"] = "sft"
    model_kind: ClassVar[Literal["policy", "value"]] = "value"
    num_values: int = 1


class ScoreStage(Stage[ScoreConfig]):
    """Squared distance of the score at the last token to 1 for the first value, 2 for the next."""

    headline = "sft/loss"

    def loss(self, units: Sequence[Unit], passes: Passes) -> Any:
        def share(found: Any) -> Any:
            wanted = torch.arange(1.0, 1.0 + self.section.num_values)
            total = (found.values.reshape(-1, self.section.num_values) - wanted).square().sum()
            count = total.new_tensor(found.num_sequences)
            return total / len(units), {"sft/loss": (total, count)}

        return share


def score_units(num: int) -> list[Unit]:
    def whole(unit: Unit) -> Unit:
        [s] = unit.sequences
        return replace(
            unit, sequences=(value_sequence(np.concatenate([s.prompt_ids, s.target_ids])),)
        )

    return [whole(unit) for unit in random_units(num)]


@pytest.mark.parametrize(("num_values", "learner"), [(1, {}), (3, {}), (1, {"lora": {"rank": 2}})])
def test_a_model_of_values_is_trained_and_exported_as_a_classifier(
    start: Start, tmp_path: Path, tiny_model_dir: str, num_values: int, learner: Any
) -> None:
    from transformers import AutoModelForSequenceClassification

    section = ScoreConfig(num_values=num_values)
    stage, units = ScoreStage(section, StageContext(data=stage_config().data)), score_units(6)
    rank = start(stage, learner={"learning_rate": 0.02, **learner})
    losses = [rank.train(units).metrics["stage/loss"] for _ in range(8)]
    assert losses[0] == pytest.approx(sum(v * v for v in range(1, num_values + 1)))
    assert losses[-1] < 0.2 * losses[0]
    scores = np.array([found for (found,) in rank.values(units)]).reshape(6, num_values)
    report = rank.write_final(str(tmp_path / "weights"))
    shapes = rank.tensor_shapes()
    version = store.commit(tmp_path / "weights", report.version, [report], 1, shapes)
    final = export_hf(version, tiny_model_dir, tmp_path / "final", num_values=num_values)
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert model.config.num_labels == num_values
    for unit, score in zip(units, scores, strict=True):
        [sequence] = unit.sequences
        with torch.no_grad():
            found = model(torch.tensor(sequence.prompt_ids)[None].long()).logits[0]
        assert found.numpy() == pytest.approx(score, abs=1e-4)


def test_a_policy_is_exported_under_the_names_of_its_folder(
    start: Start, tmp_path: Path, tiny_model_dir: str
) -> None:
    from transformers import AutoModelForCausalLM

    rank = start()
    rank.train(random_units(6))
    report = rank.write_final(str(tmp_path / "weights"))
    shapes = rank.tensor_shapes()
    version = store.commit(tmp_path / "weights", report.version, [report], 1, shapes)
    final = export_hf(version, tiny_model_dir, tmp_path / "final")
    model = AutoModelForCausalLM.from_pretrained(final)
    own = full_parameters(rank.model.module)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, own[f"lm.{name}"])
