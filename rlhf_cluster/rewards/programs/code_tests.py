r"""Runs the completion's Python program against unit tests: 1.0 when it passes all, else 0.0.

The program is the last fenced block that defines what the tests call, else ("Example usage" alone) the
last block that is tagged python, py or python3, else the last one without a tag; an open one goes to
the end. Blocks of other languages (output, bash) and reasoning are ignored. Without any fence it is
the whole completion, unless `require_fence`.

The tests are a column with a list. Each runs in a separate sandbox (`sandbox.py`), and only its
input goes in: the answer is compared out here.

    {"input": "1 2\n", "output": "3\n"}      a script, by standard input and output; white space at
                                             the ends of lines and of the text does not count
    {"call": "add(1, 2)", "expected": 3}     the value of an expression; tuples equal lists
    "assert add(1, 2) == 3"                  the same, read as call and literal; also `is`, `not`,
                                             and a bare `assert even(2)`; tuples differ from lists

A program that fails, by whatever it does, scores 0.0 and is counted by its outcome (`Code.outcomes`). A
sandbox that fails and a test that cannot be read are a `RewardFailure`.
"""

from __future__ import annotations

import ast
import builtins
import json
import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.programs.sandbox import Limits, Outcome, Ran, Sandbox
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, column
from rlhf_cluster.rewards.rules.code_fences import blocks, last_block
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection, without_reasoning

LANGUAGES = ("python", "py", "python3")
"""Tags of blocks that are programs, in lower case."""

log = logging.getLogger(__name__)


class CodeConfig(ReasoningSection):
    """The program in the completion passes unit tests, in a sandbox."""

    type: Literal["code"] = "code"
    tests_column: str = "tests"
    """Column with the list of tests."""
    require_fence: bool = False
    """A completion without a fenced block has no program."""
    partial: bool = False
    """The score is the share of tests that pass. After a test that ran out of time the others fail
    without being run."""
    tolerance: float = Field(default=0.0, ge=0)
    """Two floats of a `call` are equal up to this difference, absolute or relative."""
    packages: bool = False
    """Programs may import packages of this project's environment (numpy, ...), not only the standard
    library."""
    cpu_s: PositiveInt = 5
    """Processor time of one test, in whole seconds."""
    wall_s: PositiveFloat = 20.0
    """Time of one test from its start on; generous, since a busy machine uses it up as well."""
    memory_mib: int = Field(default=512, ge=64)
    """Address space of each process of a program."""
    max_processes: int = Field(default=8, ge=2)
    """Processes and threads of a program at once."""
    disk_mib: PositiveInt = 16
    """All files of a program; they are in memory."""
    output_kib: PositiveInt = 1024
    """Standard output of one test."""
    parallel: PositiveInt = 2
    """Sandboxes of each scoring worker at once."""
    start_timeout_s: PositiveFloat = 60.0
    """Deadline of starting one sandbox; past it the machine is at fault, not the program."""
    timeout_s: PositiveFloat = 280.0
    """Deadline of one group, all tests of all its rollouts."""


