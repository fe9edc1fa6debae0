"""On-policy distillation through the asynchronous loop: a teacher in a pool of its own."""

from rlhf_cluster.models.make_model import make_model
from tests.support.builders.run_configs import tiny_config


def test_a_teacher_rates_the_tokens_that_were_sampled_until_the_policy_leaves_it(
    start_run, tmp_path
):
    # what the run makes for itself, so that no token has another probability at the first step
    init = tiny_config().model.init
    assert init is not None
    teacher = make_model(init, tmp_path / "teacher", seed=0)
    run = start_run(
        run={"steps": 3, "groups_per_step": 4, "seed": 0},
        algorithm={"type": "on_policy_distillation", "group_size": 4, "reward_coef": 1.0},
        scoring={
            "teacher": str(teacher),
            "pools": {"teachers": {"serves": ["teacher"], "num_cpus": 0.25}},
        },
    )
    code, output = run.finish(300)
    assert code == 0, output
    records = [r for r in run.metrics() if "reward/mean" in r]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert abs(records[0]["distillation/teacher_gap"]) < 1e-5
    assert records[0]["distillation/teacher_kl"] < 1e-6
    assert records[-1]["distillation/teacher_kl"] > 1e-4
    assert all(r["learner/grad_norm"] > 0 for r in records)
