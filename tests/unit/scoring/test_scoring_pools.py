"""Pools of their own: what several find out is, joined, what one would have found, and costs a group
once when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.services.scoring_client import RayScoring
from rlhf_cluster import rewards
from rlhf_cluster.buffer.group_file import (
    Header,
    encode,
)
from rlhf_cluster.buffer.group_recovery import made_by
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import pool_sections
from rlhf_cluster.errors import ConfigError, RecordError, ScoringError, StalledError
from rlhf_cluster.planning import memory_needs
from rlhf_cluster.planning.placement import demand, derived
from rlhf_cluster.records import ExperienceGroup, RolloutGroup
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    State,
    Worker,
    WorkerPool,
)
from rlhf_cluster.scoring.score_parts import (
    RewardAnswer,
    ScorePart,
)
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from rlhf_cluster.sections.section import validate
from tests.support.builders import tiny_llama
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)
from tests.support.builders.scored_groups import (
    make_group,
    make_prompt,
    make_rollouts,
)
from tests.support.fakes.scripted_rewards import (
    ENSEMBLE,
    RESPONSES,
    Scripted,
    Telling,
    named,
)
from tests.support.fakes.services import make_version

MODELS = {"reference": True, "exact_logprobs": True, "dtype": "float32"}
REWARDS = [named("gold", weight=2.0, clip=[0, 1]), named("proxy", watch=True), ENSEMBLE]
APART = {
    "policies": {"serves": ["reference", "exact_logprobs"]},
    "proxies": {"serves": ["proxy", "ens"], "workers": 2},
}
COLUMNS = {"gold": [1.0, 0.0, 0.5, 2.0], "proxy": [9.0, -9.0, 3.0, 0.0]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


@pytest.fixture
def scorers(model_dir, monkeypatch) -> Callable[..., dict[str, ScoringWorker]]:
    """One of each pool, ready, by name."""
    monkeypatch.setitem(rewards.REWARDS, "exact_match", Scripted)
    monkeypatch.setitem(rewards.REWARDS, "ensemble", Telling)

    def build(**scoring: Any) -> dict[str, ScoringWorker]:
        config = tiny_config(scoring={"rewards": REWARDS, **scoring})
        found = {
            pool: ScoringWorker(config, str(model_dir), "scoring-0", pool=pool)
            for pool in pool_sections(config)
            if pool != "generation"
        }
        for scorer in found.values():
            scorer.start()
        return found

    return build


def group_of(**columns: Any) -> RolloutGroup:
    prompt = make_prompt("w2 w3", columns, ids=[2, 3])
    return make_group(prompt, make_rollouts(prompt, RESPONSES), 7)


def stored(group: ExperienceGroup) -> bytes:
    return encode(group, Header(newest_version=0, made_by="ab" * 16))


def test_what_several_pools_find_is_to_the_byte_what_one_finds(scorers, monkeypatch):
    import rlhf_cluster.scoring.exact_logprobs as exact

    def read(self, version, rollout):
        return {name: tensor.clone() for name, tensor in self._model._targets.items()}

    monkeypatch.setattr(exact.ExactLogprobs, "_read", read)
    group = group_of(**COLUMNS)
    [alone] = scorers(**MODELS).values()
    apart = scorers(**MODELS, pools=APART)
    parts = {pool: scorer.score_part(group)[1] for pool, scorer in apart.items()}
    assert {pool: (set(p.rewards), set(p.logprobs)) for pool, p in parts.items()} == {
        "scoring": ({"gold"}, set()),
        "policies": (set(), {"reference", "exact_logprobs"}),
        "proxies": ({"proxy", "ens"}, set()),
    }
    _, expected = alone.score(group)
    assert expected.scored[0].ref_logprobs is not None
    assert expected.scored[0].watched["gold.unclipped"] == 1.0
    for order in ([*parts], [*parts][::-1]):
        _, found = apart["scoring"].join(group, *(parts[pool] for pool in order))
        assert stored(found) == stored(expected)


def test_the_reason_of_a_pool_that_fails_is_the_groups_and_a_watched_one_costs_nothing(scorers):
    apart = scorers(pools={"proxies": APART["proxies"]})
    group = group_of(gold=COLUMNS["gold"], proxy="fail")
    parts = [scorer.score_part(group)[1] for scorer in apart.values()]
    assert parts[1].rewards["proxy"] is None
    assert all("proxy" not in s.watched for s in apart["scoring"].join(group, *parts)[1].scored)
    with pytest.raises(ScoringError, match=r"reward 'gold', group g00000007: \[died\]"):
        apart["scoring"].score_part(group_of(gold="fail", proxy=COLUMNS["proxy"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts[:1], "no pool gave 'ens'"),
        (lambda parts: [*parts, parts[0]], "'gold' came from two pools"),
        (lambda parts: [cut(parts[0]), parts[1]], "'gold' has 3 rows with steps None"),
    ],
)
def test_parts_that_are_not_the_whole_group_are_refused(scorers, change, words):
    apart, group = scorers(pools={"proxies": APART["proxies"]}), group_of(**COLUMNS)
    parts = [scorer.score_part(group)[1] for scorer in apart.values()]
    with pytest.raises(RecordError, match=words):
        apart["scoring"].join(group, *change(parts))


def cut(part: ScorePart) -> ScorePart:
    answer = part.rewards["gold"]
    assert answer is not None
    return replace(part, rewards={"gold": RewardAnswer(rows=answer.rows[:3])})


def test_a_trained_group_without_a_models_log_probabilities_is_refused(scorers):
    apart, group = scorers(**MODELS, pools={"policies": APART["policies"]}), group_of(**COLUMNS)
    _, own = apart["scoring"].score_part(group)
    with pytest.raises(RecordError, match="no pool gave 'exact_logprobs'"):
        apart["scoring"].join(group, own)
    _, held_out = apart["scoring"].join(
        replace(group, ticket=replace(group.ticket, purpose="evaluate")), own
    )
    assert held_out.scored[0].ref_logprobs is None


# The settings, and what follows from them


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        ({"learner": {"serves": ["reference"]}}, "a run has processes of that name"),
        ({"a": {"serves": []}}, "at least 1 item"),
        ({"A b": {"serves": ["reference"]}}, "pattern"),
        ({"a": {"serves": ["teacher"]}}, "scoring.teacher is not set"),
        ({"a": {"serves": ["silver"]}}, "scores with 'reference', 'gold', 'proxy', 'ens'"),
        ({"a": {"serves": ["gold"]}, "b": {"serves": ["gold"]}}, "which 'a' serves"),
        ({"a": {"serves": ["gold"], "dtype": "float32"}}, "scoring.pools.a.dtype = 'float32'"),
        ({"a": {"serves": ["ens"], "quantization": "int8"}}, "reward models have their own"),
    ],
)
def test_pools_that_do_not_fit_are_refused(pools, words):
    tree = tiny_tree(scoring={"rewards": REWARDS, "reference": True, "pools": pools})
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tree, source="run.toml")
    assert words in str(error.value)


def test_a_reward_and_a_model_of_one_name_are_told_apart_by_refusing_them():
    scoring = {"rewards": [named("reference")], "pools": {"a": {"serves": ["reference"]}}}
    with pytest.raises(ConfigError, match="a reward has that name too"):
        validate(RunConfig, tiny_tree(scoring=scoring), source="run.toml")


def test_each_pool_has_its_size_its_device_and_its_precision():
    policies = {"serves": ["reference"], "num_gpus": 1, "quantization": "int8", "dtype": "float32"}
    pools = {"policies": policies, "proxies": APART["proxies"]}
    config = tiny_config(scoring={"rewards": REWARDS, "reference": True, "pools": pools})
    owners = [bundle.owner for bundle in demand(config)]
    assert owners[:5] == ["generation-0", "scoring-0", "policies-0", "proxies-0", "proxies-1"]
    assert [b.gpus for b in demand(config)][:5] == [0, 0, 1, 0, 0]
    numbers = derived(config)
    assert (numbers["policies demand"], numbers["proxies demand"]) == ("1 CPU, 1 GPU", "2 CPU")
    models = memory_needs.frozen_models(config)
    assert {name: (m.pool, m.width) for name, m in models.items()} == {
        "reference": ("policies", 1),
        "ens": ("proxies", 2),
        "ens 1": ("proxies", 2),
    }
    shape = memory_needs.Shape(num_parameters=10, hidden_size=2, num_layers=1, key_size=2)
    needs = memory_needs.of_pools(config, shape, {"reference": 10.0, "ens": 20.0, "ens 1": 20.0})
    assert {need.role: sum(need.parts.values()) for need in needs[1:]} == {
        "scoring worker": 0.0,
        "policies worker": 10.0,
        "proxies worker": 40.0,
    }
    own = config.scoring.of_pool("policies")
    assert (own.dtype, own.quantization, own.num_gpus) == ("float32", "int8", 1)
    assert config.scoring.of_pool("scoring") is config.scoring


def test_groups_are_taken_over_by_a_run_with_other_pools_of_the_same_precision():
    def made(**scoring: Any) -> str:
        return made_by(tiny_config(scoring={"rewards": REWARDS, "reference": True, **scoring}))

    assert made() == made(pools={"policies": {"serves": ["reference"], "workers": 3}})
    rounded = {"policies": {"serves": ["reference"], "quantization": "int8"}}
    assert made() != made(pools=rounded)


def test_pools_scale_by_themselves_only_where_they_are():
    scoring = {"rewards": REWARDS, "pools": {"proxies": APART["proxies"]}}
    scale = {"pools": {"proxies": {"minimum": 2, "maximum": 4}}}
    config = validate(RunConfig, tiny_tree(scoring=scoring, autoscale=scale), source="run.toml")
    assert config.autoscale is not None
    assert [*config.autoscale.scales] == ["proxies"]
    with pytest.raises(ConfigError, match="there is no such pool. Pools: generation, scoring"):
        validate(RunConfig, tiny_tree(autoscale=scale), source="run.toml")


# The control plane


class Answer:
    """What a call gives; `future` is what the caller waits for."""

    def __init__(self) -> None:
        self.given: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.given


class Method:
    def __init__(self, worker: FakeWorker, name: str) -> None:
        self.worker, self.name = worker, name

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.worker.called(self.name, arguments)


CONTROL = ("load_reference", "bring_version", "forget_versions")


class FakeWorker:
    """Answers at once but to what is in `held`; raises what `fails` has."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.held: dict[str, Answer] = {}
        self.fails: dict[str, Exception] = {}
        self.asked = asyncio.Event()
        for method in ("score", "score_part", "join", *CONTROL):
            setattr(self, method, Method(self, method))

    def called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.calls.append((name, arguments))
        self.asked.set()
        answer = self.held.get(name) or Answer()
        if name in self.fails:
            answer.given.set_exception(self.fails[name])
        elif name not in self.held:
            answer.given.set_result(f"{name} of {self.name}")
        if name in CONTROL:
            return answer
        return answer, f"{name} handle of {self.name}"


