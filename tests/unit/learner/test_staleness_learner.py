"""The bound that the learner checks, token by token, is the one that the buffer admits by."""

from pathlib import Path

import pytest

from rlhf_cluster.errors import StalenessError
from rlhf_cluster.learner.learner_rank import LearnerRank
from tests.support.builders.tiny_learner import (
    learner_config,
    random_groups,
    save_llama,
)

REWEIGHT = {"max_staleness": 1, "on_stale": "reweight", "stale_limit": 2}


def test_reweight_trains_a_token_up_to_its_limit_and_raises_beyond(tmp_path: Path) -> None:
    model_dir = save_llama(tmp_path)
    config = learner_config(model_dir, staleness=REWEIGHT)
    learner = LearnerRank(config, model_dir, 0, 1, None)
    learner.setup()
    try:
        for staleness in (0, 1, 2):
            report = learner.train_step(random_groups(1, version=0))
            assert report.metrics["staleness/max"] == staleness
        with pytest.raises(StalenessError, match="staleness 3; allowed is 0 to"):
            learner.train_step(random_groups(1, version=0))
    finally:
        learner.close()
