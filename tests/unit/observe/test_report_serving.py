"""The live report: one page, for who has its address; and the local Prometheus around it."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from rlhf_cluster.cli.commands import main
from rlhf_cluster.errors import RunError
from rlhf_cluster.observe import local_prometheus
from rlhf_cluster.observe.report.serve import serve
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot
from tests.support.builders.run_configs import tiny_config


def get(address: str, method: str = "GET") -> tuple[int, str, http.client.HTTPMessage]:
    request = urllib.request.Request(address, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_the_page_is_refreshed_and_kept_by_nobody():
    with serve(lambda: "<p>seven</p>", refresh_s=3) as address:
        status, text, headers = get(address)
    assert (status, text) == (200, "<p>seven</p>")
    assert headers["Refresh"] == "3"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Content-Type"] == "text/html; charset=utf-8"


def test_only_the_address_with_the_token_gets_anything():
    with serve(lambda: "secret page") as address:
        base, token = address.rsplit("/", 1)
        assert base.startswith("http://127.0.0.1:")
        assert len(token) >= 43, "256 bits"
        for path in ("", "x", token[:-1], f"{token}x", f"{token}/", f"{token}?x=1", f"x/{token}"):
            status, text, headers = get(f"{base}/{path}")
            assert status == 403, path
            assert "secret" not in text
            assert headers["Refresh"] is None
        assert get(f"{base}/report.html")[0] == 403
        assert get(address, "HEAD")[:2] == (200, "")
        assert get(address, "POST")[0] == 501
        assert get(address)[0] == 200


def test_two_reports_have_different_tokens():
    with serve(lambda: "a") as first, serve(lambda: "b") as second:
        assert first.rsplit("/", 1)[1] != second.rsplit("/", 1)[1]


def test_a_taken_port_is_said_and_the_address_ends_with_the_block():
    with serve(lambda: "a") as address:
        port = int(address.split(":")[2].split("/")[0])
        with pytest.raises(RunError, match=f"{port}: cannot serve"), serve(lambda: "b", port):
            pass
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=60)


def test_many_who_look_at_once_share_a_page_and_a_failure_is_not_kept():
    made = []

    def page() -> str:
        made.append(1)
        if len(made) == 1:
            raise RunError("metrics.jsonl: line <3> is damaged")
        return f"page {len(made)}"

    with serve(page, refresh_s=0) as address:
        assert "line &lt;3&gt; is damaged" in get(address)[1]
        assert get(address)[1] == "page 2"
    with serve(page, refresh_s=3600) as address:
        seen: list[str] = []
        looks = [threading.Thread(target=lambda: seen.append(get(address)[1])) for _ in range(5)]
        for look in looks:
            look.start()
        for look in looks:
            look.join(60)
        assert seen == ["page 3"] * 5


def test_a_page_that_takes_long_is_asked_for_again_and_made_once():
    allowed, made = threading.Event(), []

    def page() -> str:
        made.append(1)
        assert allowed.wait(60)
        return "slow page"

    with serve(page, refresh_s=7, make_timeout_s=0.01) as address:
        for _ in range(3):
            status, text, headers = get(address)
            assert (status, headers["Retry-After"], headers["Refresh"]) == (503, "7", "7")
            assert text == "503: no report within 0.01 s; it is being made. Ask again in 7 s\n"
        allowed.set()
        deadline = time.monotonic() + 60
        while (found := get(address))[0] == 503:  # until its thread has come to its end
            assert time.monotonic() < deadline
    assert found[:2] == (200, "slow page")
    assert len(made) == 1


def test_an_error_that_nobody_foresaw_is_shown_and_the_next_page_is_made():
    pages = iter([])

    with serve(lambda: next(pages), refresh_s=0) as address:
        assert "No report: StopIteration" in get(address)[1]
        pages = iter(["page"])
        assert get(address)[1] == "page"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(run={"root": str(tmp_path / "runs")})
    with RunDir.create(config.run_dir, config) as made:
        made.write_status(Snapshot(run="tiny", state="running", step=1, num_steps=3, time_s=1.0))
    return made


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "tiny", "--live", "--out", "x.html"], "--out with --live"),
        (["report", "tiny", "--port", "8000"], "--port without --live"),
        (["monitor", "tiny", "--prometheus", "nowhere"], "no program that can be started"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, capsys, arguments, words):
    assert main(arguments) == 1
    assert words in capsys.readouterr().err


def test_a_report_lies_in_its_run_directory_unless_told_otherwise(run, capsys, tmp_path):
    assert main(["report", "tiny"]) == 0
    assert (run.path / "report.html").exists()
    assert not (tmp_path / "report.html").exists()
    assert main(["report", "tiny", "--out", "mine.html"]) == 0
    assert (tmp_path / "mine.html").exists()
    capsys.readouterr()


def test_without_prometheus_it_says_how_to_get_it(run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["monitor", "tiny"]) == 1
    said = capsys.readouterr().err
    assert "no Prometheus is installed. apt-get install prometheus" in said
    assert "docker compose -f deploy/compose.yml" in said


def test_it_scrapes_the_nodes_of_the_run_or_follows_rays_list_of_them(run, tmp_path):
    with pytest.raises(RunError, match="does not say where the run's metrics are"):
        local_prometheus.targets_of(run.path)
    written = {"ray_address": "127.0.0.1:6379", "metrics": ["127.0.0.1:4001"]}
    (run.path / "control.json").write_text(json.dumps(written))
    targets = local_prometheus.targets_of(run.path)
    assert targets == ["127.0.0.1:4001"]
    listed = tmp_path / "discovery.json"
    assert local_prometheus.find_discovery(targets, listed) is None
    for nodes, expected in ((["127.0.0.1:5"], None), (["127.0.0.1:4001", "10.0.0.2:1"], listed)):
        listed.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": nodes}]))
        assert local_prometheus.find_discovery(targets, listed) == expected, "not another cluster"


@pytest.mark.parametrize("discovery", [None, Path("/tmp/ray/list.json")])
def test_the_configuration_is_whole(run, discovery):
    folder = run.path / "monitor"
    path = local_prometheus.write_configuration(folder, ["127.0.0.1:4001"], discovery)
    written = yaml.safe_load(path.read_text())
    (job,) = written["scrape_configs"]
    assert job["job_name"] == "ray"
    if discovery is None:
        assert job["static_configs"] == [{"targets": ["127.0.0.1:4001"]}]
    else:
        assert job["file_sd_configs"][0]["files"] == [str(discovery)]
    assert written["rule_files"] == ["recording.rules.yml", "alerts.rules.yml"]
    for name in written["rule_files"]:
        assert (folder / name).read_text() == (
            Path(__file__).parents[3] / f"deploy/prometheus/{name}"
        ).read_text()
