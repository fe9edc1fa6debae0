"""The process that builds a sandbox around one program, and the one that watches it.

    python -I -S jail.py CONTROL_FD REPORT_FD

Imports nothing of this project, so that it starts at once. Reads one JSON line, a `Spec` of
`sandbox.py`, and keeps the pipe open as its lifeline: when its other end closes, everything dies.

    this process       new user, mount, process, network, IPC and host name namespaces
      first process    builds an empty root of read-only folders, then waits for the program;
                       as the first of its process namespace it takes all others along when it ends
        the program    user `nobody`, no capabilities, limits, a system call filter, own session

Reports one JSON object a line: {"started": true} just before the program, then {"status": code}
(negative: the signal that killed it), or {"sandbox": reason} where the sandbox cannot be built.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any

NOBODY = 65534
# Paths that cannot hide the folder of the interpreter.
PROGRAM_DIR = "/sandbox/program"
WORK_DIR = "/sandbox/work"
PACKAGES_DIR = "/sandbox/packages"

_NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture, and in no C library of ours
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_REAP_MS = 100

# After pivot_root nothing is left of it, and it is the one folder that is always there.
_ROOT = "/proc"
_JAIL = _ROOT + "/jail"

# Calls by which memory escapes its limit, or that widen what the kernel can be asked.
# (architecture, {name: number}); mounts by file descriptor have the same numbers everywhere.
_SAME = (425, 428, 429, 430, 431, 432, 433, 442, 447)  # io_uring_setup, mounts, memfd_secret
_DENIED = {
    # ptrace shmget msgget semget keys(3) unshare setns mount umount2 pivot_root bpf
    # perf_event_open userfaultfd memfd_create process_vm_readv process_vm_writev mq_open
    "x86_64": (
        0xC000003E,
        (
            101,
            29,
            68,
            64,
            248,
            249,
            250,
            272,
            308,
            165,
            166,
            155,
            321,
            298,
            323,
            319,
            310,
            311,
            240,
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (117, 194, 186, 190, 217, 218, 219, 97, 268, 40, 39, 41, 280, 241, 282, 279, 270, 271, 180),
    ),
}

_libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: Sequence[str]) -> int:
    control_fd, report_fd = int(arguments[0]), int(arguments[1])
    for fd in (control_fd, report_fd):
        os.set_inheritable(fd, False)
    # The first process of a namespace gets only signals that it handles: it must handle none. What
    # our parent ignores or blocks would be inherited, by the program as well.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    spec = json.loads(_read_line(control_fd))
    try:
        is_root = _separate()
        first = os.fork()
    except OSError as error:
        _report(report_fd, {"sandbox": str(error)})
        return 1
    if first == 0:
        os._exit(_first_process(spec, is_root, control_fd, report_fd))
    os.close(report_fd)
    os.waitpid(first, 0)  # waits for: the whole namespace; ends with the lifeline or a kill
    return 0


def _read_line(fd: int) -> bytes:
    """Read one line. Waits for: the parent's line, or its end."""
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            os._exit(1)
        line += chunk
    return bytes(line)


def _report(fd: int, message: dict[str, Any]) -> None:
    os.write(fd, json.dumps(message).encode("ascii") + b"\n")


