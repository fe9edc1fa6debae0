"""Ray's references and actors, played by futures: the driver's own code needs no cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import ActorDiedError


class Reference:
    """What a call returns; it is answered, fails, or is never heard of."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        """One of its own for each that waits, as with Ray."""
        waiter: Future[Any] = Future()

        def tell(result: Future[Any]) -> None:
            if waiter.set_running_or_notify_cancel():
                error = result.exception()
                waiter.set_exception(error) if error else waiter.set_result(result.result())

        self.result.add_done_callback(tell)
        return waiter

    def answered(self, value: Any = None) -> Reference:
        self.result.set_result(value)
        return self

    def died(self) -> Reference:
        self.result.set_exception(ActorDiedError())
        return self


class Actor:
    """Each method is called with `.remote`, or with `.options(...).remote`."""

    def __init__(self, **methods: Callable[..., Reference]) -> None:
        self.calls: list[str] = []
        for name, method in methods.items():
            setattr(self, name, Method(name, method, self.calls))


class Method:
    def __init__(self, name: str, call: Callable[..., Reference], calls: list[str]) -> None:
        self._name, self._call, self._calls = name, call, calls

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *arguments: Any) -> Reference:
        self._calls.append(self._name)
        return self._call(*arguments)
