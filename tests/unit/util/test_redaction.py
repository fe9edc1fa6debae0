"""A distinctive secret, followed through everything that a run leaves and shows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rlhf_cluster.cli.commands import explain
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.observe.record import logs, post_mortem
from rlhf_cluster.observe.report.page import page
from rlhf_cluster.observe.report.read_run import read_run
from rlhf_cluster.rewards.http_client import RemoteSection, Server
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Event, Snapshot
from rlhf_cluster.util.provenance import HIDDEN, find_secrets, redact, remove_credentials
from tests.support.builders.run_configs import tiny_config

VARIABLE, NAMED, PASSWORD = "unmistakable-xyzzy", "named-by-a-setting-plugh", "pass\"word'-2342"
JUDGE = {"type": "judge", "url": "http://judge/v1", "model": "m", "api_key_env": "JUDGE_LOGIN"}


@pytest.fixture
def no_handlers_left():
    before = list(logging.getLogger().handlers)
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()


def test_a_secret_is_in_no_file_of_a_run_and_not_in_its_report(
    tmp_path: Path, monkeypatch, capfd, no_handlers_left
):
    monkeypatch.setenv("HF_TOKEN", VARIABLE)
    monkeypatch.setenv("JUDGE_LOGIN", NAMED)
    monkeypatch.setenv("STORE_PASSWORD", PASSWORD)
    told = f"refused {VARIABLE}, {NAMED}, {PASSWORD} at s3://me:{PASSWORD}@bucket/x?sig={VARIABLE}"
    config = tiny_config(run={"root": str(tmp_path)}, scoring={"rewards": [JUDGE]})
    argv = ["run", "--set", f"tracking.api_key={VARIABLE}", f"s3://a:{PASSWORD}@b"]
    error = WorkerError(told)
    with RunDir.create(config.run_dir, config, argv=argv) as run:
        log = logs.configure("controller", "controller", run.logs)
        log.error("%s", told)
        try:
            raise error
        except WorkerError:
            log.exception("failed")
        event = Event(time_s=1.0, text=told)
        run.write_status(
            Snapshot(run="r", state="failed", step=1, num_steps=2, time_s=2.0,
                     events=(event,), error=told)
        )  # fmt: skip
        run.write_summary({"error": told, "nested": [{"reason": told}]})
        document = post_mortem.describe(
            time_s=1.0, run="r", error=error, status={}, services={"scoring": told},
            logs=post_mortem.read_tails(run.logs), stacks={}, packages={},
            config=config.model_dump(mode="json"), variables={"HF_TOKEN": VARIABLE,
            "JUDGE_LOGIN": NAMED, "STORE_PASSWORD": PASSWORD},
        )  # fmt: skip
        post_mortem.write(run.path / post_mortem.NAME, lambda: document)
    logs.flush()
    shown = {str(p): p.read_text() for p in run.path.rglob("*") if p.is_file()}
    shown["stderr"] = capfd.readouterr().err
    shown["error"] = explain(error)
    shown["report"] = page([read_run(RunDir.open(run.path))], 3.0)
    assert {Path(name).name for name in shown} >= {
        "controller.log", "status.json", "summary.json", "post_mortem.json", "environment.json",
        "resolved.json", "stderr", "report",
    }  # fmt: skip
    for name, text in shown.items():
        for secret in (VARIABLE, NAMED, PASSWORD, "word'-2342", "xyzzy", "plugh"):
            assert secret not in text, f"{secret} in {name}"
    assert "refused (hidden), (hidden), (hidden) at s3://(hidden)@bucket" in shown["stderr"]
    assert "JUDGE_LOGIN" in shown[str(run.resolved)], "the variable's name is no secret"


def test_the_key_of_a_reward_server_is_in_no_log(tmp_path, capfd, no_handlers_left):
    section = RemoteSection(url="http://judge/v1", api_key_env="JUDGE_LOGIN")
    Server(section, environment={"JUDGE_LOGIN": "only-the-server-knows-it"})
    logs.configure("scoring", "scoring-0", tmp_path).error("sent only-the-server-knows-it")
    logs.flush()
    assert "sent (hidden)" in (tmp_path / "scoring-0.log").read_text()
    assert "sent (hidden)" in capfd.readouterr().err


def test_secrets_are_known_by_names_and_ordinary_words_stay():
    variables = {
        "HF_TOKEN": "a-token", "WANDB_API_KEY": "a-key-value", "AWS_SECRET_ACCESS_KEY": "an-aws-key",
        "DB_PASSWORD": "a-password", "RAY_AUTH_MODE": "disabled", "HOME": "/home/user",
        "TOKENIZERS_PARALLELISM": "enabled", "RAY_AUTH_TOKEN_PATH": "/home/user/token",
        "A_KEY": "short",
    }  # fmt: skip
    found = find_secrets({"api_key": "from-a-setting", "url_env": "HOME"}, variables)
    assert set(found) == {
        "a-token", "a-key-value", "an-aws-key", "a-password", "from-a-setting", "/home/user",
    }  # fmt: skip
    assert found == sorted(found, key=lambda value: -len(value)), "the longest first"
    assert redact({"a": ("x a-token y", 1, None)}, found) == {"a": [f"x {HIDDEN} y", 1, None]}


def test_a_password_with_an_at_sign_is_hidden_whole():
    hidden = remove_credentials("https://me:one@two@host/path and me@host")
    assert hidden == "https://(hidden)@host/path and me@host"
