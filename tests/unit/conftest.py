"""Unit tests run without Ray and without vLLM."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = sys.modules.get("ray")
    if ray is not None:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a unit test called ray.init")

        monkeypatch.setattr(ray, "init", refuse)
