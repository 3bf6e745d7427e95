"""RECORD, the list of an installed package's or a wheel's files with their hashes and sizes."""

from __future__ import annotations

import csv
import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping

# What a file was and what it becomes; None stands for no file.
Change = tuple["bytes | None", "bytes | None"]


def update(record: bytes, changes: Mapping[str, Change]) -> bytes:
    """RECORD after these changes, every other line as it was.

    A line whose hash is not that of the file's old bytes is somebody else's statement and stays. New files
    come first: only so is taking them out again the identity, whether or not the last line has an end.
    """
    added = {path: new for path, (old, new) in changes.items() if old is None and new is not None}
    lines = []
    for line in record.decode("utf-8").splitlines(keepends=True):
        path = _path(line)
        old, new = changes.get(path, (None, None))
        if old is not None and new is None:
            continue
        if old is not None and new is not None:
            line = line.replace(_entry(old), _entry(new))
        if path not in added:
            lines.append(line)
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    return "".join([f"{path},{_entry(new)}{end}" for path, new in added.items()] + lines).encode("utf-8")


def move(record: bytes, old: str, new: str) -> bytes:
    """RECORD after a directory changed its name; both names end with a slash."""
    lines = record.decode("utf-8").splitlines(keepends=True)
    moved = (new + line.removeprefix(old) if line.startswith(old) else line for line in lines)
    return "".join(moved).encode("utf-8")


def lists(record: bytes, path: str) -> bool:
    """Whether RECORD has a line for this file.

    Raises:
        ValueError: it is no RECORD; where it is one, `update` and `move` can read it as well.
    """
    try:
        return path in [_path(line) for line in record.decode("utf-8").splitlines(keepends=True)]
    except csv.Error as error:
        raise ValueError(str(error)) from None


def intact(record: bytes, read: Callable[[str], bytes | None]) -> bool:
    """Whether `read` gives every file that has a hash in RECORD the listed bytes; never for a broken one."""
    try:
        rows = list(csv.reader(record.decode("utf-8").splitlines()))
    except (UnicodeDecodeError, csv.Error):
        return False
    for path, *entry in filter(None, rows):
        if entry != ["", ""] and ((data := read(path)) is None or _entry(data) != ",".join(entry)):
            return False
    return True


def _path(line: str) -> str:
    if not line.startswith('"'):  # as almost every line: a reader for each takes longer than all the rest
        return line.partition(",")[0].rstrip("\r\n")
    row = next(csv.reader([line]))
    return row[0] if row else ""


def digest(data: bytes) -> str:
    """A file's hash as RECORD has it."""
    return "sha256=" + urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _entry(data: bytes) -> str:
    return f"{digest(data)},{len(data)}"
