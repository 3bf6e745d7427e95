"""Processes that something happens to at one of their file operations below a directory."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Told the name of an operation and its number before it happens; may raise, and may not return.
Fault = Callable[[str, int], None]

_OPERATIONS = {
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"),
    *("os.truncate", "os.utime", "os.setxattr", "os.removexattr"),
}
# What takes room on a disk.
_GROWING = {"open", "write", "fsync", "os.link", "os.mkdir", "os.symlink"}


def stumble(action: Callable[[], int], directory: Path, fault: Fault) -> int:
    """Run `action` in a process of its own; `fault` is called before each of its operations.

    Returns:
        The exit code, or a signal's negative number.
    """
    child = os.fork()
    if child == 0:
        # Nothing of pytest's may run a second time.
        try:
            _watch(str(directory), fault)
            os._exit(action())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def noted_in(file: Path) -> Fault:
    """Nothing happens; the operations' names are written to a file."""

    def fault(operation: str, number: int) -> None:
        with file.open("a" if number > 1 else "w") as note:
            note.write(f"{operation}\n")

    return fault


def killed_at(step: int, after: Fault | None = None) -> Fault:
    """The process is killed before its `step`-th operation, after something else has happened to it."""

    def fault(operation: str, number: int) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if after:
            after(operation, number)

    return fault


def disk_full_from(step: int) -> Fault:
    """From its `step`-th operation on, nothing more has room."""

    def fault(operation: str, number: int) -> None:
        if number >= step and operation in _GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fault


def refused_at(step: int, operations: frozenset[str] = frozenset({"os.rename", "fsync"})) -> Fault:
    """The `step`-th operation fails, if it is one of these, as a bad disk or a mount lets it fail."""

    def fault(operation: str, number: int) -> None:
        if number == step and operation in operations:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fault


def _watch(directory: str, fault: Fault) -> None:
    number = 0

    def count(operation: str) -> None:
        nonlocal number
        number += 1
        fault(operation, number)

    def below(path: object, dir_fd: object = -1) -> bool:
        if isinstance(path, int):
            path = _path_of(path)
        elif isinstance(dir_fd, int) and dir_fd >= 0:
            path = os.path.normpath(f"{_path_of(dir_fd)}/{path}")
        return str(path).startswith(directory)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            # That of a name in a directory that is open is told below: nothing here says which one.
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and Path(str(arguments[0])).is_absolute() and below(arguments[0]):
                count(event)
        elif event in _OPERATIONS:
            # The last argument, or the one before it, is the directory that a bare name lies in.
            paths = [each for each in arguments if isinstance(each, (str, Path))]
            if any(below(path, arguments[-1]) for path in paths) or below(arguments[0]):
                count(event)

    sys.addaudithook(audit)
    open_, os_open = io.open, os.open

    def opened_in(path: Any, flags: int, *arguments: Any, dir_fd: int | None = None) -> int:
        if dir_fd is not None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and below(path, dir_fd):
            count("open")
        return os_open(path, flags, *arguments, dir_fd=dir_fd)

    os.open = opened_in  # type: ignore[assignment]

    def torn(file: Any, *arguments: Any, **options: Any) -> Any:
        opened = open_(file, *arguments, **options)
        return _Torn(opened, count) if opened.writable() and below(file) else opened

    def counted(handle: int) -> None:
        if below(handle):
            count("fsync")

    # No audit event tells of what is written into a file and when it reaches the disk; who kills a process
    # does not lose what it has written, so that nobody has to wait for that.
    builtins.open = io.open = torn  # type: ignore[assignment]
    os.fsync = counted  # type: ignore[assignment]


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())


class _Torn:
    """A file that is written in two halves, so that a process can die between them."""

    def __init__(self, file: Any, count: Callable[[str], None]) -> None:
        self._file, self._count = file, count

    def write(self, data: Any) -> int:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._count("write")
            self._file.write(half)
            self._file.flush()
        return len(data)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
