"""`report --live` and `monitor` as a user has them: processes that end when they are asked to."""

import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rlhf_cluster.errors import RunError, StalledError
from rlhf_cluster.observe import local_prometheus
from rlhf_cluster.observe.report.page import page
from rlhf_cluster.observe.report.read_run import read_run
from rlhf_cluster.observe.report.serve import serve
from rlhf_cluster.run.run_directory import find_run
from tests.support.builders.recorded_run import record_run
from tests.support.checks.deployed import ALERTS
from tests.support.processes.free_ports import free_ports
from tests.support.servers.browser import (
    CHROMIUM,
    WITHIN_S,
    check,
    look,
    texts_until,
)

REPOSITORY = Path(__file__).parents[2]
FETCHED = REPOSITORY / ".venv" / "prometheus" / "usr" / "bin" / "prometheus"
PROMETHEUS = shutil.which("prometheus") or (str(FETCHED) if FETCHED.exists() else None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as reply:
        return reply.read().decode()


def test_a_live_report_is_served_until_it_is_interrupted(start_serving, tmp_path):
    path = record_run(tmp_path, steps=6)
    process, address = start_serving("report", str(path), "--live")
    text = get(address)
    assert text.startswith("<!doctype html>")
    assert "Where it stands" in text
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not (path / "report.html").exists()


@needs_chromium
def test_the_report_is_whole_on_a_desk_and_a_phone_in_light_and_in_dark(tmp_path):
    run = find_run(str(record_run(tmp_path, steps=30)))
    with serve(lambda: page([read_run(run)], 0.0)) as address:
        check(look(address))


@needs_chromium
def test_a_browser_asks_again_by_itself_for_a_page_that_took_too_long():
    shown = threading.Event()

    def slow() -> str:
        assert shown.wait(WITHIN_S)
        return "<title>report</title>it is there"

    with serve(slow, refresh_s=1, make_timeout_s=0.2) as address:
        first, *_, last = texts_until(address, "it is there", shown.set)
    assert first.startswith("503: no report within 0.2 s")
    assert last == "it is there"


@pytest.mark.skipif(
    PROMETHEUS is None, reason="Prometheus is not installed: make promtool fetches it"
)
def test_a_real_prometheus_has_our_rules_and_ends_with_the_command(start_serving, tmp_path):
    path, port = record_run(tmp_path, steps=2), free_ports(1)[0]
    process, address = start_serving(
        *("monitor", str(path), "--prometheus", str(PROMETHEUS)),
        *("--port", str(port), "--target", "127.0.0.1:1"),
    )
    assert address == f"http://127.0.0.1:{port}"
    groups = json.loads(get(f"{address}/api/v1/rules?type=alert"))["data"]["groups"]
    assert {rule["name"] for group in groups for rule in group["rules"]} == {a.name for a in ALERTS}
    deadline, targets = time.monotonic() + 120, []
    while not targets:  # it looks for them a few seconds after it is ready
        assert time.monotonic() < deadline
        time.sleep(0.2)
        targets = json.loads(get(f"{address}/api/v1/targets"))["data"]["activeTargets"]
    assert [t["discoveredLabels"]["__address__"] for t in targets] == ["127.0.0.1:1"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        get(f"{address}/-/ready")


# A program that answers as Prometheus does, given the same arguments.
STAND_IN = """#!/usr/bin/env python3
import http.server, sys
words = dict(word.split("=", 1) for word in sys.argv[1:])
if "@FAILS@" == "yes":
    print("err: opening storage failed")
    sys.exit(3)
assert open(words["--config.file"]).read()
host, port = words["--web.listen-address"].split(":")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/-/ready" and "@READY@" == "yes" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer((host, int(port)), Answer).serve_forever()
"""


def stand_in(tmp_path: Path, fails: bool = False, ready: bool = True) -> Path:
    text = STAND_IN.replace("@FAILS@", "yes" if fails else "no")
    path = tmp_path / "prometheus"
    path.write_text(text.replace("@READY@", "yes" if ready else "no"))
    path.chmod(0o755)
    return path


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


def test_prometheus_is_ready_in_the_block_and_gone_after_it(tmp_path, free_port):
    configuration = local_prometheus.write_configuration(tmp_path / "monitor", ["a:1"], None)
    with local_prometheus.monitoring(stand_in(tmp_path), configuration, free_port) as (
        address,
        process,
    ):
        assert address == f"http://127.0.0.1:{free_port}"
        assert get(f"{address}/-/ready") == ""
    assert process.poll() is not None
    assert not os.path.exists(f"/proc/{process.pid}/cmdline")


def test_one_that_ends_at_once_is_an_error_with_its_words(tmp_path, free_port):
    configuration = local_prometheus.write_configuration(tmp_path / "monitor", ["a:1"], None)
    block = local_prometheus.monitoring(stand_in(tmp_path, fails=True), configuration, free_port)
    with pytest.raises(RunError, match="ended with code 3.*opening storage failed"), block:
        pass


def test_one_that_does_not_get_ready_is_ended_at_the_deadline(tmp_path, free_port):
    configuration = local_prometheus.write_configuration(tmp_path / "monitor", ["a:1"], None)
    program = stand_in(tmp_path, ready=False)
    block = local_prometheus.monitoring(program, configuration, free_port, ready_timeout_s=0.3)
    with pytest.raises(StalledError, match="not ready at .* after 0.3 s"), block:
        pass
