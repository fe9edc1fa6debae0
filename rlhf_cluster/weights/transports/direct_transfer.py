"""The port for a transfer of tensors from the learner's GPUs to an engine's, such as vLLM's own.

    learner   publish -> Sender.send_weights    iterates the `HashedTensors`; at its end, before any
                                                worker uses them, `TransferClient` gives the hashes
    worker    receive -> Receiver.update_weights -> Arrivals.load_weights      tensor by tensor
              Arrivals.verified                 names and hashes, then the engine may load them

A `Sender` is what vLLM's `WeightTransferTrainerFactory.trainer_init` returns, a `Receiver` one of its
`WeightTransferEngine`; backends "nccl" and "ipc" hand what arrives to `load_weights` of the target that
`set_weight_update_target` names. They carry no digests, so ours travel beside the tensors.

Promises:
- no tensor gets to a model before all of them are here, each with the hash that it was sent with;
- what is missing, damaged, sent twice or not announced is named in a `WeightError`;
- a transfer that broke has changed nothing. Its `Sender` is not used again: vLLM's groups cannot be.

A worker holds the version in host memory until it is verified, as with files. Nothing here waits with
a deadline of its own: a call into a `Sender` or a `Receiver` that hangs is left by who waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import (
    combine_hashes,
    hash_of,
)

if TYPE_CHECKING:
    from torch import Tensor

_NAMES_SHOWN = 5


class Sender(Protocol):
    """The learner's end of a backend, on every rank."""

    def send_weights(self) -> None:
        """Send all tensors of the source that it was made with, and drive its client meanwhile."""
        ...

    def shutdown(self) -> None: ...


class Receiver(Protocol):
    """A worker's end of a backend."""

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        """From here on tensors that arrive go to `model.load_weights`."""
        ...

    def reset_weight_update_target(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take what the sender says in `update_info` that it sends. Blocks."""
        ...

    def drain_pending(self) -> None:
        """Block until all that was taken has gone to the target."""
        ...


class Workers(Protocol):
    """All workers of a run. Every call returns when each of them is done, or raises."""

    def open(self, init_info: dict[str, Any]) -> None: ...

    def take(self, update_info: Any) -> None:
        """Each worker calls `receive`."""
        ...

    def apply(self, announced: Announced) -> None:
        """Each worker calls `Arrivals.verified`, and loads what that returns. Raises `WeightError`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What was sent: the hash of each tensor by name. `digest` is a version's in files, too."""

    version: int
    hashes: Mapping[str, str]

    @property
    def digest(self) -> str:
        return combine_hashes(self.hashes)


class HashedTensors:
    """The tensors of a policy, whole, each hashed right before it is sent. Each iteration is a fresh
    pass; `tensors` begins one."""

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self._tensors = tensors
        self._hashes: dict[str, str] = {}
        self._is_whole = False
        self.version = -1

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._hashes, self._is_whole = {}, False
        for name, tensor in self._tensors():
            self._hashes[name] = hash_of(name, tensor.cpu())
            yield name, tensor
        self._is_whole = True

    def announced(self) -> Announced:
        """Raises `WeightError`: not all of the version was sent."""
        if not self._is_whole:
            raise WeightError(
                f"version {self.version}: {len(self._hashes)} tensors were sent, and not all. Publish "
                "it again with a new sender"
            )
        return Announced(version=self.version, hashes=dict(self._hashes))


class TransferClient:
    """`VLLMWeightSyncClient` of vLLM: how a `Sender` reaches the workers."""

    def __init__(self, workers: Workers, source: HashedTensors) -> None:
        self._workers, self._source = workers, source

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._workers.open(init_info)

    def start_weight_update(self) -> None:
        return None  # a worker touches nothing before `apply`

    def update_weights(self, update_info: Any) -> None:
        self._workers.take(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._workers.apply(self._source.announced())


def publish(sender: Sender, source: HashedTensors, version: int) -> Announced:
    """Send `source` as `version`. When this returns, every worker has it. Raises `WeightError`; then
    shut `sender` down and make a new one."""
    source.version = version
    try:
        sender.send_weights()
    except WeightError:
        raise
    except Exception as error:  # what a backend raises is its own
        raise WeightError(
            f"version {version} was not transferred ({type(error).__name__}: {error}). The workers go "
            "on with the weights they have; publish it again with a new sender"
        ) from error
    return source.announced()


def receive(
    receiver: Receiver, update_info: dict[str, Any], arrivals: Arrivals, model_config: Any
) -> None:
    """Take what the sender sends to `arrivals`, and leave the engine's own model alone."""
    receiver.set_weight_update_target(arrivals, model_config)
    try:
        receiver.update_weights(update_info)
        receiver.drain_pending()
    finally:
        receiver.reset_weight_update_target()


class Arrivals:
    """Stands where a model would while tensors arrive. Make one for each version."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._twice: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Keep copies in host memory: a backend uses its buffers again. Returns their names."""
        names = set[str]()
        for name, tensor in weights:
            if name in self._tensors:
                self._twice.append(name)
            self._tensors[name] = tensor.detach().to("cpu", copy=True)
            names.add(name)
        return names

    def verified(self, announced: Announced) -> dict[str, Tensor]:
        """The tensors, which are those that were sent. Raises `WeightError`."""
        hashes = announced.hashes
        problems = {
            "are missing": hashes.keys() - self._tensors.keys(),
            "were not announced": self._tensors.keys() - hashes.keys(),
            "came twice": self._twice,
            "are damaged": [
                name
                for name, tensor in self._tensors.items()
                if name in hashes and hash_of(name, tensor) != hashes[name]
            ],
        }
        found = [
            f"{len(names)} tensors {what}, such as {sorted(names)[:_NAMES_SHOWN]}"
            for what, names in problems.items()
            if names
        ]
        if found:
            raise WeightError(
                f"version {announced.version} did not arrive as it was sent: {'; '.join(found)}. "
                "Publish it again with a new sender"
            )
        return self._tensors
