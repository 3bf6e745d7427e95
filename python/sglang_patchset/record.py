"""RECORD, the list of an installed package's or a wheel's files with their hashes and sizes."""

from __future__ import annotations

import codecs
import csv
import hashlib
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping

# What a file was and what it becomes; None stands for no file.
Change = tuple["bytes | None", "bytes | None"]


def update(record: bytes, changes: Mapping[str, Change]) -> bytes:
    """RECORD after these changes, every other byte as it was; changing the files back gives the same bytes.

    A line whose hash is not that of the file's old bytes is somebody else's statement and stays, and so do
    all lines of a file of which one has the new hash already. New files come first: only so is taking them
    out again the identity, whether or not the last line has an end.
    """
    mark, lines = _lines(record)
    numbers: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        numbers.setdefault(_path(line), []).append(number)
    added = []
    end = b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"
    for path, (old, new) in changes.items():
        if old is None and new is not None:
            added.append(f"{path},{_entry(new)}".encode() + end)
        elif old is not None and new is None:
            # The first of them is what was added.
            line = f"{path},{_entry(old)}".encode()
            for number in [each for each in numbers.get(path, ()) if lines[each].rstrip(b"\r\n") == line][:1]:
                lines[number] = b""
        elif old is not None and new is not None:
            before, after = _entry(old).encode(), _entry(new).encode()
            listed = numbers.get(path, ())
            if not any(after in lines[number] for number in listed):
                for number in listed:
                    lines[number] = lines[number].replace(before, after)
    return mark + b"".join(added + lines)


def move(record: bytes, old: str, new: str) -> bytes:
    """RECORD after a directory changed its name; both names end with a slash."""
    mark, lines = _lines(record)
    before, after = old.encode(), new.encode()
    return mark + b"".join(
        after + line.removeprefix(before) if line.startswith(before) else line for line in lines
    )


def lists(record: bytes, path: str) -> bool:
    """Whether RECORD has a line for this file.

    Raises:
        ValueError: it is no RECORD; where it is one, `update` and `move` can read it as well.
    """
    record.decode("utf-8")
    try:
        return path in map(_path, _lines(record)[1])
    except csv.Error as error:
        raise ValueError(str(error)) from None


def agrees(record: bytes, path: str, data: bytes | None) -> bool:
    """Whether RECORD has a line for a file with these bytes; for no file, none."""
    lines = [line.rstrip(b"\r\n") for line in _lines(record)[1] if _path(line) == path]
    return lines == ([] if data is None else [f"{path},{_entry(data)}".encode()])


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


def _lines(record: bytes) -> tuple[bytes, list[bytes]]:
    """A byte order mark, if it has one, and its lines, each with its end: what else is in them ends none."""
    mark = codecs.BOM_UTF8 if record.startswith(codecs.BOM_UTF8) else b""
    lines = record[len(mark) :].split(b"\n")
    return mark, [line + b"\n" for line in lines[:-1]] + [lines[-1]] * bool(lines[-1])


def _path(line: bytes) -> str:
    if not line.startswith(b'"'):  # as almost every line: a reader for each takes longer than all the rest
        return line.partition(b",")[0].rstrip(b"\r\n").decode()
    row = next(csv.reader([line.decode()]))
    return row[0] if row else ""


def digest(data: bytes) -> str:
    """A file's hash as RECORD has it."""
    return "sha256=" + urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _entry(data: bytes) -> str:
    return f"{digest(data)},{len(data)}"
