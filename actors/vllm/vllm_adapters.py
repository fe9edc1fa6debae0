"""Adapters that vLLM serves on top of its weights: `generation.lora = "served"`.

    write    any thread: read the version's A and B from the store, verify them, write a peft folder
    add      between two steps: vLLM loads that folder; a refusal changes nothing
    retire   between two steps: remove the adapters from vLLM that no request samples with

Promises:
- each load of a version has a name, a number and a folder that are unique in this engine. vLLM keys
  cached blocks by name and folder, and loaded adapters by number. So results of one version are never
  used for another one. This also holds if a version number is published again with other weights, as
  happens after a failure of the learner;
- an adapter is only added to the weights that it was trained over: the first version of each anchor is
  compared with the engine's model folder (`weights.formats.peft_folder.refuse_other_base`);
- a folder exists as long as a request may need it, because vLLM reads it again after an eviction. A
  folder that is not whole, or is written after its deadline, is deleted at once. A folder that was
  written and never added is deleted with the next version, and cannot be added then. Folders are under
  TMPDIR of the node. `close` deletes them; those of a killed process remain.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cluster.errors import WeightError
from rlhf_cluster.generation.engine import LoadedWeights
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.formats.peft_folder import refuse_other_base, write_peft_folder
from rlhf_cluster.weights.read_version import read_factors
from rlhf_cluster.weights.transports.transport import Deadline

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One loaded version as vLLM identifies it. `number` counts this engine's loads, from 1."""

    version: int
    number: int
    folder: Path
    digest: str
    num_tensors: int

    @property
    def lora_request(self) -> LoRARequest:
        from vllm.lora.request import LoRARequest

        return LoRARequest(
            lora_name=self.folder.name, lora_int_id=self.number, lora_path=str(self.folder)
        )

    def loaded(self, pause_s: float) -> LoadedWeights:
        return LoadedWeights(
            version=self.version,
            digest=self.digest,
            num_tensors=self.num_tensors,
            pause_s=pause_s,
        )


class Adapters:
    """All adapters of one engine."""

    def __init__(self, model_dir: str, name: str) -> None:
        self._model_dir = model_dir
        self._root = Path(tempfile.mkdtemp(prefix=f"rlhf-adapters-{name}-"))
        self._num_written = 0
        self._checked_base = ""
        self._served: dict[int, Adapter] = {}  # by number
        self._retired: list[Path] = []
        self._unclaimed: set[Path] = set()  # written, and not added yet
        self._claiming = threading.Lock()
        self._is_closed = False
        self._writing = threading.Lock()

    def write(self, version: WeightVersion, deadline: Deadline) -> Adapter:
        """Read `version` and write its folder.

        Raises: `WeightError`, also while an earlier version is still being read; `StalledError`.
        """
        if not self._writing.acquire(blocking=False):
            raise WeightError(
                f"version {version.version} was not loaded: the storage does not answer: an earlier "
                "version is still being read"
            )
        try:
            return self._write(version, deadline)
        finally:
            if self._is_closed:
                shutil.rmtree(self._root, ignore_errors=True)
            self._writing.release()

    def _write(self, version: WeightVersion, deadline: Deadline) -> Adapter:
        with self._claiming:
            self._retired += self._unclaimed
            self._unclaimed.clear()
        while self._retired:
            shutil.rmtree(self._retired.pop(), ignore_errors=True)
        manifest, factors = read_factors(version.path, version.digest, deadline)
        anchor = manifest.chain[0].digest if manifest.chain else manifest.digest
        if anchor != self._checked_base:
            refuse_other_base(self._model_dir, manifest, deadline)
            self._checked_base = anchor
        self._num_written += 1
        folder = self._root / f"v{version.version:06d}-{self._num_written}"
        try:
            write_peft_folder(folder, manifest, factors)
            deadline.left_s(str(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._unclaimed.add(folder)
        return Adapter(
            version=version.version,
            number=self._num_written,
            folder=folder,
            digest=manifest.digest,
            num_tensors=len(manifest.tensors),
        )

    def add(self, llm: Any, adapter: Adapter) -> None:
        """Let vLLM load an adapter. Raises `WeightError`, with the served adapters unchanged."""
        with self._claiming:
            if adapter.folder not in self._unclaimed:
                raise WeightError(
                    f"version {adapter.version} was not loaded: a later one was written meanwhile"
                )
            self._unclaimed.remove(adapter.folder)
        try:
            llm.add_lora(adapter.lora_request)
        except (ValueError, RuntimeError, OSError) as error:
            self._retired.append(adapter.folder)
            raise WeightError(
                f"version {adapter.version} was not loaded: vLLM refuses its adapter: {error}"
            ) from error
        self._served[adapter.number] = adapter

    def retire(self, llm: Any, used: Collection[int]) -> None:
        """Remove all adapters from vLLM but the newest and those whose numbers are `used`."""
        newest = max(self._served, default=0)
        for number in [n for n in self._served if n != newest and n not in used]:
            llm.remove_lora(number)
            self._retired.append(self._served.pop(number).folder)

    def close(self) -> None:
        self._is_closed = True
        shutil.rmtree(self._root, ignore_errors=True)
