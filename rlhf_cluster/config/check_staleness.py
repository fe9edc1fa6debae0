"""What `[staleness]` must agree on with the other sections; called by `config.run`.

The reasons are in docs/staleness.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.replay import fresh_groups
from rlhf_cluster.experience.staleness import largest_look_ahead

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_staleness(c: RunConfig) -> None:
    """Raises `ValueError` for settings under which the bound or the run cannot hold."""
    settings, publish_every, groups = c.staleness, c.weights.publish_every, fresh_groups(c)
    if publish_every > settings.max_staleness + 1:
        raise ValueError(
            f"weights.publish_every = {publish_every} is over staleness.max_staleness + 1 = "
            f"{settings.max_staleness + 1}: the learner would wait for ever for a version that is "
            "never published. Publish more often, or allow more staleness"
        )
    largest = largest_look_ahead(
        max_staleness=settings.max_staleness,
        publish_every=publish_every,
        groups_per_step=groups,
    )
    what = "run.groups_per_step" if c.buffer.replay is None else "the fresh groups of a step"
    if settings.look_ahead > largest:
        raise ValueError(
            f"staleness.look_ahead = {settings.look_ahead} is over {largest} = (staleness."
            f"max_staleness + 1 - weights.publish_every) * {what} + 1 = "
            f"({settings.max_staleness} + 1 - {publish_every}) * {groups} + 1: a group "
            "overtaken so often would be too old. Lower look_ahead (groups in the order of their "
            "completion have no bound at all), or allow more staleness"
        )
    _check_on_stale(c)
    if settings.adaptive is not None:
        _check_adaptive(c)


def _check_on_stale(c: RunConfig) -> None:
    settings = c.staleness
    on_stale, limit, bound = settings.on_stale, settings.stale_limit, settings.max_staleness
    if on_stale != "wait" and bound == 0:
        raise ValueError(
            f"staleness.on_stale = {on_stale!r} with staleness.max_staleness = 0: exactly on-policy "
            "training has to wait for every publish. Use on_stale = 'wait', or allow staleness"
        )
    if on_stale == "drop" and settings.look_ahead > 1:
        raise ValueError(
            f"staleness.on_stale = 'drop' with staleness.look_ahead = {settings.look_ahead}: a group "
            "gets old by being overtaken, so the slow ones (long answers) would be discarded. Use "
            "look_ahead = 1, or on_stale = 'wait'"
        )
    if on_stale != "reweight":
        if limit is not None:
            raise ValueError(
                f"staleness.stale_limit = {limit} with staleness.on_stale = {on_stale!r}: it is the "
                "bound of on_stale = 'reweight' only. Remove it, or set on_stale = 'reweight'"
            )
        return
    if limit is None or limit <= bound:
        raise ValueError(
            f"staleness.on_stale = 'reweight' needs a staleness.stale_limit over "
            f"staleness.max_staleness = {bound}, found {limit}. Set it to the largest staleness that "
            "may be trained, or use on_stale = 'wait'"
        )
    correction = getattr(c.algorithm, "correction", None)
    if correction is None or correction.type == "none":
        raise ValueError(
            "staleness.on_stale = 'reweight' needs an algorithm.correction other than 'none': groups "
            "over max_staleness are trained with its importance weights. Set one, or use 'drop'"
        )


def _check_adaptive(c: RunConfig) -> None:
    settings, adaptive = c.staleness, c.staleness.adaptive
    assert adaptive is not None
    if not settings.pipeline_depth <= settings.max_staleness or settings.max_staleness == 0:
        raise ValueError(
            f"staleness.adaptive with staleness.pipeline_depth = {settings.pipeline_depth} and "
            f"staleness.max_staleness = {settings.max_staleness}: the depth moves between 0 and "
            "max_staleness, and starts at pipeline_depth. Raise max_staleness, or lower the depth"
        )
    if adaptive.ess_low >= adaptive.ess_high:
        raise ValueError(
            f"staleness.adaptive.ess_low = {adaptive.ess_low:g} is not under staleness.adaptive."
            f"ess_high = {adaptive.ess_high:g}. Lower the first"
        )
