"""The checker of the chaos runs: a good run passes, and whatever is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from safetensors.numpy import save_file

from tests.chaos.checker import Asked, Report, check

ASKED = Asked(steps=4, groups_per_step=2, group_size=2, max_staleness=1)
DISCARDED = 3
TIME = "2030-01-01T00:00:00.000Z INFO"


def groups_of(step: int) -> list[int]:
    """Tickets 0 to 8 without the discarded one, in order."""
    tickets = [n for n in range(9) if n != DISCARDED]
    return tickets[2 * step - 2 : 2 * step]


def row(step: int, ticket: int, sample: int) -> dict[str, Any]:
    oldest = max(0, step - 2)
    return {
        "rollout_id": f"g{ticket:08d}-{sample}",
        "group_id": f"g{ticket:08d}",
        "prompt_id": f"{100 + ticket}-e0",
        "version_min": oldest,
        "version_max": step - 1,
        "staleness": step - 1 - oldest,
        "response_ids": [1, 2],
        "sampled_logprobs": [-0.5, -0.25],
    }


def log(run: Path, name: str, *texts: str) -> None:
    lines = [f"{TIME} role {name} actors.module: {text}" for text in texts]
    lines = [line.replace("00.000Z", f"{i:02d}.000Z", 1) for i, line in enumerate(lines)]
    (run / "logs" / f"{name}.log").write_text("\n".join(lines) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps that was killed after step 3 and went on from the checkpoint of step 2."""
    for folder in ("samples", "logs", "final", "checkpoints/step-000004", "weights/v000004"):
        (tmp_path / folder).mkdir(parents=True)
    lines = []
    for step in range(1, 5):
        save(tmp_path, step, [row(step, n, i) for n in groups_of(step) for i in range(2)])
        metrics = {"learner/loss": 0.5, "staleness/max": 1.0, "weights/version_live": step - 1.0}
        lines.append({"step": step, "weights/version_published": float(step - 1), **metrics})
    write_metrics(tmp_path, [{"step": 0, "evaluation/reward_mean": 0.5}, *lines])
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished", "step": 4}))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 4}))
    checkpoint = tmp_path / "checkpoints" / "step-000004"
    buffer = {"admitted": 9, "taken": 8, "discarded": {"WorkerError": 1}, "open": []}
    (checkpoint / "run.json").write_text(json.dumps({"buffer": buffer}))
    size = (checkpoint / "run.json").stat().st_size
    (checkpoint / "complete.json").write_text(json.dumps({"files": {"run.json": {"bytes": size}}}))
    (tmp_path / "weights" / "latest").write_text("v000004\n")
    tensors = {"weight": np.ones(3, dtype=np.float32)}
    save_file(tensors, tmp_path / "weights" / "v000004" / "shard-0.safetensors")
    save_file(tensors, tmp_path / "final" / "model.safetensors")
    steps = [f"step {n}: reward 0.5, 0.1 s" for n in range(1, 5)]
    discard = f"group g{DISCARDED:08d} discarded: generation-0 died"
    back = "continues from the checkpoint of step 2"
    log(tmp_path, "controller", "starting", discard, *steps[:3], "starting", back, *steps[2:])
    live = ["version 0 is live on every worker", "version 2 is live on every worker"]
    log(tmp_path, "buffer", "admitting by gate", *live, "admitting by gate", *live)
    log(
        tmp_path, "generation-0", "engine up", "version 2 live: x", "engine up", "version 1 live: x"
    )
    return tmp_path


def save(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), run / "samples" / f"step-{step:06d}.parquet")


