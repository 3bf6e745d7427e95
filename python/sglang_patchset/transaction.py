"""Replace a set of a package's files: all of them or none, whenever the run is killed.

Every new file is staged in a directory inside the package, with a journal of what goes where. Renaming that
directory is the commit: before it, the package is as it was and the leftovers are thrown away by the next
run; after it, the next run carries the journal to its end. Where a file cannot be replaced after all, those
before it get their old bytes back. Files are replaced, never written into, so that hard links to them
(package caches) and servers that run from them keep what they have.

Whoever may write into a package may not have root's next run change anything else: see `_Place`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from sglang_patchset import bytecode, record
from sglang_patchset.errors import PatchsetError, tell
from sglang_patchset.git import blob_id
from sglang_patchset.handles import Directory, is_no_directory, make_alike, user
from sglang_patchset.record import Change

_COMMITTED = ".patchset-transaction"
_WORK = ".patchset-transaction.tmp"
_STAGED = "staged"
_JOURNAL = "journal.json"
# A journal is a line of 200 bytes for each file.
_LONGEST = 1 << 20
_RECORD = re.compile(r"\.\./sglang-[^/]+\.dist-info/RECORD")
_EDITED = "{}: changed while this run was at work: run it again"
# Whether files of the package are as they were installed, by their paths in it.
AsInstalled = Callable[[Iterable[str]], bool]


@dataclass(frozen=True)
class _Entry:
    """A file, relative to the package, with its blob ids before and after; None stands for no file."""

    path: str
    old: str | None
    new: str | None

    def is_sound(self) -> bool:
        """Whether a transaction can be about it: as far as names say, the package's own, or its RECORD."""
        if not isinstance(self.path, str) or not self.path.isascii() or not self.path.isprintable():
            return False
        if not all(isinstance(each, (str, type(None))) for each in (self.old, self.new)):
            return False
        if _RECORD.fullmatch(self.path):
            return None not in (self.old, self.new)
        parts = self.path.split("/")
        return not parts[0].startswith(_COMMITTED) and not {"", ".", ".."}.intersection(parts)


@dataclass(frozen=True)
class _Place:
    """Where a file lies: a name in a directory that was reached without links, and is root's if root runs."""

    directory: Directory
    name: str

    @property
    def path(self) -> Path:
        return self.directory.path / self.name

    def read(self) -> bytes | None:
        return self.directory.read(self.name)


def interrupted(package: Path) -> bool:
    """Whether a run was killed after its commit: the package is neither what it was nor what it becomes."""
    try:
        (package / _COMMITTED / _JOURNAL).lstat()
    except PermissionError:  # another user's
        return True
    except OSError:
        return False
    return True


def stamp(package: Path) -> int | None:
    """What every transaction changes, so that two equal ones have none between them; None within one."""
    return None if interrupted(package) else package.stat().st_mtime_ns


@contextlib.contextmanager
def locked(package: Path) -> Iterator[Transaction]:
    """Hold the package against other runs; one that cannot be written to needs that of nobody.

    Raises:
        PatchsetError: another run holds it, others than root may change it while root does, its file system
            has no locks, or its disk is full.
    """
    package = package.resolve()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(Directory.at(package))
        directory.check_owner()
        work, refusal = None, None
        try:
            work = stack.enter_context(directory.workspace(_WORK, _STAGED))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise _unwritable(package, error) from None
            refusal = error
        yield stack.enter_context(Transaction(directory, work, refusal))


