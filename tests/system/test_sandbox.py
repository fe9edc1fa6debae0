"""The sandbox for real: what untrusted programs try, that it is contained, and how it is told.

Needs user namespaces; no vLLM and no Ray.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from rlhf_cluster.rewards.programs.code_tests import (
    Code,
    CodeConfig,
)
from rlhf_cluster.rewards.programs.sandbox import (
    Limits,
    Outcome,
    Sandbox,
)
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure
from tests.support.builders.sandboxed_programs import (
    KILLING,
    isolation,
    marked,
    processes_named,
    run,
    until,
)
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)

pytestmark = pytest.mark.usefixtures("_isolation")
_isolation = pytest.fixture(scope="module")(isolation)


def test_a_program_gets_its_input_and_its_output_comes_back():
    ran = run("print(sum(map(int, input().split())))", b"1 2\n")
    assert (ran.outcome, ran.output) == (Outcome.ENDED, b"3\n")


def test_input_and_output_larger_than_a_pipe_come_through():
    ran = run("import sys; sys.stdout.write(sys.stdin.read())", b"x" * 900_000)
    assert (ran.outcome, ran.output) == (Outcome.ENDED, b"x" * 900_000)
    assert run("print(5)", b"x" * 900_000).output == b"5\n"


def test_the_value_of_a_call_does_not_mix_with_what_the_program_prints():
    program = "print('[1]')\ndef f(x):\n    print(2)\n    return {x: (None, [1.5], {True})}"
    ran = run(program, call="f('a')")
    assert ran.outcome is Outcome.ENDED
    expected = ["dict", [["a", ["tuple", [None, ["list", [1.5]], ["set", [True]]]]]]]
    assert json.loads(ran.output) == expected


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("raise ValueError('no')", Outcome.ERROR),
        ("import sys; sys.exit(3)", Outcome.ERROR),
        ("def f(:", Outcome.SYNTAX),
        ("import os; os.abort()", Outcome.KILLED),
        ("exit()", Outcome.ENDED),
    ],
)
def test_how_a_program_ended_is_its_outcome(program, outcome):
    assert run(program).outcome is outcome


def test_an_endless_loop_ends_at_its_processor_time():
    assert run("while True: pass", cpu_s=1).outcome is Outcome.CPU


def test_signals_that_this_process_ignores_or_blocks_change_nothing():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])
    try:
        assert run("while True: pass", cpu_s=1).outcome is Outcome.CPU
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGXCPU])
        signal.signal(signal.SIGCHLD, before)


def test_a_program_that_ignores_the_signal_for_it_ends_as_well():
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(program, cpu_s=1).outcome is Outcome.KILLED


def test_a_program_that_waits_ends_at_its_deadline_and_what_it_said_is_kept():
    ran = run("import time; print('so far', flush=True); time.sleep(1000)", wall_s=2.0)
    assert (ran.outcome, ran.output) == (Outcome.TIMEOUT, b"so far\n")


def test_a_fork_bomb_is_told_and_leaves_no_process():
    mark, naming = marked()
    assert run(naming + "import os\nwhile True: os.fork()").outcome is Outcome.PROCESSES
    assert processes_named(mark) == []


def test_a_fork_bomb_that_hides_its_errors_stays_within_its_number_and_its_time():
    mark, naming = marked()
    program = naming + (
        "import os\nprint('up', flush=True)\n"
        "while True:\n    try: os.fork()\n    except OSError: pass"
    )
    counts: list[int] = []
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(0.05):  # waits for: the run below
            counts.append(len(processes_named(mark)))

    counting = threading.Thread(target=count)
    counting.start()
    try:
        ran = run(program, cpu_s=1, wall_s=6.0, processes=6)
    finally:
        ended.set()
        counting.join()
    assert ran.outcome in (Outcome.CPU, Outcome.TIMEOUT)
    assert 2 <= max(counts) <= 6
    assert processes_named(mark) == []


def test_too_many_threads_are_told():
    program = (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()"
    )
    assert run(program, wall_s=60.0).outcome in (Outcome.PROCESSES, Outcome.MEMORY)


def test_a_memory_hog_is_told():
    assert run("x = bytearray(10**10)").outcome is Outcome.MEMORY
    assert run("x = []\nwhile True: x.append(bytearray(10**7))").outcome is Outcome.MEMORY


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.memfd_create('x')",
        "import ctypes, errno\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.shmget(0, 4096, 0o1600) == -1\nraise OSError(ctypes.get_errno(), 'shmget')",
        "import ctypes, errno\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.unshare(0x10000000) == -1\nraise OSError(ctypes.get_errno(), 'unshare')",
        "import ctypes, errno\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) == -1\n"
        "raise OSError(ctypes.get_errno(), 'clone')",
        "import ctypes, errno\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.mount(b'x', b'/sandbox/work', b'tmpfs', 0, None) == -1\n"
        "raise OSError(ctypes.get_errno(), 'mount')",
        "import socket; socket.sethostname('x')",
        "import os; os.chroot('/sandbox/work')",
        "import os; os.setuid(0)",
    ],
    ids=["memfd", "shared memory", "unshare", "clone", "mount", "hostname", "chroot", "root"],
)
def test_what_would_get_round_the_limits_is_denied(program):
    if "syscall(56" in program and os.uname().machine != "x86_64":
        pytest.skip("the number of clone is x86-64's")
    assert run(program).outcome is Outcome.DENIED


def test_files_are_bounded_in_size_and_number():
    assert run("open('x', 'wb').write(bytes(10**8))").outcome is Outcome.FILES
    many = "for n in range(100):\n    open(f'f{n}', 'wb').write(bytes(10**6))"
    assert run(many).outcome is Outcome.FILES
    empty = "for n in range(10**5):\n    open(f'f{n}', 'wb').close()"
    assert run(empty).outcome is Outcome.FILES
    held = "x = [open('f', 'w') for _ in range(1000)]"
    assert run(held).outcome is Outcome.FILES
    assert run("import os; print(os.listdir('.'))").output == b"[]\n"


def test_installed_packages_are_there_only_where_they_are_allowed():
    program = "import numpy as np\ndef f():\n    return np.arange(3), np.float64(2.5)"
    limits = Limits(cpu_s=60, wall_s=120.0)
    ran = Sandbox(limits, packages=True).run(program, call="f()")
    assert json.loads(ran.output) == ["tuple", [["list", [0, 1, 2]], 2.5]], ran.detail
    assert "No module named 'numpy'" in Sandbox(limits).run(program, call="f()").detail


def test_endless_output_is_cut():
    ran = run("while True: print('x' * 1000)", output_bytes=10_000)
    assert (ran.outcome, len(ran.output)) == (Outcome.OUTPUT, 10_000)
    assert run("import os\nwhile True: os.write(2, b'x' * 1000)", cpu_s=1).outcome is Outcome.CPU


def test_everything_ends_when_the_process_that_asked_is_killed():
    mark, naming = marked()
    program = naming + "import time\ntime.sleep(1000)"
    code = (
        "import sys; from rlhf_cluster.rewards.programs.sandbox import Limits, Sandbox; "
        "Sandbox(Limits(wall_s=1000)).run(sys.argv[1])"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, program])
    try:
        until(lambda: processes_named(mark))
    finally:
        asking.send_signal(signal.SIGKILL)
        asking.wait()
    until(lambda: not processes_named(mark))
    assert not processes_named(mark)


def test_a_sandbox_that_cannot_be_built_is_a_failure_and_no_outcome():
    sandbox = Sandbox(Limits())
    sandbox._readable = ["/etc/ld.so.cache"]  # no interpreter in there
    with pytest.raises(RewardFailure, match="cannot be built") as failure:
        sandbox.run("print(1)")
    assert failure.value.reason == "sandbox"


AS_USER = """
import json, sys
from rlhf_cluster.rewards.programs.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(cpu_s=60, wall_s=120))
sandbox.check()
ran = [sandbox.run(program) for program in json.loads(sys.argv[1])]
print(json.dumps([[r.outcome, r.output.decode()] for r in ran]))
"""
PROBE = (
    "from rlhf_cluster.rewards.programs.sandbox import *; Sandbox(Limits()).check(); print('held')"
)


def test_a_user_without_rights_gets_the_same_isolation():
    """There, jail and program are one user: each step is held by another wall than for root."""
    if shutil.which("unshare") is None:
        pytest.skip("the command unshare is not installed")
    paths = (
        "/note",
        "/sandbox/program/solution.py",
        "/sandbox/program/note",
        os.__file__,
        "/usr/note",
        "/dev/note",
    )
    programs = [
        *(f"open({path!r}, 'a').write('x')" for path in paths),
        "import socket; socket.sethostname('x')",
        "import socket; socket.create_connection(('127.0.0.1', 9), 5)",
        KILLING.format(signals=[9, 15, 2, 1, 3, 10, 17, 19, 20]),
    ]
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    done = subprocess.run(
        [*command, sys.executable, "-c", AS_USER, json.dumps(programs)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    denied, killed = ["denied", ""], ["killed", "on\n"]
    assert json.loads(done.stdout) == [denied] * 7 + [["network", ""], killed]


def test_a_machine_that_cannot_isolate_is_refused_with_the_cure():
    if shutil.which("unshare") is None:
        pytest.skip("the command unshare is not installed")
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, PROBE],
        capture_output=True,
        text=True,
    )
    assert "ConfigError: this machine cannot isolate programs" in done.stderr
    assert "user.max_user_namespaces" in done.stderr


def test_the_reward_scores_real_programs_and_counts_their_outcomes():
    reward = Code(CodeConfig(cpu_s=1, parallel=2), RewardContext())
    tests = ["assert add(1, 2) == 3", {"call": "add([1], [2])", "expected": [1, 2]}]
    prompt = make_prompt(columns={"tests": tests})
    completions = [
        "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
        "```python\ndef add(a, b):\n    return 3\n```",
        "```\ndef add(a, b):\n    while True: pass\n```",
        "```\nimport os\ndef add(a, b):\n    os._exit(0)\n```",
    ]
    try:
        rollouts = make_rollouts(prompt, [[5, 1]] * len(completions))
        assert reward.score(prompt, rollouts, completions) == [1.0, 0.0, 0.0, 0.0]
        assert reward.outcomes() == {"passed": 1.0, "wrong": 2.0, "cpu": 1.0}
    finally:
        reward.close()