def write_metrics(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_rows(run: Path, step: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = parquet.read_table(run / "samples" / f"step-{step:06d}.parquet").to_pylist()
    save(run, step, change(rows) or rows)


def kinds(report: Report) -> set[str]:
    return {violation.kind for violation in report.violations}


def test_a_good_run_passes_with_its_counts(run: Path) -> None:
    report = check(run, ASKED)
    assert report.violations == []
    assert (report.steps, report.rollouts, report.staleness_max) == (4, 16, 1)
    counts = (report.groups_admitted, report.groups_trained, report.groups_discarded)
    assert counts == (9, 8, 1)
    assert (report.lives, report.rewinds) == (2, 1)
    assert (report.groups_lost, report.groups_trained_twice, report.orphans) == (0, 0, 0)


def test_copies_that_outlive_the_run_are_found_and_so_is_a_mirror_that_was_never_used(
    run: Path, tmp_path: Path
) -> None:
    mirror = tmp_path / "copies"
    assert kinds(check(run, ASKED, mirror=mirror)) == {"mirror"}
    mirror.mkdir()
    assert check(run, ASKED, mirror=mirror).violations == []
    (mirror / "rlhf_mirror_0123456789abcdef").mkdir()
    assert kinds(check(run, ASKED, mirror=mirror)) == {"leftover"}


def test_a_group_that_vanished_is_lost(run: Path) -> None:
    edit_rows(run, 2, lambda rows: [r for r in rows if r["group_id"] != "g00000004"])
    report = check(run, ASKED)
    assert report.groups_lost == 1
    assert "group lost: group g00000004 was neither" in str(report.violations[1])
    assert kinds(report) == {"batch", "group lost", "counters"}


def test_a_discard_without_a_reason_is_a_lost_group(run: Path) -> None:
    path = run / "logs" / "controller.log"
    path.write_text(path.read_text().replace("generation-0 died", ""))
    report = check(run, ASKED)
    assert (report.groups_lost, report.groups_discarded) == (1, 0)
    assert kinds(report) == {"group lost", "counters"}


def test_a_group_still_open_at_the_end_is_lost(run: Path) -> None:
    path = run / "checkpoints" / "step-000004" / "run.json"
    before = path.stat().st_size
    text = path.read_text().replace('"open": []', '"open": [{"number": 9}]')
    path.write_text(text)
    marker = path.with_name("complete.json")
    marker.write_text(marker.read_text().replace(str(before), str(len(text))))
    assert "tickets 9" in str(check(run, ASKED).violations)


def test_a_group_in_two_steps_was_trained_twice(run: Path) -> None:
    save(run, 4, [row(4, n, i) for n in (groups_of(4)[0], groups_of(3)[0]) for i in range(2)])
    report = check(run, ASKED)
    assert report.groups_trained_twice == 1
    assert {"group twice", "group lost"} <= kinds(report)


def test_a_group_that_was_never_admitted_is_named(run: Path) -> None:
    save(run, 4, [row(4, n, i) for n in (groups_of(4)[0], 77) for i in range(2)])
    assert {"group unknown", "group lost"} <= kinds(check(run, ASKED))


def test_staleness_over_the_bound_is_counted(run: Path) -> None:
    edit_rows(run, 4, lambda rows: rows[0].update(version_min=1, staleness=2))
    report = check(run, ASKED)
    assert (report.bound_violations, report.staleness_max) == (1, 2)
    assert kinds(report) == {"staleness"}


def test_staleness_over_the_bound_in_the_metrics_is_counted(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"staleness/max": 1.0', '"staleness/max": 3.0', 1))
    report = check(run, ASKED)
    assert (report.bound_violations, kinds(report)) == (1, {"staleness"})


@pytest.mark.parametrize(
    "change",
    [
        {"version_max": 4},
        {"version_min": 3, "version_max": 2, "staleness": 0},
        {"staleness": 0},
    ],
)
def test_versions_that_cannot_be_are_named(run: Path, change: dict[str, int]) -> None:
    edit_rows(run, 4, lambda rows: rows[0].update(change))
    assert kinds(check(run, ASKED)) == {"versions"}


@pytest.mark.parametrize(("keep", "kind"), [(0, "step missing"), (2, "step twice")])
def test_a_step_missing_or_there_twice_is_named(run: Path, keep: int, kind: str) -> None:
    first, second, third, *rest = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([first, second, *[third] * keep, *rest]))
    report = check(run, ASKED)
    assert [str(v).split(":")[0] for v in report.violations] == [kind]
    assert "steps 2" in report.violations[0].text


def test_steps_that_skip_or_repeat_without_a_return_are_named(run: Path) -> None:
    path = run / "logs" / "controller.log"
    path.write_text(path.read_text().replace("continues from the checkpoint of step 2", "goes on"))
    assert "step order" in kinds(check(run, ASKED))


def test_a_return_to_the_beginning_lets_steps_begin_anew(run: Path) -> None:
    steps = [f"step {n}: reward" for n in range(1, 5)]
    log(run, "controller", "starting", "group g00000003 discarded: x", steps[0], *steps)
    assert kinds(check(run, ASKED)) == {"step order"}
    back = "buffer lost: the run goes on from the beginning, restart 1 of 3"
    log(run, "controller", "starting", "group g00000003 discarded: x", steps[0], back, *steps)
    report = check(run, ASKED)
    assert (kinds(report), report.rewinds) == (set(), 1)


def test_a_group_with_another_ticket_s_prompt_is_named(run: Path) -> None:
    edit_rows(run, 4, lambda rows: [r.update(prompt_id="999-e0") for r in rows[:2]] and rows)
    assert kinds(check(run, ASKED)) == {"prompt"}


def test_a_store_of_groups_that_tells_other_steps_is_named(run: Path) -> None:
    (run / "experience").mkdir()
    for steps, expected in (([1], set()), ([2], {"experience"}), ([1, 2], {"experience"})):
        (run / "experience" / "trained.json").write_text(json.dumps({"0": steps, "3": [2]}))
        assert kinds(check(run, ASKED)) == expected


def test_with_replay_a_group_may_be_in_as_many_steps_as_allowed(run: Path) -> None:
    """A step of two groups may have a third, which was trained before."""
    replay = replace(ASKED, groups_per_step=3, replayed=1, max_uses=2)
    assert check(run, replay).violations == []
    again = lambda step, ticket: edit_rows(  # noqa: E731
        run, step, lambda rows: [*rows, *(row(step, ticket, i) for i in range(2))]
    )
    again(2, 0)
    again(3, 2)
    assert check(run, replay).violations == []
    assert "group twice" in kinds(check(run, ASKED))
    again(4, 0)
    report = check(run, replay)
    assert (report.groups_trained_twice, kinds(report)) == (1, {"group twice", "rollouts"})


def test_with_replay_a_step_has_as_many_new_groups_as_asked(run: Path) -> None:
    replay = replace(ASKED, groups_per_step=3, replayed=1, max_uses=2)
    save(run, 4, [row(4, n, i) for n in (groups_of(4)[0], groups_of(3)[0]) for i in range(2)])
    report = check(run, replay)
    assert "batch: step 4 trained 1 new groups, asked were 2" in map(str, report.violations)


@pytest.mark.parametrize("name", ["buffer", "generation-0"])
def test_a_live_version_that_goes_back_within_a_life_is_named(run: Path, name: str) -> None:
    start = {"buffer": "admitting by gate", "generation-0": "engine up"}[name]
    live = "version {} is live on every worker" if name == "buffer" else "version {} live: x"
    log(run, name, start, live.format(3), live.format(2))
    assert kinds(check(run, ASKED)) == {"version back"}


def test_a_return_to_a_checkpoint_lets_versions_go_back(run: Path) -> None:
    log(run, "buffer", "admitting by gate", *["_"] * 4, "version 3 is live", "version 2 is live")
    assert kinds(check(run, ASKED)) == set(), "between them the driver went back, at second 6"


def test_a_load_that_ends_between_a_return_and_the_next_step_is_of_the_time_before(run: Path):
    lives = ["version 3 live: x", "version 2 live: x"]
    log(run, "generation-0", "engine up", *["_"] * 6, *lives)
    assert kinds(check(run, ASKED)) == set(), "the driver went back at second 6, step 3 was at 7"
    log(run, "generation-0", "engine up", *["_"] * 8, *lives)
    assert kinds(check(run, ASKED)) == {"version back"}


def test_a_version_that_goes_back_in_the_metrics_is_named(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(
        path.read_text().replace('"weights/version_live": 3.0', '"weights/version_live": 1.0')
    )
    assert kinds(check(run, ASKED)) == {"version back"}


def test_a_rollout_missing_is_named(run: Path) -> None:
    edit_rows(run, 3, lambda rows: rows[1:])
    report = check(run, ASKED)
    assert kinds(report) == {"rollouts"}
    assert "group g00000005 has 1 rollouts, asked were 2" in report.violations[0].text


def test_a_rollout_twice_and_one_without_log_probabilities_are_named(run: Path) -> None:
    edit_rows(run, 3, lambda rows: rows[1].update(rollout_id=rows[0]["rollout_id"]))
    assert "was trained 2 times" in str(check(run, ASKED).violations)
    edit_rows(run, 3, lambda rows: rows[0].update(sampled_logprobs=[-0.5]))
    assert "not one log-probability a token" in str(check(run, ASKED).violations)


def test_a_run_that_stopped_early_is_named(run: Path) -> None:
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 3}))
    (run / "samples" / "step-000004.parquet").unlink()
    assert {"unfinished", "samples missing", "group lost"} <= kinds(check(run, ASKED))


