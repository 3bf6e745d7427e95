"""The one kind of error that a user can mend, and remarks that are none."""

from __future__ import annotations

import contextlib
import sys


class PatchsetError(Exception):
    """Says in one line what is wrong, where, and what to do next. Nothing was changed."""

    def __init__(self, message: str) -> None:
        super().__init__(_line(message))


def _line(message: str) -> str:
    # File names and what others wrote can hold anything; a terminal would obey some of it.
    line = " ".join(message.split())
    return "".join(char if char.isprintable() else _escaped(char) for char in line)


def _escaped(char: str) -> str:
    return char.encode("ascii", "backslashreplace").decode() if ord(char) > 127 else f"\\x{ord(char):02x}"


def tell(message: str) -> None:
    """Say in one line on stderr what is no failure, and does not become one where that cannot be written."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(f"sglang-patchset: {_line(message)}", file=sys.stderr, flush=True)


def fault(error: Exception) -> PatchsetError:
    """What is said of an exception that nobody has foreseen; `python -X dev` shows where it comes from."""
    return PatchsetError(
        f"{type(error).__name__} ({error}): a fault of sglang-patchset, not of what it was run on: report it "
        "with what `python -X dev -m sglang_patchset` says"
    )
