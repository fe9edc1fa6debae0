"""Metrics of offline stages."""

from __future__ import annotations

from rlhf_cluster.observe.metric import Role, gauge

_ROLE = Role.LEARNER

STAGE_ROWS = (
    gauge("stage/loss", "1", _ROLE, "The loss that a step of an offline stage descended"),
    gauge("stage/units", "1", _ROLE, "Dialogues, pairs or rankings that the step trained on"),
    gauge("stage/tokens", "tokens", _ROLE, "Tokens that the step's model read"),
    gauge("stage/tokens_per_s", "tokens/s", _ROLE, "Tokens read by wall time"),
    gauge("stage/step_s", "s", _ROLE, "Wall time of the step"),
    gauge(
        "stage/held_out", "1", _ROLE, "A metric of held-out units, area.name in the label", "metric"
    ),
    gauge("stage/data_rows", "1", _ROLE, "Rows that were read"),
    gauge("stage/data_units", "1", _ROLE, "Units made of them"),
    gauge("stage/data_held_out", "1", _ROLE, "Units that are evaluated on and never trained"),
    gauge("stage/data_truncated", "1", _ROLE, "Units cut to data.max_tokens"),
    gauge("stage/data_duplicates", "1", _ROLE, "Units left out because they were there before"),
    gauge("stage/data_skipped", "1", _ROLE, "Rows and units left out: too long, or of no use"),
)