class Transaction:
    """A package that is held; without `work`, nothing can be written to it, for that reason."""

    def __init__(self, package: Directory, work: Directory | None, refusal: OSError | None) -> None:
        self._package, self._work, self._refusal = package, work, refusal
        self._directories = {"": package}
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def complete(self, installed: AsInstalled = lambda *_: False) -> None:
        """Carry an interrupted transaction to its end, or back where its files cannot be brought there.

        Raises:
            PatchsetError: a file was edited since and it cannot be told of which state, one cannot be
                replaced, or the journal is none; it is named, and nothing is changed.
        """
        with contextlib.ExitStack() as stack:
            directory = self._committed(stack)
            if directory is None:
                return
            if entries := self._entries(directory):
                self._carry_on(directory, entries, installed)
                for entry, place in entries.items():
                    if place and entry.path.endswith(".py"):
                        bytecode.drop(place.directory, place.name)
            try:
                self._forget(directory)
            except OSError as error:
                tell(
                    f"{directory.path}: done, but it cannot be removed ({error.strerror}): the next run does"
                )

    def commit(self, changes: Mapping[str, Change]) -> None:
        """Give every file, by its path from the package, its new bytes; call with nothing pending.

        Raises:
            PatchsetError: a file is not what the change starts from, a directory cannot be written to or lies
                elsewhere or on another file system, or the disk is full.
        """
        package = self._package.path
        places = {path: self._reached(path) for path in changes}
        self._check_directories({id(place.directory): place.directory for place in places.values()}.values())
        if self._work is None:
            assert self._refusal
            raise _unwritable(package, self._refusal)
        if self._package.stat(_COMMITTED):
            raise PatchsetError(
                f"{package / _COMMITTED}: left by an earlier run, which could not remove it: do"
            )
        entries = []
        try:
            with self._work.make(_STAGED) as staging:
                for number, (path, (old, new)) in enumerate(changes.items()):
                    if new is not None:
                        _stage(staging, str(number), new, places[path])
                    entries.append(_Entry(path, _blob(old), _blob(new)))
                    if _id(places[path]) != _blob(old):
                        raise PatchsetError(_EDITED.format(places[path].path))
                with staging.create(_JOURNAL) as file:
                    _write(file, json.dumps([asdict(entry) for entry in entries]).encode())
                staging.sync()
                self._work.move(_STAGED, self._package, _COMMITTED)
        except OSError as error:
            raise _unwritable(package, error) from None
        self.complete()
        # What is said to be done is what lies there now.
        ids = {entry: _id(places[entry.path]) for entry in entries}
        wrong = [entry for entry, found in ids.items() if found != entry.new]
        for entry in sorted(wrong, key=lambda entry: ids[entry] == entry.old)[:1]:
            raise PatchsetError(_EDITED.format(places[entry.path].path))

    def _place(self, path: str) -> _Place | None:
        """Where a file lies; None where its directory does not exist.

        Raises:
            OSError: a directory on the way is none, but a link for one.
            PatchsetError: root is at work, and somebody else may write to one.
        """
        *parents, name = path.split("/")
        way = ""
        directory = self._package
        for part in parents:
            way = f"{way}{part}/"
            if way not in self._directories:
                try:
                    self._directories[way] = self._opened.enter_context(directory.enter(part))
                except FileNotFoundError:
                    return None
                self._directories[way].check_owner(shared=part == "..")
            directory = self._directories[way]
        return _Place(directory, name)

    def _reached(self, path: str) -> _Place:
        place = None
        with contextlib.suppress(OSError):
            place = self._place(path)
        if place is None:
            raise PatchsetError(
                f"{os.path.normpath(self._package.path / path)}: behind a link, which others may share: put "
                "a copy in that link's place, or install SGLang again"
            )
        return place

    def _check_directories(self, directories: Iterable[Directory]) -> None:
        device = os.fstat(self._package.handle).st_dev
        for directory in sorted({self._package, *directories}, key=lambda each: each.path):
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=directory.handle):
                raise PatchsetError(
                    f"{directory.path}: no permission to write there, or mounted read-only: "
                    "run this as its owner"
                )
            if os.fstat(directory.handle).st_dev != device:
                raise PatchsetError(
                    f"{directory.path}: not on the file system of {self._package.path}: install SGLang on one"
                )

    def _committed(self, stack: contextlib.ExitStack) -> Directory | None:
        try:
            return stack.enter_context(self._package.enter(_COMMITTED))
        except FileNotFoundError:
            return None
        except PermissionError:
            path, found = self._package.path / _COMMITTED, self._package.stat(_COMMITTED)
            owner = user(found.st_uid) if found else "nobody"
            raise PatchsetError(f"{path}: a run of {owner} was interrupted: run this as {owner}") from None
        except OSError as error:
            if not is_no_directory(error):
                raise
            raise self._damaged() from None

    def _entries(self, directory: Directory) -> dict[_Entry, _Place | None]:
        """What a journal says, and where that is; nothing without a journal."""
        try:
            journal = directory.read(_JOURNAL, _LONGEST, follow=False)
        except (OSError, PatchsetError):  # another kind of file, or a large one
            raise self._damaged() from None
        if journal is None:
            return {}
        try:
            entries = [_Entry(**entry) for entry in json.loads(journal)]
            if all(entry.is_sound() for entry in entries):
                places = {entry: self._place(entry.path) for entry in entries}
                if all(
                    _is_its_record(place) for entry, place in places.items() if entry.path.startswith("..")
                ):
                    return places
        except (ValueError, TypeError, RecursionError, OSError):
            pass
        raise self._damaged()

    def _damaged(self) -> PatchsetError:
        directory = self._package.path / _COMMITTED
        return PatchsetError(
            f"{directory / _JOURNAL}: damaged: reinstall SGLang, or check its files out again, "
            f"and remove {directory}"
        )

    def _carry_on(
        self, directory: Directory, entries: Mapping[_Entry, _Place | None], installed: AsInstalled
    ) -> None:
        """Bring every file to its new bytes, or back to its old ones where they cannot all have those."""
        steps = [_Step(number, *each, directory) for number, each in enumerate(entries.items())]
        pending = [step for step in steps if step.found != step.entry.new]
        edited = [step for step in pending if step.found != step.entry.old]
        pending = [step for step in pending if step not in edited]
        # Of these, the edit is one of the new file.
        replaced = [step for step in edited if step.is_replaced]
        can_finish = all(step.is_ready for step in pending)
        if edited and installed(step.entry.path for step in steps if not step.entry.path.startswith("..")):
            tell(f"{directory.path}: of an interrupted run, before SGLang was installed again: removed")
            _undo(steps)
        elif replaced and not (can_finish and replaced == edited):
            raise _ambiguous(directory, replaced[0])
        elif replaced or (can_finish and not edited):
            self._finish(directory, pending, steps)
        else:
            _undo(steps)

    def _finish(self, directory: Directory, pending: list[_Step], steps: list[_Step]) -> None:
        path = self._package.path
        try:
            # The journal is on the disk before the first file is replaced.
            self._package.sync()
            for step in pending:
                path = step.path
                step.replace()
            for each in {step.place.directory for step in steps if step.place}:
                path = each.path
                each.sync()
        except (OSError, PatchsetError) as error:
            _undo(steps)
            with contextlib.suppress(OSError):
                self._forget(directory)
            if isinstance(error, PatchsetError):
                raise
            raise PatchsetError(
                f"{path}: cannot be replaced ({error.strerror}): see whether it is a mount, immutable or "
                "another user's, and run this again"
            ) from None

    def _forget(self, directory: Directory) -> None:
        """Remove a transaction's directory; without its journal it only waits for that."""
        directory.remove(_JOURNAL)
        directory.clear()
        self._package.remove(_COMMITTED)


