"""Online DPO through the asynchronous loop: sampled pairs, judged by the scoring pool."""

from rlhf_cluster.observe.record.samples import read_samples


def test_stale_pairs_of_the_loop_are_trained_and_groups_without_one_are_counted(start_run):
    run = start_run(
        run={"steps": 6, "groups_per_step": 4},
        algorithm={"type": "online_dpo", "loss": {"type": "dpo", "beta": 0.5}},
        scoring={"reference": True},
        staleness={"max_staleness": 2, "pipeline_depth": 2},
    )
    run.script(generate_delay_s=0.05, pull_delay_s=0.1, skill=0.5, skill_per_version=0.0)
    code, output = run.finish()
    assert code == 0, output
    records = [r for r in run.metrics() if "reward/mean" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        tied = round(4 * record["reward/zero_std_groups_fraction"])
        assert record["preference/tied_groups"] == tied
        assert record["preference/pairs"] == 4 - tied
        assert record["learner/dropped_rollouts"] == 16 - 2 * record["preference/pairs"]
        assert record["preference/chosen_logprob"] < 0
        assert record["preference/rejected_logprob"] < 0
    assert sum(r["preference/pairs"] for r in records) >= 12
    assert max(r["staleness/max"] for r in records) > 0, "old pairs were met"
    first, last = records[0], records[-1]
    assert abs(first["preference/margin"]) < 1e-4, "the policy began as its reference"
    assert last["preference/chosen_log_ratio"] != 0
    rows = [r for p in (run.path / "samples").iterdir() for r in read_samples(p)]
    assert len(rows) == 6 * 16
    learnt = [row for row in rows if row["learner_logprobs"] is not None]
    assert len(learnt) == 2 * sum(r["preference/pairs"] for r in records)
    assert {row["correction_weights"] for row in rows} == {None}
