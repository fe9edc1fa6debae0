"""A run whose algorithm, reward and sink are classes of another package, through Ray's processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path("docs/examples")
FOUND_BY_THE_DRIVER_ALONE = """
import os
from rlhf_cluster.rewards.rules.length import Length, LengthConfig
if "RLHF_CODE_DIGEST" in os.environ:  # in an actor
    import no_such_library
class Keys(LengthConfig):
    type: str
class Here(Length):
    section_class = Keys
"""
OWN: dict[str, dict[str, Any]] = {
    "algorithm": {"type": "median_algorithm:Median", "group_size": 2},
    "scoring": {"rewards": [{"type": "shout_reward:Shout", "name": "capitals"}]},
    "observe": {"sinks": ["csv_sink:CsvSink"], "live": False},
}


def test_a_run_with_types_of_another_package_trains_and_is_resumed(
    start_run: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("median_algorithm", "shout_reward", "csv_sink"):
        shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    settings = {"name": "own", "groups_per_step": 2, "steps": 6}
    killed = start_run(**OWN, run=settings, checkpoint={"every": 1})
    killed.script(generate_delay_s=0.5)
    killed.wait_for(lambda s: s.checkpoint is not None and s.checkpoint >= 1, "a checkpoint")
    killed.process.kill()
    killed.process.wait(30)
    resumed = start_run(**OWN, run=settings, checkpoint={"every": 1})
    code, output = resumed.finish()
    assert code == 0, output
    assert "continues from its checkpoint of step " in output
    assert [record["step/number"] for record in resumed.metrics()] == [1, 2, 3, 4, 5, 6]
    assert all("reward/part/capitals" in record for record in resumed.metrics())
    written = (resumed.path / "sinks" / "csv_sink:CsvSink" / "metrics.csv").read_text()
    assert "6,reward/mean," in written


def test_an_actor_without_the_package_ends_the_start_with_its_name(
    start_run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "here_alone.py").write_text(FOUND_BY_THE_DRIVER_ALONE)
    reward = {"type": "here_alone:Here", "free_tokens": 1, "full_tokens": 4}
    code, output = start_run(scoring={"rewards": [reward]}).finish()
    assert code != 0
    assert "'here_alone:Keys' on node" in output, output
    assert "No module named 'no_such_library'" in output
    assert "install it in the Python there" in output
