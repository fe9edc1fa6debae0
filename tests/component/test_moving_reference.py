"""Runs whose scoring pool loads what the run itself publishes: exact log-probabilities, and a
reference that moves."""

import math
import re
import signal
from typing import Any

import pytest

from actors.services.control_actor import scale
from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.observe.trace_rollout import trace_sample
from rlhf_cluster.run.run_directory import RunDir

SCORING = {"exact_logprobs": True, "reference": True}
KL = {"kl_coef": 0.01}


def test_a_run_with_exact_logprobs_and_a_periodic_reference_goes_to_its_end(start_run):
    run = start_run(
        run={"steps": 6, "groups_per_step": 4},
        algorithm={**KL, "sampler": "exact"},
        scoring={**SCORING, "reference_update": {"type": "periodic", "every": 2}},
        staleness={"max_staleness": 2, "pipeline_depth": 2},
    )
    run.script(generate_delay_s=0.05, pull_delay_s=0.1)
    code, output = run.finish()
    assert code == 0, output
    records = [r for r in run.metrics() if "reward/mean" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert record["importance/engine_mismatch_mean"] > 0.1, "the engine's numbers are made up"
        for quantity in ("mean", "p95", "max"):
            mismatch = record[f"importance/engine_mismatch_{quantity}"]
            assert 0 <= record[f"importance/staleness_effect_{quantity}"] < mismatch
        assert record["learner/kl_ref"] >= 0
        if record["staleness/max"] == 0:
            assert record["importance/staleness_effect_max"] < 1e-4
    assert max(r["importance/staleness_effect_max"] for r in records) > 1e-4, "old tokens were met"
    references = [r["scoring/reference_version"] for r in records]
    assert references == sorted(references)
    assert set(references) <= {0, 2, 3, 4, 5, 6}
    assert len(set(references)) >= 2, "it moved"
    assert "reference of version 0 loaded" in (run.path / "logs" / "scoring-0.log").read_text()
    rows = [r for p in (run.path / "samples").iterdir() for r in read_samples(p)]
    assert len(rows) == 6 * 16
    last = read_samples(run.path / "samples" / "step-000006.parquet")
    trained = [row for row in last if row["learner_logprobs"] is not None]
    assert len(trained) == 16 - records[-1]["learner/dropped_rollouts"] > 0
    for row in trained:
        tokens: Any = trace_sample(RunDir.open(run.path), row["rollout_id"]).tokens
        learner, exact = tokens["learner_logprob"], tokens["exact_logprob"]
        expected = [min(math.exp(own - mu), 2.0) for own, mu in zip(learner, exact, strict=True)]
        assert tokens["correction_weight"] == pytest.approx(expected, rel=1e-5)


def loaded_references(run, worker: str) -> dict[str, str]:
    """Digest by version of the references that a worker logged, in its order."""
    text = (run.path / "logs" / f"{worker}.log").read_text()
    return dict(re.findall(r"reference of version (\d+) loaded, digest (\w+)", text))


def test_a_worker_that_joins_the_references_pool_late_holds_that_of_the_others(
    start_run, ray_address
):
    apart = {"policies": {"serves": ["reference", "exact_logprobs"], "num_cpus": 0.25}}
    run = start_run(
        run={"steps": 400, "groups_per_step": 4},
        algorithm=KL,
        scoring={
            **SCORING,
            "reference_update": {"type": "ema", "every": 2, "decay": 0.9},
            "pools": apart,
        },
    )
    run.script(generate_delay_s=0.15)
    run.wait_for(lambda s: s.step >= 3, "three steps")
    grown = scale(run.path, {"policies": 2, "silver": 3}, ray_address)
    assert grown == {
        "policies": "policies: 2 workers",
        "silver": "refused: no pool 'silver'. Pools: generation, scoring, policies",
    }
    first, late = (loaded_references(run, f"policies-{number}") for number in (0, 1))
    assert "0" in first
    assert "0" not in late, "the reference had moved"
    common = first.keys() & late.keys()
    assert common, "it was given the reference before it counted as a worker"
    assert {v: first[v] for v in common} == {v: late[v] for v in common}
    assert loaded_references(run, "scoring-0") == {}, "it rewards, joins and stores"
    records = run.metrics()
    assert sum(r.get("time/pool_busy_s/policies", 0.0) for r in records) > 0
    assert any("advisor/gain/policies" in r for r in records)
    last = next(r for r in reversed(records) if "reward/mean" in r)
    assert last["learner/kl_ref"] >= 0
    assert last["importance/engine_mismatch_mean"] > 0.1, "exact log-probabilities came along"
    run.process.send_signal(signal.SIGTERM)
    run.finish()
