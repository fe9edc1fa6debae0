"""Whole runs with a scripted engine on a real Ray cluster: what they do, and what they survive."""

import json
import re
import signal
import time
import urllib.error
import urllib.request

import pyarrow.parquet as parquet
import pytest
import ray
from ray.util.state import list_actors

from actors.cluster.calls import NAMESPACE
from actors.services.control_actor import (
    actor_name,
    scale,
)
from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.observe.report.page import page
from rlhf_cluster.observe.report.read_run import read_run
from rlhf_cluster.observe.report.serve import serve
from rlhf_cluster.run.run_directory import find_run
from rlhf_cluster.weights.transports.mirror_folder import copies_of
from tests.support.checks.promql import (
    NOT_IN_A_PLAIN_RUN,
    looked_at,
)
from tests.support.servers.browser import (
    CHROMIUM,
    check,
    look,
)

LONG = {"steps": 400, "groups_per_step": 4}
SLOW = {"generate_delay_s": 0.15}


def actor_pids(kind: str) -> dict[str, int]:
    """Process ids of the live actors of a class."""
    actors = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("state", "=", "ALIVE"), ("class_name", "=", kind)],
        detail=True,
    )
    return {actor.actor_id: actor.pid for actor in actors}


def exported_by(run: str) -> set[str]:
    """Names of the series that every live node's Prometheus endpoint has of a run."""
    lines = []
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as reply:
                lines += reply.read().decode().splitlines()
    return {line.split("{")[0] for line in lines if f'run="{run}"' in line}


def check_live_page(run, step):
    """The report of a run that is going, as a person has it, on a desk and on a phone."""
    found = find_run(str(run.path))
    with serve(lambda: page([read_run(found)], time.time())) as address:
        looks = look(address)
    check(looks)
    for seen in looks:
        assert "running" in seen.text
        [shown] = re.findall(r"step\s+(\d+) of 400", seen.text)
        assert int(shown) >= step
        name = f"report-{seen.width}-{seen.scheme}.png"
        (run.path / name).write_bytes(seen.picture)


def shown_step(address: str) -> int:
    """The step at which the report that is served there says the run is."""
    with urllib.request.urlopen(address, timeout=120) as reply:
        shown = re.findall(r"\b(\d+) of 400\b", reply.read().decode())[0]
    return int(shown)


def check_live_pages(run, address):
    """The served report goes on with the run. Waits for: the page to be made anew, past the step of
    the first look."""
    first = shown_step(address)
    run.wait_for(lambda s: s.step > first, "a step after the first look")
    deadline = time.monotonic() + 120
    while shown_step(address) <= first:
        assert time.monotonic() < deadline, f"the live report stays at step {first}"
        time.sleep(0.2)
    assert run.process.poll() is None, "it is a run that is going"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        shown_step(address.rpartition("/")[0] + "/guessed")


