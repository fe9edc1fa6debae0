"""What the learner made of a step's first rollouts: by definition, of the first pass, of all ranks."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms import build_algorithm
from rlhf_cluster.algorithms.algorithm import LossInputs
from rlhf_cluster.learner.token_samples import (
    COLUMNS,
    KeptTokens,
)
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.reference_objectives import POLICY_GRADIENTS
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    loss_inputs,
    random_groups,
    response_logprobs,
)

LENGTHS = (7, 1, 12, 5)
EXACT = {"rewards": [{"type": "exact_match"}], "exact_logprobs": True}
NO_RULE = {"type": "none"}


def built(scoring: Any = EXACT, **keys: Any) -> Any:
    return build_algorithm(tiny_config(algorithm=keys, scoring=scoring).algorithm, 64)


def inputs(seed: int = 0) -> LossInputs:
    """Log-probabilities that all differ, the last sequence's close enough for narrow bands."""
    draw, n = torch.Generator().manual_seed(seed), sum(LENGTHS)
    scale = torch.tensor([0.6] * (n - LENGTHS[-1]) + [0.002] * LENGTHS[-1], dtype=torch.float64)

    def logprobs() -> torch.Tensor:
        return -2 + scale * torch.randn(n, generator=draw, dtype=torch.float64)

    given = loss_inputs(
        logprobs().requires_grad_(),
        logprobs(),
        torch.randn(n, generator=draw, dtype=torch.float64),
        proximal=logprobs(),
        staleness=torch.randint(0, 4, (n,), generator=draw).double(),
        lengths=LENGTHS,
    )
    return replace(given, exact_logprobs=logprobs())


# name -> (level, low, high, inside the band weighs its ratio, outside is moved to the bound)
RULES: dict[str, tuple[str, float, float, bool, bool]] = {
    "token_tis": ("token", 0.0, 2.0, True, True),
    "sequence_tis": ("sequence", 0.0, 2.0, True, True),
    "geometric_tis": ("geometric", 0.0, 2.0, True, True),
    "icepop": ("token", 0.5, 5.0, True, False),
    "sequence_mis": ("sequence", 0.5, 2.0, True, False),
    "sequence_mask": ("sequence", 0.5, 2.0, False, False),
    "geometric_mask": ("geometric", 0.99, 1.01, False, False),
}


def slow_weights(rule: str, policy: list[float], sampler: list[float]) -> list[float]:
    """The definition in `algorithms.off_policy_correction`, a token at a time."""
    level, low, high, weighs, truncates = RULES[rule]
    found, first = [], 0
    for length in LENGTHS:
        logs = [policy[t] - sampler[t] for t in range(first, first + length)]
        for log in logs:
            whole = {"token": log, "sequence": sum(logs), "geometric": sum(logs) / length}[level]
            ratio = math.exp(whole)
            if truncates:
                found.append(min(max(ratio, low), high))
            elif low <= ratio <= high:
                found.append(ratio if weighs else 1.0)
            else:
                found.append(0.0)
        first += length
    return found


@pytest.mark.parametrize("sampler", ["sampled", "exact"])
@pytest.mark.parametrize("rule", RULES)
def test_the_decoupled_weight_is_proximal_over_sampler_by_the_rule(rule: str, sampler: str) -> None:
    given = inputs()
    algorithm = built(type="grpo", correction={"type": rule}, sampler=sampler)
    mu = given.exact_logprobs if sampler == "exact" else given.sampled_logprobs
    assert mu is not None
    expected = slow_weights(rule, given.proximal_logprobs.tolist(), mu.tolist())
    weights = algorithm.correction_weights(given)
    assert weights.tolist() == pytest.approx(expected, rel=1e-9)
    assert not weights.requires_grad
    assert len(set(expected)) > 1, "the case has to tell rollouts apart"


@pytest.mark.parametrize("kind", POLICY_GRADIENTS)
def test_it_is_what_the_loss_of_every_algorithm_multiplied_a_token_by(kind: str) -> None:
    """The loss without a correction, times the weight, is the loss with it."""
    given = replace(inputs(), teacher_logprobs=inputs(1).sampled_logprobs)
    scoring = {**EXACT, "teacher": "a folder"} if kind == "on_policy_distillation" else EXACT
    keys = {"type": kind, "correction": {"type": "sequence_mis"}, "group_size": 2}
    corrected = built(scoring, **keys)
    plain = built(scoring, **{**keys, "correction": NO_RULE})
    weights = corrected.correction_weights(given)
    torch.testing.assert_close(
        corrected.loss(given)[0], plain.loss(given)[0] * weights, rtol=1e-12, atol=0
    )
    assert plain.correction_weights(given).tolist() == [1.0] * sum(LENGTHS)


