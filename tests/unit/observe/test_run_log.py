"""metrics.jsonl and the samples."""

import json
import math
import os
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest

from rlhf_cluster.errors import MetricError, RunError
from rlhf_cluster.observe.record.run_log import RunLog
from rlhf_cluster.observe.record.samples import keep_samples, read_samples, write_samples
from rlhf_cluster.records import Ticket, TokenSample
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import cut_metrics, read_metrics
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import make_group, make_prompt


@pytest.fixture
def run(tmp_path):
    with RunDir.create(tmp_path / "tiny", tiny_config(run={"root": str(tmp_path)})) as run:
        yield run


def test_a_step_is_one_finite_json_line_on_disk_at_once(run):
    with RunLog(run) as log:
        log.append(1, 10.0, {"reward/mean": np.float32(0.5), "reward/std": math.nan})
        log.flush()
        lines = run.metrics.read_text().splitlines()
    assert len(lines) == 1
    refuse = pytest.fail
    assert json.loads(lines[0], parse_constant=refuse) == {
        "step": 1,
        "time_s": 10.0,
        "reward/mean": 0.5,
        "reward/std": None,
    }


def test_n07_a_line_that_waits_for_a_slow_disk_is_written_before_the_record_is_cut(run):
    answers, begun = threading.Event(), threading.Event()

    def slow(fd: int, data: memoryview) -> int:
        begun.set()
        assert answers.wait(30)
        return os.write(fd, data)

    def cut() -> None:
        assert answers.is_set(), "the lines that wait come first"
        cut_metrics(run.metrics, 1)

    with RunLog(run, write=slow) as log:
        log.append(1, 1.0, {"reward/mean": 0.5})
        log.append(2, 2.0, {"reward/mean": 0.5})
        assert begun.wait(30)
        assert run.metrics.read_bytes() == b"", "nobody waited for the disk"
        threading.Timer(0.2, answers.set).start()
        log.cut(cut)
        log.append(2, 3.0, {"reward/mean": 0.75})
        log.flush()
    assert [(r["step"], r["reward/mean"]) for r in read_metrics(run.metrics)] == [
        (1, 0.5),
        (2, 0.75),
    ]


def test_an_unknown_metric_is_refused_and_writes_nothing(run):
    with RunLog(run) as log, pytest.raises(MetricError, match="rewrd/mean"):
        log.append(1, 0.0, {"rewrd/mean": 1.0})
    assert run.metrics.read_text() == ""


def test_steps_never_go_back_not_even_over_a_restart(run):
    with RunLog(run) as log:
        log.append(2, 0.0, {})
    with RunLog(run) as log, pytest.raises(RunError, match="step 1 after step 2"):
        log.append(1, 0.0, {})


def test_lines_of_one_step_read_as_one_record(run):
    with RunLog(run) as log:
        log.append(0, 1.0, {"evaluation/reward_mean": 0.25})
        log.append(1, 2.0, {"reward/mean": 0.5})
        log.append(1, 3.0, {"evaluation/reward_mean": 0.75})
    assert read_metrics(run.metrics) == [
        {"step": 0, "time_s": 1.0, "evaluation/reward_mean": 0.25},
        {"step": 1, "time_s": 3.0, "reward/mean": 0.5, "evaluation/reward_mean": 0.75},
    ]


def test_a_late_point_stands_at_its_step_and_leaves_the_time_of_the_step(run):
    with RunLog(run) as log:
        log.append(1, 1.0, {"reward/mean": 0.5})
        log.append(2, 2.0, {"reward/mean": 0.6})
        log.append(1, 3.0, {"evaluation/reward_mean": 0.75}, late=True)
        assert log.last_step == 2
        with pytest.raises(RunError, match="step 1 after step 2"):
            log.append(1, 4.0, {})
    assert read_metrics(run.metrics) == [
        {"step": 1, "time_s": 1.0, "reward/mean": 0.5, "evaluation/reward_mean": 0.75},
        {"step": 2, "time_s": 2.0, "reward/mean": 0.6},
    ]
    cut_metrics(run.metrics, 1)
    with RunLog(run) as log:
        assert log.last_step == 1
    assert read_metrics(run.metrics)[0]["evaluation/reward_mean"] == 0.75


@pytest.mark.parametrize("num_bytes", [1, 2, 9])
def test_a_torn_last_line_is_left_out_and_mended(run, num_bytes):
    with RunLog(run) as log:
        log.append(1, 1.0, {"reward/mean": 0.5})
        log.append(2, 2.0, {"reward/mean": 0.6})
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole[:-num_bytes])
    assert [r["step"] for r in read_metrics(run.metrics)] == [1]
    with RunLog(run) as log:
        log.append(2, 3.0, {"reward/mean": 0.7})
    assert [r.get("reward/mean") for r in read_metrics(run.metrics)] == [0.5, 0.7]