def _check_result(name: str, result: int) -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _separate() -> bool:
    """Enter new namespaces. Return whether we were root: then `nobody` is another user in there."""
    uid, gid, me = os.getuid(), os.getgid(), os.getpid()
    if uid != 0:
        _check_result("unshare", _libc.unshare(_NEW_NAMESPACES))
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return False
    # Two users can be mapped only by a process that is still outside.
    begin_read, begin_write = os.pipe()
    outside = os.fork()
    if outside == 0:
        os.close(begin_write)
        if os.read(begin_read, 1) != b"1":
            os._exit(1)
        try:
            for kind in ("uid", "gid"):
                _write(f"/proc/{me}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    try:
        _check_result("unshare", _libc.unshare(_NEW_NAMESPACES))
        os.write(begin_write, b"1")
    finally:
        os.close(begin_read)
        os.close(begin_write)
        code = os.waitstatus_to_exitcode(os.waitpid(outside, 0)[1])
    if code:
        raise OSError(code, f"uid_map: {os.strerror(code)}")
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _first_process(spec: dict[str, Any], is_root: bool, control_fd: int, report_fd: int) -> int:
    try:
        _write("/proc/self/oom_score_adj", "1000")  # out of memory, the kernel takes us first
        _build_root(spec)
        _report(report_fd, {"started": True})
        program = os.fork()
        if program == 0:
            _become_program(spec, is_root, report_fd)
    except OSError as error:
        _report(report_fd, {"sandbox": str(error)})
        return 1
    for fd in (0, 1, 2):
        os.close(fd)
    _report(report_fd, {"status": _wait(program, control_fd)})
    return 0


def _wait(program: int, lifeline: int) -> int:
    """Return the program's exit status. Reaps orphans, which would use up the limit of processes.

    Waits for: the program's end. Unblocked by: that, or the end of the lifeline.
    """
    poll = select.poll()
    poll.register(os.pidfd_open(program), select.POLLIN)
    poll.register(lifeline, 0)  # a hang-up is always reported
    while True:
        if any(fd == lifeline for fd, _ in poll.poll(_REAP_MS)):
            os._exit(1)
        pid = -1
        while pid != 0:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == program:
                return os.waitstatus_to_exitcode(status)


def _build_root(spec: dict[str, Any]) -> None:
    """An empty root with read-only folders, the program's files, and one small writable folder."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64m,mode=755")
    os.umask(0o022)
    for path in spec["readable"]:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(_JAIL + path), exist_ok=True)
            os.symlink(os.readlink(path), _JAIL + path)
        elif os.path.exists(path):
            _bind_read_only(path, path)
    if spec["packages"] is not None:
        _bind_read_only(spec["packages"], PACKAGES_DIR)
    for name in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{name}", f"/dev/{name}")
    os.makedirs(_JAIL + PROGRAM_DIR)
    for name, text in spec["files"].items():
        with open(f"{_JAIL}{PROGRAM_DIR}/{name}", "wb") as file:
            file.write(text.encode("utf-8", "surrogatepass"))
    os.makedirs(_JAIL + WORK_DIR)
    size = f"size={spec['disk_bytes']},nr_inodes={spec['num_files']},mode=1777"
    _mount("tmpfs", _JAIL + WORK_DIR, "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    if not os.path.exists(_JAIL + "/tmp"):
        os.symlink(WORK_DIR, _JAIL + "/tmp")
    os.mkdir(_ROOT + "/old")
    _check_result("pivot_root", _libc.pivot_root(_ROOT.encode(), (_ROOT + "/old").encode()))
    os.chdir("/")
    _check_result("umount", _libc.umount2(b"/old", _MNT_DETACH))
    os.rmdir("/old")
    _set_attributes("/", _ATTR_RDONLY, 0)
    # Below the root of the mounts: the kernel refuses further user namespaces to such processes.
    os.chroot("/jail")
    os.chdir(WORK_DIR)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, data: str | None = None
) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check_result(f"mount {target}", _libc.mount(*given[:3], ctypes.c_ulong(flags), given[3]))


def _bind_read_only(path: str, inside: str) -> None:
    _bind(path, inside)
    _set_attributes(_JAIL + inside, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, _AT_RECURSIVE)


def _bind(path: str, inside: str) -> None:
    target = _JAIL + inside
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
    _mount(path, target, None, _MS_BIND | _MS_REC)


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    what = struct.pack("QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_long(_AT_FDCWD),
        path.encode(),
        ctypes.c_long(flags),
        what,
        ctypes.c_long(len(what)),
    )
    _check_result(f"mount_setattr {path}", result)


def _become_program(spec: dict[str, Any], is_root: bool, report_fd: int) -> None:
    """Drop every right, then run the program. Never returns.

    Starting a program as `nobody` takes the capabilities of the new user namespace from it.
    """
    try:
        os.setsid()  # kill(0) reaches a process group across namespaces: it must be our own
        if is_root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
        if is_root:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        # Where the program has our own user, the limit includes this process and its parents.
        limits = spec["limits"] | {"NPROC": spec["processes"] + (0 if is_root else 2)}
        for name, value in limits.items():
            number = getattr(resource, f"RLIMIT_{name}")
            resource.setrlimit(number, (value, value + 1 if name == "CPU" else value))
        _check_result("no_new_privs", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _filter_system_calls()
        os.execve(spec["command"][0], spec["command"], spec["environment"])
    except OSError as error:
        _report(report_fd, {"sandbox": str(error)})
        os._exit(1)


def _filter_system_calls() -> None:
    """Answer the calls of `_DENIED` with EPERM (classic BPF on `struct seccomp_data`)."""
    machine = platform.machine()
    if machine not in _DENIED:
        raise OSError(0, f"seccomp: no table of system calls for {machine}")
    architecture, numbers = _DENIED[machine]
    denied = (*numbers, *_SAME)
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06
    kill, refuse, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (leave, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # x86-64's second table of calls
        (leave, 0, 0, kill),
        *((equal, len(denied) - place, 0, n) for place, n in enumerate(denied)),
        (leave, 0, 0, allow),
        (leave, 0, 0, refuse),
    ]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed)
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    _check_result("seccomp", _libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