def test_a_summary_of_fewer_steps_is_named(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"steps": 3}))
    assert kinds(check(run, ASKED)) == {"unfinished"}


def test_a_step_that_nobody_asked_for_is_named(run: Path) -> None:
    (run / "metrics.jsonl").open("a").write(json.dumps({"step": 5, "learner/loss": 0.5}) + "\n")
    assert kinds(check(run, ASKED)) == {"steps"}


def test_a_log_that_tells_of_no_start_is_named(run: Path) -> None:
    log(run, "controller", f"group g{DISCARDED:08d} discarded: generation-0 died")
    assert kinds(check(run, ASKED)) == {"unreadable"}


@pytest.mark.parametrize(
    "name", ["weights/v000005.partial", "checkpoints/step-000004.partial", "samples/.x.partial"]
)
def test_what_is_half_written_is_named(run: Path, name: str) -> None:
    (run / name).mkdir()
    assert kinds(check(run, ASKED)) == {"leftover"}


def test_a_checkpoint_that_is_not_whole_is_named(run: Path) -> None:
    (run / "checkpoints" / "step-000004" / "run.json").open("a").write(" ")
    assert kinds(check(run, ASKED)) == {"checkpoint"}


def test_weights_that_are_no_numbers_or_not_the_last_are_named(run: Path) -> None:
    save_file({"weight": np.array([np.nan])}, run / "final" / "model.safetensors")
    assert "model.safetensors: weight is not finite" in str(check(run, ASKED).violations)
    (run / "weights" / "latest").write_text("v000003\n")
    assert "the latest version is v000003" in str(check(run, ASKED).violations)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "status.json", "samples/step-000002.parquet", "final/model.safetensors"],
)
def test_a_damaged_file_is_a_violation_and_no_crash(run: Path, name: str) -> None:
    (run / name).write_bytes(b"{torn")
    assert "unreadable" in kinds(check(run, ASKED))


def test_nothing_at_all_is_a_violation_and_no_crash(tmp_path: Path) -> None:
    assert {"unreadable", "samples missing", "checkpoint"} <= kinds(check(tmp_path, ASKED))


def test_an_orphan_is_named(run: Path) -> None:
    report = check(run, ASKED, {4711: "ray::GenerationActor"})
    assert report.orphans == 1
    assert str(report.violations[0]) == (
        "orphan: process 4711 (ray::GenerationActor) outlived the run"
    )


def test_second_copies_are_whole_and_the_last_step_has_one(run: Path, tmp_path: Path) -> None:
    copies = tmp_path / "second"
    copy = copies / run.name / "step-000004"
    assert kinds(check(run, ASKED, copies=copies)) == {"copy"}
    copy.mkdir(parents=True)
    (copy / "run.json").write_text("{}")
    marker = {"files": {"run.json": {"bytes": 2}}}
    (copy / "copied.json").write_text(json.dumps(marker))
    left = copies / run.name / "step-000003"
    left.mkdir()
    (left / "set_aside.json").write_text("{}")
    assert check(run, ASKED, copies=copies).violations == []
    (copy / "run.json").write_text("{")
    assert kinds(check(run, ASKED, copies=copies)) == {"copy"}
