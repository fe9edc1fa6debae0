"""Reference, teacher and reward models whose groups share passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from rlhf_cluster.errors import ScoringError
from rlhf_cluster.models.shared_passes import SharedPasses
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_group, make_prompt, make_rollouts
from tests.support.builders.waiting_calls import DEADLINE_S, Clock


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


def groups() -> list[Any]:
    prompt = make_prompt(ids=[2, 3, 0, 4])
    responses = ([[9, 8, 7, 6, 1], [9]], [[5, 1]], [[0, 0, 0], [30] * 20])
    return [make_rollouts(prompt, own) for own in responses]


def asked_at_once(model: SharedPasses[Any, Any], calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, which wait while somebody else is served."""
    found: list[Any] = [None] * len(calls)
    clock = model._clock = Clock()

    def call(place: int) -> None:
        found[place] = calls[place]()

    model._is_busy = True
    threads = []
    for place in range(len(calls)):
        name = f"call {place}"
        threads.append(threading.Thread(target=call, args=(place,), name=name, daemon=True))
        threads[-1].start()
        assert clock.waits(name).wait(DEADLINE_S)
    model._end_round([])
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return found


def passes_of(model: Any) -> list[int]:
    """The rows of every forward pass of `model` from now on."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


@pytest.mark.parametrize(
    ("batch_groups", "passes"), [(1, [2, 1, 2]), (2, [3, 2]), (8, [5])], ids=["1", "2", "8"]
)
def test_the_reference_gives_groups_together_what_it_gives_each_alone(
    model_dir, batch_groups, passes
):
    """Alone each group is a pass; then those that wait share them."""
    reference = FrozenPolicy(
        "reference", str(model_dir), "float32", "cpu", 4096, batch_groups=batch_groups
    )
    rows = passes_of(reference._policy)
    alone = [reference.logprobs(own) for own in groups()]
    assert rows == [2, 1, 2]
    calls = [lambda own=own: reference.logprobs(own) for own in groups()]
    together = asked_at_once(reference._together, calls)
    assert rows[3:] == passes
    for one, other in zip(alone, together, strict=True):
        for values, expected in zip(other, one, strict=True):
            np.testing.assert_allclose(values, expected, atol=2e-5)
            if batch_groups == 1:
                assert np.array_equal(values, expected)


def test_a_rollout_that_cannot_be_scored_fails_its_group_before_it_joins(model_dir):
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 64, batch_groups=8)
    rows = passes_of(reference._policy)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    with pytest.raises(ScoringError, match="temperature 0"):
        reference.logprobs(make_rollouts(prompt, [[5]], temperature=0.0))
    with pytest.raises(ScoringError, match="has 73 positions"):
        reference.logprobs(make_rollouts(prompt, [[5], [5] * 70]))
    assert (reference._together.num_calls, rows) == (0, [])


class WatchedLock:
    """A lock that tells when somebody waits for it."""

    def __init__(self) -> None:
        self._lock, self.waited_for = threading.Lock(), threading.Event()

    def acquire(self, timeout: float) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        self.waited_for.set()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


def test_groups_that_share_passes_are_scored_with_one_reference_while_it_is_replaced(
    model_dir, tmp_path
):
    """Two temperatures are two passes: the other reference comes in the first one, and waits."""
    other = tiny_llama.build(seed=2, max_position=48)
    version = tiny_llama.publish(tmp_path, 3, tiny_llama.checkpoint_tensors(other))
    reference = FrozenPolicy("reference", str(model_dir), "float32", "cpu", 4096, batch_groups=8)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    asked = [make_rollouts(prompt, [[9, 8, 7]], temperature=t) for t in (0.7, 1.0)]
    before = [reference.logprobs(own)[0] for own in asked]
    lock = WatchedLock()
    reference._lock = lock  # type: ignore[assignment]
    loading = threading.Thread(target=reference.load, args=(version,), daemon=True)

    def replaced_meanwhile(module: Any, args: Any) -> None:
        if loading.ident is None:
            loading.start()
            assert lock.waited_for.wait(DEADLINE_S)

    reference._policy.register_forward_pre_hook(replaced_meanwhile)
    rows = passes_of(reference._policy)
    calls = [lambda own=own: reference.logprobs(own) for own in asked]
    together = asked_at_once(reference._together, calls)
    assert rows == [1, 1]
    assert reference._together.num_rounds == 3  # two alone, and these
    loading.join(DEADLINE_S)
    assert not loading.is_alive()
    for [found], old, own in zip(together, before, asked, strict=True):
        np.testing.assert_array_equal(found, old)
        assert not np.allclose(reference.logprobs(own)[0], old)


@pytest.fixture(scope="module")
def reward_dir(model_dir, tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    settings = LlamaConfig.from_pretrained(model_dir, num_labels=1, pad_token_id=tiny_llama.END)
    torch.manual_seed(2)
    LlamaForSequenceClassification(settings).save_pretrained(folder)
    return folder


def test_a_reward_model_gives_groups_together_what_it_gives_each_alone(reward_dir, model_dir):
    config = RewardModelConfig(path=str(reward_dir), dtype="float32")
    context = RewardContext(tokenizer_dir=str(model_dir), batch_groups=4)
    reward = RewardModel(config, context)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    alone = [reward.score(prompt, own, [""] * len(own)) for own in groups()]
    rows = passes_of(reward._model.base_model)
    calls = [lambda own=own: reward.score(prompt, own, [""] * len(own)) for own in groups()]
    together = asked_at_once(reward._together, calls)
    assert rows == [5]
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=2e-5)


@pytest.mark.parametrize(("batch_groups", "passes"), [(1, [2, 1, 2]), (2, [3, 2])], ids=["1", "2"])
def test_a_scorers_reference_teacher_and_reward_model_follow_the_setting(
    model_dir, reward_dir, batch_groups, passes
):
    reward = {"type": "reward_model", "path": str(reward_dir), "dtype": "float32"}
    config = tiny_config(
        algorithm={"type": "on_policy_distillation"},
        scoring={
            "rewards": [reward],
            "reference": True,
            "teacher": str(model_dir),
            "batch_groups": batch_groups,
        },
    )
    scorer = ScoringWorker(config, str(model_dir), "scoring-0")
    scorer.start()
    prompt = make_prompt(ids=[2, 3, 0, 4])
    given = [make_group(prompt, own) for own in groups()]
    reference, teacher = cast("Any", scorer._reference), cast("Any", scorer._teacher)
    rewards = cast("Any", scorer._rewards._built["reward_model"])
    fronts = {
        reference._together: passes_of(reference._policy),
        teacher._together: passes_of(teacher._policy),
        rewards._together: passes_of(rewards._model.base_model),
    }
    asks = [
        lambda own: reference.logprobs(own.rollouts),
        lambda own: teacher.logprobs(own.rollouts),
        lambda own: rewards.score(prompt, own.rollouts, [""] * len(own.rollouts)),
    ]
    for (front, rows), ask in zip(fronts.items(), asks, strict=True):
        asked_at_once(front, [lambda ask=ask, own=own: ask(own) for own in given])
        assert rows == passes
    scorer.close()
