"""Files by way of handles of the directories that they lie in.

A directory is opened once and judged by its handle, and what lies in it is named from there: whatever becomes
of the way to it, no other directory is meant. Links are followed only where that is said.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sglang_patchset.errors import PatchsetError, tell

# No file of SGLang's, and no RECORD, comes near.
LARGEST = 64 << 20

_ACCESS_LIST = "system.posix_acl_access"
# What is said of a file; other namespaces say where its bytes lie.
_KEPT = ("user.", "security.", "system.", "trusted.")
# What signs a file's bytes: no other file can have it.
_SIGNATURES = ("security.ima", "security.evm")
_IS_NO_DIRECTORY = (errno.ENOTDIR, errno.ELOOP)
# How often a name may lead to something else between two looks at it.
_TRIES = 100


class Directory:
    """An open directory; `path` is where it was then, for messages."""

    def __init__(self, handle: int, path: Path) -> None:
        self.handle, self.path = handle, path

    @classmethod
    def at(cls, path: Path) -> Directory:
        """The directory at a path, through any links."""
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY), path)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def enter(self, name: str) -> Directory:
        """A directory in this one, or above it: `..`.

        Raises:
            OSError: there is none; a link is none, see `is_no_directory`.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        return Directory(os.open(name, flags, dir_fd=self.handle), Path(os.path.normpath(self.path / name)))

    def make(self, name: str) -> Directory:
        """A new directory that nobody else can open, whatever the umask."""
        mask = os.umask(0o077)
        try:
            os.mkdir(name, 0o700, dir_fd=self.handle)
        finally:
            os.umask(mask)
        return self.enter(name)

    def create(self, name: str, mode: int = 0o600) -> BinaryIO:
        """A new file, to be written to."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return os.fdopen(os.open(name, flags, mode, dir_fd=self.handle), "wb")

    def open(self, name: str, *, follow: bool = True) -> int | None:
        """A handle of a file to read, through links if it is one; None where there is none.

        Raises:
            PatchsetError: it is no file.
            OSError: it cannot be opened; a link, without `follow`.
        """
        # Whoever opens a FIFO otherwise waits for its other end.
        flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        try:
            handle = os.open(name, flags, dir_fd=self.handle)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise PatchsetError(f"{self.path / name}: not a file: put the file back")
        return handle

    def read(self, name: str, limit: int = LARGEST, *, follow: bool = True) -> bytes | None:
        """A file's bytes; as `open` otherwise.

        Raises:
            PatchsetError: it is no file, or a large one.
        """
        handle = self.open(name, follow=follow)
        if handle is None:
            return None
        with os.fdopen(handle, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise PatchsetError(f"{self.path / name}: larger than {limit} bytes: put the file back")
        return data

    def link(self, name: str) -> str | None:
        """Where a link leads; None for what is none."""
        try:
            return os.readlink(name, dir_fd=self.handle)
        except OSError:
            return None

    def stat(self, name: str) -> os.stat_result | None:
        """What lies here by that name, a link itself; None for nothing."""
        try:
            return os.stat(name, dir_fd=self.handle, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def move(self, name: str, to: Directory, new: str) -> None:
        """Rename something, in place of what is there."""
        os.rename(name, new, src_dir_fd=self.handle, dst_dir_fd=to.handle)

    def unlink(self, name: str) -> None:
        """Remove a file, or a link."""
        os.unlink(name, dir_fd=self.handle)

    def remove(self, name: str) -> None:
        """Remove what lies here by that name, if anything does."""
        found = self.stat(name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.unlink(name)
            return
        with self.enter(name) as directory:
            directory.clear()
        os.rmdir(name, dir_fd=self.handle)

    def names(self) -> list[str]:
        """What lies in it."""
        return os.listdir(self.handle)  # noqa: PTH208 (there is no path for a handle)

    def clear(self) -> None:
        """Remove everything in it."""
        for name in self.names():
            self.remove(name)

    def sync(self) -> None:
        """Bring the names in it to the disk."""
        os.fsync(self.handle)

    def check_owner(self, *, shared: bool = False) -> None:
        """See that root, if this is root, works where nobody else can put anything.

        With `shared`, others may add to it, but not change what is there.

        Raises:
            PatchsetError: somebody else can.
        """
        if os.geteuid() != 0:
            return
        found = os.fstat(self.handle)
        if found.st_uid != 0:
            owner = user(found.st_uid)
            raise PatchsetError(f"{self.path}: belongs to {owner}, who is not root: run this as {owner}")
        if shared and found.st_mode & stat.S_ISVTX:
            return
        # The group's bits of a file with an access list are those of everybody on it.
        by_group = found.st_mode & stat.S_IWGRP and (
            _ACCESS_LIST in attributes(self.handle) or _has_members(found.st_gid)
        )
        if found.st_mode & stat.S_IWOTH or by_group:
            raise PatchsetError(f"{self.path}: others than root may write to it: `chmod go-w` it first")

    @contextlib.contextmanager
    def workspace(self, name: str, contents: str) -> Iterator[Directory]:
        """An empty directory in this one that is held against other runs; it is removed at the end.

        It is its own lock: only this user can open it. Nothing but `contents` is made in it, and what a
        killed run has left of that is thrown away.

        Raises:
            PatchsetError: another run holds it, another user has made it, it is something else, or its file
                system has no locks.
            OSError: it cannot be made.
        """
        with self._claim(name, contents) as work:
            try:
                yield work
            except BaseException:
                with contextlib.suppress(OSError):
                    self._leave(name, work)
                raise
            try:
                self._leave(name, work)
            except OSError as error:
                tell(f"{work.path}: done, but it cannot be removed ({error.strerror}): the next run does")

    def _leave(self, name: str, work: Directory) -> None:
        work.clear()
        os.rmdir(name, dir_fd=self.handle)

    def _claim(self, name: str, contents: str) -> Directory:
        for _ in range(_TRIES):
            try:
                work = self.make(name)
            except FileExistsError:
                try:
                    work = self.enter(name)
                except FileNotFoundError:  # whoever had it has removed it just now
                    continue
                except OSError as error:
                    found = self.stat(name)
                    if is_no_directory(error) and found:
                        self.unlink(name)
                        continue
                    if isinstance(error, PermissionError) and found:
                        raise self._taken(name, found.st_uid) from None
                    raise
            try:
                self._hold(name, work)
                here = self.stat(name)
                if here and os.path.samestat(here, os.fstat(work.handle)):
                    if here.st_mode & 0o077 or not {contents}.issuperset(work.names()):
                        raise PatchsetError(f"{work.path}: not what a run leaves: move it away")
                    work.remove(contents)
                    return work
            except BaseException:
                os.close(work.handle)
                raise
            os.close(work.handle)
        raise self._busy()

    def _hold(self, name: str, work: Directory) -> None:
        owner = os.fstat(work.handle).st_uid
        if owner != os.geteuid():
            raise self._taken(name, owner)
        try:
            fcntl.flock(work.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._busy() from None
        except OSError as error:
            raise PatchsetError(
                f"{self.path}: cannot be locked ({error.strerror}): run this where its disk is"
            ) from None

    def _busy(self) -> PatchsetError:
        return PatchsetError(f"{self.path}: another run is at work on it: wait for its end")

    def _taken(self, name: str, owner: int) -> PatchsetError:
        return PatchsetError(
            f"{self.path / name}: belongs to {user(owner)}: wait for the end of their run, or remove it"
        )


def is_no_directory(error: OSError) -> bool:
    """Whether `enter` has met something that is not a directory, a link for one."""
    return error.errno in _IS_NO_DIRECTORY


def user(number: int) -> str:
    """A user's name, or number where there is none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _has_members(group: int) -> bool:
    """Whether anybody but root is in a group; nobody knows of one that has no name."""
    if group == 0:
        return False
    try:
        members = set(grp.getgrgid(group).gr_mem)
    except KeyError:
        return True
    users = pwd.getpwall()
    members |= {each.pw_name for each in users if each.pw_gid == group}
    return not members <= {each.pw_name for each in users if each.pw_uid == 0}