@pytest.mark.parametrize("rule", ["token_tis", "icepop", "sequence_mask", "none"])
def test_without_a_proximal_policy_it_is_the_ratio_to_the_sampler_as_the_loss_has_it(
    rule: str,
) -> None:
    given = inputs()
    algorithm = built(type="reinforce", proximal="bypass", correction={"type": rule}, group_size=2)
    weights = algorithm.correction_weights(given)
    torch.testing.assert_close(
        algorithm.loss(given)[0].detach(), -weights * given.advantages, rtol=1e-12, atol=0
    )
    assert not weights.requires_grad
    assert len(set(weights.tolist())) > 1


def test_gspo_shares_its_ratio_over_a_response_without_a_proximal_policy() -> None:
    given = inputs()
    algorithm = built(type="gspo", proximal="bypass", correction=NO_RULE)
    learner, sampler = given.learner_logprobs.tolist(), given.sampled_logprobs.tolist()
    expected, first = [], 0
    for length in LENGTHS:
        logs = [learner[t] - sampler[t] for t in range(first, first + length)]
        expected += [math.exp(sum(logs) / length)] * length
        first += length
    assert algorithm.correction_weights(given).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_preference_loss_has_no_weight() -> None:
    assert (
        built(
            scoring={**EXACT, "reference": True}, type="online_dpo", group_size=2
        ).correction_weights(inputs())
        is None
    )


def trained(groups: list[ExperienceGroup]) -> list[Any]:
    return [s.rollout for group in groups for s in group.scored]


def kept_of(learner: Any, groups: list[ExperienceGroup]) -> list[Any]:
    learner.train_step(groups)
    return [learner.kept.get(rollout.rollout_id) for rollout in trained(groups)]


@pytest.mark.parametrize(
    "learner_keys", [{}, {"epochs": 2, "minibatches": 3, "tokens_per_micro_batch": 64}]
)
def test_a_step_keeps_the_learner_before_its_first_update(
    start_learner: Any, learner_keys: dict[str, Any]
) -> None:
    learner = start_learner(
        learner={"learning_rate": 0.05, **learner_keys}, observe={"samples_per_step": 100}
    )
    groups = random_groups(3)
    before = response_logprobs(learner, groups)
    found = kept_of(learner, groups)
    after = response_logprobs(learner, groups)
    for rollout, kept, start, end in zip(trained(groups), found, before, after, strict=True):
        mask = rollout.response_mask
        np.testing.assert_array_equal(kept.trained, mask)
        np.testing.assert_allclose(kept.learner_logprobs[mask], start[mask], atol=1e-5)
        assert np.abs(end[mask] - start[mask]).max() > 1e-3, "the step has to move them"
        weights = [
            min(math.exp(own - sampled), 2.0)
            for own, sampled in zip(start[mask], rollout.sampled_logprobs[mask], strict=True)
        ]
        np.testing.assert_allclose(kept.correction_weights[mask], weights, rtol=1e-4)
        assert np.isnan(kept.learner_logprobs[~mask]).all()
        assert np.isnan(kept.correction_weights[~mask]).all()


def test_a_weight_without_a_proximal_policy_is_of_the_pass_that_is_kept(start_learner: Any) -> None:
    learner = start_learner(
        algorithm={"proximal": "bypass"},
        learner={"epochs": 2, "minibatches": 4, "learning_rate": 0.05},
    )
    groups = random_groups(3)
    before = response_logprobs(learner, groups)
    found, moved = kept_of(learner, groups), 0
    for rollout, kept, start in zip(trained(groups), found, before, strict=True):
        mask = rollout.response_mask
        own = kept.learner_logprobs[mask]
        expected = np.minimum(np.exp(own - rollout.sampled_logprobs[mask]), 2.0)
        np.testing.assert_allclose(kept.correction_weights[mask], expected, rtol=1e-5)
        moved += np.abs(own - start[mask]).max() > 1e-3
    assert 0 < moved < len(found), "some minibatch comes first, others after an update"


def test_only_the_first_rollouts_are_kept_and_none_without_samples(start_learner: Any) -> None:
    groups = random_groups(0, rewards=[0.5, 0.5, 0.5, 0.5, *[0.0, 1.0] * 6])
    learner = start_learner(observe={"samples_per_step": 6})
    found = kept_of(learner, groups)
    assert [kept is not None for kept in found] == [*[False] * 4, True, True, *[False] * 10], (
        "the first four have no advantage, and so no pass"
    )
    assert not any(kept_of(start_learner(observe={"samples_per_step": 0}), groups))


