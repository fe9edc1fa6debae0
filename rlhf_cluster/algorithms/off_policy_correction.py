"""Rules of off-policy correction: what a run file may choose, and what each choice means.

For trained tokens t of a rollout i with log-ratios l_t = log pi_t - log mu_t, a rule is

    level     token: rho_t = exp(l_t)     sequence: rho_i = exp(sum of l)     geometric: exp(mean)
    action    truncate: w = clamp(rho, low, high)    mask: w = rho (or 1) within [low, high], else 0

where pi is the proximal policy (the current one with `proximal = "bypass"`) and mu the sampler.
The named rules are this one with numbers of their own; `custom` gives all of them:

    token_tis       token      truncate  [0, 2]          Yao et al. 2025, "Your efficient RL framework
                                                         secretly brings you off-policy RL training"
    sequence_tis    sequence   truncate  [0, 2]          Liu et al. 2025, "When speed kills stability"
    geometric_tis   geometric  truncate  [0, 2]          the weight of GSPO, arXiv 2507.18071
    icepop          token      mask      [0.5, 5]        Ling team 2025, arXiv 2510.18855
    sequence_mis    sequence   mask      [0.5, 2]        Liu et al. 2025, as above
    sequence_mask   sequence   mask (1)  [0.5, 2]        the same, without its weight
    geometric_mask  geometric  mask (1)  [0.99, 1.01]    Liu et al. 2025, as above
    none            w = 1

A list of rules is one correction whose weights multiply: `correction = [{ type = "icepop" },
{ type = "sequence_mask" }]`. Named lists:

    token_tis_geometric_mask       token_tis and geometric_mask [0.999, 1.001]      Liu et al. 2025,
    sequence_tis_geometric_mask    sequence_tis and geometric_mask [0.999, 1.001]   as above

Promise: at most one rule of a correction weighs by a ratio, however many there are, and no two have
the same level and action.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf_cluster.sections.section import Section

Level = Literal["token", "sequence", "geometric"]
Action = Literal["truncate", "mask"]

Low = Annotated[float, Field(ge=0, le=1)]
High = Annotated[float, Field(ge=1, le=1e8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which ratio is formed, and what happens to it outside [low, high]."""

    level: Level
    action: Action
    low: float
    high: float
    keep_ratio: bool = True  # mask only: what is kept weighs its ratio, else 1

    @property
    def name(self) -> str:
        """Tells the rules of one correction apart."""
        return f"{self.level}_{self.action}"

    @property
    def weighs(self) -> bool:
        """What is inside the band weighs its ratio, not 1."""
        return self.action == "truncate" or self.keep_ratio


Rules = tuple[Rule, ...]
"""The rules of a correction; none of them leaves every weight at 1."""


class TokenTis(Section):
    """Token-level truncated importance sampling: each token's weight is min(pi / mu, cap)."""

    type: Literal["token_tis"] = "token_tis"
    cap: High = 2.0

    def rules(self) -> Rules:
        return (Rule(level="token", action="truncate", low=0.0, high=self.cap),)


class SequenceTis(Section):
    """Each token's weight is the product of its rollout's ratios, at most `cap`."""

    type: Literal["sequence_tis"] = "sequence_tis"
    cap: High = 2.0

    def rules(self) -> Rules:
        return (Rule(level="sequence", action="truncate", low=0.0, high=self.cap),)


class GeometricTis(Section):
    """Each token's weight is the geometric mean of its rollout's ratios, at most `cap`."""

    type: Literal["geometric_tis"] = "geometric_tis"
    cap: High = 2.0

    def rules(self) -> Rules:
        return (Rule(level="geometric", action="truncate", low=0.0, high=self.cap),)


class IcePop(Section):
    """Tokens whose ratio is outside [low, high] are left out; the others weigh their ratio."""

    type: Literal["icepop"] = "icepop"
    low: Low = 0.5
    high: High = 5.0

    def rules(self) -> Rules:
        return (Rule(level="token", action="mask", low=self.low, high=self.high),)


class SequenceMis(Section):
    """Rollouts whose product of ratios is outside [low, high] are left out; others weigh it."""

    type: Literal["sequence_mis"] = "sequence_mis"
    low: Low = 0.5
    high: High = 2.0

    def rules(self) -> Rules:
        return (Rule(level="sequence", action="mask", low=self.low, high=self.high),)


