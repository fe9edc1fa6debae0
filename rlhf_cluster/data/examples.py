"""What the supervised warm-up trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_cluster.errors import RecordError


@dataclass(frozen=True, slots=True, kw_only=True)
class SftExample:
    """A prompt and the answer to learn. `target_ids` ends with the end token.

    Prompt and target are tokenized apart, so that the border lies where it lies in generation.
    """

    prompt_ids: np.ndarray  # [P] int32
    target_ids: np.ndarray  # [T] int32

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "target_ids"):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != np.int32 or len(array) == 0:
                raise RecordError(
                    f"SftExample.{name} must be a non-empty int32[n], found "
                    f"{array.dtype}{list(array.shape)}"
                )
