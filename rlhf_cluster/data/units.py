"""Units: what an offline stage trains on, and what belongs together in its loss.

A unit is one sequence (supervised fine-tuning), a chosen and a rejected one, or the answers of one
ranking. Two texts decide what becomes of it: on which side of the held-out split it falls, by a hash of
`key`, so that equal keys are never on both sides; and whether it was there before, by `content`.

Shapes: L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from xxhash import xxh3_64_intdigest

from rlhf_cluster.errors import RecordError
from rlhf_cluster.learning.packing import TokenSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Sequences that are laid out together, in this order."""

    sequences: tuple[TokenSequence, ...]
    key: str  # equal keys are on one side of the held-out split; such as the prompt
    content: str  # equal contents are the same row twice
    place: str  # where it came from, for messages
    values: Mapping[str, float] = field(default_factory=dict)  # numbers of the whole unit

    def __post_init__(self) -> None:
        if not self.sequences:
            raise RecordError(f"{self.place}: a unit without sequences; it has at least one")

    @property
    def longest(self) -> int:
        """Tokens that a model reads of the longest sequence."""
        return max(sequence.num_inputs for sequence in self.sequences)

    @property
    def num_trained(self) -> int:
        """Trained targets of all sequences."""
        return sum(num_trained(sequence) for sequence in self.sequences)


def num_trained(sequence: TokenSequence) -> int:
    mask = sequence.target_mask
    return len(sequence.target_ids) if mask is None else int(mask.sum())


def sequence_of(token_ids: np.ndarray, trained: np.ndarray) -> TokenSequence | None:
    """A sequence whose tokens [L] are trained where `trained` [L] says so; None where nowhere.

    What follows the last trained token is left out. The first token is never trained: nothing
    predicts it.
    """
    places = np.flatnonzero(trained[1:]) + 1
    if not len(places):
        return None
    first, stop = int(places[0]), int(places[-1]) + 1
    return TokenSequence(
        prompt_ids=token_ids[:first],
        target_ids=token_ids[first:stop],
        target_mask=trained[first:stop].astype(np.bool_),
    )


def cut_end(sequence: TokenSequence, max_tokens: int) -> TokenSequence | None:
    """The sequence without what is over `max_tokens` inputs; None when no trained target is left."""
    num_targets = max_tokens + 1 - len(sequence.prompt_ids)
    if num_targets >= len(sequence.target_ids):
        return sequence
    if num_targets < 1:
        return None
    mask = None if sequence.target_mask is None else sequence.target_mask[:num_targets]
    if mask is not None and not mask.any():
        return None
    return replace(
        sequence,
        target_ids=sequence.target_ids[:num_targets],
        target_mask=mask,
        streams={name: values[:num_targets] for name, values in sequence.streams.items()},
    )


def flat(units: Sequence[Unit]) -> tuple[list[TokenSequence], list[int]]:
    """All sequences in order, and how many of them each unit has."""
    return [s for unit in units for s in unit.sequences], [len(unit.sequences) for unit in units]


def is_held_out(key: str, share: float) -> bool:
    """Whether a unit with this key is in a held-out part of about `share` of all keys."""
    return xxh3_64_intdigest(key.encode()) < share * 2**64


def order_of(key: str) -> int:
    """By which held-out units are ordered, whatever the order of the files."""
    return xxh3_64_intdigest(f"order/{key}".encode())
