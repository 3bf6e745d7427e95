"""Reading what others wrote: regular files alone, without waiting, up to a limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sglang_patchset.errors import PatchsetError

# SGLang's largest source has less than half a megabyte, its RECORD less than two.
SOURCE = 16 << 20
# Its wheels are below 50 MB, packed and unpacked.
WHEEL = 512 << 20


def read(path: Path, largest: int = SOURCE) -> bytes:
    """The bytes of a file.

    Raises:
        PatchsetError: it is no regular file, has more than `largest` bytes, or cannot be read.
        FileNotFoundError: there is none.
    """
    try:
        # Opening a device may do something, and opening a pipe waits, unless it is told not to.
        _check(path, path.stat(), largest)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            _check(path, os.fstat(handle), largest)
            data = file.read(largest + 1)
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PatchsetError(f"{path}: cannot be read ({error.strerror}): see why, and give leave") from None
    if len(data) > largest:  # it grew
        raise PatchsetError(_too_large(path, largest))
    return data


def check(path: Path, largest: int) -> None:
    """See that `read` would not refuse a file for what it is, or for its size."""
    _check(path, path.stat(), largest)


def _check(path: Path, found: os.stat_result, largest: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise PatchsetError(f"{path}: not a regular file: move it away, or install SGLang again")
    if found.st_size > largest:
        raise PatchsetError(_too_large(path, largest))


def _too_large(path: Path, largest: int) -> str:
    return f"{path}: has more than {largest >> 20} MB, as no file of SGLang's: get it again"