class _Step:
    """One file of a transaction, what it is now, and its new and old bytes in the transaction's directory."""

    def __init__(self, number: int, entry: _Entry, place: _Place | None, directory: Directory) -> None:
        self.entry, self.place, self._directory = entry, place, directory
        self._new, self._old = str(number), f"{number}.old"
        self.found = _id(place)
        self.is_ready = entry.new is None or _blob(directory.read(self._new, follow=False)) == entry.new
        # On the way back, what was kept of the old file is in its place again.
        self.is_replaced = not self.is_ready and (entry.old is None or bool(directory.stat(self._old)))

    @property
    def path(self) -> Path:
        assert self.place
        return self.place.path

    @property
    def spare(self) -> Path:
        """Other bytes that a run goes on from."""
        return self._directory.path / (self._new if self._directory.stat(self._new) else self._old)

    def replace(self) -> None:
        """Put the new file in its place, and keep the old one."""
        assert self.place
        if self.entry.old is not None:
            self._keep(self.place)
        if self.entry.new is None:
            self.place.directory.unlink(self.place.name)
        else:
            self._directory.move(self._new, self.place.directory, self.place.name)

    def undo(self) -> None:
        """Put the old file back; it takes no room on the disk."""
        if self.place is None or self.entry.old == self.entry.new or _id(self.place) != self.entry.new:
            return
        if self.entry.old is None:
            self.place.directory.unlink(self.place.name)
        else:
            self._directory.move(self._old, self.place.directory, self.place.name)

    def _keep(self, place: _Place) -> None:
        """Keep a file, or a link to one, as it is: a hard link, or a copy where links cannot be."""
        if self._kept_id(place) != self.entry.old:
            draft = f"{self._old}.tmp"
            self._directory.remove(draft)
            try:
                os.link(
                    place.name,
                    draft,
                    src_dir_fd=place.directory.handle,
                    dst_dir_fd=self._directory.handle,
                    follow_symlinks=False,
                )
            except OSError:
                self._copy(place, draft)
            self._directory.move(draft, self._directory, self._old)
        if self._kept_id(place) != self.entry.old:
            raise PatchsetError(_EDITED.format(place.path))

    def _copy(self, place: _Place, draft: str) -> None:
        if target := place.directory.link(place.name):
            os.symlink(target, draft, dir_fd=self._directory.handle)
            return
        handle = place.directory.open(place.name)
        if handle is None:
            raise PatchsetError(_EDITED.format(place.path))
        with os.fdopen(handle, "rb") as source, self._directory.create(draft) as copy:
            copy.write(source.read())
            copy.flush()
            make_alike(copy.fileno(), source.fileno(), place.path)
            modified = os.fstat(source.fileno())
            os.utime(copy.fileno(), ns=(modified.st_atime_ns, modified.st_mtime_ns))

    def _kept_id(self, place: _Place) -> str | None:
        # Where the file is a link, what is kept is one too, and leads from where the file lies.
        target = self._directory.link(self._old)
        return _blob(place.directory.read(target) if target else self._directory.read(self._old))


