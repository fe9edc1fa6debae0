"""Exact log-probabilities: every token under the version that sampled it, against transformers."""

import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import RecordError, ScoringError, StalledError, WeightError
from rlhf_cluster.records import GroupSummary, ScoredRollout, Ticket
from rlhf_cluster.scoring.exact_logprobs import ExactLogprobs
from rlhf_cluster.scoring.frozen_policy import FrozenPolicy
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from rlhf_cluster.sections.rl_run import Staleness
from rlhf_cluster.util.waiting import call_deadline
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.shared_files import version_dir
from tests.support.builders import small_weights, tiny_llama
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.scored_groups import make_group, make_prompt, make_rollouts
from tests.support.simulation.simulated_run import SimulatedRun

NUM_VERSIONS = 4
PROMPT = [2, 3, 0, 4]
# (response, the version that sampled each token): alone, mixed twice, mixed three times
MIXED = (
    ([9, 8, 7, 6, 1], [2, 2, 2, 2, 2]),
    ([9, 5, 7, 6, 1], [1, 1, 2, 2, 2]),
    ([5, 1], [0, 3]),
    ([30, 31, 32, 33, 34, 35], [0, 1, 1, 2, 3, 3]),
    ([0], [3]),
)
TOLERANCE = 2e-5  # nats: float32 passes against float64 ones


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory) -> Path:
    """Versions 0 to 3, of different weights."""
    root = tmp_path_factory.mktemp("weights")
    for version in range(NUM_VERSIONS):
        tensors = tiny_llama.checkpoint_tensors(tiny_llama.build(10 + version, max_position=48))
        tiny_llama.publish(root, version, tensors)
    return root