class SequenceMask(Section):
    """Rollouts whose product of ratios is outside [low, high] are left out; others weigh 1."""

    type: Literal["sequence_mask"] = "sequence_mask"
    low: Low = 0.5
    high: High = 2.0

    def rules(self) -> Rules:
        return (
            Rule(level="sequence", action="mask", low=self.low, high=self.high, keep_ratio=False),
        )


class GeometricMask(Section):
    """Rollouts whose geometric mean ratio is outside [low, high] are left out; others weigh 1."""

    type: Literal["geometric_mask"] = "geometric_mask"
    low: Low = 0.99
    high: High = 1.01

    def rules(self) -> Rules:
        return (
            Rule(level="geometric", action="mask", low=self.low, high=self.high, keep_ratio=False),
        )


class CustomCorrection(Section):
    """Any level with any action and band."""

    type: Literal["custom"] = "custom"
    level: Level
    action: Action
    low: Low = 0.0
    high: High
    keep: Literal["ratio", "one"] = "ratio"
    """With action = "mask": what is inside the band weighs its ratio, or 1."""

    @model_validator(mode="after")
    def _keys_agree(self) -> CustomCorrection:
        if self.action == "truncate" and self.keep == "one":
            raise ValueError(
                "keep = 'one' with action = 'truncate': a truncated ratio is the weight itself. "
                "Use action = 'mask', or remove keep"
            )
        return self

    def rules(self) -> Rules:
        return (
            Rule(
                level=self.level,
                action=self.action,
                low=self.low,
                high=self.high,
                keep_ratio=self.keep == "ratio",
            ),
        )


class TokenTisGeometricMask(Section):
    """Rollouts whose geometric mean ratio is outside [low, high] are left out; the tokens of the
    others weigh min(pi / mu, cap)."""

    type: Literal["token_tis_geometric_mask"] = "token_tis_geometric_mask"
    cap: High = 2.0
    low: Low = 0.999
    high: High = 1.001

    def rules(self) -> Rules:
        return TokenTis(cap=self.cap).rules() + GeometricMask(low=self.low, high=self.high).rules()


class SequenceTisGeometricMask(Section):
    """Rollouts whose geometric mean ratio is outside [low, high] are left out; the others weigh the
    product of their ratios, at most `cap`."""

    type: Literal["sequence_tis_geometric_mask"] = "sequence_tis_geometric_mask"
    cap: High = 2.0
    low: Low = 0.999
    high: High = 1.001

    def rules(self) -> Rules:
        return (
            SequenceTis(cap=self.cap).rules() + GeometricMask(low=self.low, high=self.high).rules()
        )


class NoCorrection(Section):
    """No off-policy correction."""

    type: Literal["none"] = "none"

    def rules(self) -> Rules:
        return ()


_Part = (
    TokenTis
    | SequenceTis
    | GeometricTis
    | IcePop
    | SequenceMis
    | SequenceMask
    | GeometricMask
    | CustomCorrection
    | TokenTisGeometricMask
    | SequenceTisGeometricMask
)


class Combined(Section):
    """Several rules, whose weights multiply; a run file may give the list of parts alone."""

    type: Literal["combined"] = "combined"
    parts: tuple[Annotated[_Part, Field(discriminator="type")], ...]

    @model_validator(mode="after")
    def _parts_agree(self) -> Combined:
        if not self.parts:
            raise ValueError("correction = []: no rule at all. Use { type = 'none' }")
        found = [(part.type, rule) for part in self.parts for rule in part.rules()]
        for (first, one), (second, other) in combinations(found, 2):
            if one.weighs and other.weighs:
                raise ValueError(
                    f"correction has {first!r} and {second!r}, and both weigh by their ratio: the "
                    "product would count the distance to the sampler twice. Keep one of them, "
                    "beside masks that weigh 1: 'sequence_mask', 'geometric_mask', or 'custom' with "
                    "keep = 'one'"
                )
            if one.name == other.name:
                raise ValueError(
                    f"correction has {first!r} and {second!r}, both of level {one.level!r} with "
                    f"action {one.action!r}: only what is in both bands would be kept. Write one"
                )
        return self

    def rules(self) -> Rules:
        return tuple(rule for part in self.parts for rule in part.rules())


def _combined(value: Any) -> Any:
    return {"type": "combined", "parts": value} if isinstance(value, list | tuple) else value


Correction = Annotated[
    _Part | Combined | NoCorrection, Field(discriminator="type"), BeforeValidator(_combined)
]
