"""Online DPO: the pairs of a group, the loss against the offline stage's, and the whole learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms.micro_batch_loss import TrainedTokens
from rlhf_cluster.algorithms.online_dpo import (
    OnlineDpo,
    OnlineDpoConfig,
    choose_pair,
)
from rlhf_cluster.algorithms.policy_losses import token_weights
from rlhf_cluster.algorithms.preference_loss_config import PREFERENCE_LOSSES
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import ConfigError, RecordError, ScoringError
from rlhf_cluster.learner.step.training_batch import training_batch
from rlhf_cluster.offline.train_preference import _pair_loss
from rlhf_cluster.records import ExperienceGroup, RolloutGroup
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.preference_ranks import (
    pair_unit,
    stage_ranks,
)
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import (
    loss_inputs,
    random_groups,
    response_logprobs,
)
from tests.support.fakes.checked_metrics import CheckedMetrics

start_stage = pytest.fixture(stage_ranks)
LOSSES = sorted(set(PREFERENCE_LOSSES) - {"kto"})


def section(**keys: Any) -> OnlineDpoConfig:
    return OnlineDpoConfig.model_validate(keys)


def rewarded(*rewards: float, silent: Sequence[int] = ()) -> ExperienceGroup:
    """A group with these rewards; the rollouts of `silent` have no trained token."""
    (group,) = random_groups(0, num_groups=1, group_size=len(rewards), rewards=rewards)
    scored = list(group.scored)
    for place in silent:
        mask = np.zeros_like(scored[place].rollout.response_mask)
        rollout = replace(scored[place].rollout, response_mask=mask)
        scored[place] = replace(scored[place], rollout=rollout)
    return replace(group, scored=tuple(scored))


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (rewarded(0.0, 1.0), (1, 0)),
        (rewarded(3.0, -1.0, 5.0, 0.0), (2, 1)),
        (rewarded(1.0, 1.0, 0.0, 0.0), (0, 2)),
        (rewarded(2.0, 2.0 + 1e-9), None),
        (rewarded(3.0, -1.0, 5.0, 0.0, silent=[1, 2]), (0, 3)),
        (rewarded(1.0, 0.0, silent=[0]), None),
    ],
)
def test_a_pair_is_the_best_and_the_worst_of_a_group(
    group: ExperienceGroup, expected: tuple[int, int] | None
) -> None:
    assert choose_pair(group) == expected


def test_rollouts_in_no_pair_are_not_trained_and_ties_are_counted() -> None:
    algorithm = OnlineDpo(section(group_size=4))
    groups = [rewarded(3.0, -1.0, 5.0, 0.0), rewarded(1.0, 1.0, 1.0, 1.0)]
    trained = algorithm.trained_groups(groups)
    kept = [[bool(s.rollout.response_mask.any()) for s in g.scored] for g in trained]
    assert kept == [[False, True, True, False], [False] * 4]
    marks = [[float(a[0]) for a in own] for own in algorithm.advantages(trained)]
    assert marks == [[0, -1, 1, 0], [0] * 4]
    assert algorithm.derive({}) == {"preference/pairs": 1, "preference/tied_groups": 1}
    batch = training_batch(trained, algorithm.advantages(trained), 0, True)
    assert [s is not None for s in batch.sequences] == [False, True, True, *[False] * 5]
    tied = algorithm.trained_groups(groups[1:])
    assert tied == groups[1:], "a batch has a trained token"
    assert not np.concatenate(algorithm.advantages(tied)[0]).any()


def test_groups_without_signal_are_discarded_only_where_asked() -> None:
    assert section().trains_on([1.0, 1.0])
    assert not section(dynamic_sampling=True).trains_on([1.0, 1.0])
    assert section(dynamic_sampling=True).trains_on([1.0, 0.0])


@pytest.mark.parametrize("type", LOSSES)
def test_loss_and_gradient_are_those_of_the_offline_stage_on_the_same_pairs(type: str) -> None:
    draw = torch.Generator().manual_seed(3)
    lengths = [3, 9, 1, 6, 5, 5]
    first_is_chosen = [True, False, True]
    num = sum(lengths)
    start = -0.1 - 2 * torch.rand(num, generator=draw, dtype=torch.float64)
    ref = start + 0.3 * torch.randn(num, generator=draw, dtype=torch.float64)
    places = torch.arange(num).split(lengths)

    marks = torch.cat(
        [
            torch.full((lengths[i],), 1.0 if first_is_chosen[i // 2] == (i % 2 == 0) else -1.0)
            for i in range(6)
        ]
    ).double()
    online = OnlineDpo(section(loss={"type": type}))
    own = start.clone().requires_grad_()
    losses, sums = online.loss(
        loss_inputs(own, start, marks, ref=ref, lengths=lengths, unit_size=2)
    )
    weights = torch.tensor(token_weights(lengths, online.aggregation, 9), dtype=torch.float64)
    total = (losses * weights.repeat_interleave(torch.tensor(lengths))).sum()
    total.backward()

    order = [
        i for p, right in enumerate(first_is_chosen) for i in (2 * p + 1 - right, 2 * p + right)
    ]
    moved = torch.cat([places[i] for i in order])
    other = start[moved].clone().requires_grad_()
    needs = online.config.loss.needs_reference
    reference = [ref[places[i]].numpy() for i in order]
    share = _pair_loss(online.config.loss, 3, reference if needs else None)  # type: ignore[arg-type]
    expected, stage_sums = share(
        TrainedTokens(
            logprobs=other,
            entropy=torch.zeros_like(other),
            streams={},
            sequence=torch.repeat_interleave(
                torch.arange(6), torch.tensor([lengths[i] for i in order])
            ),
            num_sequences=6,
            members=tuple(range(6)),
            unit_sizes=(2, 2, 2),
        )
    )
    expected.backward()
    assert own.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad[moved], other.grad, rtol=1e-10, atol=1e-12)
    assert own.grad.abs().sum() > 0
    for name, (value, count) in stage_sums.items():
        if needs or ("ratio" not in name and "fell" not in name):
            torch.testing.assert_close(sums[name][0], value)
            assert sums[name][1] == count == 3


def test_a_micro_batch_without_a_pair_has_loss_zero_and_a_gradient() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    empty = loss_inputs(nothing, torch.zeros(0), torch.zeros(0), ref=torch.zeros(0), lengths=[])
    losses, sums = OnlineDpo(section()).loss(empty)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert {"preference/chosen_logprob", "importance/ratio_mean", "learner/kl_ref"} <= set(sums)


def test_sequences_that_are_no_pairs_are_refused() -> None:
    four = torch.zeros(4, requires_grad=True)
    alone = loss_inputs(four, four.detach(), torch.ones(4), ref=torch.zeros(4), lengths=[2, 2])
    with pytest.raises(RecordError, match="2 sequences in 2 units of"):
        OnlineDpo(section()).loss(alone)
    pair = loss_inputs(four, four.detach(), torch.ones(4), lengths=[2, 2], unit_size=2)
    with pytest.raises(RecordError, match="no ref_logprobs. Set scoring.reference = true"):
        OnlineDpo(section()).loss(pair)
    OnlineDpo(section(loss={"type": "simpo"})).loss(pair)


# The whole learner


REFERENCE = {"scoring": {"reference": True}}


def own_groups(learner: Any, seed: int, rewards: Sequence[float], **keys: Any) -> list[Any]:
    """Groups whose every token is trained, with the learner as sampler and as reference."""
    groups = random_groups(seed, rewards=rewards, **keys)
    found = iter(response_logprobs(learner, groups))

    def of(scored: Any) -> Any:
        values = next(found)
        mask = np.ones(len(values), dtype=np.bool_)
        rollout = replace(scored.rollout, sampled_logprobs=values, response_mask=mask)
        return replace(scored, rollout=rollout, ref_logprobs=values)

    return [replace(g, scored=tuple(of(s) for s in g.scored)) for g in groups]


def as_units(groups: Sequence[ExperienceGroup]) -> list[Unit]:
    """The same pairs as the offline stage has them."""
    units = []
    for number, group in enumerate(groups):
        pair = choose_pair(group)
        assert pair is not None
        rollouts = [group.scored[i].rollout for i in pair]
        units.append(pair_unit(number, rollouts[0].prompt_ids, [r.response_ids for r in rollouts]))
    return units


@pytest.mark.parametrize(
    "learner",
    [{"batching": "padded"}, {"tokens_per_micro_batch": 64, "tokens_per_row": 64}],
    ids=["padded", "small"],
)
def test_steps_are_those_of_the_offline_stage_in_any_layout(
    start_learner: Any, start_stage: Any, learner: dict[str, Any]
) -> None:
    loss = {"type": "dpo", "beta": 0.5, "nll_coef": 0.2}
    rewards = [0.0, 1.0, 0.5, 0.2] * 3
    rate = {"learning_rate": 3e-3}
    online = start_learner(
        algorithm={"type": "online_dpo", "group_size": 4, "loss": loss},
        learner=rate | learner,
        **REFERENCE,
    )
    groups = own_groups(online, 0, rewards, num_groups=3)
    steps = [online.train_step(groups).metrics for _ in range(2)]
    online.close()
    stage = start_stage({"type": "preference", "loss": loss}, learner=rate, data={"max_tokens": 32})
    shares = {"preference/accuracy", "preference/chosen_fell_fraction"}
    for step, found in enumerate(steps):
        expected = stage.train(as_units(groups)).metrics
        names = {"learner/grad_norm", *(n for n in expected if n.startswith("preference/"))}
        for name in names if step else names - shares:  # at first the sign is that of rounding
            assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5), name
        assert found["learner/loss"] == pytest.approx(expected["stage/loss"], rel=1e-4)
        assert found["preference/pairs"] == 3
        CheckedMetrics().record(found)
    first, second = (found["preference/margin"] for found in steps)
    assert abs(first) < 1e-5, "the policy began as its reference"
    assert second > 0.01


def test_several_steps_of_stale_pairs_tell_them_apart(start_learner: Any) -> None:
    learner = start_learner(
        algorithm={"type": "online_dpo", "group_size": 4, "loss": {"type": "ipo", "beta": 0.5}},
        learner={"learning_rate": 3e-3, "epochs": 2, "minibatches": 2},
        staleness={"max_staleness": 4},
        **REFERENCE,
    )
    groups = own_groups(learner, 1, [1.0, 0.0, 0.5, 0.5] * 4)
    first = learner.train_step(groups).metrics
    second = learner.train_step(groups).metrics
    assert second["staleness/max"] == 1
    assert second["preference/accuracy"] > 0.8
    assert second["preference/loss"] < first["preference/loss"]
    assert second["importance/log_ratio_p95_by_staleness/1"] > 0


def test_a_step_without_a_pair_changes_nothing(start_learner: Any) -> None:
    learner = start_learner(algorithm={"type": "online_dpo", "group_size": 4}, **REFERENCE)
    groups = own_groups(learner, 0, [0.5] * 16)
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/grad_norm"] == 0
    assert (metrics["preference/pairs"], metrics["preference/tied_groups"]) == (0, 4)
    assert metrics["learner/dropped_rollouts"] == 16


# The run file


def refused(algorithm: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        configured(algorithm, **sections)
    return str(error.value)


def configured(algorithm: dict[str, Any], **sections: Any) -> RunConfig:
    tree = tiny_tree(**{**REFERENCE, **sections})
    tree["algorithm"] = {"type": "online_dpo", **algorithm}
    return validate(RunConfig, tree, source="run.toml")


@pytest.mark.parametrize(
    ("algorithm", "sections", "words"),
    [
        ({}, {"scoring": {}}, ["algorithm.loss.type = 'dpo' with scoring.reference = false"]),
        ({"loss": {"type": "kto"}}, {}, ["'kto'", "'ipo'"]),
        ({"kl_coef": 0.1}, {}, ["algorithm.online_dpo.kl_coef: unknown key"]),
        ({"group_size": 1}, {}, ["group_size", "found 1"]),
        (
            {},
            {"learner": {"tokens_per_row": 20}},
            ["8 + 8 = 16, 2 times (a pair) is over learner.tokens_per_row = 20"],
        ),
        (
            {},
            {"learner": {"ranks": 3, "minibatches": 2}},
            ["run.groups_per_step = 4 is under learner.ranks * learner.minibatches = 3 * 2"],
        ),
        (
            {},
            {"staleness": {"on_stale": "reweight", "max_staleness": 1, "stale_limit": 2}},
            ["staleness.on_stale = 'reweight' needs importance weights", "'drop'"],
        ),
    ],
    ids=["no reference", "kto", "a KL", "one rollout", "short rows", "few pairs", "weights"],
)
def test_what_cannot_work_is_refused_with_the_reason(
    algorithm: dict[str, Any], sections: dict[str, Any], words: list[str]
) -> None:
    message = refused(algorithm, **sections)
    for word in words:
        assert word in message


def test_a_row_holds_a_pair_and_a_rollout_that_would_break_it_costs_its_group_alone(
    tmp_path: Path,
) -> None:
    config = configured({})
    assert config.tokens_per_row == 2 * config.max_sequence_tokens == 32
    assert configured({"loss": {"type": "simpo"}}, scoring={}).algorithm.group_size == 2
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), tmp_path)
    scorer = ScoringWorker(config, str(tmp_path), "scoring-0")
    scorer.start()
    (group,) = random_groups(0, num_groups=1, group_size=2, lengths=[20, 3])
    rollouts = tuple(s.rollout for s in group.scored)
    given = RolloutGroup(ticket=group.ticket, prompt=group.prompt, rollouts=rollouts)
    with pytest.raises(ScoringError, match="over learner.tokens_per_row / 2 = 16"):
        scorer.score(given)
