"""Critiques and revisions by principles: chains, what fails in them, the rows, and who is asked."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_cluster.config.dataset_config import ChatEndpoint
from rlhf_cluster.errors import (
    ConfigError,
    RecordLost,
    RlhfError,
    ScoringError,
    WorkerError,
)
from rlhf_cluster.records import (
    Prompt,
    Ticket,
)
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.synthetic_data.answers_file import (
    Answers,
    Round,
)
from rlhf_cluster.synthetic_data.revise_answers import (
    PROBLEMS,
    EndpointAsker,
    drawn,
    revise,
)
from tests.support.builders.revising_model import (
    PRINCIPLES,
    PROMPTS,
    SAMPLES,
    Model,
    Scoring,
    how,
    ids_of,
    producer,
    run,
    text_of,
)


def test_each_round_criticises_the_last_revision_by_its_principle_and_every_text_is_kept(tmp_path):
    model, scoring = Model(), Scoring()
    found = run(producer(tmp_path, model, scoring=scoring))
    assert [group.number for group in found] == list(range(PROMPTS))
    wanted: Counter[str] = Counter()
    for group in found:
        wanted[str(group.prompt)] += 1
        assert [answer.text for answer in group.answers] == [f"{group.prompt}/{i}" for i in (0, 1)]
        assert (group.unrevised, group.scorer_version) == ((), "v1")
        for index, answer in enumerate(group.answers):
            principles = drawn(PRINCIPLES, 2, f"0/{group.number}/{index}")
            text, rounds = answer.text, []
            for principle in principles:
                critique = f"({principle} of {text})"
                wanted[f"C|{group.prompt}|{text}|{principle}"] += 1
                wanted[f"R|{text}|{critique}"] += 1
                text += "+"
                rounds.append(Round(principle=principle, critique=critique, revision=text))
            own = answer.revised
            assert own is not None
            assert (own.text, own.rounds) == (text, tuple(rounds))
            assert (answer.reward, own.reward) == (0.0, 2.0)
            assert own.unusable == {}
    assert Counter(request for _, request in model.asked) == wanted
    for group in scoring.groups:
        first, last = group.rollouts
        assert text_of(last.response_ids) == text_of(first.response_ids) + "++"
        assert last.prompt_ids is group.prompt.token_ids, "scored as a response to the prompt"
        assert str(group.prompt.source).startswith("prompt")
    numbers = [number for number, _ in model.asked] + [g.ticket.number for g in scoring.groups]
    assert len(set(numbers)) == len(numbers), "every request has a random stream of its own"


def test_principles_follow_from_the_seed_and_none_comes_again_before_all_came():
    for seed in map(str, range(20)):
        found = drawn(PRINCIPLES, 7, seed)
        assert found == drawn(PRINCIPLES, 7, seed)
        assert {*found[:3]} == {*found[3:6]} == {*PRINCIPLES}
    assert {drawn(PRINCIPLES, 1, str(seed))[0] for seed in range(20)} == {*PRINCIPLES}


def test_a_killed_stage_asks_only_what_is_missing_and_ends_with_the_same_texts(tmp_path):
    whole = run(producer(tmp_path))
    path = tmp_path / "groups.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    kept = {Answers.from_line(line).prompt for line in lines[:2]}
    model = Model()
    assert run(producer(tmp_path, model)) == whole
    assert not any(prompt in request for _, request in model.asked for prompt in map(str, kept))


@pytest.mark.parametrize(
    ("reply", "problem"),
    [(("", False), "empty_{}"), ((" \n", False), "empty_{}"), (("half", True), "cut_{}")],
)
@pytest.mark.parametrize("kind", ["critique", "revision"])
def test_a_reply_of_no_use_is_counted_and_asked_for_again(tmp_path, reply, problem, kind):
    mark, problem = kind[0].upper(), problem.format(kind)
    seen: Counter[str] = Counter()

    def odd(number: int, request: str) -> tuple[str, bool] | None:
        """The first reply to each request of the kind."""
        seen[request] += 1
        # a rollout has at least one token: one without text
        text, cut = reply
        return (text or "\n", cut) if request[0] == mark and seen[request] == 1 else None

    found = run(producer(tmp_path, Model(odd=odd), how(attempts=2)))
    revised = [answer.revised for group in found for answer in group.answers]
    assert len(revised) == PROMPTS * SAMPLES
    assert problem in PROBLEMS
    for own in revised:
        assert own is not None
        assert own.text.endswith("++"), "the second reply was taken"
        assert own.unusable == {problem: 2}, "once a round"


def test_a_response_that_cannot_be_revised_is_kept_apart_with_its_reason(tmp_path):
    def odd(number: int, request: str) -> tuple[str, bool] | None:
        if request == "prompt 1":
            return (" ", False)
        broken = request.startswith("R|prompt 2/1+|")  # after a first round that went well
        return ("x", True) if broken else None

    model, scoring = Model(odd=odd), Scoring()
    found = run(producer(tmp_path, model, how(attempts=3), scoring=scoring))
    problems = {g.number: [lost.problem for lost in g.unrevised] for g in found if g.unrevised}
    assert problems == {1: ["empty_response"] * SAMPLES, 2: ["cut_revision"]}
    [lost] = found[2].unrevised
    assert (lost.text, lost.unusable) == ("prompt 2/1", {"cut_revision": 3})
    first, second = lost.rounds
    assert first.revision == "prompt 2/1+"
    assert second.critique.endswith("of prompt 2/1+)")
    assert second.revision == ""
    assert sum(request.startswith("R|prompt 2/1+|") for _, request in model.asked) == 3
    numbers = [number for number, _ in model.asked] + [g.ticket.number for g in scoring.groups]
    assert len(set(numbers)) == len(numbers), "each attempt has a random stream of its own"
    assert len(found[2].answers) == 1
    assert len(scoring.groups) == (PROMPTS - 1) * SAMPLES - 1, "nobody scores what is given up"


def test_a_request_that_is_too_long_is_neither_shortened_nor_asked_again(tmp_path):
    model = Model()
    limit = len("C|prompt 0|prompt 0/0|be honest")
    found = run(producer(tmp_path, model, max_prompt_tokens=limit))
    assert {lost.problem for group in found for lost in group.unrevised} == {"long_revision"}
    assert all(lost.unusable == {} for group in found for lost in group.unrevised)
    assert not any(request.startswith("R") for _, request in model.asked)
    asked: list[int] = []

    async def ask(number: int, request: str) -> None:
        asked.append(number)

    chain = asyncio.run(revise("why?", "so", PRINCIPLES, how(attempts=5), ask))
    assert (chain.problem, len(asked)) == ("long_critique", 1)
    (tmp_path / "shorter").mkdir()
    found = run(producer(tmp_path / "shorter", max_prompt_tokens=10))
    assert {lost.problem for group in found for lost in group.unrevised} == {"long_critique"}


def test_a_failed_request_discards_its_prompt_which_is_tried_again_the_next_time(tmp_path):
    def fail(ticket: Ticket, prompt: Prompt) -> RlhfError | None:
        return WorkerError("broken") if "R|prompt 3/1" in str(prompt.source) else None

    told: list[int] = []
    work = producer(tmp_path, Model(fail=fail), discarded=lambda number, error: told.append(number))
    found = run(work)
    assert told == [3]
    assert work.num_discarded == {"WorkerError": 1}
    assert [group.number for group in found] == [0, 1, 2, 4, 5]
    again = run(producer(tmp_path))
    assert [group.number for group in again] == list(range(PROMPTS))


def test_a_record_that_is_lost_on_its_way_is_made_again(tmp_path):
    lost: set[tuple[str, int]] = set()

    async def fetch(handle: Any) -> Any:
        """The first of each kind and ticket is lost."""
        what = (type(handle).__name__, handle.ticket.number)
        if what not in lost:
            lost.add(what)
            raise RecordLost("with its node")
        return handle

    whole = run(producer(tmp_path))
    (tmp_path / "lossy").mkdir()
    work = producer(tmp_path / "lossy", fetch=fetch)
    assert run(work) == whole
    assert not work.num_discarded


# Endpoints


@dataclass
class Server:
    """A chat endpoint that answers `reply(request)`: a text and how it ended, or an error."""

    reply: Callable[[str], Any]
    questions: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: Any, deadline: float) -> Any:
        self.questions.append(question)
        found = self.reply(question["messages"][0]["content"])
        if isinstance(found, Exception):
            raise found
        text, reason = found
        return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def endpoint(**changes: Any) -> ChatEndpoint:
    return ChatEndpoint.model_validate({"url": "http://judge/v1", "model": "m", **changes})


def test_an_endpoint_revises_in_place_of_the_model_and_its_text_is_what_is_scored(tmp_path):
    server = Server(lambda request: (f" {Model()._text(request, 0)}\n", "stop"))
    model, scoring = Model(), Scoring()
    section = endpoint(temperature=0.5, max_tokens=77)
    work = producer(
        tmp_path,
        model,
        scoring=scoring,
        asker=EndpointAsker(section, server),
        encode=lambda text: [*ids_of(text).tolist(), 10],  # an end that decodes to white space
    )
    found = run(work)
    assert [request for _, request in model.asked] == [f"prompt {n}" for n in range(PROMPTS)]
    assert len(server.questions) == PROMPTS * SAMPLES * 4
    assert all(q["temperature"] == 0.5 and q["max_tokens"] == 77 for q in server.questions)
    for group in found:
        for answer in group.answers:
            assert answer.revised is not None
            assert answer.revised.rounds[-1].revision == f"{answer.text}++"
            assert answer.revised.text == f"{answer.text}++\n", "as the rewards read it"
            assert answer.revised.reward == 2.0


def test_a_revision_that_the_tokenizer_cannot_write_is_given_up_and_named(tmp_path):
    server = Server(lambda request: (Model()._text(request, 0), "stop"))
    found = run(
        producer(
            tmp_path,
            asker=EndpointAsker(endpoint(), server),
            encode=lambda text: [ord(c) for c in text if c != "+"],
        )
    )
    problems = [lost.problem for group in found for lost in group.unrevised]
    assert problems == ["altered_revision"] * PROMPTS * SAMPLES


def test_no_more_requests_are_at_an_endpoint_than_allowed_and_so_many_are():
    answered = threading.Event()

    def reply(request: str) -> tuple[str, str]:
        assert answered.wait(60)
        return ("fine", "stop")

    async def ask_all() -> tuple[int, list[Any]]:
        asker = EndpointAsker(endpoint(parallel=3), Server(reply))
        before = set(threading.enumerate())
        asking = [asyncio.create_task(asker.ask(n, "why?")) for n in range(9)]
        for _ in range(20):  # each has come as far as it can
            await asyncio.sleep(0)
        at_once = len(set(threading.enumerate()) - before)
        answered.set()
        return at_once, await asyncio.gather(*asking)

    at_once, replies = asyncio.run(ask_all())
    assert [each.text for each in replies] == ["fine"] * 9
    assert at_once == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (RewardFailure("cannot be asked", "remote"), "stage.revise.endpoint: cannot be asked"),
        ((None, "stop"), "expected choices"),
    ],
)
def test_an_endpoint_that_does_not_answer_is_a_failure_and_never_a_text(reply, words):
    asker = EndpointAsker(endpoint(), Server(lambda request: reply))
    with pytest.raises(ScoringError, match=words):
        asyncio.run(asker.ask(0, "why?"))


def test_an_endpoint_s_reply_that_ended_at_its_limit_is_cut():
    for reason, cut in (("length", True), ("stop", False), (None, False)):
        asker = EndpointAsker(endpoint(), Server(lambda request, reason=reason: ("half", reason)))
        reply = asyncio.run(asker.ask(0, "why?"))
        assert reply is not None
        assert reply.cut is cut


def test_a_key_that_is_not_there_is_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("REVISER_KEY", raising=False)
    with pytest.raises(
        ConfigError, match="REVISER_KEY, which is not set where the server is asked"
    ):
        EndpointAsker.of(endpoint(api_key_env="REVISER_KEY"))
