"""docs/examples/loop.py: the loop on our parts, and how many files a reader of it has to hold."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.pipeline import Pipeline
from rlhf_cluster.weights import store

EXAMPLE = Path("docs/examples/loop.py")
MAX_LINES = 300
MAX_FILES = 60
STEPS = 5


def loop_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_loop", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["example_loop"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def recording(files: set[str]) -> Iterator[None]:
    """Record every file of the project in which a function runs, in any thread that begins now."""
    root = str(Path.cwd())

    def see(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(root):
            files.add(code.co_filename[len(root) + 1 :])

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def test_the_loop_is_asynchronous_bounded_and_short_to_read(tmp_path: Path, capsys: Any):
    assert EXAMPLE.read_text().count("\n") <= MAX_LINES
    loop = loop_module()
    tree = {
        **loop.RUN,
        "run": {**loop.RUN["run"], "steps": STEPS, "groups_per_step": 4},
        "sft": {**loop.RUN["sft"], "steps": 2},
        "evaluation": {"num_prompts": 4},
    }
    files: set[str] = set()

    class Recorded(Pipeline):
        async def run(self) -> int:
            with recording(files):
                return await super().run()

    loop.Pipeline = Recorded
    config = validate(RunConfig, tree, "test")
    before, after, observer = asyncio.run(loop.train(config, tmp_path))
    assert 0.0 <= before <= 1.0
    assert 0.0 <= after <= 1.0
    assert len(observer.steps) == STEPS
    staleness = [largest for _, largest in observer.steps]
    assert max(staleness) <= config.staleness.max_staleness
    assert any(staleness), "no batch was sampled while an earlier one was trained"
    latest = store.latest(tmp_path / "weights")
    assert latest is not None
    assert latest.version == STEPS
    product = sorted(name for name in files if name.startswith(("rlhf_cluster/", "actors/")))
    print(len(product), *product, sep="\n")
    assert len(product) <= MAX_FILES, product
    assert "rlhf_cluster/pipeline.py" in product
    assert "rlhf_cluster/learner/step/train_step.py" in product
