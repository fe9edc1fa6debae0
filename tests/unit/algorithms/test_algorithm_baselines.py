"""What each algorithm takes off a reward, and by what it divides it, on one batch by hand."""

from typing import Any

import numpy as np
import pytest

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config import RunConfig, validate
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import random_groups

REWARDS = [3.0, 1.0, 0.0, 0.0, 6.0, 2.0]
"""Three groups of two, with means 2, 0 and 4; all have mean 2."""

ROOT2 = 2**0.5
CENTRED = [1, -1, 0, 0, 2, -2]
SCALED = [ROOT2 / 2, -ROOT2 / 2, 0, 0, ROOT2 / 2, -ROOT2 / 2]
"""The deviation of two rewards that differ by d is d / sqrt(2)."""


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"type": "grpo"}, SCALED),
        ({"type": "grpo", "normalize_std": False}, CENTRED),
        ({"type": "dr_grpo"}, CENTRED),
        ({"type": "dapo"}, SCALED),
        ({"type": "gspo"}, SCALED),
        ({"type": "gspo", "normalize_std": False}, CENTRED),
        ({"type": "sapo"}, SCALED),
        ({"type": "cispo"}, SCALED),
        ({"type": "reinforce", "baseline": "none"}, REWARDS),
        ({"type": "reinforce"}, [1, -1, -2, -2, 4, 0]),
        ({"type": "reinforce", "baseline": "group"}, CENTRED),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_advantages_are_those_worked_out_by_hand(
    algorithm: dict[str, Any], expected: list[float]
) -> None:
    tree = {**tiny_tree(), "algorithm": {**algorithm, "group_size": 2}}
    config = validate(RunConfig, tree, source="test").algorithm
    groups = random_groups(0, num_groups=3, group_size=2, rewards=REWARDS)
    found = ALGORITHMS[config.type](config, 24).advantages(groups)
    flat = [array for arrays in found for array in arrays]
    # 1e-4 is added to a deviation before it divides
    np.testing.assert_allclose([a[0] for a in flat], expected, rtol=1e-4, atol=1e-6)
    lengths = [len(s.rollout.response_ids) for g in groups for s in g.scored]
    assert [a.shape for a in flat] == [(n,) for n in lengths]
    assert all(a.dtype == np.float32 and np.all(a == a[0]) for a in flat)
