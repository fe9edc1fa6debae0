"""What a program does to get out of the sandbox: each way is contained."""

import json
import os
import secrets
import socket
import sys
from pathlib import Path

import pytest

from rlhf_cluster.rewards.programs.sandbox import Outcome
from tests.support.builders.sandboxed_programs import (
    KILLING,
    isolation,
    marked,
    processes_named,
    run,
)

pytestmark = pytest.mark.usefixtures("_isolation")
_isolation = pytest.fixture(scope="module")(isolation)


def test_nothing_outside_the_own_folder_can_be_written(tmp_path):
    for path in ("/note", "/sandbox/program/solution.py", os.__file__, "/usr/note", "/dev/note"):
        ran = run(f"open({path!r}, 'a').write('x')")
        assert ran.outcome is Outcome.DENIED, path
    outside = tmp_path / "note"
    assert run(f"open({str(outside)!r}, 'w').write('x')").outcome is Outcome.ERROR
    assert run("open('/tmp/note', 'w').write('x')\nprint(open('note').read())").output == b"x\n"
    assert not outside.exists()
    assert not Path("/tmp/note").exists()


def test_the_network_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
        assert ran.outcome is Outcome.NETWORK
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert run("import socket; socket.getaddrinfo('example.org', 80)").outcome is Outcome.NETWORK
    name = "\0" + secrets.token_hex(8)  # a socket without a file, which any process can reach
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        program = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
        assert "ConnectionRefused" in run(program).detail


SEARCH = """
import gc, os, sys
seen = [repr(dict(os.environ)), repr(sys.argv)]
for path in (PATH, "/proc/self/environ", "/proc/1/cmdline", "/proc/2/mem"):
    try:
        seen.append(open(path).read())
    except OSError as error:
        seen.append(type(error).__name__)
for fd in range(3, 64):
    try:
        seen.append(os.read(fd, 10**6).decode())
    except OSError:
        pass
for folder, names, files in os.walk("/"):
    names[:] = [n for n in names if os.path.join(folder, n) not in ("/usr", PREFIX)]
    for name in files:
        try:
            seen.append(os.path.join(folder, name))
            if not folder.startswith("/dev"):
                seen.append(open(os.path.join(folder, name), errors="replace").read())
        except OSError:
            pass
seen.append(repr([o for o in gc.get_objects() if isinstance(o, (list, tuple, dict))][:20000]))
sys.stderr.write("".join(seen).replace(BOTH[0] + BOTH[1], "FOUND"))
def answer(x):
    return "".join(seen)
"""


def test_the_tests_answers_are_not_in_reach(tmp_path, monkeypatch):
    secret = "answer-" + secrets.token_hex(8)
    answers = tmp_path / "tests.json"
    answers.write_text(json.dumps([secret]))
    monkeypatch.setenv("ANSWERS", secret)
    given = f"PATH, PREFIX, BOTH = {str(answers)!r}, {sys.base_prefix!r}, "
    program = given + f"({secret[:9]!r}, {secret[9:]!r})\n" + SEARCH
    ran = run(program, stdin=b"in", call="answer(3)", output_bytes=64 << 20, cpu_s=20)
    assert ran.outcome is Outcome.ENDED, ran.detail
    seen = json.loads(ran.output)
    assert "FileNotFoundError" in seen
    assert "answer(3)" in seen  # it reads what went in, so it would have read more
    assert secret not in seen


@pytest.mark.parametrize("signals", [[9], [15, 2, 1, 3, 10, 17, 19, 20]], ids=["kill", "others"])
def test_a_program_that_kills_around_itself_hits_nobody_else(signals):
    ran = run(KILLING.format(signals=signals))
    assert (ran.outcome, ran.output) == (Outcome.KILLED, b"on\n")


def test_an_orphan_in_a_session_of_its_own_dies_with_the_program():
    mark, naming = marked()
    program = (
        naming
        + """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in (0, 1, 2):
            os.close(fd)
        time.sleep(1000)
    os._exit(0)
os.wait()
print("main")
"""
    )
    ran = run(program)
    assert (ran.outcome, ran.output) == (Outcome.ENDED, b"main\n")
    assert processes_named(mark) == []
