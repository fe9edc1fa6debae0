"""Remote rewards against a real server on this machine: every way to answer badly, and the judge."""

import errno
import logging
import threading

import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.http_client import MAX_ANSWER_BYTES, Server
from rlhf_cluster.rewards.http_reward import Http, HttpConfig, join_scores
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from tests.support.builders.scored_groups import failure_of, score
from tests.support.servers.scripted_server import never, scored, serving

serve = pytest.fixture(serving)

KEY = "sk-very-secret-0123456789"


def http(server, waited=None, **keys):
    config = HttpConfig(url=server.url + "/score", **keys)
    reward = Http(config, RewardContext())
    if waited is not None:
        reward._server = Server(config, wait=waited.append)
    return reward


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


def drips_headers(handler):
    """The same before the body has begun."""
    handler.send_response(200)
    handler.flush_headers()
    try:
        while not handler.server.ended.wait(0.01):
            handler.wfile.write(b"x")
    except OSError:
        pass


@pytest.mark.timeout(60)
@pytest.mark.parametrize("way", [drips, drips_headers, never])
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
    assert f"Errno {errno.ECONNREFUSED}" in str(failure)


def test_an_answer_without_end_is_refused_at_the_limit(serve):
    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while not handler.server.ended.is_set():
                handler.wfile.write(b" " * 65536)
        except OSError:
            pass

    failure = failure_of(http(serve(lambda *_: endless), [], attempts=1, attempt_s=10.0), "a")
    assert failure.reason == "reply"
    assert f"more than {MAX_ANSWER_BYTES} bytes" in str(failure)


def test_a_proxy_of_the_environment_sees_no_question(serve, monkeypatch):
    server, proxy = serve(scored), serve(scored)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert score(http(server), "abc") == [3.0]
    assert (len(server.requests), len(proxy.requests)) == (1, 0)


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


@pytest.mark.parametrize("url", ["http://x:99999", "http://xn--.com", "http://[::1"])
def test_a_url_that_no_request_can_go_to_is_refused_when_the_reward_is_built(url):
    with pytest.raises(ConfigError, match="url 'http://"):
        Http(HttpConfig(url=url), RewardContext())


@pytest.mark.parametrize(
    "url", ["ftp://x", "x:80", "http://user:word@x", "http://x?key=1", "http://"]
)
def test_a_url_that_is_none_or_holds_secrets_is_refused(url):
    with pytest.raises(ConfigError):
        validate(HttpConfig, {"url": url}, "run.toml")
