"""The port for a transfer of tensors between GPUs, filled by a fake, with our digests beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import compute_digest
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

Pair = tuple[str, torch.Tensor]


class FakeReceiver:
    """A worker's end: what is on `wire` goes to the target, through a buffer that is used again."""

    def __init__(self, wire: list[Pair], model: Any) -> None:
        self._wire, self._model, self.target = wire, model, model

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        self.target = model

    def reset_weight_update_target(self) -> None:
        self.target = self._model

    def update_weights(self, update_info: dict[str, Any]) -> None:
        for name, tensor in self._wire[: update_info["num_tensors"]]:
            buffer = tensor.clone()
            self.target.load_weights([(name, buffer)])
            buffer.fill_(7)
        del self._wire[: update_info["num_tensors"]]

    def drain_pending(self) -> None:
        return None


class Model:
    """What a worker samples with."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.version = -1

    def load_weights(self, weights: Any) -> None:
        self.weights |= dict(weights)


class Worker:
    def __init__(self, wire: list[Pair]) -> None:
        self.model, self.arrivals = Model(), Arrivals()
        self.receiver = FakeReceiver(wire, self.model)
        self.config: dict[str, Any] = {}

    def open(self, init_info: dict[str, Any]) -> None:
        self.config = init_info

    def take(self, update_info: dict[str, Any]) -> None:
        receive(self.receiver, update_info, self.arrivals, self.config)

    def apply(self, announced: Announced) -> None:
        arrivals, self.arrivals = self.arrivals, Arrivals()
        self.model.load_weights(arrivals.verified(announced).items())
        self.model.version = announced.version


class FakeSender:
    """The learner's end, in the order of vLLM's: begin, chunk by chunk, finish. `change` is what
    happens to the tensors on their way."""

    def __init__(
        self,
        source: HashedTensors,
        client: TransferClient,
        wire: list[Pair],
        change: Callable[[list[Pair]], list[Pair]] = lambda sent: sent,
    ) -> None:
        self._source, self._client, self._wire, self._change = source, client, wire, change
        client.init_weight_transfer_engine({"packed": False})

    def send_weights(self) -> None:
        self._client.start_weight_update()
        sent = self._change([(name, tensor.clone()) for name, tensor in self._source])
        for pair in sent:
            self._wire.append(pair)
            self._client.update_weights({"num_tensors": 1})
        self._client.finish_weight_update()

    def shutdown(self) -> None:
        return None


class Transfer:
    def __init__(self, change: Callable[[list[Pair]], list[Pair]] = lambda sent: sent) -> None:
        wire: list[Pair] = []
        self.policy: Mapping[str, torch.Tensor] = small_model(seed=1)
        self.worker = Worker(wire)
        self.source = HashedTensors(lambda: self.policy.items())
        self.client = TransferClient(self.worker, self.source)
        self.sender = FakeSender(self.source, self.client, wire, change)

    def publish(self, version: int) -> Announced:
        return publish(self.sender, self.source, version)


def test_a_version_that_arrived_whole_is_loaded_and_has_the_digest_of_one_in_files() -> None:
    transfer = Transfer()
    for version in (1, 2):
        transfer.policy = small_model(seed=version)
        announced = transfer.publish(version)
        assert announced.digest == compute_digest(transfer.policy.items())
        assert_same(transfer.worker.model.weights, dict(transfer.policy))
        assert transfer.worker.model.version == version


def flipped(sent: list[Pair]) -> list[Pair]:
    sent[1][1].view(torch.uint8).view(-1)[3] ^= 16
    return sent


def renamed(sent: list[Pair]) -> list[Pair]:
    return [("another", sent[0][1]), *sent[1:]]


def transposed(sent: list[Pair]) -> list[Pair]:
    return [(name, tensor.reshape(-1)) for name, tensor in sent]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flipped, "1 tensors are damaged, such as"),
        (lambda sent: sent[1:], "1 tensors are missing, such as"),
        (lambda sent: [*sent, sent[0]], "1 tensors came twice, such as"),
        (renamed, "1 tensors are missing.*1 tensors were not announced, such as .*'another'"),
        (transposed, "tensors are damaged"),
    ],
)
def test_what_did_not_arrive_as_it_was_sent_is_named_and_reaches_no_model(
    change: Callable[[list[Pair]], list[Pair]], says: str
) -> None:
    transfer = Transfer()
    transfer.publish(1)
    had = dict(transfer.worker.model.weights)
    transfer.policy = small_model(seed=2)
    transfer.sender._change = change
    with pytest.raises(WeightError, match=f"version 2 did not arrive as it was sent: .*{says}"):
        transfer.publish(2)
    assert_same(transfer.worker.model.weights, had)
    assert transfer.worker.model.version == 1


def test_a_backend_that_fails_is_a_refused_version_and_changes_nothing() -> None:
    def broken(sent: list[Pair]) -> list[Pair]:
        raise RuntimeError("NCCL error: unhandled system error")

    transfer = Transfer(broken)
    with pytest.raises(WeightError, match=r"version 3 was not transferred \(RuntimeError: NCCL"):
        transfer.publish(3)
    assert not transfer.worker.model.weights


def test_a_sender_that_stops_before_the_end_announces_nothing() -> None:
    source = HashedTensors(lambda: small_model(seed=1).items())
    passing: Iterator[Pair] = iter(source)
    next(passing)
    with pytest.raises(WeightError, match="1 tensors were sent, and not all"):
        source.announced()


def test_the_engines_own_model_is_the_target_again_after_a_failure() -> None:
    class Failing(FakeReceiver):
        def update_weights(self, update_info: dict[str, Any]) -> None:
            raise RuntimeError("the other side is gone")

    model = Model()
    receiver = Failing([], model)
    with pytest.raises(RuntimeError):
        receive(receiver, {}, Arrivals(), None)
    assert receiver.target is model
