"""A learner rank on a disk that does not answer. No cluster is needed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from actors.services.learner_actors import LearnerActor
from rlhf_cluster.errors import RankFailed, WeightError
from rlhf_cluster.weights.writer_fence import Writer
from tests.support.builders.run_configs import tiny_config

WRITER = Writer(1, "of the test")


class Hanging:
    """Everything that is asked of it waits until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.let_go.wait(300)


def test_what_a_rank_cannot_write_in_time_is_named_with_folder_and_setting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = tiny_config(run={"root": str(tmp_path)}, observe={"slow_write_fraction": 0.5})
    rank, hanging = LearnerActor(config, "", 0), Hanging()
    rank._rank = rank._transport = hanging  # type: ignore[assignment]
    checkpoint = str(tmp_path / "checkpoints" / "step-000050")
    publishing = "weights.publish_timeout_s"
    weights = config.weights_dir
    for setting, folder, kind, call in (
        (publishing, weights, WeightError, lambda: rank.write_snapshot(0, WRITER, 0.02)),
        (publishing, weights, WeightError, lambda: rank.commit(3, [], WRITER, 0.02)),
        (
            "checkpoint.timeout_s",
            checkpoint,
            RankFailed,
            lambda: rank.write_state(checkpoint, 0.02),
        ),
    ):
        caplog.clear()
        with pytest.raises(kind) as caught:
            call()
        assert str(folder) in str(caught.value)
        assert f"not written within {setting} = 0.02 s" in str(caught.value)
        slow = [r.getMessage() for r in caplog.records if r.getMessage().startswith("slow disk")]
        assert len(slow) == 1
        assert str(folder) in slow[0]
    hanging.let_go.set()
