"""Snapshots, the live view, pictures and logs."""

import io
import json
import logging
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from rlhf_cluster.errors import RunError
from rlhf_cluster.observe.record.logs import log_names, read_logs
from rlhf_cluster.observe.report.learning_curve import draw_curve, moving_average, series
from rlhf_cluster.observe.report.live_view import LINE_EVERY_S, LiveView, line, render
from rlhf_cluster.run.run_record import Event, Pool, Snapshot, who_waits

SNAPSHOT = Snapshot(
    run="demo",
    state="running",
    step=38,
    num_steps=120,
    time_s=1e9,
    elapsed_s=95.0,
    reward=0.55,
    reward_mean10=0.5012,
    left_s=164.0,
    staleness_mean=0.81,
    staleness_max=1.0,
    response_length_tokens=7.25,
    tokens_per_s=5123.4,
    step_s=2.0,
    learner_wait_s=0.76,
    generation_wait_s=0.01,
    pools=(Pool(name="generation", alive=1, wanted=2, restarts=1),),
    buffer_in_flight=16,
    buffer_ready=3,
    buffer_discarded=2,
    version_published=38,
    version_live=37,
    advice="generation-bound: one more gives 1.6x",
    events=(Event(time_s=1e9, text="generation-1 died [restarting]"),),
)


def shown(snapshot: Snapshot) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(render(snapshot))
    return console.file.getvalue()


def changed(**changes) -> Snapshot:
    return Snapshot(**{**vars(SNAPSHOT), **changes})


def printed(*snapshots: Snapshot) -> list[str]:
    """First parts of the lines that a view without a terminal prints of `snapshots`."""
    console = Console(file=io.StringIO(), width=40)
    with LiveView(console, live=True) as view:
        for snapshot in snapshots:
            view.update(snapshot)
    assert "\x1b" not in console.file.getvalue()
    return [text.split(" | ")[0] for text in console.file.getvalue().splitlines()]


def test_a_snapshot_survives_json():
    assert Snapshot.from_json(SNAPSHOT.to_json()) == SNAPSHOT


def test_numbers_that_are_not_finite_become_null():
    text = changed(reward=math.nan).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["reward"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"run": 3}', '{"state": "dancing"}'])
def test_text_that_is_no_status_is_refused(text):
    with pytest.raises(RunError, match="not a run's status"):
        Snapshot.from_json(text)


@pytest.mark.parametrize(
    ("learner_wait_s", "generation_wait_s", "step_s", "text"),
    [
        (0.76, 0.0, 2.0, "learner waits for generation 38 % of the time"),
        (
            0.5,
            1.0,
            2.0,
            "learner waits for generation 25 % of the time; "
            "generation waits for the learner 50 % of the time",
        ),
        (0.001, None, 2.0, "nobody waits"),
        (3.0, None, 2.0, "learner waits for generation 100 % of the time"),
        (1.0, 1.0, None, "no step yet"),
        (1.0, 1.0, 0.0, "no step yet"),
    ],
)
def test_who_waits_for_whom(learner_wait_s, generation_wait_s, step_s, text):
    assert who_waits(learner_wait_s, generation_wait_s, step_s) == text


def test_a_step_is_one_line():
    assert line(SNAPSHOT) == (
        "step 38/120 | reward 0.550 (mean10 0.501) | 5,123 tokens/s | 0:02:44 left"
    )
    held_out = line(changed(reward_held_out=0.625))
    assert "(mean10 0.501) | held-out 0.625 | 5,123 tokens/s" in held_out


def test_a_step_of_a_stage_is_one_line():
    stage = {"reward": None, "stage": "sft", "metric": "sft/loss", "metric_value": 1.5}
    assert line(changed(**stage)) == (
        "step 38/120 | sft/loss 1.5000 | 5,123 tokens/s | 0:02:44 left"
    )


def test_between_steps_the_line_repeats_no_numbers():
    assert line(changed(state="evaluating")) == "evaluating | step 38/120"
    assert line(changed(state="warmup", step=3, num_steps=40)) == "warmup | 40 supervised steps"


def test_a_failed_run_says_why_in_its_line():
    assert line(changed(state="failed", error="boom\nmore")).startswith("failed | step 38/120")
    assert line(changed(state="failed", error="boom\nmore")).endswith("| error: boom")


def test_before_the_first_step_the_line_says_only_what_is_known():
    starting = Snapshot(run="demo", state="starting", step=0, num_steps=5, time_s=0.0)
    assert line(starting) == "starting | step 0/5"


@pytest.mark.parametrize(
    "part",
    [
        "demo",
        "step 38 of 120",
        "0:01:35, about 0:02:44 left",
        "0.550 now, 0.501 mean of 10 steps",
        "held-out     0.625 reward",
        "0.81 mean, 1 largest",
        "5,123 tokens/s",
        "learner waits for generation 38 % of the time",
        "generation-bound: one more gives 1.6x",
        "generation 1/2 (1 restarts)",
        "16 in flight, 3 ready, 2 discarded",
        "v38 published, v37 live",
        "generation-1 died [restarting]",
    ],
)
def test_the_view_shows(part):
    assert part in shown(changed(reward_held_out=0.625))


