"""User functions in real child processes: every way to fail, and that a failure ends there."""

import os
import pickle
import signal
import threading
from pathlib import Path

import pytest

from rlhf_cluster.errors import ConfigError, ScoringError
from rlhf_cluster.rewards.programs.function_pool import (
    FunctionPool,
    FunctionProcess,
)
from rlhf_cluster.rewards.reward_failure import (
    RewardFailure,
    check_scores,
)

MODULE = """
import ctypes, os, signal, subprocess, sys, threading, time

def back(texts):
    return texts

def pid():
    return os.getpid()

def chatty():
    print("hello from print")
    os.write(1, b"hello from the descriptor\\n")
    subprocess.run(["echo", "hello from a grandchild"], check=True)
    return sys.stdin.read()

def raises():
    raise ValueError("no such\\nunit")

def leaves():
    sys.exit(3)

def crashes():
    ctypes.string_at(0)

def exits():
    os._exit(3)

def exits_with_the_pipes_still_held():
    if os.fork() == 0:
        signal.pause()
    os._exit(3)

def hangs():
    while True:
        pass

def hangs_in_c_code():
    ctypes.PyDLL(None).pause()  # holds the interpreter's lock

def hangs_with_a_grandchild(fifo, by_itself):
    subprocess.Popen(["sh", "-c", "exec 3>$0; sleep 1000", fifo])
    with open(fifo + ".up", "rb"):  # until the grandchild is up
        pass
    if by_itself:
        os._exit(0)
    time.sleep(1000)

def uses_an_alarm():
    def ring(*_):
        raise TimeoutError("ring")
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()

def waits_for(path):
    with open(path, "rb") as fifo:
        return fifo.read().decode()

def writes_everywhere(text):
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if fd > 2:
                os.write(fd, text.encode())
        except OSError:
            pass
    time.sleep(1000)

class Odd:
    pass

def odd():
    return [Odd(), 1.0]

def numbers(as_array):
    import numpy
    array = numpy.array([0.5, 1.5, 3.0], dtype=numpy.float32)
    return array if as_array else [array[0], True, 3, numpy.float64(2.5)]

not_a_function = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def process():
    made: list[FunctionProcess] = []

    def make(name: str) -> FunctionProcess:
        made.append(FunctionProcess(f"user_rewards:{name}", start_timeout_s=30))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def failure_of(process: FunctionProcess, timeout_s: float = 30.0, **arguments) -> RewardFailure:
    with pytest.raises(RewardFailure) as failure:
        process.call(arguments, timeout_s)
    return failure.value


def test_arguments_and_results_larger_than_a_pipe_come_through_unchanged(process):
    texts = ["a\n\u00e9\ud800" * 100_000, "", "x" * 1_000_000, *map(str, range(1000))]
    assert process("back").call({"texts": texts}, 60) == texts


def test_a_child_serves_many_calls_and_is_replaced_when_it_died_in_between(process):
    child = process("pid")
    first = child.call({}, 30)
    assert child.call({}, 30) == first
    os.kill(first, 9)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert child.call({}, 30) != first


def test_what_a_function_prints_never_mixes_with_its_answer_and_goes_to_standard_error(
    process, capfd
):
    assert process("chatty").call({}, 30) == ""
    captured = capfd.readouterr()
    for source in ("print", "the descriptor", "a grandchild"):
        assert f"hello from {source}\n" in captured.err
    assert captured.out == ""


def test_s23_an_exception_comes_back_as_its_last_line_and_the_child_lives_on(process):
    child = process("raises")
    failure = failure_of(child)
    assert failure.reason == "raised"
    assert "ValueError: no such" in str(failure)
    assert "user_rewards.py, line" in str(failure)
    alive = child._child
    assert failure_of(child).reason == "raised"
    assert child._child is alive
    assert failure_of(process("leaves")).reason == "raised"


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("crashes", "killed by SIGSEGV"),
        ("exits", "exit code 3"),
        ("exits_with_the_pipes_still_held", "exit code 3"),
    ],
)
def test_s23_a_death_is_a_reason_and_the_next_call_gets_a_new_child(process, name, how):
    child = process(name)
    for _ in range(2):
        failure = failure_of(child)
        assert failure.reason == "died"
        assert how in str(failure)


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c_code"])
def test_s23_a_hang_ends_at_the_deadline_and_the_child_is_gone(process, name):
    child = process(name)
    child.start()
    pid = child._child.pid
    failure = failure_of(child, timeout_s=0.3)
    assert failure.reason == "timeout"
    assert "0.3 s" in str(failure)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("by_itself", [False, True], ids=["at the deadline", "when it dies"])
def test_the_processes_that_a_function_started_are_killed_with_it(process, folder, by_itself):
    fifo = str(folder / "held")
    os.mkfifo(fifo)
    os.mkfifo(fifo + ".up")
    child = process("hangs_with_a_grandchild")
    held: list[bytes] = []

    def until_released():
        end = os.open(fifo, os.O_RDONLY)  # waits for: the grandchild to open it
        with open(fifo + ".up", "wb"):
            pass
        held.append(os.read(end, 1))  # waits for: the grandchild's death
        os.close(end)

    watcher = threading.Thread(target=until_released, daemon=True)
    watcher.start()
    failure = failure_of(child, timeout_s=1.0, fifo=fifo, by_itself=by_itself)
    assert failure.reason == ("died" if by_itself else "timeout")
    watcher.join(timeout=20)
    assert held == [b""]


@pytest.mark.timeout(30)
def test_a_child_and_its_processes_end_when_the_parent_goes_away(process, folder):
    fifo = str(folder / "held")
    os.mkfifo(fifo)
    os.mkfifo(fifo + ".up")
    child = process("hangs_with_a_grandchild")
    child.start()
    request = b'{"id": 1, "arguments": {"fifo": "%s", "by_itself": false}}\n' % fifo.encode()
    os.write(child._request_fd, request)
    end = os.open(fifo, os.O_RDONLY)
    with open(fifo + ".up", "wb"):
        pass
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, child._request_fd)  # closes the pipe, as the parent's end would
    os.close(nothing)
    assert os.read(end, 1) == b""
    os.close(end)
    assert child._child.wait(timeout=20) == -9


def test_a_function_may_use_signals_of_its_own(process):
    assert "TimeoutError: ring" in str(failure_of(process("uses_an_alarm")))


@pytest.mark.parametrize(
    "text",
    ['{"id": 1, "result": [1.0]}\n' * 2, '{"id": 9, "result": [1.0]}\n', "[1.0]\n", "noise\n"],
)
def test_an_answer_that_is_not_the_childs_own_is_refused(process, text):
    failure = failure_of(process("writes_everywhere"), text=text)
    assert failure.reason == "reply"


@pytest.mark.timeout(30)
def test_a_child_that_does_not_read_its_request_meets_the_deadline_too(process):
    child = process("back")
    child.start()
    pid = child._child.pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    os.write(child._request_fd, b" " * 32_768)  # a pipe with some room left, not all
    assert failure_of(child, timeout_s=0.3, texts="x" * 1_000_000).reason == "timeout"


def test_arrays_and_their_scalars_count_as_lists_and_numbers(process):
    child = process("numbers")
    assert check_scores(child.call({"as_array": True}, 30), 3) == [0.5, 1.5, 3.0]
    assert check_scores(child.call({"as_array": False}, 30), 4) == [0.5, 1.0, 3.0, 2.5]


def test_a_value_that_json_does_not_know_is_named_by_its_type(process):
    with pytest.raises(RewardFailure, match="Odd") as failure:
        check_scores(process("odd").call({}, 30), 2)
    assert failure.value.reason == "not_a_number"


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (None, "not_a_list"),
        (1.0, "not_a_list"),
        ("ab", "not_a_list"),
        ([1.0], "length"),
        ([1.0, 2.0, 3.0], "length"),
        ([1.0, None], "none"),
        ([1.0, "2"], "not_a_number"),
        ([1.0, float("nan")], "nan"),
        ([1.0, float("inf")], "infinite"),
        ([1.0, 10**400], "infinite"),
    ],
)
def test_s23_an_unusable_answer_has_a_reason_of_its_own_and_is_never_a_zero(scores, reason):
    with pytest.raises(RewardFailure) as failure:
        check_scores(scores, 2)
    assert failure.value.reason == reason


def test_a_failure_keeps_message_and_reason_across_processes():
    failure = RewardFailure("returned NaN", "nan")
    copy = pickle.loads(pickle.dumps(failure))
    assert isinstance(copy, ScoringError)
    assert (str(copy), copy.reason) == ("returned NaN", "nan")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("broken_rewards:f", "No module named 'no_such_package'"),
        ("user_rewards:absent", "has no attribute 'absent'"),
        ("user_rewards:not_a_function", "not_a_function is not callable"),
    ],
)
def test_a_function_that_cannot_be_imported_is_found_at_the_start_with_the_cure(function, words):
    pool = FunctionPool(function, processes=1, start_timeout_s=30, wait_timeout_s=1)
    with pytest.raises(ConfigError, match=r"PYTHONPATH") as error:
        pool.check()
    assert words in str(error.value)
    pool.close()


def test_a_module_on_the_python_path_is_found(folder, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far_rewards.py").write_text("def one():\n    return [1.0]\n")
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    pool = FunctionPool("far_rewards:one", processes=1, start_timeout_s=30, wait_timeout_s=1)
    try:
        assert pool.call({}, 30) == [1.0]
    finally:
        pool.close()


@pytest.mark.timeout(30)
def test_a_pool_runs_as_many_calls_at_once_as_it_has_processes(folder):
    os.mkfifo(folder / "first")
    pool = FunctionPool("user_rewards:waits_for", 2, start_timeout_s=30, wait_timeout_s=0.1)
    (folder / "second").write_bytes(b"second")
    answers: list[str] = []

    def run() -> None:
        answers.append(pool.call({"path": str(folder / "first")}, 30))

    blocked = threading.Thread(target=run)
    blocked.start()
    with open(folder / "first", "wb") as gate:  # waits for: the blocked call to be running
        assert pool.call({"path": str(folder / "second")}, 30) == "second"
        assert answers == []
        gate.write(b"first")
    blocked.join(timeout=20)
    assert answers == ["first"]
    pool.close()


@pytest.mark.timeout(30)
def test_a_call_that_finds_no_free_process_fails_by_its_deadline_and_close_ends_the_other(folder):
    os.mkfifo(folder / "never")
    pool = FunctionPool("user_rewards:waits_for", 1, start_timeout_s=30, wait_timeout_s=0.1)
    failures: list[RewardFailure] = []

    def run() -> None:
        try:
            pool.call({"path": str(folder / "never")}, 30)
        except RewardFailure as failure:
            failures.append(failure)

    blocked = threading.Thread(target=run)
    blocked.start()
    with open(folder / "never", "wb"):
        with pytest.raises(RewardFailure, match="busy") as busy:
            pool.call({"path": "x"}, 30)
        assert busy.value.reason == "busy"
        pool.close()
        blocked.join(timeout=20)
    assert [failure.reason for failure in failures] == ["died"]
    with pytest.raises(RewardFailure, match="closed"):
        pool.call({"path": "x"}, 30)