def _undo(steps: list[_Step]) -> None:
    """Put the old files back, the last one first."""
    for step in reversed(steps):
        try:
            step.undo()
        except OSError as error:
            raise PatchsetError(
                f"{step.path}: cannot be put back ({error.strerror}): see why, and run this again, "
                "or reinstall SGLang"
            ) from None


def _ambiguous(directory: Directory, step: _Step) -> PatchsetError:
    spare, path = shlex.quote(str(step.spare)), shlex.quote(str(step.path))
    return PatchsetError(
        f"{step.path}: edited after a run was interrupted: save it, `cp {spare} {path}`, run this again, and "
        f"edit it then; where SGLang was installed again, remove {directory.path}"
    )


def _is_its_record(place: _Place | None) -> bool:
    """Whether a RECORD lists the package; one that is gone lists nothing else."""
    data = place.read() if place else None
    return data is None or record.lists(data, "sglang/__init__.py")


def _unwritable(package: Path, error: OSError) -> PatchsetError:
    return PatchsetError(
        f"{package}: cannot be written to ({error.strerror}): make room or give leave, and run this again"
    )


def _stage(staging: Directory, name: str, new: bytes, place: _Place) -> None:
    """Write a file's successor, with what the file has beside its bytes."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(staging.create(name))
        file.write(new)
        file.flush()
        modified = time.time()
        handle = place.directory.open(place.name)
        if handle is None:
            # Whoever can read the package can read what is new in it, whatever the umask.
            os.fchmod(file.fileno(), 0o644)
        else:
            stack.callback(os.close, handle)
            make_alike(file.fileno(), handle, place.path)
            # Cached bytecode is matched by its source's size and second of modification: move on by one
            # second at least, so that none of what was compiled before can pass for the new file's.
            modified = max(modified, int(os.fstat(handle).st_mtime) + 1)
        os.utime(file.fileno(), (modified, modified))
        os.fsync(file.fileno())


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _id(place: _Place | None) -> str | None:
    return _blob(place.read() if place else None)


def _blob(data: bytes | None) -> str | None:
    return None if data is None else blob_id(data)
