"""Runs the program to be judged, inside its sandbox.

    python -I -S -B candidate.py [FOLDER_OF_PACKAGES]

Imports nothing of this project. Runs `solution.py` of its folder as a script; where the
folder has `call.py`, it evaluates that expression afterwards and writes its value as JSON to standard
output, which what the program prints does not reach. Nothing here is a secret: the expected values
are not in the sandbox. The exit codes of `EXITS` say what ended a program; a program that forges one
fails as well.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

EXITS = {
    101: "memory",
    102: "processes",
    103: "files",
    104: "denied",
    105: "network",
    106: "syntax",
    107: "error",
}
_BY_ERRNO = {
    errno.ENOMEM: "memory",
    errno.EAGAIN: "processes",
    errno.EFBIG: "files",
    errno.ENOSPC: "files",
    errno.EMFILE: "files",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
    errno.ENETUNREACH: "network",
    errno.EHOSTUNREACH: "network",
    errno.EADDRNOTAVAIL: "network",
}


def main(packages: list[str]) -> None:
    sys.path += packages
    builtins.exit = builtins.quit = sys.exit  # what `site` adds, which is not loaded
    here = Path(__file__).parent
    call = here / "call.py"
    answers = -1
    if call.exists():
        answers = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module = types.ModuleType("solution" if call.exists() else "__main__")
    sys.modules[module.__name__] = module
    sys.argv = ["solution.py"]
    try:
        text = (here / "solution.py").read_bytes()
        exec(compile(text, "solution.py", "exec"), module.__dict__)
        if answers != -1:
            value = eval(compile(call.read_bytes(), "call.py", "eval"), module.__dict__)
            _send(answers, json.dumps(plain(value)).encode("ascii"))
        sys.stdout.flush()
    except SystemExit:
        if answers != -1:
            _leave("error")
        raise
    # A program may raise anything.
    except BaseException as error:
        _leave(_kind(error), error)


def plain(value: Any) -> Any:
    """The value as JSON that keeps tuples, sets and keys apart. `TypeError`: it is none of those."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    for kind, name in ((list, "list"), (tuple, "tuple"), (set | frozenset, "set")):
        if isinstance(value, kind):
            return [name, [plain(entry) for entry in value]]
    if isinstance(value, dict):
        return ["dict", [[plain(key), plain(entry)] for key, entry in value.items()]]
    raise TypeError(f"the value is {type(value).__name__}: it cannot be compared")


def _kind(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SyntaxError):
        return "syntax"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "processes"
    if isinstance(error, OSError):
        if type(error).__name__ == "gaierror":
            return "network"
        return _BY_ERRNO.get(error.errno or 0, "error")
    return "error"


def _leave(kind: str, error: BaseException | None = None) -> None:
    code = next(number for number, name in EXITS.items() if name == kind)
    if error is not None:
        # Where no memory is left, there may be none for telling it.
        try:
            traceback.print_exception(error)
        except BaseException:
            os._exit(code)
    os._exit(code)


def _send(fd: int, text: bytes) -> None:
    unsent = memoryview(text)
    while unsent:
        unsent = unsent[os.write(fd, unsent) :]


if __name__ == "__main__":
    main(sys.argv[1:])