def test_a_run_trains_every_group_once_and_leaves_its_whole_record(start_run):
    run = start_run(
        run={"steps": 4, "groups_per_step": 4},
        evaluation={"num_prompts": 8},
        generation={"segment_tokens": 3},
        scoring={
            "rewards": [
                {"type": "exact_match", "normalize": "running"},
                {"type": "length", "free_tokens": 1, "full_tokens": 8, "watch": True},
            ]
        },
    )
    code, output = run.finish()
    assert code == 0, output
    records = [r for r in run.metrics() if "reward/mean" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(r["staleness/max"] <= 1 for r in records)
    assert records[-1]["generation/segments_total"] >= 3 * (16 + 8), "7 tokens, 3 a segment"
    assert sum(r["time/generation_busy_s"] + r["time/scoring_busy_s"] for r in records) > 0
    assert "advisor/gain/generation" in records[-1]
    for record in records:
        assert record["reward/part/exact_match"] == record["reward/mean"]
        assert -1 <= record["reward/part/length"] < 0, "watched, and no part of the mean"
        assert 0 <= record["reward/running_mean/exact_match"] <= 1
    [*_, evaluated] = [r for r in run.metrics() if "evaluation/reward_mean" in r]
    assert evaluated["evaluation/part/exact_match"] == evaluated["evaluation/reward_mean"]
    assert "evaluation/part/length" in evaluated
    for name in ("resolved.json", "environment.json", "status.json", "curve.png", "summary.json"):
        assert (run.path / name).stat().st_size > 0, name
    names = {"controller", "learner-0", "buffer", "generation-0", "scoring-0"}
    logs = {p.stem: p.read_text() for p in (run.path / "logs").glob("*.log")}
    assert logs.keys() >= names
    assert all(logs[name] for name in names), "every process tells what it did"
    assert "version 4 live" in logs["generation-0"]
    assert "step 4: " in logs["controller"]
    assert (run.path / "final" / "model.safetensors").exists()
    samples = [row for p in sorted((run.path / "samples").iterdir()) for row in read_samples(p)]
    groups = {row["group_id"] for row in samples}
    assert groups == {f"g{n:08d}" for n in range(16)}
    assert len({row["rollout_id"] for row in samples}) == len(samples) == 64
    for row in samples:
        assert len(row["response_ids"]) == len(row["sampled_logprobs"])
        assert 0 <= row["staleness"] <= 1
        assert json.loads(row["watched"]).keys() == {"length"}
    assert len({row["scorer_version"] for row in samples} - {""}) == 1
    assert parquet.read_table(run.path / "samples" / "step-000001.parquet").num_rows == 16
    assert not actor_pids("GenerationActor"), "nothing of the run is left on the cluster"


def test_a_run_with_mirrors_brings_each_version_to_the_node_once_and_leaves_nothing(
    start_run, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("mirror")
    run = start_run(
        run=LONG,
        generation={"workers": 2},
        weights={"mirror": str(folder), "format": "delta", "anchor_every": 2},
    )
    run.script(**SLOW)
    run.wait_for(lambda s: s.step >= 5, "five steps")
    [mirror] = [p for p in folder.iterdir() if p.is_dir()]
    assert mirror == copies_of(run.path / "weights", folder)
    versions = sorted(int(p.name[1:]) for p in mirror.glob("v*"))
    assert versions
    assert versions[-1] >= 4, "the fifth may be under way"
    assert len(versions) <= 3, "the newest one and what it builds on"
    run.process.send_signal(signal.SIGTERM)
    code, output = run.finish()
    assert code == 1, output
    status = json.loads((run.path / "status.json").read_text())
    assert [pool["restarts"] for pool in status["pools"]] == [0, 0]
    assert list(folder.iterdir()) == []


def test_a_failed_pull_retires_the_worker_and_loses_nothing(start_run):
    run = start_run(run={**LONG, "steps": 10 * LONG["steps"]}, generation={"workers": 2})
    run.script(**SLOW)
    seen: set[str] = set()
    run.wait_for(
        lambda s: (
            seen.update(exported_by(s.run)) or looked_at() <= seen | NOT_IN_A_PLAIN_RUN.keys()
        ),
        "all that dashboards and alerts look at is exported, with the run's name",
    )
    run.script(workers={"generation-1": {"fail_pull": True}}, **SLOW)
    status = run.wait_for(
        lambda s: any(p.name == "generation" and p.restarts >= 1 and p.alive == 2 for p in s.pools),
        "the worker that could not pull was replaced",
    )
    status = run.wait_for(lambda s: s.step >= status.step + 3, "three more steps")
    assert status.buffer_discarded == 0
    assert status.staleness_max <= 1
    run.wait_for(
        lambda s: "ray_rlhf_pool_restarts_total" in exported_by(s.run), "the restart is exported"
    )
    run.process.send_signal(signal.SIGTERM)
    code, output = run.finish()
    assert code == 1
    assert "was stopped by a signal" in output
    assert json.loads((run.path / "status.json").read_text())["state"] == "stopped"


def test_dead_generation_fails_the_run_naming_worker_error_and_groups(start_run):
    run = start_run(
        run={**LONG, "stall_timeout_s": 4.0},
        generation={"request_timeout_s": 600},
    )
    run.script(**SLOW)
    run.wait_for(lambda s: s.step >= 1, "a step")
    run.script(hang_generate=True)
    code, output = run.finish()
    assert code == 1
    assert "run.stall_timeout_s = 4" in output
    assert "in flight" in output
    assert "Pending groups: g0" in output
    stacks = json.loads((run.path / "post_mortem.json").read_text())["stacks"]["processes"]
    assert stacks.keys() >= {"generation-0", "scoring-0", "learner-0", "buffer"}
    assert all(any("most recent call first" in line for line in s) for s in stacks.values())


def test_d11_the_trained_model_is_there_though_no_prompt_can_be_evaluated(start_run):
    run = start_run(run={"steps": 1}, evaluation={"num_prompts": 2})
    run.script(fail_greedy=True)
    code, output = run.finish()
    assert code == 0, output
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["reward_before"], summary["reward_after"]) == (None, None)
    assert (run.path / "final" / "model.safetensors").exists()
    [*_, last] = [r for r in run.metrics() if "evaluation/failed_prompts" in r]
    assert last["evaluation/failed_prompts"] == 2
    assert "evaluation/reward_mean" not in last
    assert (
        "2 of 2 prompts failed, and do not count" in (run.path / "logs/controller.log").read_text()
    )


def test_a_crash_loop_ends_the_run_with_the_first_cause(start_run):
    run = start_run(run=LONG, cluster={"max_restarts": 1})
    run.script(**SLOW)
    run.wait_for(lambda s: s.step >= 1, "a step")
    run.script(fail_check=True, fail_generate=True)
    code, output = run.finish()
    assert code == 1
    assert "0 of at least 1 workers live. First cause" in output
    assert "scripted failure" in output
    known = json.loads((run.path / "post_mortem.json").read_text())
    assert output.strip().endswith(str(run.path / "post_mortem.json"))
    assert "scripted failure" in known["first_cause"]
    assert known["causes"][-1]["message"].startswith(
        "generation: 2 restarts within 3600 s, more than 1, "
    )
    assert known["step"] >= 1
    assert known["logs"].keys() >= {"controller", "generation-0", "learner-0"}
    assert known["stacks"]["processes"].keys() >= {"scoring-0", "learner-0", "buffer"}


def test_pools_grow_and_shrink_under_a_running_job_whose_name_is_taken(
    start_run, start_serving, ray_address
):
    run = start_run(run=LONG, generation={"workers": 1}, staleness={"max_in_flight_groups": 2})
    run.script(**SLOW)
    run.wait_for(lambda s: s.step >= 1, "a step")
    grown = scale(run.path, {"generation": 3, "scoring": 2}, ray_address)
    assert grown == {"generation": "generation: 3 workers", "scoring": "scoring: 2 workers"}
    status = run.wait_for(
        lambda s: {p.name: p.alive for p in s.pools} == {"generation": 3, "scoring": 2},
        "both pools grew",
    )
    assert status.buffer_in_flight <= 2, "the in-flight limit holds whatever the pool's size"
    if CHROMIUM is not None:
        check_live_page(run, status.step)
    _, address = start_serving("report", str(run.path), "--live")
    check_live_pages(run, address)
    shrunk = scale(run.path, {"generation": 1}, ray_address)
    assert shrunk == {"generation": "generation: 1 workers"}
    status = run.wait_for(lambda s: s.step >= status.step + 2, "two more steps")
    assert status.buffer_discarded == 0, "nothing in flight was lost"
    refused = scale(run.path, {"generation": 500}, ray_address)
    assert "refused" in refused["generation"]
    assert "no node can hold generation-" in refused["generation"]
    assert not (run.path / "logs" / "generation-3.log").exists(), "nothing was started for it"
    run.wait_for(lambda s: s.step > status.step, "the run goes on")

    second = start_run(run={**LONG, "name": run.path.name})
    code, output = second.finish()
    assert code == 1
    assert "in use by process" in output
    ray.get_actor(actor_name(run.path.name), namespace=NAMESPACE)
    assert run.process.poll() is None
