"""Rules of off-policy correction: what a run file may choose, and what each choice means.

For trained tokens t of a rollout i with log-ratios l_t = log pi_t - log mu_t, a rule is

    level     token: rho_t = exp(l_t)     sequence: rho_i = exp(sum of l)     geometric: exp(mean)
    action    truncate: w = clamp(rho, low, high)    mask: w = rho (or 1) within [low, high], else 0

where pi is the proximal policy (the current one with `proximal = "bypass"`) and mu the sampler.
A named correction is a row of `PRESETS`; its keys give the bounds. `custom` is any other
rule. A list is one correction whose weights multiply: `correction = [{ type = "icepop" },
{ type = "sequence_mask" }]`.

Promise: at most one rule of a correction weighs by a ratio, and no two have the same level and action.
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
    """Ratio to form, and what to do with it outside [low, high]."""

    level: Level
    action: Action
    low: float
    high: float
    keep_ratio: bool = True  # mask only: a token inside the band weighs its ratio, else 1

    @property
    def name(self) -> str:
        """Name that is unique among the rules of one correction."""
        return f"{self.level}_{self.action}"

    @property
    def weighs(self) -> bool:
        """Whether a token inside the band weighs its ratio; if not, it weighs 1."""
        return self.action == "truncate" or self.keep_ratio


Rules = tuple[Rule, ...]
"""The rules of a correction; without any every token weighs 1."""

PRESETS: dict[str, tuple[tuple[Level, Action, bool], ...]] = {
    # level, action, `keep_ratio` of each rule. A truncation is to [0, cap], a mask's band [low, high].
    # Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
    "token_tis": (("token", "truncate", True),),
    # Liu et al. 2025, "When speed kills stability": all below but geometric_tis and icepop
    "sequence_tis": (("sequence", "truncate", True),),
    # the weight of GSPO, arXiv 2507.18071
    "geometric_tis": (("geometric", "truncate", True),),
    # Ling team 2025, arXiv 2510.18855
    "icepop": (("token", "mask", True),),
    "sequence_mis": (("sequence", "mask", True),),
    "sequence_mask": (("sequence", "mask", False),),
    "geometric_mask": (("geometric", "mask", False),),
    "token_tis_geometric_mask": (("token", "truncate", True), ("geometric", "mask", False)),
    "sequence_tis_geometric_mask": (("sequence", "truncate", True), ("geometric", "mask", False)),
    "none": (),
}


def preset_rules(type: str, cap: float = 0.0, low: float = 0.0, high: float = 0.0) -> Rules:
    """Return the rules of a preset with the bounds that its section gives."""
    bounds: dict[Action, tuple[float, float]] = {"truncate": (0.0, cap), "mask": (low, high)}
    return tuple(
        Rule(
            level=level,
            action=action,
            low=bounds[action][0],
            high=bounds[action][1],
            keep_ratio=keep_ratio,
        )
        for level, action, keep_ratio in PRESETS[type]
    )


class _Preset(Section):
    def rules(self) -> Rules:
        return preset_rules(**self.model_dump())


class TokenTis(_Preset):
    """Weigh each token by min(pi / mu, cap): token-level truncated importance sampling."""

    type: Literal["token_tis"] = "token_tis"
    cap: High = 2.0
    """Upper bound of the weight."""


class SequenceTis(_Preset):
    """Weigh each token by the product of its rollout's ratios, at most `cap`."""

    type: Literal["sequence_tis"] = "sequence_tis"
    cap: High = 2.0
    """Upper bound of the weight."""


class GeometricTis(_Preset):
    """Weigh each token by the geometric mean of its rollout's ratios, at most `cap`."""

    type: Literal["geometric_tis"] = "geometric_tis"
    cap: High = 2.0
    """Upper bound of the weight."""


class IcePop(_Preset):
    """Mask tokens whose ratio is outside [low, high]; the others weigh their ratio."""

    type: Literal["icepop"] = "icepop"
    low: Low = 0.5
    """Ratio below which a token is masked."""
    high: High = 5.0
    """Ratio above which a token is masked."""


