"""Divergence of a distribution S from another one T over the same vocabulary, with its gradient.

    reverse_kl   sum S (log S - log T)
    forward_kl   sum T (log T - log S)
    js           alpha sum T (log T - log M) + (1 - alpha) sum S (log S - log M),
                 M = alpha T + (1 - alpha) S

S is the trained distribution. `js` is the generalised Jensen-Shannon divergence of Agarwal et al. 2023,
arXiv 2306.13649, eq. 1, and bounded. Divided by alpha it becomes forward_kl as alpha goes to 0; divided
by 1 - alpha it becomes reverse_kl as alpha goes to 1.

Promises: values are finite for any finite logarithms. No gradient flows into T. Importing this module
does not load torch.

Shapes: N distributions over a vocabulary of V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "js"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Kind of divergence. `alpha`, in (0, 1), is the share of T in the mixture M of `js`."""

    kind: Kind = "reverse_kl"
    alpha: float = 0.5

    def values(self, logs: Tensor, other: Tensor) -> Tensor:
        """Compute the divergences, [N] in nats, from log S and log T, [N, V] each."""
        if self.kind == "reverse_kl":
            return (logs.exp() * (logs - other)).sum(-1)
        if self.kind == "forward_kl":
            return (other.exp() * (other - logs)).sum(-1)
        mixture = self._mixture(logs, other)
        of_other = (other.exp() * (other - mixture)).sum(-1)
        of_own = (logs.exp() * (logs - mixture)).sum(-1)
        return self.alpha * of_other + (1 - self.alpha) * of_own

    def gradient(self, logs: Tensor, other: Tensor) -> Tensor:
        """Compute the gradient of each value with respect to the logits of S, [N, V]."""
        own = logs.exp()
        if self.kind == "forward_kl":
            return own - other.exp()
        if self.kind == "reverse_kl":
            slope = logs - other
        else:
            slope = (logs - self._mixture(logs, other)) * (1 - self.alpha)
        return own * (slope - (own * slope).sum(-1, keepdim=True))

    def _mixture(self, logs: Tensor, other: Tensor) -> Tensor:
        """Compute log M, [N, V]."""
        return (logs + math.log1p(-self.alpha)).logaddexp(other + math.log(self.alpha))


REVERSE_KL = Divergence()
