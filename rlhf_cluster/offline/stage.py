"""What a kind of offline stage decides: how a row becomes a unit, the loss, and what is reported.

    rows -> read -> units -> loss of a batch -> shares of micro-batches -> one optimizer step

A stage is one file: its section of the run file, and a class on `Stage` built as `cls(section,
context)`, in the driver (which reads) and in every rank (which trains). It holds no model: what it
computes, it computes through `Passes`. Promises asked of it: importing its file loads no torch; `loss`
makes the same calls on every rank; shares of all micro-batches and ranks add up to the loss.

Shapes: T targets of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit, cut_end
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.models.divergence import (
    REVERSE_KL,
    Divergence,
)
from rlhf_cluster.sections.offline_stage import (
    StageData,
    StageSectionBase,
)

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.algorithms.micro_batch_loss import (
        TokenLoss,
        ValueLoss,
    )

    PerUnit = list[tuple[np.ndarray, ...]]
    """A unit's sequences in order, each [T] float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage is built with. `tokenizer` is there where rows are read."""

    data: StageData
    tokenizer: PreTrainedTokenizerBase | None = None
    end_ids: tuple[int, ...] = ()  # that end an answer, the tokenizer's own first


class Passes(Protocol):
    """Passes without gradient over all units of a batch; every rank gets all results.

    Each is a collective: all ranks call it, with the same units. T is ALL targets of a sequence, those
    that its mask leaves out too.
    """

    def logprobs(self, units: Sequence[Unit]) -> PerUnit:
        """Of the targets, by the model as it is now."""
        ...

    def reference(self, units: Sequence[Unit]) -> PerUnit:
        """Of the targets, by the model as the stage began, or as `Stage.reference_share` moved it;
        `needs_reference` stages only."""
        ...

    def values(self, units: Sequence[Unit]) -> PerUnit:
        """Of the targets' positions, [T] or [T, K], by a model of values."""
        ...


S = TypeVar("S", bound=StageSectionBase)


class Stage(Generic[S]):
    """Defaults of a stage. `headline` is the metric that status, curve and summary show."""

    needs_reference: bool = False
    reference_moves: bool = False  # by `reference_share`
    teacher: str | None = None  # folder of a frozen model; the loss gets `divergence` to it as kl
    divergence: Divergence = REVERSE_KL
    streams: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[str]
    lower_is_better: ClassVar[bool] = True

    def __init__(self, section: S, context: StageContext) -> None:
        self.section = section
        self.context = context

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises `ConfigError` where no rows are read."""
        if self.context.tokenizer is None:
            raise ConfigError("this stage was built without a tokenizer; rows are read elsewhere")
        return self.context.tokenizer

    def read(self, row: Row, name: str) -> Sequence[Unit]:
        """The units of a row, mostly one, at whatever length. `name` is the source's.

        Raises `DataError` with name and place; `UnusableRow` for a row that teaches nothing.
        """
        raise NotImplementedError

    def shorten(self, unit: Unit, max_tokens: int) -> Unit | None:
        """The unit with no sequence over `max_tokens`, or None: nothing of it can be trained."""
        cut = [cut_end(sequence, max_tokens) for sequence in unit.sequences]
        whole = [sequence for sequence in cut if sequence is not None]
        return replace(unit, sequences=tuple(whole)) if len(whole) == len(cut) else None

    def times(self, unit: Unit) -> int:
        """How often one pass over the data has a unit that is trained; 0 leaves it out."""
        return 1

    def loss(self, units: Sequence[Unit], passes: Passes) -> TokenLoss | ValueLoss:
        """From one micro-batch to its share of the loss of all `units`, and metric sums.

        Called on every rank with all units, before the passes of a step, and of an evaluation, in
        which no gradient is taken.
        """
        raise NotImplementedError

    def reference_share(self, step: int) -> float:
        """What of the reference becomes the model as it is after step `step`, from 1: 0 nothing, 1 all
        of it."""
        return 0.0

    def reference_moved(self) -> None:
        """Called after each move: what the reference said before does not hold any more."""

    def metrics(self, units: Sequence[Unit]) -> Mapping[str, float]:
        """What follows from the units of a step alone."""
        return {}

    def report(self, units: Sequence[Unit], passes: Passes) -> dict[str, Any]:
        """More about the trained model, of all held-out units; it ends up in report.json."""
        return {}

    def conclude(
        self, report: dict[str, Any], units: Sequence[Unit], folder: Path
    ) -> dict[str, Any]:
        """In the driver, after `report` of the held-out `units`: write what there is to keep of it
        into the run directory `folder`, and return what report.json and the summary are to hold."""
        return report

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep of the stage, the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from `state()` as if there had been no interruption."""