class Runner(Protocol):
    """Runner of programs: a `Sandbox`."""

    def run(self, program: str, stdin: bytes = b"", call: str | None = None) -> Ran: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test: what goes into the sandbox, and what is kept out here."""

    stdin: str = ""
    call: str | None = None
    expected: Any  # text of a script's output, or a call's value
    as_json: bool = False  # the value comes from JSON, which has no tuples
    as_truth: bool = False  # only whether the value is true


class Code:
    def __init__(
        self, config: CodeConfig, context: RewardContext, sandbox: Runner | None = None
    ) -> None:
        """Tries the sandbox. Raises `ConfigError` where this machine cannot isolate programs."""
        self._config = config
        self._sandbox = sandbox or self._new_sandbox()
        self._threads = ThreadPoolExecutor(config.parallel, thread_name_prefix="code")
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()  # held for an addition only

    def _new_sandbox(self) -> Sandbox:
        config = self._config
        limits = Limits(
            cpu_s=config.cpu_s,
            wall_s=config.wall_s,
            memory_bytes=config.memory_mib << 20,
            processes=config.max_processes,
            disk_bytes=config.disk_mib << 20,
            output_bytes=config.output_kib << 10,
        )
        sandbox = Sandbox(limits, config.packages, config.start_timeout_s)
        sandbox.check()
        log.info("programs are isolated: no network, no files but their own, %s", limits)
        return sandbox

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """Scores in [0, 1]. Raises `RewardFailure`: unreadable tests, or a sandbox that failed."""
        cases = self._cases(prompt)
        deadline = time.monotonic() + self._config.timeout_s
        texts = self._config.without_reasoning(completions)
        running = [self._threads.submit(self._score, text, cases, deadline) for text in texts]
        try:
            # Waits for: each program's tests. Unblocked by: their end, or the group's deadline.
            return [one.result(max(deadline - time.monotonic(), 0.0)) for one in running]
        except FutureTimeout:
            raise self._late() from None
        finally:
            for one in running:
                one.cancel()

    def outcomes(self) -> dict[str, float]:
        """Programs so far: "passed", "wrong", "no_program", and those of `Outcome` but "ended"."""
        with self._counting:
            return {name: float(count) for name, count in self._counts.items()}

    def close(self) -> None:
        """Later calls fail; a test that is running ends by its own limits."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _late(self) -> RewardFailure:
        return RewardFailure(
            f"the group's tests were not done after {self._config.timeout_s:g} s. Raise timeout_s "
            "or parallel, or lower wall_s and cpu_s",
            "timeout",
        )

    def _cases(self, prompt: Prompt) -> list[Case]:
        name = self._config.tests_column
        tests = column(prompt, name)
        where = f"prompt {prompt.prompt_id}, column {name!r}"
        if not isinstance(tests, Sequence) or isinstance(tests, str | bytes) or not tests:
            raise RewardFailure(
                f"{where}: found {type(tests).__name__} {str(tests)[:60]!r}, expected a list of at "
                "least one test. Correct the row, or set tests_column",
                "column",
            )
        try:
            return [read_test(test) for test in tests]
        except ValueError as error:
            raise RewardFailure(f"{where}: {error}. Correct the row", "column") from error

    def _score(self, completion: str, cases: Sequence[Case], deadline: float) -> float:
        program = find_program(completion, self._config.require_fence, called_names(cases))
        if program is None:
            self._count("no_program")
            return 0.0
        num_passed, first_failure = 0, "passed"
        for case in cases:
            if time.monotonic() > deadline:
                raise self._late()
            ran = self._sandbox.run(program, case.stdin.encode("utf-8", "replace"), case.call)
            outcome = self._judge(case, ran)
            if outcome == "passed":
                num_passed += 1
                continue
            if first_failure == "passed":
                first_failure = outcome
            if not self._config.partial or outcome in (Outcome.CPU, Outcome.TIMEOUT):
                break
        self._count(first_failure)
        if self._config.partial:
            return num_passed / len(cases)
        return 1.0 if num_passed == len(cases) else 0.0

    def _judge(self, case: Case, ran: Ran) -> str:
        if ran.outcome is not Outcome.ENDED:
            return str(ran.outcome)
        if case.call is None:
            found = ran.output.decode("utf-8", "replace")
            return "passed" if _strip_ends(found) == _strip_ends(case.expected) else "wrong"
        try:
            value = _value(json.loads(ran.output), case.as_json)
            right = (
                bool(value) is case.expected
                if case.as_truth
                else same(value, case.expected, self._config.tolerance)
            )
        # The program wrote something else than its value.
        except (ValueError, TypeError, OverflowError, RecursionError):
            return "wrong"
        return "passed" if right else "wrong"

    def _count(self, outcome: str) -> None:
        with self._counting:
            self._counts[outcome] += 1


