"""What the engines and the driver count: sums and counts, never means of means (S39)."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any

import pytest

from actors.drivers.rl_observer import RunObserver
from actors.vllm.vllm_requests import Totals
from rlhf_cluster.config import RunConfig
from rlhf_cluster.observe.metrics import Metrics
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.records import (
    GroupSummary,
    StepReport,
    Ticket,
    TrainingGroup,
)
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.weights.sync import SyncStats
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.checked_metrics import CheckedMetrics
from tests.support.fakes.services import Sent
from tests.unit.scoring.test_served_rewards import step_times


def output(prompt: int, cached: int | None, *choices: tuple[int, int, list[int]]):
    """A finished `RequestOutput`: tokens, and of drafts the proposed and how many steps took n."""
    return SimpleNamespace(
        prompt_token_ids=[0] * prompt,
        num_cached_tokens=cached,
        outputs=[
            SimpleNamespace(
                token_ids=[0] * tokens,
                spec_decode_metrics=None
                if not drafted
                else SimpleNamespace(num_draft_tokens=drafted, histogram=steps),
            )
            for tokens, drafted, steps in choices
        ],
    )


def test_s39_hits_and_accepted_tokens_are_sums_over_requests_of_any_length():
    totals = Totals()
    totals.add(output(100, 90, (7, 9, [1, 0, 2]), (3, 0, [])))
    totals.add(output(10, 0, (5, 3, [0, 3, 0])))
    totals.add(output(4, None, (1, 0, [])))
    assert (totals.num_prefix, totals.num_cached) == (114, 90)
    assert totals.num_sampled == 16
    assert (totals.num_drafted, totals.num_accepted) == (12, 4 + 3)


def taken(number: int, oldest: int, rollouts: int = 2) -> TrainingGroup:
    summary = GroupSummary(
        group_id=f"g{number}",
        oldest_version=oldest,
        num_rollouts=rollouts,
        num_tokens=4,
        rewards=(1.0,) * rollouts,
        longest_tokens=2,
    )
    return TrainingGroup(ticket=Ticket(number=number, version=oldest), handle=None, summary=summary)


def observing(config: RunConfig, rundir: RunDir) -> tuple[Any, Sent]:
    observer: Any = RunObserver(
        config, rundir, (), SyncStats, lambda snapshot: None, 0.0, lambda: 1.0
    )
    sent = Sent()
    observer._metrics = Metrics(sent)
    return observer, sent


def by_staleness(sent: Sent) -> dict[str, float]:
    return {k[1]: v for k, v in sent.series.items() if k[0] == "staleness/rollouts_total"}


async def test_rollouts_are_counted_by_staleness_over_the_whole_run(tmp_path):
    config = tiny_config(run={"root": str(tmp_path)})
    with RunDir.create(config.run_dir, config) as rundir:
        observer, sent = observing(config, rundir)
        observer.step(StepReport(step=1, metrics={}), [taken(0, 0), taken(1, 0, 3)], step_times())
        observer.step(StepReport(step=3, metrics={}), [taken(2, 2), taken(3, 1)], step_times())
        observer.close()
        assert by_staleness(sent) == {"0": 7.0, "1": 2.0}
        observer, sent = observing(config, rundir)
        await observer.resumed(3)
        observer.step(StepReport(step=4, metrics={}), [taken(4, 2)], step_times())
        observer.close()
        assert by_staleness(sent) == {"0": 7.0, "1": 4.0}


def test_the_memory_of_a_process_is_the_kernels_number(tmp_path):
    assert resident_bytes() > 1 << 20
    statm = tmp_path / "statm"
    statm.write_text("100 25 3 1 0 9 0\n")
    assert resident_bytes(statm) == 25 * os.sysconf("SC_PAGESIZE")
    statm.write_text("nonsense")
    assert math.isnan(resident_bytes(statm))
    assert math.isnan(resident_bytes(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["generation/responses_total", "staleness/rollouts_total"])
def test_a_count_by_label_needs_its_label(name):
    metrics = CheckedMetrics()
    metrics.count(f"{name}/3")
    with pytest.raises(Exception, match="needs a label"):
        metrics.count(name)
