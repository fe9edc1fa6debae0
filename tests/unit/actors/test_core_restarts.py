"""The budget of restarts that the drivers give to the learner and the buffer."""

from typing import Any

import pytest

from actors.services.learner_core import core_restarts
from tests.support.builders.offline_stages import stage_config
from tests.support.builders.run_configs import tiny_config

SECTIONS: dict[str, Any] = {
    "cluster": {"recovery_timeout_s": 90.0, "restart_window_s": 70.0},
    "learner": {"ranks": 3, "num_cpus": 2.0, "num_gpus": 1.0, "max_restarts": 5},
}


@pytest.mark.parametrize(
    ("config", "needs"),
    [
        (tiny_config(**SECTIONS), "6.1 CPU, 3 GPU"),
        (stage_config("model", **SECTIONS), "6 CPU, 3 GPU"),
    ],
)
def test_the_budget_is_that_of_the_configuration(config: Any, needs: str):
    found = core_restarts(config)
    assert (found.limit, found.window.window_s) == (5, 70.0)
    assert (found.recovery_timeout_s, found.needs) == (90.0, needs)
