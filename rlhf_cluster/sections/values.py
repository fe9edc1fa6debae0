"""Types of values that several sections share. This module imports no section."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Rounding = Literal["nearest", "stochastic"]


FrozenQuantization = Literal["int8"]
"""Storage type of the linear layers of a model that is not trained. It computes in its `dtype`."""


HeadDtype = Literal["float32", "model"]
"""Type of the logits: float32, or that of the model's own head."""


OnStale = Literal["wait", "drop", "reweight"]
