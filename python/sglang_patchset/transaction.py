"""Replace a set of a package's files: all of them or none, whenever the run is killed.

Every new file is staged in a directory inside the package, with a journal of what goes where. Renaming that
directory is the commit: before it, the package is as it was and the leftovers are thrown away by the next
run; after it, the next run carries the journal to its end. Where a file cannot be replaced after all, those
before it get their old bytes back. Files are replaced, never written into, so that hard links to them
(package caches) and servers that run from them keep what they have.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_patchset.errors import PatchsetError
from sglang_patchset.git import blob_id
from sglang_patchset.record import Change

_COMMITTED = ".patchset-transaction"
_STAGING = ".patchset-transaction.tmp"
_JOURNAL = "journal.json"
_EDITED = "{}: changed while this run was at work: run it again"


@dataclass(frozen=True)
class _Entry:
    """A file, relative to the package, with its blob ids before and after; None stands for no file."""

    path: str
    old: str | None
    new: str | None

    def at(self, package: Path) -> Path:
        """Where the file lies; `package` is without links."""
        return Path(os.path.normpath(package / self.path))


@contextlib.contextmanager
def locked(package: Path) -> Iterator[None]:
    """Hold the package against other runs.

    Raises:
        PatchsetError: another run holds it, or its file system has no locks.
    """
    # The lock is on the directory itself, so that no lock file stays behind.
    handle = os.open(package, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PatchsetError(f"{package}: another run is at work on it: wait for its end") from None
        except OSError as error:
            raise PatchsetError(
                f"{package}: cannot be locked ({error.strerror}): run this where its disk is"
            ) from None
        yield
    finally:
        os.close(handle)


def interrupted(package: Path) -> bool:
    """Whether a run was killed after its commit: the package is neither what it was nor what it becomes."""
    return (package / _COMMITTED / _JOURNAL).exists()


def stamp(package: Path) -> int | None:
    """What every transaction changes, so that two equal ones have none between them; None within one."""
    return None if interrupted(package) else package.stat().st_mtime_ns


def complete(package: Path) -> None:
    """Carry an interrupted transaction to its end; call with the package locked.

    Raises:
        PatchsetError: a file was edited since, or cannot be replaced; it is named, and nothing is changed.
    """
    # A journal's paths may lead out of the package, to RECORD, and `..` is not the same through a link.
    package = package.resolve()
    directory = package / _COMMITTED
    if (directory / _JOURNAL).exists():
        _carry_on(package, directory, _entries(directory))
    _remove(directory)
    _remove(package / _STAGING)


def _carry_on(package: Path, directory: Path, entries: list[_Entry]) -> None:
    """Bring every file to its new bytes, or back to its old ones where a run was killed on that way."""
    pending = [(number, entry) for number, entry in enumerate(entries) if _id(entry.at(package)) != entry.new]
    for _, entry in pending:
        if _id(entry.at(package)) != entry.old:
            raise PatchsetError(
                f"{entry.at(package)}: edited after a run was interrupted: reinstall SGLang, "
                f"or check its files out again, and remove {directory}"
            )
    if any(_id(directory / str(number)) != entry.new for number, entry in pending):
        _undo(package, directory, entries)
        return
    place = package
    try:
        # The journal is on the disk before the first file is replaced.
        sync(package)
        for number, entry in pending:
            place = entry.at(package)
            _replace(place, directory, number, entry)
        for place in sorted({entry.at(package).parent for entry in entries}):
            sync(place)
    except (OSError, PatchsetError) as error:
        _undo(package, directory, entries)
        _remove(directory)
        if isinstance(error, PatchsetError):
            raise
        raise PatchsetError(
            f"{place}: cannot be replaced ({error.strerror}): see whether it is a mount, immutable or "
            "another user's, and run this again"
        ) from None


def _replace(path: Path, directory: Path, number: int, entry: _Entry) -> None:
    if entry.old is not None:
        kept = directory / f"{number}.old"
        _keep(path, kept)
        if _id(kept) != entry.old:
            raise PatchsetError(_EDITED.format(path))
    if entry.new is None:
        path.unlink()
    else:
        os.replace(directory / str(number), path)


def _entries(directory: Path) -> list[_Entry]:
    try:
        entries = [_Entry(**entry) for entry in json.loads((directory / _JOURNAL).read_bytes())]
        # A directory that is a link is not what a run has left.
        if not directory.is_symlink() and all(_may_change(directory.parent, each.path) for each in entries):
            return entries
    except (ValueError, TypeError, RecursionError):
        pass
    raise PatchsetError(
        f"{directory / _JOURNAL}: damaged: reinstall SGLang, or check its files out again, "
        f"and remove {directory}"
    )


def _may_change(package: Path, path: object) -> bool:
    """Whether a transaction can be about this file: the package's own, or a RECORD that lists it.

    Whoever may write into a package may not have its next run, by root perhaps, replace any other file.
    """
    if not isinstance(path, str) or path.startswith("/") or "\0" in path or os.path.normpath(path) != path:
        return False
    parent = os.path.normpath((package / path).parent)
    if os.path.realpath(parent) != parent:  # all links have been followed
        return False
    if path.startswith(".."):
        return bool(re.search(r"/sglang-[^/]+\.dist-info/RECORD$", path))
    return path != "."


def _undo(package: Path, directory: Path, entries: list[_Entry]) -> None:
    """Put the old files back, the last one first; it takes no room on the disk."""
    for number, entry in reversed(list(enumerate(entries))):
        path = entry.at(package)
        if entry.old == entry.new or _id(path) != entry.new:
            continue
        try:
            if entry.old is None:
                path.unlink()
            else:
                os.replace(directory / f"{number}.old", path)
        except OSError as error:
            raise PatchsetError(
                f"{path}: cannot be put back ({error.strerror}): see why, and run this again, or reinstall "
                f"SGLang and remove {directory}"
            ) from None


def _keep(path: Path, kept: Path) -> None:
    """Keep a file as it is: a hard link, or a copy where links cannot be."""
    if _id(kept) == _id(path):
        return
    draft = kept.with_name(f"{kept.name}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(path, draft, follow_symlinks=False)
    except OSError:
        shutil.copyfile(path, draft, follow_symlinks=False)
        _own(draft, path.lstat())
        shutil.copystat(path, draft, follow_symlinks=False)
    os.replace(draft, kept)


def _remove(directory: Path) -> None:
    """Remove a transaction's directory; without its journal it only waits for that."""
    if directory.is_symlink():
        directory.unlink()
    (directory / _JOURNAL).unlink(missing_ok=True)
    if directory.exists():
        shutil.rmtree(directory)