def test_the_view_of_a_run_without_numbers_can_be_drawn():
    text = shown(Snapshot(run="demo", state="starting", step=0, num_steps=5, time_s=0.0))
    assert "no step yet" in text
    assert "- published, - live" in text


def test_without_a_terminal_there_is_one_plain_line_per_interval():
    steps = [changed(step=step, time_s=1e9 + 4.0 * step) for step in range(1, 9)]
    assert printed(*steps) == ["step 1/120", "step 4/120", "step 7/120"]


def test_without_a_terminal_slow_steps_have_a_line_each():
    steps = [changed(step=step, time_s=1e9 + LINE_EVERY_S * step) for step in (1, 1, 2, 3)]
    assert printed(*steps) == ["step 1/120", "step 2/120", "step 3/120"]


def test_without_a_terminal_no_line_is_printed_twice():
    start = [changed(state="starting", step=0)] * 2
    warmup = [changed(state="warmup", step=step, num_steps=40) for step in range(1, 41)]
    last = [changed(step=step, time_s=1e9 + step) for step in (119, 120)]
    again = changed(step=120, time_s=2e9)
    end = [changed(step=120, state=state) for state in ("evaluating", "evaluating", "finished")]
    assert printed(*start, *warmup, *last, again, *end) == [
        "starting", "warmup", "step 119/120", "step 120/120", "evaluating", "finished"
    ]  # fmt: skip


def test_without_a_terminal_a_run_that_went_back_says_so_and_where_it_is():
    assert printed(
        changed(step=5), changed(step=4, state="recovering"), changed(step=3, time_s=1e9 + 1)
    ) == ["step 5/120", "recovering", "step 3/120"]


def test_on_a_terminal_the_view_is_redrawn_in_place():
    console = Console(file=io.StringIO(), width=110, force_terminal=True)
    with LiveView(console, live=True) as view:
        view.update(SNAPSHOT)
    assert "step 38 of 120" in console.file.getvalue()
    assert "\x1b" in console.file.getvalue()


def test_a_moving_average_looks_back_and_leaves_gaps_out():
    values = np.array([np.nan, 1.0, 3.0, np.nan, 5.0])
    assert np.array_equal(
        moving_average(values, 2), np.array([np.nan, 1.0, 2.0, 3.0, 5.0]), equal_nan=True
    )
    long = np.arange(50.0)
    slow = [long[max(0, i - 6) : i + 1].mean() for i in range(50)]
    assert np.allclose(moving_average(long, 7), slow)


def test_missing_and_null_values_are_gaps():
    records = [{"step": 1, "reward/mean": 1.0}, {"step": 2, "reward/mean": None}, {"step": 4}]
    steps, values = series(records, "reward/mean")
    assert steps.tolist() == [1.0, 2.0, 4.0]
    assert np.array_equal(values, [1.0, np.nan, np.nan], equal_nan=True)


def test_there_is_no_curve_without_a_reward(tmp_path):
    with pytest.raises(RunError, match="no step with a reward"):
        draw_curve([{"step": 0, "evaluation/reward_mean": 0.1}], tmp_path / "curve.png", "demo")
    assert list(tmp_path.iterdir()) == []


LOGGING = """
import logging, sys
from rlhf_cluster.observe.record.logs import configure
configure("scoring", "scoring-0", sys.argv[1])
log = configure("scoring", "scoring-0", sys.argv[1])
log.info("quiet")
log.debug("hidden")
logging.getLogger("somelibrary").info("chatter")
logging.getLogger("rlhf_cluster.run.worker_pool").warning("loud")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed\\nbadly")
"""


def test_every_line_of_a_log_says_when_how_bad_and_who(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "RLHF_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", LOGGING, str(tmp_path / "logs")],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": os.getcwd()},
        check=True,
    )
    lines = (tmp_path / "logs" / "scoring-0.log").read_text().splitlines()
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (INFO|WARNING|ERROR) scoring scoring-0 \S+: "
    assert all(re.match(pattern, text) for text in lines), lines
    assert sum("quiet" in text for text in lines) == 1
    assert sum("loud" in text for text in lines) == 1
    assert any("ZeroDivisionError" in text for text in lines)
    assert not any("hidden" in text or "chatter" in text for text in lines)
    assert "loud" in done.stderr
    assert "quiet" not in done.stderr


def test_logs_of_a_run_merge_by_time(tmp_path):
    (tmp_path / "a.log").write_text("2026-01-01T00:00:01 a1\n2026-01-01T00:00:03 a2\n")
    (tmp_path / "b.log").write_text("2026-01-01T00:00:02 b1\n2026-01-01T00:00:04 b2\n")
    names = log_names(tmp_path)
    assert names == ["a", "b"]
    assert [text[-2:] for text in read_logs(tmp_path, names)] == ["a1", "b1", "a2", "b2"]
    assert [text[-2:] for text in read_logs(tmp_path, names, tail=3)] == ["b1", "a2", "b2"]
    assert [text[-2:] for text in read_logs(tmp_path, ["b"], tail=1)] == ["b2"]


def test_a_log_name_cannot_leave_its_folder(tmp_path):
    from rlhf_cluster.observe.record.logs import configure

    before = list(logging.getLogger().handlers)
    with pytest.raises(RunError, match="log name"):
        configure("scoring", "../evil", tmp_path)
    assert logging.getLogger().handlers == before
