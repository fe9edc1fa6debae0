"""Remote rewards against a real server on this machine: every way to answer badly, and the judge."""

import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.base import RewardContext
from rlhf_cluster.rewards.failure import RewardFailure
from rlhf_cluster.rewards.http_reward import Http, HttpConfig, join_scores
from rlhf_cluster.rewards.judge import Judge, JudgeConfig, meetings, shares
from rlhf_cluster.rewards.remote import Server
from tests.rewarding import make_prompt, make_rollouts

KEY = "sk-very-secret-0123456789"


class ScriptedServer(ThreadingHTTPServer):
    """Answers each request by `answer(question, number)`: (status, bytes), or a callable that gets
    the handler. Keeps every request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.counting = threading.Lock()
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counting:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), question))
        answer = self.server.answer(question, number)
        if callable(answer):
            answer(self)
            return
        status, body = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Location", self.server.url + "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def serve():
    started = []

    def begin(answer):
        server = ScriptedServer(answer)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield begin
    for server, thread in started:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=30)


def scored(question, _):
    scores = [{"id": i["id"], "score": float(len(i["completion"]))} for i in question["items"]]
    return 200, json.dumps({"scores": scores[::-1]}).encode()


def http(server, waited=None, **keys):
    config = HttpConfig(url=server.url + "/score", **keys)
    reward = Http(config, RewardContext())
    if waited is not None:
        reward._server = Server(config, wait=waited.append)
    return reward


def score(reward, *completions, columns=None, source="2 + 2 ="):
    prompt = make_prompt(source, columns or {"answer": "4"})
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


def failure_of(reward, *completions):
    with pytest.raises(RewardFailure) as failure:
        score(reward, *completions)
    return failure.value


def test_scores_that_come_in_another_order_are_joined_by_their_ids(serve):
    server = serve(scored)
    assert score(http(server, columns=["answer"]), "a", "bbb", "cc\u00e9") == [1.0, 3.0, 3.0]
    [(path, headers, question)] = server.requests
    assert path == "/score"
    assert "Authorization" not in headers
    assert question["items"][1] == {
        "id": "1:g0/1",
        "prompt": "2 + 2 =",
        "completion": "bbb",
        "columns": {"answer": "4"},
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"scores": [1.0, 2.0]}, "ids"),
        ([1.0, 2.0], "reply"),
        ({"score": 1}, "reply"),
        ({"scores": [{"id": "a", "score": 1}]}, "length"),
        ({"scores": [{"id": "a", "score": 1}, {"id": "a", "score": 2}]}, "ids"),
        ({"scores": [{"id": "a", "score": 1}, {"id": "c", "score": 2}]}, "ids"),
        ({"scores": [{"id": "a", "score": 1}, {"id": 5, "score": 2}]}, "ids"),
        ({"scores": [{"id": "a", "score": 1}, {"id": "b"}]}, "none"),
        ({"scores": [{"id": "a", "score": 1}, {"id": "b", "score": "2"}]}, "not_a_number"),
        ({"scores": [{"id": "a", "score": 1}, {"id": "b", "score": float("nan")}]}, "nan"),
        ({"scores": [{"id": "a", "score": 1}, {"id": "b", "score": float("inf")}]}, "infinite"),
    ],
    ids=str,
)
def test_s23_an_answer_that_cannot_be_used_is_an_error_and_never_a_zero(answer, reason):
    with pytest.raises(RewardFailure) as failure:
        join_scores(answer, ["a", "b"])
    assert failure.value.reason == reason


@pytest.mark.parametrize(
    ("status", "body", "reason", "times"),
    [
        (500, b"down", "remote", 3),
        (503, b"", "remote", 3),
        (429, b"slower", "remote", 3),
        (400, b"what?", "remote", 1),
        (401, b"who?", "remote", 1),
        (302, b"", "remote", 1),
        (200, b"no json", "reply", 1),
        (200, b"[" * 100_000, "reply", 1),
    ],
)
def test_what_may_pass_is_asked_again_after_growing_pauses_and_nothing_else(
    serve, status, body, reason, times
):
    server, waited = serve(lambda *_: (status, body)), []
    failure = failure_of(http(server, waited, attempts=3, backoff_s=0.5), "a")
    assert failure.reason == reason
    assert len(server.requests) == times
    assert waited == [0.5, 1.0][: times - 1]


def test_a_server_that_comes_back_is_asked_until_it_answers(serve):
    server, waited = serve(lambda q, n: (503, b"") if n < 2 else scored(q, n)), []
    assert score(http(server, waited), "abc") == [3.0]
    assert len(server.requests) == 3


def test_an_answer_that_breaks_off_is_asked_for_again(serve):
    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"scores": [')

    server, waited = serve(lambda q, n: half if n == 0 else scored(q, n)), []
    assert score(http(server, waited), "abc") == [3.0]
    assert len(waited) == 1


def test_pauses_stop_growing_and_never_pass_the_deadline(serve):
    server, waited = serve(lambda *_: (503, b"")), []
    failure_of(http(server, waited, attempts=9, backoff_s=4.0, timeout_s=1000), "a")
    assert waited == [4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0, 30.0]
    waited.clear()
    failure_of(http(server, waited, attempts=9, backoff_s=4.0, timeout_s=3.9), "a")
    assert waited == []


def drips(handler):
    """One byte after the other, for ever: no single read is ever late."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while not handler.server.ended.wait(0.01):
            handler.wfile.write(b" ")
    except OSError:
        pass