class Ranks:
    """Joins what all ranks have in one process: asks each for its own, then gives each the sum."""

    def __init__(self) -> None:
        self.asked: list[dict[int, np.ndarray]] = []
        self.lengths: list[int] = []

    def ask(self, own: Any, lengths: Any) -> list[np.ndarray]:
        self.asked.append(dict(own))
        self.lengths = list(lengths)
        return self.sum()

    def sum(self, *_: Any) -> list[np.ndarray]:
        tables = [np.zeros((n, COLUMNS), np.float32) for n in self.lengths]
        for own in self.asked:
            for index, table in own.items():
                tables[index] = tables[index] + table
        return tables


def see(
    kept: KeptTokens, rollouts: list[int], groups: list[ExperienceGroup], algorithm: Any
) -> None:
    """A pass over these rollouts, with log-probabilities -(rollout + place / 100)."""
    entries = [trained(groups)[i] for i in rollouts]
    counts = [int(r.response_mask.sum()) for r in entries]
    own = [-(i + np.arange(n) / 100) for i, n in zip(rollouts, counts, strict=True)]
    sampled = np.concatenate([r.sampled_logprobs[r.response_mask] for r in entries])
    given = loss_inputs(
        torch.from_numpy(np.concatenate(own)).float(),
        torch.from_numpy(sampled),
        torch.ones(sum(counts)),
        lengths=counts,
    )
    kept.see(rollouts, given, algorithm)


@pytest.mark.parametrize("kind", ["grpo", "online_dpo"])
def test_what_two_ranks_kept_is_joined_and_the_same_on_both(kind: str) -> None:
    groups = random_groups(1, num_groups=2)
    algorithm = built(scoring={**EXACT, "reference": True}, type=kind, group_size=4)
    ranks, shares = [KeptTokens(6), KeptTokens(6)], ([[5, 0], [7, 2]], [[6], [4, 1]])
    for kept, passes in zip(ranks, shares, strict=True):
        for rollouts in passes:
            see(kept, rollouts, groups, algorithm)
    network = Ranks()
    for kept in ranks:
        kept.join(groups, network.ask)
    assert [sorted(own) for own in network.asked] == [[0, 2, 5], [1, 4]], "6 and 7 do not travel"
    for kept in ranks:
        kept.join(groups, network.sum)
        assert set(kept.found) == {"0/0", "0/1", "0/2", "1/0", "1/1"}, "no pass had 0/3"
        for index, rollout in enumerate(trained(groups)[:6]):
            if rollout.rollout_id not in kept.found:
                continue
            one, mask = kept.found[rollout.rollout_id], rollout.response_mask
            own = (-(index + np.arange(mask.sum()) / 100)).astype(np.float32)
            np.testing.assert_array_equal(one.learner_logprobs[mask], own)
            if kind == "online_dpo":
                assert one.correction_weights is None
            else:
                expected = np.minimum(np.exp(own - rollout.sampled_logprobs[mask]), 2)
                assert one.correction_weights is not None
                np.testing.assert_allclose(one.correction_weights[mask], expected, rtol=1e-5)


def test_a_second_pass_over_a_rollout_is_not_kept() -> None:
    groups = random_groups(1, num_groups=1)
    algorithm, kept, network = built(type="grpo", group_size=4), KeptTokens(4), Ranks()
    see(kept, [2], groups, algorithm)
    shifted = [replace(groups[0], scored=tuple(reversed(groups[0].scored)))]
    see(kept, [2], shifted, algorithm)
    kept.join(groups, network.ask)
    [table] = network.asked[0].values()
    assert len(table) == trained(groups)[2].response_mask.sum()


def test_without_samples_nothing_is_gathered() -> None:
    groups, kept, network = random_groups(1, num_groups=1), KeptTokens(0), Ranks()
    see(kept, [0, 1, 2, 3], groups, built(type="grpo", group_size=4))
    kept.join(groups, network.ask)
    assert (kept.found, network.asked) == ({}, [])


def test_a_step_without_a_kept_trained_token_gathers_nothing() -> None:
    [group] = random_groups(1, num_groups=1)
    blank = [
        replace(s, rollout=replace(s.rollout, response_mask=np.zeros_like(s.rollout.response_mask)))
        for s in group.scored
    ]
    kept, network = KeptTokens(4), Ranks()
    kept.join([replace(group, scored=tuple(blank))], network.ask)
    assert (kept.found, network.asked) == ({}, [])