async def nothing(worker: Worker) -> None:
    """A health check that passes."""


async def client_of(**scoring: Any) -> tuple[RayScoring, dict[str, WorkerPool], list[float]]:
    config = tiny_config(scoring={"rewards": REWARDS, "max_retries": 0, **scoring})
    now = [0.0]

    async def launch(name: str) -> Worker:
        return Worker(name=name, actor=FakeWorker(name), placement=None)

    pools = {}
    for kind, section in pool_sections(config).items():
        if kind != "generation":
            pools[kind] = WorkerPool(
                kind=kind,
                launch=launch,
                retire=lambda worker: None,
                check=nothing,
                limits=PoolLimits(max_in_flight=8),
            )
            await pools[kind].start(section.workers)
    return RayScoring(pools, config, lambda: now[0]), pools, now


def calls_of(pools: dict[str, WorkerPool]) -> dict[str, list[Any]]:
    return {w.name: w.actor.calls for pool in pools.values() for w in pool.workers}


async def test_one_pool_is_asked_once():
    client, pools, _ = await client_of()
    assert await client.score("group") == ("score handle of scoring-0", "score of scoring-0")
    assert calls_of(pools) == {"scoring-0": [("score", ("group",))]}
    assert client.take_busy() == {}


async def test_several_are_asked_at_once_and_their_parts_are_joined_without_passing_through():
    client, pools, now = await client_of(pools={"proxies": {"serves": ["proxy"]}})
    slow = pools["proxies"].workers[0].actor
    slow.held["score_part"] = Answer()
    client.take_busy()
    scoring = asyncio.ensure_future(client.score("group"))
    await slow.asked.wait()
    assert not scoring.done()
    now[0] = 3.0
    slow.held["score_part"].given.set_result(4)
    assert await scoring == ("join handle of scoring-0", "join of scoring-0")
    parts = ("score_part handle of scoring-0", "score_part handle of proxies-0")
    assert calls_of(pools) == {
        "scoring-0": [("score_part", ("group",)), ("join", ("group", *parts))],
        "proxies-0": [("score_part", ("group",))],
    }
    busy = client.take_busy()
    assert busy["proxies"] == 3.0
    assert set(busy) == {"scoring", "proxies"}
    assert client.take_busy() == {"scoring": 0.0, "proxies": 0.0}


