"""Locks and permissions of what a run writes; what survives a power cut is in test_power_cut.py."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from rlhf_cluster.errors import StorageError
from rlhf_cluster.util.durable_files import take_lock


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_d14_a_file_system_without_locks_is_named_with_its_mount_option(
    tmp_path: Path, code: int
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    with (tmp_path / "run.lock").open("w") as file, pytest.raises(StorageError) as error:
        take_lock(file.fileno(), tmp_path / "run.lock", flock=flock)
    for word in (str(tmp_path / "run.lock"), "-o flock", "run.root", os.strerror(code)):
        assert word in str(error.value)


def test_a_lock_excludes_others_and_ends_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with path.open("w") as first, path.open() as second:
        assert take_lock(first.fileno(), path)
        assert not take_lock(second.fileno(), path)
        assert not take_lock(second.fileno(), path, shared=True)
        fcntl.flock(first, fcntl.LOCK_UN)
        assert take_lock(second.fileno(), path, shared=True)
