"""A patched wheel from a published one, and the published one back from it.

Members keep their order, times, modes and bytes, compressed as they are, except for the files that the fixes
touch, the receipt, and what names the version: METADATA, `_version.py`, RECORD, the names of the wheel and of
its dist-info. Those are not compressed: the same wheel comes out of every Python.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from packaging.version import Version

from sglang_patchset import archive, receipt, record, releases, repair, status
from sglang_patchset.archive import Member
from sglang_patchset.catalog import Catalog, published_version
from sglang_patchset.errors import PatchsetError
from sglang_patchset.handles import Directory
from sglang_patchset.releases import WheelFile
from sglang_patchset.status import FixState
from sglang_patchset.targets import Wheel

_VERSION_FILE = "sglang/_version.py"


def patch(catalog: Catalog, wheel: Wheel, out: Path) -> Path:
    """Write the wheel that has the whole series into the directory `out`; it is the same bytes every time.

    Returns:
        The patched wheel; `wheel` itself where it is patched already.

    Raises:
        PatchsetError: nothing was written, the message says why.
    """
    if published_version(wheel.version) != wheel.version:
        _, missing = repair.select(catalog, status.examine(catalog, wheel), (), FixState.VULNERABLE)
        if not missing:
            return wheel.file
    release = releases.check(catalog, wheel.file)
    if not release.patchset:
        raise PatchsetError(f"{wheel}: SGLang {release.version} has no patch set: see `sglang-patchset list`")
    found, fixes = repair.select(catalog, status.examine(catalog, wheel), (), FixState.VULNERABLE)
    changed = repair.changed(found, add=frozenset(fixes))
    return _rewrite(wheel, found.series.release.patched_version, changed, out)


def unpatch(catalog: Catalog, wheel: Wheel) -> Path:
    """Write the wheel as it was published beside it: every member has the published bytes.

    Returns:
        The plain wheel; `wheel` itself where no fix is in it.

    Raises:
        PatchsetError: nothing was written, the message says why.
    """
    found, fixes = repair.select(catalog, status.examine(catalog, wheel), (), FixState.PATCHED)
    if not fixes:
        return wheel.file
    if foreign := found.foreign():
        raise PatchsetError(
            f"{wheel}: has other changes in {', '.join(foreign)}, which was not published so: "
            "install it and revert the fixes there"
        )
    version = found.series.release.version
    published = wheel.file.with_name(_name(wheel, version))
    if published.exists():
        # What is left of a run that was killed after it.
        with contextlib.suppress(OSError):
            _draft(published).rmdir()
    # Where it lies there as published already, it stays the very file.
    if published.exists() and releases.listed(catalog, published) == "published":
        return published
    changed = repair.changed(found, remove=frozenset(fixes))
    if not published.exists():
        return _rewrite(wheel, version, changed, wheel.file.parent)
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        if releases.sha256(_rewrite(wheel, version, changed, Path(scratch))) != releases.sha256(published):
            raise PatchsetError(f"{published}: neither the published wheel nor made by this: move it away")
    return published


def _rewrite(wheel: Wheel, version: Version, changed: Mapping[str, bytes | None], out: Path) -> Path:
    file = out / _name(wheel, version)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Written where nobody else can, and renamed: the next run takes over what a killed one leaves.
        with (
            Directory.at(out) as place,
            place.workspace(_draft(file).name, file.name) as work,
            releases.opened(wheel.file) as source,
            wheel.file.open("rb") as packed,
        ):
            with work.create(file.name, 0o666) as draft:
                archive.write(draft, _members(source, packed, wheel.version, version, changed))
                draft.flush()
                os.fsync(draft.fileno())
            work.move(file.name, place, file.name)
    except OSError as error:
        raise PatchsetError(
            f"{out}: cannot be written to ({error.strerror}): make room there or give leave, "
            "and run this again"
        ) from None
    return file


def _draft(file: Path) -> Path:
    """The directory that a wheel is written in; its name is no wheel's."""
    return file.with_name(f".{file.name}.draft")


def _members(
    source: WheelFile, packed: BinaryIO, old: Version, new: Version, changed: Mapping[str, bytes | None]
) -> Iterator[Member]:
    old_info, new_info = f"sglang-{old}.dist-info/", f"sglang-{new}.dist-info/"
    metadata = f"{old_info}METADATA"
    changed = {
        **changed,
        metadata: _replace(source, metadata, f"\nVersion: {old}\n", f"\nVersion: {new}\n"),
        _VERSION_FILE: _replace(source, _VERSION_FILE, _assignments(old), _assignments(new)),
    }
    members = source.infolist()
    names = {member.filename for member in members}
    changes = {path: (source.read(path) if path in names else None, data) for path, data in changed.items()}
    lines = record.update(source.read(source.record_path), changes)
    changed[source.record_path] = record.move(lines, old_info, new_info)
    # A new receipt stands where the package ends.
    added = None if receipt.PATH in names else changed.pop(receipt.PATH)
    for member in members:
        path = member.filename
        if path.startswith(old_info) and added is not None:
            yield archive.stored(receipt.PATH, source.getinfo(_VERSION_FILE), added)
            added = None
        name = new_info + path.removeprefix(old_info) if path.startswith(old_info) else path
        if path not in changed:
            source.read(member)  # for its hash
            yield archive.copied(name, member, packed)
        elif (data := changed[path]) is not None:
            yield archive.stored(name, member, data)


def _replace(source: WheelFile, path: str, old: str, new: str) -> bytes:
    before, found, after = source.read(path).decode("utf-8").partition(old)
    if not found:
        raise PatchsetError(f"{source.filename}: its {path} does not say its version: download it again")
    return f"{before}{new}{after}".encode()


def _assignments(version: Version) -> str:
    """The lines of `_version.py` that say the version, as vcs-versioning writes them."""
    parts: list[int | str] = list(version.release)
    if version.post is not None:
        parts.append(f"post{version.post}")
    if version.local is not None:
        parts.append(version.local)
    return f"__version__ = version = '{version}'\n__version_tuple__ = version_tuple = {tuple(parts)}\n"


def _name(wheel: Wheel, version: Version) -> str:
    """The file name of the same wheel in another version."""
    return wheel.file.name.replace(f"-{wheel.version}-", f"-{version}-", 1)
