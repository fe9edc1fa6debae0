"""A learner rank on a disk that does not answer, or without descriptors. No cluster is needed."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.services.rank_actors import RankActor, build_learner_rank
from actors.weights.transports import Transport
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RankFailed, WeightError
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.transports.lent_shards import ShardLender
from rlhf_cluster.weights.transports.transport import Deadline, ShardSink
from rlhf_cluster.weights.writer_fence import Writer
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import assert_same, small_model, split_evenly

WRITER = Writer(1, "of the test")


class Hanging:
    """Everything that is asked of it waits until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.let_go.wait(300)


def test_a_rank_that_cannot_serve_publishes_all_the_same(tmp_path: Path):
    def no_descriptors(config: RunConfig) -> ShardLender:
        raise OSError(errno.EMFILE, "Too many open files")

    config = tiny_config(
        run={"root": str(tmp_path)}, weights={"transport": "relay", "mirror": "/elsewhere"}
    )
    transport, tensors = Transport(config, no_descriptors), small_model(seed=1)
    [parts] = split_evenly(tensors, 1)
    deadline, writer = Deadline("the test", 60.0), store.begin_attempt(config.weights_dir)

    class Rank:
        def write_snapshot(self, to: Sequence[ShardSink], base: int | None) -> ShardReport:
            return send_shard(to, 1, 0, parts)

    report = transport.write(Rank(), None, deadline, writer)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    version = transport.commit(1, [report], shapes, deadline, writer)
    assert_same(dict(store.read(version.path)), tensors)


def test_what_a_rank_cannot_write_in_time_is_named_with_folder_and_setting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = tiny_config(run={"root": str(tmp_path)}, observe={"slow_write_fraction": 0.5})
    rank, hanging = RankActor(config, "", 0, build_learner_rank), Hanging()
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
