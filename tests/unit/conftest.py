"""Unit tests run without Ray and without vLLM."""

import gc
import sys

import pytest

gc.disable()  # until all is imported: a fourth of that time went into looking through it


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = sys.modules.get("ray")
    if ray is not None:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a unit test called ray.init")

        monkeypatch.setattr(ray, "init", refuse)


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it again for garbage is a tenth of the time."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 50, 50)