class SequenceMis(_Preset):
    """Mask rollouts whose product of ratios is outside [low, high]; others weigh the product."""

    type: Literal["sequence_mis"] = "sequence_mis"
    low: Low = 0.5
    """Ratio below which a rollout is masked."""
    high: High = 2.0
    """Ratio above which a rollout is masked."""


class SequenceMask(_Preset):
    """Mask rollouts whose product of ratios is outside [low, high]; others weigh 1."""

    type: Literal["sequence_mask"] = "sequence_mask"
    low: Low = 0.5
    """Ratio below which a rollout is masked."""
    high: High = 2.0
    """Ratio above which a rollout is masked."""


class GeometricMask(_Preset):
    """Mask rollouts whose geometric mean ratio is outside [low, high]; others weigh 1."""

    type: Literal["geometric_mask"] = "geometric_mask"
    low: Low = 0.99
    """Ratio below which a rollout is masked."""
    high: High = 1.01
    """Ratio above which a rollout is masked."""


class TokenTisGeometricMask(_Preset):
    """Mask rollouts whose geometric mean ratio is outside [low, high]; tokens of the others weigh
    min(pi / mu, cap)."""

    type: Literal["token_tis_geometric_mask"] = "token_tis_geometric_mask"
    cap: High = 2.0
    """Upper bound of the weight."""
    low: Low = 0.999
    """Geometric mean ratio below which a rollout is masked."""
    high: High = 1.001
    """Geometric mean ratio above which a rollout is masked."""


class SequenceTisGeometricMask(_Preset):
    """Mask rollouts whose geometric mean ratio is outside [low, high]; the others weigh the product
    of their ratios, at most `cap`."""

    type: Literal["sequence_tis_geometric_mask"] = "sequence_tis_geometric_mask"
    cap: High = 2.0
    """Upper bound of the weight."""
    low: Low = 0.999
    """Geometric mean ratio below which a rollout is masked."""
    high: High = 1.001
    """Geometric mean ratio above which a rollout is masked."""


class NoCorrection(_Preset):
    """No off-policy correction."""

    type: Literal["none"] = "none"


class CustomCorrection(Section):
    """A rule of any level, action and band."""

    type: Literal["custom"] = "custom"
    level: Level
    """Ratio that the rule bounds. `token`: of each token. `sequence`: the product over a rollout.
    `geometric`: its geometric mean."""
    action: Action
    """Treatment of a ratio outside [low, high]. `truncate`: it is moved to the bound. `mask`: weight
    0."""
    low: Low = 0.0
    """Lower bound of the ratio. 0: none."""
    high: High
    """Upper bound of the ratio, at least 1."""
    keep: Literal["ratio", "one"] = "ratio"
    """Weight of a token inside the band, with action = "mask": its ratio, or 1."""

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
    """Several corrections whose weights multiply; a run file may give just the list of them."""

    type: Literal["combined"] = "combined"
    parts: tuple[Annotated[_Part, Field(discriminator="type")], ...]
    """Corrections whose weights multiply. At most one of them may weigh by its ratio."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Combined:
        if not self.parts:
            raise ValueError("correction = []: the list is empty. Use { type = 'none' }")
        rules = [(part.type, rule) for part in self.parts for rule in part.rules()]
        for (first, one), (second, other) in combinations(rules, 2):
            if one.weighs and other.weighs:
                raise ValueError(
                    f"correction has {first!r} and {second!r}, and both weigh by their ratio: the "
                    "product would count the distance to the sampler twice. Keep one of them, "
                    "next to masks that weigh 1: 'sequence_mask', 'geometric_mask', or 'custom' with "
                    "keep = 'one'"
                )
            if one.name == other.name:
                raise ValueError(
                    f"correction has {first!r} and {second!r}, both of level {one.level!r} with "
                    f"action {one.action!r}: only tokens within both bands would be kept. Write one"
                )
        return self

    def rules(self) -> Rules:
        return tuple(rule for part in self.parts for rule in part.rules())


def _wrap_list(value: Any) -> Any:
    return {"type": "combined", "parts": value} if isinstance(value, list | tuple) else value


Correction = Annotated[
    _Part | Combined | NoCorrection, Field(discriminator="type"), BeforeValidator(_wrap_list)
]