def attributes(handle: int) -> dict[str, bytes]:
    """The extended attributes of a file or directory, its access list (ACL) among them."""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        names = [name for name in os.listxattr(handle) if name.startswith(_KEPT)]
    except OSError:  # the file system has none
        return {}
    return {name: os.getxattr(handle, name) for name in names}


def make_alike(handle: int, model: int, path: Path) -> None:
    """Give a file the owner, group, attributes and mode of another, which is the one at `path`.

    Raises:
        PatchsetError: it cannot have them, and others could read it, or nobody would know what was said.
    """
    wanted = os.fstat(model)
    _own(handle, wanted, path)
    found, kept = attributes(handle), attributes(model)
    # What the directory gives to everything that is made in it, and the model does not have, goes.
    for name in sorted(found.keys() | kept.keys()):
        try:
            if name in kept and name in _SIGNATURES:
                raise OSError(errno.EPERM, "it signs the file's bytes")
            if name not in kept:
                os.removexattr(handle, name)
            elif kept[name] != found.get(name):
                os.setxattr(handle, name, kept[name])
        except OSError as error:
            raise PatchsetError(
                f"{path}: its attribute {name} cannot be kept ({error.strerror}): take it away, "
                "or run this as who may set it"
            ) from None
    # After its owner: a change of that takes the set-id bits away.
    os.fchmod(handle, wanted.st_mode & 0o7777)


def _own(handle: int, wanted: os.stat_result, path: Path) -> None:
    now = os.fstat(handle)
    if (wanted.st_uid, wanted.st_gid) == (now.st_uid, now.st_gid):
        return
    try:
        os.fchown(handle, wanted.st_uid, wanted.st_gid)
    except PermissionError:
        # A group that may do what all may says nothing.
        if wanted.st_uid != os.geteuid() or wanted.st_mode >> 3 & 7 != wanted.st_mode & 7:
            raise PatchsetError(
                f"{path}: its owner and group cannot be kept: run this as its owner, or as root"
            ) from None
