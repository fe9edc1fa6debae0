"""Runs that are stopped by another process; a run is stood for by one that holds its directory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cluster.cli.commands import main
from rlhf_cluster.cli.run_control import stop_run
from rlhf_cluster.errors import StalledError
from rlhf_cluster.run.run_directory import RunDir


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hold(path: Path, on_sigterm: str) -> subprocess.Popen[str]:
    code = f"""
import signal, sys
from rlhf_cluster.run.run_directory import RunDir
from tests.support.builders.run_configs import tiny_config
signal.signal(signal.SIGTERM, {on_sigterm})
run = RunDir.create({str(path)!r}, tiny_config())
print("held", flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_stop_ends_a_run_and_sees_it_gone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = hold(here / "runs" / "tiny", "lambda *_: sys.exit(7)")
    assert main(["stop", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny: stopped\n"
    holder.communicate(timeout=30)
    assert holder.returncode == 7
    assert main(["stop", "tiny"]) == 1
    assert "not running" in capsys.readouterr().err


def test_a_run_that_does_not_stop_is_named(here: Path) -> None:
    holder = hold(here / "runs" / "tiny", "signal.SIG_IGN")
    try:
        with pytest.raises(StalledError, match=f"kill -9 {holder.pid}"):
            stop_run(RunDir.open(here / "runs" / "tiny"), timeout_s=0.2)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=30)