async def test_a_pool_that_serves_nothing_only_joins():
    everything = {"all": {"serves": ["gold", "proxy", "ens"]}}
    client, pools, _ = await client_of(pools=everything)
    await client.score("group")
    assert [name for name, _ in calls_of(pools)["scoring-0"]] == ["join"]


async def test_the_first_part_that_fails_is_the_groups_failure_and_the_others_are_given_up(
    monkeypatch,
):
    import ray

    client, pools, _ = await client_of(pools={"proxies": {"serves": ["proxy"]}})
    waits, fails = pools["proxies"].workers[0].actor, pools["scoring"].workers[0].actor
    waits.held["score_part"] = Answer()
    fails.fails["score_part"] = ScoringError("reward 'gold': [died]")
    cancelled: list[Any] = []
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    with pytest.raises(ScoringError, match="gold"):
        await client.score("group")
    assert cancelled == [waits.held["score_part"]]
    assert [w.num_in_flight for pool in pools.values() for w in pool.workers] == [0, 0]


async def test_only_the_pool_that_has_the_reference_is_given_one():
    pools = {"policies": {"serves": ["reference"], "workers": 2}}
    client, made, _ = await client_of(reference=True, pools=pools)
    version = client._reference.target = make_version(3)
    for kind, pool in made.items():
        for worker in pool.workers:
            await client.join(kind, worker)
    loads = {name: calls for name, calls in calls_of(made).items() if calls}
    assert loads == {f"policies-{i}": [("load_reference", (version,))] for i in range(2)}