@pytest.fixture(scope="module")
def models(store_dir):
    """Each version, loaded from the store by transformers, in float64."""
    import torch

    found = []
    for version in range(NUM_VERSIONS):
        model = tiny_llama.build(seed=0, max_position=48)
        tensors = dict(store.read(version_dir(store_dir, version)))
        assert not model.load_state_dict(tensors, strict=False).unexpected_keys
        found.append(model.to(torch.float64))
    return found


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """The folder that the run started from: the weights of no version."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


def rollouts(temperature=1.0, mixed=MIXED):
    plain = make_rollouts(
        make_prompt(ids=PROMPT), [response for response, _ in mixed], temperature=temperature
    )
    return [
        replace(rollout, versions=np.array(versions, np.int32))
        for rollout, (_, versions) in zip(plain, mixed, strict=True)
    ]


def exact(model_dir, store_dir, cached_versions=2, tokens_per_batch=4096) -> ExactLogprobs:
    model = FrozenPolicy("exact", str(model_dir), "float32", "cpu", tokens_per_batch)
    return ExactLogprobs(model, store_dir, cached_versions)


def slowly(models, rollout) -> np.ndarray:
    """For each version a whole pass of transformers in float64: full logits, then log_softmax."""
    import torch

    prompt, response = rollout.prompt_ids.tolist(), rollout.response_ids.tolist()
    found = np.zeros(len(response))
    for version in sorted(set(rollout.versions.tolist())):
        with torch.no_grad():
            logits = models[version](torch.tensor([prompt + response])).logits[0]
        table = (logits / rollout.temperature).log_softmax(-1)
        for place in np.flatnonzero(rollout.versions == version):
            found[place] = table[len(prompt) + place - 1, response[place]].item()
    return found


@pytest.mark.parametrize("tokens_per_batch", [16, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_of_mixed_rollouts_is_scored_by_the_version_that_sampled_it(
    model_dir, store_dir, models, tokens_per_batch, temperature
):
    given = rollouts(temperature)
    found = exact(model_dir, store_dir, tokens_per_batch=tokens_per_batch).logprobs(given)
    for values, rollout in zip(found, given, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, slowly(models, rollout), atol=TOLERANCE)


def test_a_version_that_is_published_anew_is_read_anew(model_dir, store_dir, models, tmp_path):
    """After the loss of a learner a number may stand for other weights than before."""
    [given] = rollouts(mixed=[([9, 8, 7, 1], [2, 2, 2, 2])])
    root = tmp_path / "weights"
    shutil.copytree(store_dir, root)
    scorer = exact(model_dir, root)
    [before] = scorer.logprobs([given])
    store.rewind(root, 1)
    tiny_llama.publish(root, 2, dict(store.read(version_dir(store_dir, 3))))
    scorer.forget()
    [after] = scorer.logprobs([given])
    np.testing.assert_allclose(before, slowly(models, given), atol=TOLERANCE)
    other = replace(given, versions=np.full(4, 3, np.int32))
    np.testing.assert_allclose(after, slowly(models, other), atol=TOLERANCE)


def test_versions_tell_their_tokens_apart(model_dir, store_dir, models):
    """What the tolerance above cannot hide: the same tokens under other versions are far away."""
    [mixed] = rollouts(mixed=[MIXED[3]])
    right = slowly(models, mixed)
    for version in range(NUM_VERSIONS):
        wrong = slowly(models, replace(mixed, versions=np.full(6, version, np.int32)))
        assert np.abs(wrong - right).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("cached_versions", [1, 2, 9])
def test_the_cache_changes_what_is_read_and_never_a_value(
    model_dir, store_dir, models, cached_versions
):
    scorer = exact(model_dir, store_dir, cached_versions)
    given = rollouts(mixed=[([9, 8, 1], [version] * 3) for version in range(NUM_VERSIONS)])
    expected = [slowly(models, rollout) for rollout in given]
    for version in (0, 1, 2, 3, 3, 2, 3, 2, 0, 2, 0, 0, 1, 3):
        [found] = scorer.logprobs([given[version]])
        np.testing.assert_allclose(found, expected[version], atol=TOLERANCE)
    # of 0 1 2 3 | 3 2 3 2 | 0 2 0 0 1 3: loaded unless resident, read unless among the last k used
    assert scorer.num_loads == 4 + 3 + 5
    assert scorer.num_reads == {1: 12, 2: 4 + 0 + 3, 9: 4}[cached_versions]


def test_a_batch_starts_with_the_version_that_is_in_the_model(model_dir, store_dir):
    scorer = exact(model_dir, store_dir)
    scorer.logprobs(rollouts(mixed=[([9, 8], [1, 1])]))
    scorer.logprobs(rollouts(mixed=[([9, 8], [0, 1])]))
    assert scorer.num_loads == 2
    scorer.logprobs(rollouts(mixed=[([9, 8], [0, 1])]))
    assert scorer.num_loads == 3


def test_a_version_that_was_stored_as_a_difference_scores_as_one_that_was_stored_whole(
    model_dir, store_dir, tmp_path
):
    first = tiny_llama.checkpoint_tensors(tiny_llama.build(10, max_position=48))
    second = small_weights.stepped(first, seed=3)
    [given] = rollouts(mixed=[([9, 8, 7], [1, 1, 1])])
    found = []
    for base in (None, (0, first)):
        root = tmp_path / f"weights-{base is None}"
        small_weights.publish(root, 0, first)
        version = small_weights.publish(root, 1, second, base=base)
        assert store.open_version(version.path).format == ("full" if base is None else "delta")
        found.append(exact(model_dir, root).logprobs([given])[0])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], exact(model_dir, store_dir).logprobs([given])[0])


def test_a_version_that_is_gone_is_named_with_the_rollout_and_those_that_are_there(
    model_dir, store_dir, tmp_path
):
    root = shutil.copytree(store_dir, tmp_path / "weights")
    shutil.rmtree(root / "v000001")
    scorer = exact(model_dir, root)
    with pytest.raises(WeightError, match=r"version 1, which sampled tokens of rollout g0/1.*0, 2"):
        scorer.logprobs(rollouts())
    assert len(scorer.logprobs(rollouts(mixed=[MIXED[0]]))) == 1, "the others are served on"


def test_a_damaged_version_is_refused_before_it_is_used(model_dir, store_dir, models, tmp_path):
    root = shutil.copytree(store_dir, tmp_path / "weights")
    [shard] = (root / "v000001").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    scorer = exact(model_dir, root)
    [first, second] = rollouts(mixed=[([9, 8], [0, 0]), ([9, 8], [1, 1])])
    scorer.logprobs([first])
    with pytest.raises(WeightError, match=r"tensor .* damaged"):
        scorer.logprobs([second])
    np.testing.assert_allclose(scorer.logprobs([first])[0], slowly(models, first), atol=TOLERANCE)


def test_a_greedy_rollout_has_no_exact_logprobs(model_dir, store_dir):
    with pytest.raises(ScoringError, match="temperature 0"):
        exact(model_dir, store_dir).logprobs(rollouts(temperature=0.0))


def test_a_scorer_adds_exact_logprobs_to_what_is_trained_only(model_dir, store_dir, models):
    root = store_dir.parent
    config = tiny_config(
        run={"name": store_dir.name, "root": str(root)},
        weights={"root": str(root)},
        scoring={"rewards": [{"type": "exact_match"}], "exact_logprobs": True},
    )
    scorer = ScoringWorker(config, str(model_dir), "scoring-0")
    scorer.start()
    try:
        prompt = make_prompt(columns={"answer": "w5"}, ids=PROMPT)
        group, held_out = (make_group(prompt, rollouts(), purpose=p) for p in ("train", "evaluate"))
        for scored in scorer.score(group)[1].scored:
            np.testing.assert_allclose(
                scored.exact_logprobs, slowly(models, scored.rollout), atol=TOLERANCE
            )
            assert scored.ref_logprobs is None
        for scored in scorer.score(held_out)[1].scored:
            assert scored.exact_logprobs is None
    finally:
        scorer.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(1, np.float32), "exact_logprobs has 1 entries for 2 response tokens"),
        (np.zeros(2), r"exact_logprobs must be float32\[n\]"),
        (np.array([0, np.nan], np.float32), "exact_logprobs must be finite"),
    ],
)
def test_a_record_refuses_exact_logprobs_that_do_not_fit(values, message):
    [rollout] = rollouts(mixed=[([9, 8], [0, 0])])
    with pytest.raises(RecordError, match=message):
        ScoredRollout(
            rollout=rollout,
            reward=0.0,
            reward_parts={},
            ref_logprobs=None,
            exact_logprobs=values,
            scorer="scoring-0",
        )


@dataclass
class AskedFor(SimulatedRun):
    """Notes of each group that is scored how old its version is, by the learner's present one."""

    ages_when_scored: list[int] = field(default_factory=list)

    def _summary(self, ticket: Ticket, version: int) -> GroupSummary:
        self.ages_when_scored.append(self.learner - version)
        return super()._summary(ticket, version)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"look_ahead": 5},
        {"on_stale": "reweight", "stale_limit": 4},
        {"on_stale": "drop"},
        {"on_stale": "drop", "look_ahead": 5},
        {"max_staleness": 0, "pipeline_depth": 0},
    ],
    ids=["strict", "look_ahead", "reweight", "drop", "drop_ahead", "synchronous"],
)
def test_a_version_that_is_asked_for_is_among_the_newest_that_the_store_keeps(changes):
    """Nothing newer than the learner's version is published, so age is the place in the store."""
    settings = {"max_staleness": 2, "pipeline_depth": 2, **changes}
    gate = AdmissionGate(groups_per_step=4, num_steps=60, **settings)
    ages = [
        age
        for seed in range(15)
        for age in AskedFor(gate, seed, publish=lambda rng: 6 * rng.random()).run().ages_when_scored
    ]
    oldest = Staleness(**settings).oldest_in_flight
    assert max(ages) == oldest, "and the oldest of them is asked for"


