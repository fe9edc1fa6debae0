"""Cache of scores. The least recently used are evicted first.

Promises:
- A row is found only by its key: a digest of the scorer's version, the prompt with all its columns,
  the token ids and the text of the response.
- There are never more than `max_entries` rows.
- A row that could not be computed is not kept.

Two threads that miss the same key at once both compute it.

A reward model reads the responses of a group in one padded batch, and the rounding of its last bits
depends on the rest of the batch. A score from the cache was computed in a batch with other responses.
"""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.scoring.score_parts import Row


class ScoreCache:
    """Cached rows of all rewards of one worker. `max_entries` = 0 keeps nothing."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._rows: OrderedDict[bytes, Row] = OrderedDict()
        self._changing = threading.Lock()  # held for a look-up or an insertion only
        self.hits = self.misses = 0

    def through(
        self, keys: Sequence[bytes], compute: Callable[[list[int]], Sequence[Row]]
    ) -> list[Row]:
        """Return the row of each key, in order, from the cache or from `compute`.

        `compute` gets the indices in `keys` of those that are not cached, each key once, and returns
        their rows. It is not called when all are cached. Its errors are raised, and nothing is kept.
        """
        known = self._look_up(keys)
        places = {key: place for place, key in reversed([*enumerate(keys)]) if key not in known}
        missing = sorted(places.values())
        with self._changing:
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            rows = compute(missing)
            known |= {keys[place]: row for place, row in zip(missing, rows, strict=True)}
            self._keep({keys[place]: known[keys[place]] for place in missing})
        return [known[key] for key in keys]

    def __len__(self) -> int:
        return len(self._rows)

    def _look_up(self, keys: Sequence[bytes]) -> dict[bytes, Row]:
        with self._changing:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            for key in found:
                self._rows.move_to_end(key)
        return found

    def _keep(self, rows: dict[bytes, Row]) -> None:
        with self._changing:
            for key, row in rows.items():
                self._rows[key] = row
                self._rows.move_to_end(key)
            while len(self._rows) > self._max_entries:
                self._rows.popitem(last=False)


def content_key(version: str, prompt: Prompt, rollout: Rollout, completion: str) -> bytes:
    """Return the key of a row, 32 bytes: a digest of the scorer's version and of all its inputs."""
    digest = blake2b(digest_size=32)
    parts = (
        version.encode(),
        # Equal values may be pickled in different ways. Then the score is computed again.
        pickle.dumps((prompt.source, dict(prompt.columns)), protocol=5),
        rollout.prompt_ids.tobytes(),
        rollout.response_ids.tobytes(),
        completion.encode("utf-8", "surrogatepass"),
    )
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
