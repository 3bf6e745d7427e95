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
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sglang_patchset.errors import PatchsetError
from sglang_patchset.git import blob_id

_COMMITTED = ".patchset-transaction"
_STAGING = ".patchset-transaction.tmp"
_JOURNAL = "journal.json"


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
        PatchsetError: another run holds it.
    """
    # The lock is on the directory itself, so that no lock file stays behind.
    handle = os.open(package, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PatchsetError(f"{package}: another run is at work on it: wait for its end") from None
        yield
    finally:
        os.close(handle)


def interrupted(package: Path) -> bool:
    """Whether a run was killed after its commit: the package is neither what it was nor what it becomes."""
    return (package / _COMMITTED / _JOURNAL).exists()


def complete(package: Path) -> None:
    """Carry an interrupted transaction to its end; call with the package locked.

    Raises:
        PatchsetError: a file was edited since, or cannot be replaced; it is named, and nothing is changed.
    """
    # A journal's paths may lead out of the package, to RECORD, and `..` is not the same through a link.
    package = package.resolve()
    directory = package / _COMMITTED
    if (directory / _JOURNAL).exists():
        entries = _entries(directory)
        pending = [
            (number, entry) for number, entry in enumerate(entries) if _id(entry.at(package)) != entry.new
        ]
        for number, entry in pending:
            staged = entry.new is None or (directory / str(number)).exists()
            if not staged or _id(entry.at(package)) != entry.old:
                raise PatchsetError(
                    f"{entry.at(package)}: edited after a run was interrupted: reinstall SGLang, "
                    f"or check its files out again, and remove {directory}"
                )
        for number, entry in pending:
            try:
                if entry.old is not None:
                    _keep(entry.at(package), directory / f"{number}.old")
                if entry.new is None:
                    entry.at(package).unlink()
                else:
                    os.replace(directory / str(number), entry.at(package))
            except OSError as error:
                _undo(package, directory, entries)
                _remove(directory)
                raise PatchsetError(
                    f"{entry.at(package)}: cannot be replaced ({error.strerror}): see whether it is a "
                    "mount, immutable or another user's, and run this again"
                ) from None
        for parent in {entry.at(package).parent for entry in entries}:
            _sync(parent)
    _remove(directory)
    _remove(package / _STAGING)


def _entries(directory: Path) -> list[_Entry]:
    try:
        entries = [_Entry(**entry) for entry in json.loads((directory / _JOURNAL).read_bytes())]
        if all(isinstance(entry.path, str) for entry in entries):
            return entries
    except (ValueError, TypeError):
        pass
    raise PatchsetError(
        f"{directory / _JOURNAL}: damaged: reinstall SGLang, or check its files out again, "
        f"and remove {directory}"
    )


def _undo(package: Path, directory: Path, entries: list[_Entry]) -> None:
    """Put the old files back, the last one first; killed in here, the next run carries on."""
    for number, entry in reversed(list(enumerate(entries))):
        path, staged = entry.at(package), directory / str(number)
        if entry.old == entry.new or _id(path) != entry.new:
            continue
        try:
            if entry.old is None:
                os.replace(path, staged)
                continue
            if entry.new is not None:
                _keep(path, staged)
            os.replace(directory / f"{number}.old", path)
        except OSError as error:
            raise PatchsetError(
                f"{path}: cannot be put back ({error.strerror}): reinstall SGLang, or check its files out "
                f"again, and remove {directory}"
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
        shutil.copy2(path, draft, follow_symlinks=False)
        _own(draft, path.lstat())
    os.replace(draft, kept)


def _remove(directory: Path) -> None:
    """Remove a transaction's directory; without its journal it only waits for that."""
    (directory / _JOURNAL).unlink(missing_ok=True)
    if directory.exists():
        shutil.rmtree(directory)


def commit(package: Path, changes: Mapping[Path, bytes | None]) -> None:
    """Give every file its new bytes, None for no file; call with the package locked and nothing pending.

    Raises:
        PatchsetError: a directory cannot be written to, or lies on another file system.
    """
    package = package.resolve()
    # The last part stays: a link to a file is replaced, not what it leads to.
    resolved = {path.parent.resolve() / path.name: new for path, new in changes.items()}
    _check_directories(package, {path.parent for path in resolved})
    staging = package / _STAGING
    try:
        staging.mkdir()
        entries = []
        for number, (path, new) in enumerate(resolved.items()):
            if new is not None:
                _stage(staging / str(number), new, path)
            entries.append(
                _Entry(os.path.relpath(path, package), _id(path), None if new is None else blob_id(new))
            )
        journal = json.dumps([asdict(entry) for entry in entries])
        _write(staging / _JOURNAL, journal.encode())
        _sync(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    os.rename(staging, package / _COMMITTED)
    _sync(package)
    complete(package)


def _check_directories(package: Path, directories: set[Path]) -> None:
    device = package.stat().st_dev
    for directory in sorted({package, *directories}):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PatchsetError(f"{directory}: no permission to write there: run this as its owner")
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
        staged.chmod(stat.st_mode & 0o7777)
        _own(staged, stat)
        # Cached bytecode is matched by its source's size and second of modification: move on by one second
        # at least, so that none of what was compiled before can pass for the new file's.
        modified = max(modified, int(stat.st_mtime) + 1)
    os.utime(staged, (modified, modified))


def _own(file: Path, stat: os.stat_result) -> None:
    if (stat.st_uid, stat.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):
            os.chown(file, stat.st_uid, stat.st_gid, follow_symlinks=False)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _id(path: Path) -> str | None:
    try:
        return blob_id(path.read_bytes())
    except FileNotFoundError:
        return None
