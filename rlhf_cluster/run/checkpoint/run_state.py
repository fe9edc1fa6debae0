"""State of a run in a checkpoint, without the learner's tensors: one JSON file, `run.json`.

All of it belongs to one moment: `step` steps are trained and the next has not begun. Everything else is
derived from it. Group streams are determined by seed and group id, the prompt of a ticket by its
number, and learning rates and minibatches by the step. No process draws from another random stream.
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
    """State of the run after `step` steps.

    An offline stage has an empty buffer and no live version. Its `reward_before` and `score` are of the
    number that it is monitored by (`offline.stage.Stage.headline`).

    `live_version` is the version that generation sampled with. It only informs the user: a resumed run
    publishes its own weights first. `reference` is the version of the stored reference, if any.
    """

    step: int
    learner: LearnerState
    buffer: BufferState
    live_version: int
    publishes_skipped: int
    depth: DepthState | None
    first_prompt: int  # index of ticket 0's prompt in the stream of prompts
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
        """Return the state of an offline stage after `learner.version` steps.

        The steps determine its position in the data.
        """
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
        """Parse the result of `to_json`. Raises `CheckpointError` that starts with `where`."""
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
