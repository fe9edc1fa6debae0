"""Metrics of offline stages: rows of `rlhf_cluster.observe.table`, as (name, unit, meaning, label)."""

from __future__ import annotations

Row = tuple[str, str, str, str | None]

STAGE_ROWS: tuple[Row, ...] = (
    ("stage/loss", "1", "The loss that a step of an offline stage descended", None),
    ("stage/units", "1", "Dialogues, pairs or rankings that the step trained on", None),
    ("stage/tokens", "tokens", "Tokens that the step's model read", None),
    ("stage/tokens_per_s", "tokens/s", "Tokens read by wall time", None),
    ("stage/step_s", "s", "Wall time of the step", None),
    ("stage/held_out", "1", "A metric of held-out units, area.name in the label", "metric"),
    ("stage/data_rows", "1", "Rows that were read", None),
    ("stage/data_units", "1", "Units made of them", None),
    ("stage/data_held_out", "1", "Units that are evaluated on and never trained", None),
    ("stage/data_truncated", "1", "Units cut to data.max_tokens", None),
    ("stage/data_duplicates", "1", "Units left out because they were there before", None),
    ("stage/data_skipped", "1", "Rows and units left out: too long, or of no use", None),
)