def test_a_damaged_line_in_the_middle_is_named(run):
    run.metrics.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        read_metrics(run.metrics)


def test_no_metrics_yet_is_an_empty_log(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_samples_hold_what_was_trained_on(run):
    groups = [
        make_group(Ticket(number=n, version=4), make_prompt(n), [0.0, 1.0, 0.5], version=4)
        for n in range(2)
    ]
    path = write_samples(run.samples, 6, groups, 5, lambda ids: f"<{len(ids)}>", limit=4)
    assert path == run.samples / "step-000006.parquet"
    rows = read_samples(path)
    assert [r["rollout_id"] for r in rows] == [
        s.rollout.rollout_id for s in (*groups[0].scored, groups[1].scored[0])
    ]
    rollout, row = groups[0].scored[1].rollout, rows[1]
    assert row["response_ids"] == rollout.response_ids.tolist()
    assert row["prompt_ids"] == rollout.prompt_ids.tolist()
    assert row["sampled_logprobs"] == rollout.sampled_logprobs.tolist()
    assert row["response"] == f"<{len(rollout.response_ids)}>"
    assert (row["reward"], json.loads(row["reward_parts"])) == (1.0, {"exact_match": 1.0})
    assert (row["version_min"], row["version_max"], row["staleness"]) == (4, 4, 1)
    assert (row["prompt"], row["finish_reason"]) == ("prompt 0", "stop")
    types = {field.name: str(field.type) for field in parquet.read_schema(path)}
    assert types["response_ids"] == "list<element: int32>"
    assert types["sampled_logprobs"] == "list<element: float>"


def test_samples_hold_the_steps_where_they_were_scored(run):
    group = make_group(Ticket(number=0, version=0), make_prompt(0), [1.5, 0.0])
    ends, rewards = np.array([0, 2], np.int32), np.array([1.0, 0.5])
    first = replace(group.scored[0], step_ends=ends, step_rewards=rewards)
    path = write_samples(
        run.samples, 1, [replace(group, scored=(first, group.scored[1]))], 0, str, limit=4
    )
    found = [(r["step_ends"], r["step_rewards"]) for r in read_samples(path)]
    assert found == [([0, 2], [1.0, 0.5]), (None, None)]


def test_samples_hold_what_the_learner_made_of_each_trained_token(run):
    group = make_group(Ticket(number=0, version=0), make_prompt(0), [0.0, 1.0, 0.5])
    first, second, third = (s.rollout for s in group.scored)
    trained = np.arange(len(first.response_ids)) != 1
    values = np.where(trained, np.float32(-0.25), np.nan).astype(np.float32)
    whole = np.full(len(second.response_ids), np.nan, np.float32)
    kept = {
        first.rollout_id: TokenSample(
            learner_logprobs=values, correction_weights=-2 * values, trained=trained
        ),
        second.rollout_id: TokenSample(
            learner_logprobs=whole, correction_weights=None, trained=np.ones_like(whole, bool)
        ),
    }
    path = write_samples(run.samples, 1, [group], 0, str, limit=4, kept=kept)
    one, two, three = read_samples(path)
    assert one["learner_logprobs"] == [-0.25 if t else None for t in trained.tolist()]
    assert one["correction_weights"] == [0.5 if t else None for t in trained.tolist()]
    assert all(math.isnan(value) for value in two["learner_logprobs"]), "not finite is not unknown"
    assert two["correction_weights"] is None
    assert three["rollout_id"] == third.rollout_id
    assert (three["learner_logprobs"], three["correction_weights"]) == (None, None)
    types = {field.name: str(field.type) for field in parquet.read_schema(path)}
    assert types["learner_logprobs"] == types["correction_weights"] == "list<element: float>"


def test_n17_samples_that_cannot_be_written_or_are_late_end_no_step(run, caplog):
    group = make_group(Ticket(number=0, version=0), make_prompt(0), [0.0])
    run.samples.rmdir()
    run.samples.write_text("a file where the folder should be")
    keep_samples(lambda: write_samples(run.samples, 1, [group], 0, str, limit=4))
    assert "samples_per_step = 0; the step has no samples, and the run continues" in caplog.text
    hangs = threading.Event()
    keep_samples(lambda: hangs.wait(30), within_s=0.01)
    assert "samples of a step was not over after 0.01 s" in caplog.text
    hangs.set()
    with pytest.raises(ZeroDivisionError):  # a fault of the system is none of the disk
        keep_samples(lambda: 1 / 0)


def test_no_samples_are_no_file(run):
    assert write_samples(run.samples, 1, [], 0, str, limit=4) is None
    group = make_group(Ticket(number=0, version=0), make_prompt(0), [0.0])
    assert write_samples(run.samples, 1, [group], 0, str, limit=0) is None
    assert list(run.samples.iterdir()) == []
