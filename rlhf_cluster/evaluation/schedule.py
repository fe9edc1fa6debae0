"""Schedule of evaluations during training: pure functions of versions and of the run's record."""

from __future__ import annotations

from collections.abc import Mapping


def due_sets(
    every: Mapping[str, int], covered: Mapping[str, int], version: int, last_version: int
) -> list[str]:
    """Return the names of the sets that `version`, which is live since this moment, is measured on.

    A set is due once per `every` versions, at the first version that goes live there: where publishes
    are skipped, a later version takes the place of the due one. The evaluation of the last version
    comes after training and is none of these.

    Args:
        every: steps between two evaluations, by the name of the set; 0 for a set without them.
        covered: newest version by set that the run's record has a point or a skip of.
        last_version: version at the end of training.
    """
    if version >= last_version:
        return []
    return [
        name
        for name, steps in every.items()
        if steps and version // steps > covered.get(name, 0) // steps
    ]
