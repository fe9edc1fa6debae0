"""The advisor's benchmark: rates from records, and what is no rate."""

from pathlib import Path

import pytest

from benchmarks import advisor
from benchmarks.advisor import COUNTED, SETTLING
from rlhf_cluster.config import RunConfig, validate


def run(before_s=2.0, after_s=1.25, before=COUNTED, after=COUNTED, foretold: float | None = 2.0):
    """Records of a run whose generation gets a second worker; its settling steps take ten times as
    long."""
    records, now_s = [{"step": 0, "time_s": 0.0, "evaluation/reward_mean": 0.1}], 0.0
    for size, seconds, counted in ((1.0, before_s, before), (2.0, after_s, after)):
        for k in range(SETTLING + counted):
            now_s += seconds if k >= SETTLING else 10 * seconds
            records.append(
                {
                    "step": len(records),
                    "time_s": now_s,
                    "time/step_s": seconds,
                    "pool/size/generation": size,
                    "advisor/gain/generation": foretold if size == 1.0 else 1.0,
                }
            )
    return records


def test_the_gain_is_of_the_settled_steps_and_the_forecast_that_of_the_last_before():
    found = advisor.compared(run(), "generation")
    assert found["steps_per_s_before"] == pytest.approx(0.5)
    assert found["steps_per_s_after"] == pytest.approx(0.8)
    assert found["foretold_gain"] == 2.0
    assert found["measured_gain"] == pytest.approx(1.6)
    assert found["measured_over_foretold"] == pytest.approx(0.8)


@pytest.mark.parametrize("few", [{"before": COUNTED - 1}, {"after": COUNTED - 1}])
def test_too_few_settled_steps_are_no_rate(few):
    with pytest.raises(SystemExit, match=f"{COUNTED - 1} settled steps"):
        advisor.compared(run(**few), "generation")


def test_steps_with_a_gap_are_no_rate():
    records = run(before=COUNTED + 1)
    del records[SETTLING + 5]
    with pytest.raises(SystemExit, match=f"are not {COUNTED}; no rate"):
        advisor.compared(records, "generation")


def test_a_run_that_foretells_nothing_is_refused():
    with pytest.raises(SystemExit, match="foretells nothing of generation"):
        advisor.compared(run(foretold=None), "generation")


def test_every_case_is_a_valid_run():
    for name, case in advisor.CASES.items():
        config = validate(RunConfig, advisor.tree_of(case, name, Path("runs")), source=name)
        assert config.algorithm.group_size >= 4