def never(handler):
    handler.server.ended.wait(60)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("way", [drips, never])
def test_s23_a_server_that_hangs_costs_its_deadline_and_is_an_error(serve, way):
    server, waited = serve(lambda *_: way), []
    failure = failure_of(http(server, waited, attempts=2, attempt_s=0.2), "a")
    assert failure.reason == "timeout"
    assert "2 attempts" in str(failure)


def test_a_server_that_is_not_there_is_an_error_naming_its_url(serve):
    server = serve(scored)
    reward = http(server, [], attempts=2)
    server.shutdown()
    server.server_close()
    failure = failure_of(reward, "a")
    assert failure.reason == "remote"
    assert server.url in str(failure)


@pytest.mark.timeout(60)
def test_close_ends_the_wait_between_two_attempts(serve):
    asked = threading.Event()

    def busy(*_):
        asked.set()
        return 503, b""

    reward = http(serve(busy), backoff_s=30.0)
    failures = []
    asking = threading.Thread(target=lambda: failures.append(failure_of(reward, "a")))
    asking.start()
    assert asked.wait(30)
    reward.close()
    asking.join(timeout=25)
    assert [f.reason for f in failures] == ["remote"]


def test_the_key_comes_from_the_environment_and_stands_nowhere_else(serve, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    server = serve(lambda *_: (401, f"wrong key {KEY}".encode()))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    reward = http(server, api_key_env="JUDGE_KEY")
    failure = failure_of(reward, "a")
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    shown = f"{failure} {failure.__cause__} {caplog.text} {reward._config!r}"
    assert "wrong key ***" in shown
    assert KEY not in shown


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "line\nline", "schl\u00fcssel"])
def test_a_key_that_cannot_be_sent_is_refused_at_the_start_without_showing_it(value, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="JUDGE_KEY") as error:
        Http(HttpConfig(url="http://x", api_key_env="JUDGE_KEY"), RewardContext())
    if value and value.strip():
        assert value not in str(error.value)


@pytest.mark.parametrize(
    "url", ["ftp://x", "x:80", "http://user:word@x", "http://x?key=1", "http://"]
)
def test_a_url_that_is_none_or_holds_secrets_is_refused(url):
    with pytest.raises(ConfigError):
        validate(HttpConfig, {"url": url}, "run.toml")


