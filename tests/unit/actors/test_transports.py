"""What a learner rank's transport asks of the run's planner, and what it costs when nobody answers."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from actors.weights.transports import Transport
from rlhf_cluster.errors import WeightError
from tests.support.builders.run_configs import tiny_config


class Planner:
    """`RemotePlanner` of a run whose planner may be gone."""

    def __init__(self, is_gone: bool) -> None:
        self.is_gone, self.asked = is_gone, list[str]()

    def __call__(self, run_name: str) -> Any:
        self.asked.append(run_name)
        return self

    def begin_anew(self) -> None:
        if self.is_gone:
            raise WeightError("relay:x cannot be reached")


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_planner_that_went_with_the_learner_costs_no_run(is_gone: bool, caplog) -> None:
    planner = Planner(is_gone)
    config = tiny_config(weights={"transport": "relay"})
    with caplog.at_level(logging.WARNING):
        Transport(config, planner=planner).begin_anew()
    assert planner.asked == [config.run.name]
    assert ("relay:x cannot be reached" in caplog.text) is is_gone


def test_files_have_no_planner_to_ask() -> None:
    planner = Planner(is_gone=True)
    Transport(tiny_config(weights={"transport": "files"}), planner=planner).begin_anew()
    assert planner.asked == []
