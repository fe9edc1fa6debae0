"""Metrics of groups that are trained again."""

from __future__ import annotations

from rlhf_cluster.observe.metric import Role, counter, gauge

REPLAY_ROWS = (
    gauge("replay/groups", "1", Role.CONTROLLER, "Groups of the step that were trained before"),
    gauge(
        "replay/missing_groups",
        "1",
        Role.CONTROLLER,
        "Groups that the step is smaller by, because too few could be replayed",
    ),
    gauge(
        "replay/uses_mean",
        "1",
        Role.CONTROLLER,
        "Steps that trained one of the step's replayed groups, this one included",
    ),
    gauge(
        "replay/weight_mean",
        "1",
        Role.CONTROLLER,
        "Mean importance weight of the step's replayed groups",
    ),
    counter("buffer/replayed_total", "1", Role.BUFFER, "Groups handed to the learner again"),
    gauge("buffer/replayable", "1", Role.BUFFER, "Trained groups that may be trained again"),
)