async def test_only_the_pool_that_has_versions_forgets_them():
    pools = {"policies": {"serves": ["exact_logprobs"]}}
    client, made, _ = await client_of(exact_logprobs=True, pools=pools)
    await client.begin_anew()
    assert {name for name, calls in calls_of(made).items() if calls} == {"policies-0"}


POLICIES = {"policies": {"serves": ["exact_logprobs"], "workers": 2}}


async def test_n08_versions_are_brought_to_the_pool_that_scores_under_them_and_to_who_joins():
    client, made, _ = await client_of(exact_logprobs=True, pools=POLICIES)
    await client.follow(make_version(3))
    await client.follow(make_version(3))
    asked = {name: calls for name, calls in calls_of(made).items() if calls}
    assert asked == {f"policies-{i}": [("bring_version", (make_version(3),))] for i in range(2)}
    joins = Worker(name="policies-2", actor=FakeWorker("policies-2"), placement=None)
    await client.join("policies", joins)
    assert joins.actor.calls == [("bring_version", (make_version(3),))]
    await client.begin_anew()
    other = Worker(name="policies-3", actor=FakeWorker("policies-3"), placement=None)
    await client.join("policies", other)
    assert other.actor.calls == [], "that version may be gone"


async def test_n08_a_storage_that_is_too_slow_for_scorers_kills_none_and_fails_no_publish():
    client, made, _ = await client_of(exact_logprobs=True, pools=POLICIES)
    for worker in made["policies"].workers:
        worker.actor.fails["bring_version"] = StalledError("version 3 was not read within 60 s")
    await client.follow(make_version(3))
    assert [w.state for w in made["policies"].workers] == [State.LIVE, State.LIVE]
    assert made["policies"].restarts.total == 0


async def test_n08_workers_that_are_behind_forget_versions_too():
    client, made, _ = await client_of(exact_logprobs=True, pools=POLICIES)
    slow = made["policies"].workers[1]
    slow.state = State.BEHIND
    await client.begin_anew()
    assert slow.actor.calls == [("forget_versions", ())]
