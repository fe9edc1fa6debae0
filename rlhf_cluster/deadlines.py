"""How deadlines nest: who waits for a reply waits longer than who works on it may take.

With equal deadlines the one that began first passes first, and it is the caller's: a worker that is
only slow would look silent, and be killed with everything else that it does, before it could say that
its call was late. So every wait for a remote call is `reply_deadline` of what the callee may take, and
the deadline around several of them is the `reply_deadline` of their sum.
"""

from __future__ import annotations

_SHARE, _LEAST_S, _MOST_S = 0.1, 0.5, 30.0


def reply_deadline(*inner_s: float) -> float:
    """Seconds to wait for calls, one after another, that may take `inner_s` each: their sum, and a
    margin of half a second and a tenth of it, at most 30 s."""
    total_s = sum(inner_s)
    return total_s + min(_MOST_S, _LEAST_S + _SHARE * total_s)
