"""Port for a transfer of tensors from the learner's GPUs to an engine's, such as vLLM's transfer.

    learner   publish -> Sender.send_weights    iterates the `HashedTensors`; at its end, before any
                                                worker uses them, `TransferClient` sends the hashes
    worker    receive -> Receiver.update_weights -> Arrivals.load_weights      tensor by tensor
              Arrivals.verified                 names and hashes, then the engine may load them

A `Sender` is what vLLM's `WeightTransferTrainerFactory.trainer_init` returns, a `Receiver` one of its
`WeightTransferEngine`. The backends "nccl" and "ipc" pass arriving tensors to `load_weights` of the
target that `set_weight_update_target` names. They carry no digests, so the hashes are sent separately.

Promises:
- No tensor reaches a model before all have arrived, each with the hash that it was sent with.
- Tensors that are missing, damaged, sent twice or not announced are named in a `WeightError`.
- A transfer that failed has changed nothing. Its `Sender` is not used again: vLLM's groups cannot be.

A worker holds the version in host memory until it is verified, as with files. Calls here have no
deadline: the caller must end its wait for a `Sender` or a `Receiver` that hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import (
    combine_hashes,
    hash_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

_NAMES_SHOWN = 5


class Sender(Protocol):
    """The learner's end of a backend, on every rank."""

    def send_weights(self) -> None:
        """Send all tensors of the sender's source, and call its client meanwhile."""
        ...

    def shutdown(self) -> None: ...


class Receiver(Protocol):
    """A worker's end of a backend."""

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        """Pass all tensors that arrive after this call to `model.load_weights`."""
        ...

    def reset_weight_update_target(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive the tensors that the sender describes in `update_info`. Blocks."""
        ...

    def drain_pending(self) -> None:
        """Block until the target has all tensors that were received."""
        ...


class Workers(Protocol):
    """All workers of a run. Every call returns when all of them are done, or raises."""

    def open(self, init_info: dict[str, Any]) -> None: ...

    def take(self, update_info: Any) -> None:
        """Make each worker call `receive`."""
        ...

    def apply(self, announced: Announced) -> None:
        """Make each worker call `Arrivals.verified` and load the result. Raises `WeightError`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """Hashes of the tensors that were sent, by name. `digest` equals that of the version in files."""

    version: int
    hashes: Mapping[str, str]

    @property
    def digest(self) -> str:
        return combine_hashes(self.hashes)


class HashedTensors:
    """Complete tensors of a policy, each hashed right before it is sent.

    Each iteration is a new pass over all tensors; `tensors` begins one.
    """

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self._tensors = tensors
        self._hashes: dict[str, str] = {}
        self._is_whole = False
        self.version = -1

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._hashes, self._is_whole = {}, False
        for name, tensor in self._tensors():
            self._hashes[name] = hash_tensor(name, tensor.cpu())
            yield name, tensor
        self._is_whole = True

    def announced(self) -> Announced:
        """Return the hashes of the last pass. Raises `WeightError`: not all of it was sent."""
        if not self._is_whole:
            raise WeightError(
                f"version {self.version}: {len(self._hashes)} tensors were sent, and not all. Publish "
                "it again with a new sender"
            )
        return Announced(version=self.version, hashes=dict(self._hashes))


class TransferClient:
    """`VLLMWeightSyncClient` of vLLM, by which a `Sender` calls the workers."""

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
    """Send `source` as `version`. When this returns, every worker has it.

    Raises `WeightError`: then shut `sender` down and make a new one.
    """
    source.version = version
    try:
        sender.send_weights()
    except WeightError:
        raise
    except Exception as error:  # a backend may raise errors of any kind
        raise WeightError(
            f"version {version} was not transferred ({type(error).__name__}: {error}). The workers "
            "keep the weights they have; publish it again with a new sender"
        ) from error
    return source.announced()


def receive(
    receiver: Receiver, update_info: dict[str, Any], arrivals: Arrivals, model_config: Any
) -> None:
    """Receive what the sender sends into `arrivals`. The engine's model is not changed."""
    receiver.set_weight_update_target(arrivals, model_config)
    try:
        receiver.update_weights(update_info)
        receiver.drain_pending()
    finally:
        receiver.reset_weight_update_target()


class Arrivals:
    """Buffer that takes the place of the model while tensors arrive. Make one for each version."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._twice: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Keep copies in host memory, as a backend reuses its buffers. Returns their names."""
        names = set[str]()
        for name, tensor in weights:
            if name in self._tensors:
                self._twice.append(name)
            self._tensors[name] = tensor.detach().to("cpu", copy=True)
            names.add(name)
        return names

    def verified(self, announced: Announced) -> dict[str, Tensor]:
        """Return the tensors, checked against the hashes of those that were sent.

        Raises `WeightError`: some are missing, not announced, came twice, or are damaged.
        """
        hashes = announced.hashes
        problems = {
            "are missing": hashes.keys() - self._tensors.keys(),
            "were not announced": self._tensors.keys() - hashes.keys(),
            "came twice": self._twice,
            "are damaged": [
                name
                for name, tensor in self._tensors.items()
                if name in hashes and hash_tensor(name, tensor) != hashes[name]
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