def commit(package: Path, changes: Mapping[Path, Change]) -> None:
    """Give every file its new bytes; call with the package locked and nothing pending.

    Raises:
        PatchsetError: a file is not what the change starts from, a directory cannot be written to or lies
            elsewhere or on another file system, or the disk is full.
    """
    package = package.resolve()
    resolved = {}
    for path, change in changes.items():
        # The last part stays: a link to a file is replaced, not what it leads to.
        place = path.parent.resolve() / path.name
        if not _may_change(package, os.path.relpath(place, package)):
            raise PatchsetError(
                f"{path}: a link leads out of {package} to it: put a copy in that link's place, "
                "or install SGLang again"
            )
        resolved[place] = change
    _check_directories(package, {path.parent for path in resolved})
    staging = package / _STAGING
    try:
        staging.mkdir()
        entries = []
        for number, (path, (old, new)) in enumerate(resolved.items()):
            if new is not None:
                _stage(staging / str(number), new, path)
            entries.append(_Entry(os.path.relpath(path, package), _blob(old), _blob(new)))
            if _id(path) != _blob(old):
                raise PatchsetError(_EDITED.format(path))
        journal = json.dumps([asdict(entry) for entry in entries])
        _write(staging / _JOURNAL, journal.encode())
        sync(staging)
        os.rename(staging, package / _COMMITTED)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise PatchsetError(
                f"{package}: cannot be written to ({error.strerror}): make room or give leave, "
                "and run this again"
            ) from None
        raise
    complete(package)


def _check_directories(package: Path, directories: set[Path]) -> None:
    device = package.stat().st_dev
    for directory in sorted({package, *directories}):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PatchsetError(
                f"{directory}: no permission to write there, or mounted read-only: run this as its owner"
            )
        if directory.stat().st_dev != device:
            raise PatchsetError(f"{directory}: not on the file system of {package}: install SGLang on one")


def _stage(staged: Path, new: bytes, path: Path) -> None:
    """Write a file's successor, with its mode and owner."""
    _write(staged, new)
    modified = time.time()
    try:
        stat = path.stat()
    except FileNotFoundError:
        staged.chmod(0o644)  # whoever can read the package can read what is new in it, whatever the umask
    else:
        if not _own(staged, stat):
            raise PatchsetError(
                f"{path}: its owner and group cannot be kept: run this as its owner, or as root"
            )
        # After its owner: a change of that takes the set-id bits away.
        staged.chmod(stat.st_mode & 0o7777)
        # Cached bytecode is matched by its source's size and second of modification: move on by one second
        # at least, so that none of what was compiled before can pass for the new file's.
        modified = max(modified, int(stat.st_mtime) + 1)
    os.utime(staged, (modified, modified))


def _own(file: Path, stat: os.stat_result) -> bool:
    """Give a file the owner and group of another; False where that would change who can read it."""
    now = file.lstat()
    if (stat.st_uid, stat.st_gid) == (now.st_uid, now.st_gid):
        return True
    try:
        os.chown(file, stat.st_uid, stat.st_gid, follow_symlinks=False)
    except PermissionError:
        return stat.st_uid == os.geteuid() and stat.st_mode >> 3 & 7 == stat.st_mode & 7
    return True


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _id(path: Path) -> str | None:
    try:
        return blob_id(path.read_bytes())
    except FileNotFoundError:
        return None


def _blob(data: bytes | None) -> str | None:
    return None if data is None else blob_id(data)
