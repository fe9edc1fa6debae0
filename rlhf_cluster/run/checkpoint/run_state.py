"""What a checkpoint keeps of a run beside the learner's tensors: one JSON file, `run.json`.

All of it belongs to one moment: `step` steps are trained and the next has not begun. What is not here
follows from what is. Group streams follow from seed and group id, and the prompt of a ticket from its
number. Learning rates and the parts of a batch follow from the step; no process draws from a random
stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf_cluster.buffer.adaptive_depth import DepthState
from rlhf_cluster.errors import CheckpointError
from rlhf_cluster.records import BufferState, LearnerState

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The run after `step` steps. That of an offline stage has an empty buffer and no live version;
    `reward_before` and `score` are of the number that it is watched by
    (`offline.stage.Stage.headline`).

    `live_version` is what generation sampled with, for people: a resumed run publishes its own
    weights first. `reference` is the version of the stored reference, where there is one.
    """

    step: int
    learner: LearnerState
    buffer: BufferState
    live_version: int
    publishes_skipped: int
    depth: DepthState | None
    first_prompt: int  # place in the stream of prompts of ticket 0
    reference: int | None
    reward_before: float | None
    packages: dict[str, str | None]
    score: float | None = None  # mean reward of the last steps; higher is better
    format: int = FORMAT

    @classmethod
    def of_stage(
        cls,
        learner: LearnerState,
        before: float | None,
        score: float | None,
        packages: dict[str, str | None],
    ) -> RunState:
        """An offline stage after `learner.version` steps, from which its place in the data follows."""
        step = learner.version
        empty = BufferState(
            learner_version=step,
            admitted=0,
            finished=0,
            taken=0,
            reweighted=0,
            discarded={},
            open=(),
        )
        return cls(
            step=step,
            learner=learner,
            buffer=empty,
            live_version=-1,
            publishes_skipped=0,
            depth=None,
            first_prompt=0,
            reference=None,
            reward_before=before,
            packages=packages,
            score=score,
        )

    def to_json(self) -> str:
        return _adapter().dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> RunState:
        """The inverse of `to_json`. Raises `CheckpointError`, which starts with `where`."""
        from pydantic import ValidationError

        try:
            state: RunState = _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole text"
            raise CheckpointError(
                f"{where}: not the state of a run: {place}: {first['msg']}. Was it written by "
                "another version?"
            ) from None
        if state.format != FORMAT:
            raise CheckpointError(
                f"{where}: has format {state.format}, this version reads {FORMAT}. Continue the run "
                "with the version that began it"
            )
        return state


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(RunState)
