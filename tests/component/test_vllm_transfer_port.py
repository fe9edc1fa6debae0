"""Our port for direct transfers, filled by a backend of vLLM's own classes, without a GPU."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.direct_transfer import (
    Announced,
    Arrivals,
    HashedTensors,
    TransferClient,
    publish,
    receive,
)
from tests.support.builders.small_weights import (
    assert_same,
    small_model,
)

BACKEND = "queue"
GENEROUS_S = 60.0
WIRE: queue.Queue[torch.Tensor] = queue.Queue()


class Source(WeightSource):
    """vLLM's view of what is sent."""

    def __init__(self, tensors: HashedTensors, shapes: dict[str, torch.Tensor]) -> None:
        self._tensors, self._shapes = tensors, shapes

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self._shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._tensors)


@dataclass
class QueueTrainerInfo(TrainerInitInfo):
    backend = BACKEND
    damages: bool = False


class QueueTrainer(TrainerWeightTransferEngine[QueueTrainerInfo]):
    """In the order of vLLM's NCCL engine: the workers take beside the sender's pass."""

    init_info_cls = QueueTrainerInfo
    damages = False

    @classmethod
    def trainer_init(
        cls,
        init_info: QueueTrainerInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> QueueTrainer:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.damages = init_info.damages
        client.init_weight_transfer_engine({})
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        info = QueueUpdateInfo(names=[meta.name for meta in self.source.metadata()])
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as threads:
            taking = threads.submit(self.client.update_weights, asdict(info))
            for _, tensor in self.source:
                WIRE.put(tensor + 1 if self.damages else tensor)
            taking.result(GENEROUS_S)
        self.client.finish_weight_update()


@dataclass
class QueueInitInfo(WeightTransferInitInfo):
    pass


@dataclass
class QueueUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]


class QueueEngine(WeightTransferEngine[QueueInitInfo, QueueUpdateInfo]):
    init_info_cls = QueueInitInfo
    update_info_cls = QueueUpdateInfo

    def init_transfer_engine(self, init_info: QueueInitInfo) -> None: ...

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Without the base class's wait for an accelerator, which is not there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: QueueUpdateInfo) -> None:
        load: Any = self.model.load_weights
        for name in update_info.names:
            load([(name, WIRE.get(timeout=GENEROUS_S))])

    def shutdown(self) -> None: ...


class Worker:
    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.arrivals = Arrivals()
        vllm_config: Any = SimpleNamespace(parallel_config=None, model_config="own")
        config: Any = SimpleNamespace(backend=BACKEND)
        model: Any = SimpleNamespace(load_weights=self.loaded.update)
        self.engine: WeightTransferEngine = WeightTransferEngineFactory.create_engine(
            config, vllm_config, torch.device("cpu"), model
        )

    def open(self, init_info: dict[str, Any]) -> None:
        self.engine.init_transfer_engine(self.engine.parse_init_info(init_info))

    def take(self, update_info: dict[str, Any]) -> None:
        receive(self.engine, update_info, self.arrivals, self.engine.model_config)

    def apply(self, announced: Announced) -> None:
        arrivals, self.arrivals = self.arrivals, Arrivals()
        self.engine.model.load_weights(arrivals.verified(announced))  # type: ignore[operator]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    WeightTransferEngineFactory.register_engine(BACKEND, QueueEngine)
    WeightTransferTrainerFactory.register_engine(BACKEND, QueueTrainer)


@pytest.mark.parametrize("damages", [False, True])
def test_a_backend_of_vllm_fills_the_port_and_our_digests_are_checked(damages: bool) -> None:
    policy, worker = small_model(seed=1), Worker()
    tensors = HashedTensors(policy.items)
    client = TransferClient(worker, tensors)
    assert isinstance(client, VLLMWeightSyncClient)
    sender = WeightTransferTrainerFactory.trainer_init(
        QueueTrainerInfo(rank=0, damages=damages), client=client, source=Source(tensors, policy)
    )
    if damages:
        with pytest.raises(WeightError, match="3 tensors are damaged"):
            publish(sender, tensors, 5)
        assert not worker.loaded
    else:
        publish(sender, tensors, 5)
        assert_same(worker.loaded, policy)


def test_vllm_still_has_the_backends_that_the_port_is_for() -> None:
    """By name; none of them runs without a GPU."""
    assert {"nccl", "ipc"} <= WeightTransferTrainerFactory._registry.keys()
    assert {"nccl", "ipc"} <= WeightTransferEngineFactory._registry.keys()
    assert WeightTransferConfig(backend="nccl").backend == "nccl"