def says(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def judge(server, waited=None, **keys):
    config = JudgeConfig(url=server.url + "/v1", model="m", parallel=4, **keys)
    return Judge(config, RewardContext())


def test_a_pointwise_judge_rates_each_completion_on_the_scale(serve):
    def answer(question, _):
        text = question["messages"][0]["content"]
        rating = "[[8]]" if "<answer>\ngood\n</answer>" in text else "first [[9]], no: [[ 2.5 ]]"
        return says(rating)

    server = serve(answer)
    reward = judge(server, criteria="Be brief.", reference_column="answer")
    assert score(reward, "bad", "good", "bad") == [0.25, 0.8, 0.25]
    path, _, question = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (question["model"], question["temperature"]) == ("m", 0.0)
    text = question["messages"][0]["content"]
    for part in ("Be brief.", "2 + 2 =", "<reference answer>\n4\n"):
        assert part in text


@pytest.mark.parametrize("text", ["no verdict", "[[11]]", "[[-1]]", "[[nan]]", "[[good]]", ""])
def test_s23_a_judge_without_a_verdict_is_asked_again_and_then_an_error(serve, text):
    server = serve(lambda *_: says(text))
    failure = failure_of(judge(server, verdict_attempts=2), "a")
    assert failure.reason == "reply"
    assert len(server.requests) == 2
    server = serve(lambda q, n: says(text) if n == 0 else says("[[5]]"))
    assert score(judge(server), "a") == [0.5]


@pytest.mark.parametrize("answer", [{}, {"choices": []}, [], {"choices": [{"message": None}]}])
def test_an_answer_in_another_form_is_an_error(serve, answer):
    server = serve(lambda *_: (200, json.dumps(answer).encode()))
    assert failure_of(judge(server), "a").reason == "reply"


def verdict_of(question, better):
    """The verdict of a judge that knows how good each completion is."""
    text = question["messages"][0]["content"]
    first, second = (text.partition(f"<answer {s}>\n")[2].partition("\n")[0] for s in "AB")
    return (
        "[[C]]"
        if better(first) == better(second)
        else "[[A]]"
        if better(first) > better(second)
        else "[[B]]"
    )


def test_a_pairwise_judge_sees_each_pair_both_ways(serve):
    server = serve(lambda q, _: says(verdict_of(q, len)))
    found = score(judge(server, mode="pairwise", opponents=3), "a", "bbb", "cc", "dd")
    assert found == [0.0, 1.0, 0.5, 0.5]
    assert len(server.requests) == 12
    seen = {q["messages"][0]["content"].partition("<answer A>")[2] for _, _, q in server.requests}
    assert len(seen) == 12


def test_a_judge_that_prefers_a_position_prefers_nobody(serve):
    server = serve(lambda *_: says("[[A]]"))
    assert score(judge(server, mode="pairwise"), "a", "bb", "ccc") == [0.5, 0.5, 0.5]


def test_s23_one_judgement_that_cannot_be_had_is_an_error_of_the_group(serve):
    server = serve(lambda q, n: says("[[A]]") if n != 2 else (400, b"no"))
    assert failure_of(judge(server, mode="pairwise"), "a", "bb", "ccc").reason == "remote"


def test_a_pair_needs_two(serve):
    assert failure_of(judge(serve(scored), mode="pairwise"), "a").reason == "length"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("opponents", [1, 2, 3, 9])
def test_each_pair_meets_once_and_everyone_as_often(count, opponents):
    pairs = meetings(count, opponents)
    assert len(pairs) == len({frozenset(pair) for pair in pairs})
    met = [sum(one in pair for pair in pairs) for one in range(count)]
    assert set(met) == {min(2 * opponents, count - 1)}


def test_shares_of_judgements_by_hand():
    orders = [(0, 1), (1, 0), (1, 2), (2, 1)]
    assert shares(orders, [1.0, 0.5, 0.0, 1.0], 3) == [0.75, 0.125, 1.0]


def test_criteria_that_hold_a_verdict_are_refused():
    with pytest.raises(ConfigError, match="marks a verdict"):
        validate(
            JudgeConfig, {"url": "http://x", "model": "m", "criteria": "say [[1]]"}, "run.toml"
        )


@pytest.mark.timeout(60)
def test_a_pair_is_judged_by_one_principle_in_both_positions(serve):
    principles = [f"Principle {n}." for n in range(4)]
    server = serve(lambda *_: says("[[C]]"))
    reward = judge(server, mode="pairwise", opponents=4, principles=principles, criteria="Always.")
    assert score(reward, "one", "two", "three", "four", "five") == [0.5] * 5
    met: dict[frozenset[str], set[str]] = {}
    for _, _, question in server.requests:
        text = question["messages"][0]["content"]
        assert "Always.\n" in text
        [given] = [principle for principle in principles if principle in text]
        met.setdefault(frozenset(re.findall(r"<answer [AB]>\n(\w+)\n", text)), set()).add(given)
    assert len(met) == 10
    assert all(len(given) == 1 for given in met.values())
    assert len(set().union(*met.values())) > 1


@pytest.mark.parametrize(
    ("principles", "words"), [(["say [[1]]"], "a principle holds"), ([" "], "blank text")]
)
def test_principles_that_no_judge_could_use_are_refused(principles, words):
    tree = {"url": "http://x", "model": "m", "principles": principles}
    with pytest.raises(ConfigError, match=words):
        validate(JudgeConfig, tree, "run.toml")


def test_a_group_that_is_not_judged_by_its_deadline_is_an_error(serve):
    server = serve(lambda *_: never)
    failure = failure_of(judge(server, timeout_s=0.2), *"abcdefgh")
    assert failure.reason == "timeout"