def find_program(completion: str, require_fence: bool, names: Collection[str] = ()) -> str | None:
    """The program of a completion by the rule above, `names` are called; None when there is none."""
    text = without_reasoning(completion)
    if any(blocks(text, may_be_open=True)):
        defined = re.compile(
            rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+({'|'.join(names)})\b"
            rf"|^({'|'.join(names)})[ \t]*=",
            re.MULTILINE,
        )
        rank = (lambda program: len(set(defined.findall(program)))) if names else (lambda _: 0)
        return last_block(text, LANGUAGES, may_be_open=True, rank=rank)
    return None if require_fence or not text.strip() else text


def called_names(cases: Sequence[Case]) -> frozenset[str]:
    """The functions and classes that the calls of tests need of a program."""
    trees = [ast.parse(case.call, mode="eval") for case in cases if case.call is not None]
    used = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return frozenset(used - set(dir(builtins)))


def read_test(test: Any) -> Case:
    """A test of the data set. Raises `ValueError` saying what was found and what is expected."""
    if isinstance(test, str):
        return _read_assert(test)
    if isinstance(test, Mapping):
        keys = {key for key, value in test.items() if value is not None}
        if keys == {"input", "output"} and all(isinstance(test[k], str) for k in keys):
            return Case(stdin=test["input"], expected=test["output"])
        if keys - {"expected"} == {"call"} and "expected" in test and _parses(test["call"]):
            return Case(call=test["call"], expected=test["expected"], as_json=True)
    raise ValueError(
        f"test {str(test)[:80]!r} is neither {{input, output}} of texts, nor {{call, expected}}, "
        "nor an assert"
    )


def _parses(call: Any) -> bool:
    try:
        ast.parse(call, mode="eval")
    except (SyntaxError, TypeError, ValueError):
        return False
    return True


def _read_assert(text: str) -> Case:
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"test {text[:80]!r} is not valid Python ({error})") from error
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError(f"test {text[:80]!r} is not one assert")
    claim, wanted = body[0].test, True
    if isinstance(claim, ast.UnaryOp) and isinstance(claim.op, ast.Not):
        claim, wanted = claim.operand, False
    if isinstance(claim, ast.Call):
        return Case(call=ast.unparse(claim), expected=wanted, as_truth=True)
    if wanted and isinstance(claim, ast.Compare) and len(claim.ops) == 1:
        sides = (claim.left, claim.comparators[0])
        if isinstance(claim.ops[0], ast.Eq | ast.Is):
            for call, literal in (sides, sides[::-1]):
                if isinstance(call, ast.Call):
                    with_value = _literal(literal)
                    if with_value is not None:
                        return Case(call=ast.unparse(call), expected=with_value[0])
    raise ValueError(
        f"test {text[:80]!r}: the expected value must stay outside of the sandbox, so an assert "
        "compares a call with a literal by == (write it as call and expected instead)"
    )


def _literal(node: ast.expr) -> tuple[Any] | None:
    try:
        return (ast.literal_eval(node),)
    except (ValueError, TypeError):
        return None


def _strip_ends(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _value(written: Any, as_json: bool) -> Any:
    """The value that `candidate.plain` wrote. Raises `ValueError`, `TypeError`: it did not."""
    if not isinstance(written, list):
        return written
    name, entries = written
    if name == "dict":
        pairs = [(_value(k, as_json), _value(v, as_json)) for k, v in entries]
        return {str(k): v for k, v in pairs} if as_json else dict(pairs)
    values = [_value(entry, as_json) for entry in entries]
    if name == "set":
        return set(values)
    return tuple(values) if name == "tuple" and not as_json else values


def same(one: Any, other: Any, tolerance: float) -> bool:
    """Equal as Python means it, with floats within `tolerance`, absolute or relative."""
    if isinstance(one, float) or isinstance(other, float):
        if not all(isinstance(side, int | float) for side in (one, other)):
            return False
        return one == other or math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(
            same(a, b, tolerance) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], tolerance) for k in one)
    return bool(one == other)
