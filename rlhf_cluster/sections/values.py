"""Values that several sections share. This module imports no other section."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Rounding = Literal["nearest", "stochastic"]


FrozenQuantization = Literal["int8"]
"""How the linear layers of a model that is not trained are held, computed in its `dtype`."""


HeadDtype = Literal["float32", "model"]


OnStale = Literal["wait", "drop", "reweight"]
