"""A run that resizes itself, by the same path as `rlhf-cluster scale`."""

from rlhf_cluster.run.run_directory import RunDir


def test_a_generation_bound_run_gets_a_worker_and_is_told_why(start_run):
    run = start_run(
        run={"steps": 2000, "groups_per_step": 4},
        autoscale={"steps": 4, "generation": {"maximum": 2, "cooldown_s": 1.0}},
    )
    run.script(generate_delay_s=0.3, in_turn=True)
    before = run.wait_for(lambda s: s.step >= 1, "a step")
    assert [(p.name, p.wanted) for p in before.pools] == [("generation", 1), ("scoring", 1)]
    grown = run.wait_for(lambda s: s.pools[0].alive == 2, "a second generation worker")
    assert grown.pools[0].restarts == 0
    run.wait_for(lambda s: s.step >= grown.step + 6, "steps with both")
    log = (RunDir.open(run.path).logs / "controller.log").read_text()
    assert "scale generation to 2: autoscale: generation-bound: learner waits" in log
    assert "scale generation to 2: generation: 2 workers" in log
    assert "scale generation to 3" not in log, "over its maximum"
    assert "discarded" not in log
