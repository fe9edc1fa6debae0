"""A new configuration key: a field with a default, a description, and a check against another key."""

from pydantic import NonNegativeInt

from rlhf_cluster.config.run_sections import RunSections
from rlhf_cluster.sections.section import Section


class Pause(Section):
    """Stop for a look at the run. In the project: a section of rlhf_cluster/sections/rl_run.py."""

    at_step: NonNegativeInt = 0
    """Step after which the run pauses. 0: never."""


class Sections(RunSections):
    """In the project: one line in rlhf_cluster/config/run_sections.py."""

    pause: Pause = Pause()


def check_pause(c: Sections) -> None:
    """In the project: an entry in _CHECKS of rlhf_cluster/config/run_config.py."""
    if c.pause.at_step > c.run.steps:
        raise ValueError(
            f"pause.at_step = {c.pause.at_step} is over run.steps = {c.run.steps}: the run would "
            "never pause. Lower it, or set it to 0"
        )