class SlowExact(ExactLogprobs):
    """Exact log-probabilities whose reads wait until `answers` is set."""

    answers: threading.Event
    asked: threading.Event

    def _read(self, version: int, who: str) -> dict[str, Any]:
        self.asked.set()
        assert self.answers.wait(30)
        return super()._read(version, who)


def slow_exact(model_dir: Path, root: Path) -> SlowExact:
    model = FrozenPolicy("exact", str(model_dir), "float32", "cpu", 4096)
    made = SlowExact(model, root, cached_versions=2, wait_timeout_s=30.0)
    made.answers, made.asked = threading.Event(), threading.Event()
    return made


def test_n08_a_slow_read_ends_with_the_calls_deadline_and_goes_on(model_dir, store_dir, models):
    scorer = slow_exact(model_dir, store_dir)
    [given] = rollouts(mixed=[([9, 8, 1], [2, 2, 2])])
    for _ in range(3):
        with (
            call_deadline(0.01),
            pytest.raises(StalledError, match=r"version 2 was not read .*continues.*weights.root"),
        ):
            scorer.logprobs([given])
    with scorer._model.hold():
        pass  # it is free for groups of other versions meanwhile
    scorer.answers.set()
    [found] = scorer.logprobs([given])
    np.testing.assert_allclose(found, slowly(models, given), atol=TOLERANCE)
    assert scorer.num_reads == 1, "no try begins anew"


def test_n08_a_version_that_was_brought_is_not_read_for_a_group(model_dir, store_dir, models):
    scorer = slow_exact(model_dir, store_dir)
    scorer.answers.set()
    scorer.bring(store.open_version(version_dir(store_dir, 1)))
    scorer.answers.clear()
    [given] = rollouts(mixed=[([9, 8], [1, 1])])
    with call_deadline(10.0):
        [found] = scorer.logprobs([given])
    np.testing.assert_allclose(found, slowly(models, given), atol=TOLERANCE)
    assert scorer.num_reads == 1


def test_n08_what_is_read_while_versions_are_forgotten_is_not_kept(
    model_dir, store_dir, models, tmp_path
):
    root = shutil.copytree(store_dir, tmp_path / "weights")
    scorer = slow_exact(model_dir, root)
    [given] = rollouts(mixed=[([9, 8, 7, 1], [2, 2, 2, 2])])
    with call_deadline(0.01), pytest.raises(StalledError):
        scorer.logprobs([given])
    [old] = scorer._reads.values()
    assert scorer.asked.wait(30)
    scorer.forget()
    scorer.answers.set()
    assert old.result(30)
    assert scorer._cache == {}


def test_n08_a_version_with_another_digest_is_read_anew(model_dir, store_dir, models, tmp_path):
    """A worker that was starting when the learner went back was told to forget nothing."""
    root = shutil.copytree(store_dir, tmp_path / "weights")
    scorer = exact(model_dir, root)
    [given] = rollouts(mixed=[([9, 8, 7, 1], [2, 2, 2, 2])])
    scorer.bring(store.open_version(version_dir(root, 2)))
    scorer.logprobs([given])
    store.rewind(root, 1)
    anew = tiny_llama.publish(root, 2, dict(store.read(version_dir(store_dir, 3))))
    scorer.bring(anew)
    [found] = scorer.logprobs([given])
    other = replace(given, versions=np.full(4, 3, np.int32))
    np.testing.assert_allclose(found, slowly(models, other), atol=TOLERANCE)
    scorer.bring(anew)
    assert scorer.num_reads == 2
