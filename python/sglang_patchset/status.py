"""What each fix is to a target: the report that the other verbs act on."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from packaging.version import Version

from sglang_patchset import git, patches, receipt, releases, survey, transaction
from sglang_patchset.catalog import Catalog, Cell, Fix, Release, State, published_version
from sglang_patchset.errors import PatchsetError
from sglang_patchset.receipt import Receipt
from sglang_patchset.survey import Presence, Survey
from sglang_patchset.targets import Package, Reader, Target


class FixState(Enum):
    """What a fix is to a target; the first two are not fixed."""

    VULNERABLE = "vulnerable"
    FIXED_IN_PART = "fixed in part"
    PATCHED = "patched"
    FIXED_UPSTREAM = "fixed upstream"
    NOT_AFFECTED = "not affected"
    UNKNOWN = "unknown"


OPEN = (FixState.VULNERABLE, FixState.FIXED_IN_PART)


@dataclass(frozen=True)
class FixStatus:
    """One fix's state, with the reason or a remark; `fix` is None where its table is damaged.

    `patch` says whether the target's release has one.
    """

    name: str
    state: FixState
    detail: str = ""
    fix: Fix | None = None
    patch: bool = False


@dataclass(frozen=True)
class Report:
    """Every fix's state in a target, by the fix's name; `survey` is there where it is a pinned release.

    `wheel` says of a wheel file how its release lists it: published, patched, or unlisted.
    """

    target: Target
    survey: Survey | None
    fixes: Mapping[str, FixStatus]
    wheel: str | None = None

    @property
    def release(self) -> Release | None:
        """The pinned release that the target is."""
        return self.survey.series.release if self.survey else None


# Another run may replace the files one by one while they are looked at: then they are looked at again.
_TRIES = 5
_FROM_TABLE = {
    State.VULNERABLE: FixState.VULNERABLE,
    State.IN_PART: FixState.FIXED_IN_PART,
    State.UPSTREAM: FixState.FIXED_UPSTREAM,
    State.NOT_AFFECTED: FixState.NOT_AFFECTED,
}
# Those that reassure, in part or all, which no version alone may do.
_NOT_WANTED = {
    State.IN_PART: "has part of it",
    State.UPSTREAM: "has it",
    State.NOT_AFFECTED: "does not need it",
}


def examine(catalog: Catalog, target: Target) -> Report:
    """Find every fix's state. What a tree's bytes can tell is never taken from what it claims to be.

    Raises:
        PatchsetError: git is needed and missing, or a patch file or a wheel is broken.
    """
    if not isinstance(target, Package):
        wheel = releases.listed(catalog, target.file)
        return replace(_examine(catalog, target), wheel=wheel)
    for _ in range(_TRIES):
        before = transaction.stamp(target.directory)
        if before is None:
            reason = "another run is at work or was interrupted: apply or revert again"
            statuses = [_unknown(fix, reason) for fix in catalog.fixes.values()]
            return _report(catalog, target, None, statuses)
        report = _examine(catalog, target)
        if transaction.stamp(target.directory) == before:
            break
    return report


def _examine(catalog: Catalog, target: Target) -> Report:
    fixes = catalog.fixes.values()
    with target.reader() as unread:
        # Several fixes look at the same file.
        read = functools.cache(unread)
        found = _survey(catalog, target, read)
        if found is None:
            return _report(
                catalog, target, None, [_by_version(catalog, fix, target.version, read) for fix in fixes]
            )
        applied = receipt.parse(read(receipt.PATH))
        statuses = [_by_bytes(catalog, fix, found, applied, read) for fix in fixes]
    return _report(catalog, target, found, statuses)


def _report(catalog: Catalog, target: Target, found: Survey | None, statuses: Sequence[FixStatus]) -> Report:
    # Of a release whose table is damaged, no more is known than of any other.
    out = [
        FixStatus(name, FixState.UNKNOWN, why)
        for name, why in catalog.damaged.items()
        if (catalog.root / "fixes" / f"{name}.toml").exists()
    ]
    return Report(target, found, {status.name: status for status in (*statuses, *out)})


def _unknown(fix: Fix, reason: str) -> FixStatus:
    return FixStatus(fix.name, FixState.UNKNOWN, reason, fix)


def _survey(catalog: Catalog, target: Target, read: Reader) -> Survey | None:
    """The survey of the pinned release that a tree is."""
    version = target.version
    claimed = catalog.releases.get(published_version(version)) if version else None
    taken = survey.take(patches.load(catalog, claimed), read, target.blob) if claimed else None
    if taken and taken.files and not taken.foreign():
        return taken
    # A checkout's version may be that of another commit, or of none: its files may still be a release's.
    others = [patches.load(catalog, each) for each in catalog.releases.values() if each is not claimed]
    fitting = [series for series in others if survey.matches(series, read)]
    return survey.take(fitting[0], read, target.blob) if len(fitting) == 1 else taken


def _by_bytes(catalog: Catalog, fix: Fix, found: Survey, applied: Receipt | None, read: Reader) -> FixStatus:
    release = found.series.release.version
    cell = fix.cell(release)
    if cell is None:
        return _unknown(fix, f"nothing is known of it in {release}")
    if not cell.patch:
        # The release's own files are what it says, whatever our other patches have made of them since.
        own = {path for path, state in found.files.items() if not state.foreign and not state.problem}
        plain = functools.partial(_without_ours, found, read)
        if cell.state in _NOT_WANTED and (
            reason := _contradiction(catalog, fix, release, cell.state, plain, own)
        ):
            return _unknown(fix, f"SGLang {release} {_NOT_WANTED[cell.state]}, but {reason}")
        return FixStatus(fix.name, _FROM_TABLE[cell.state], _remark(cell), fix)
    patch = found.series.patch(fix.name)
    if patch is None:
        return _unknown(fix, found.series.damaged[fix.name])
    presence, reason = found.presence(patch)
    foreign = [path for path in found.foreign() if path in patch.files]
    # Among other changes, a patch that has more than ours cannot be told from them.
    if applied and (theirs := [path for path in foreign if applied.left(path, found.files[path].content)]):
        reason = f"{', '.join(theirs)} as another version of this tool left it: revert it with that version"
        return _unknown(fix, reason)
    if presence is Presence.UNKNOWN:
        return _unknown(fix, reason)
    is_in = presence is Presence.IN
    notes = [_remark(cell, is_in)]
    if foreign:
        notes.append(f"other changes too in {', '.join(foreign)}")
    state = FixState.PATCHED if is_in else _FROM_TABLE[cell.state]
    return FixStatus(fix.name, state, "; ".join(filter(None, notes)), fix, patch=True)


def _remark(cell: Cell, is_in: bool = False) -> str:
    """The note, and what is left open; what upstream left is none where the patch for it is in."""
    left = "" if is_in and cell.state is State.IN_PART else cell.left
    return "; ".join(filter(None, (left and f"left open {left}", cell.note)))


def _by_version(catalog: Catalog, fix: Fix, version: Version | None, read: Reader) -> FixStatus:
    if version is None:
        return _unknown(fix, "no version, and the files are not those of a pinned release")
    if why := catalog.damaged.get(str(version)):
        return _unknown(fix, why)
    if cell := fix.cell(version):
        if cell.state in _NOT_WANTED and (reason := _contradiction(catalog, fix, version, cell.state, read)):
            return _unknown(fix, f"the version says {version}, but {reason}")
        return FixStatus(fix.name, _FROM_TABLE[cell.state], _remark(cell), fix)
    if version.is_prerelease or version.local:
        reason = f"SGLang {version} is no release, and the files are not those of a pinned one"
    elif version < min(catalog.releases):
        reason = f"SGLang {version} is older than the releases that were looked at"
    else:
        reason = f"SGLang {version} is none of the releases that were looked at: update sglang-patchset"
    return _unknown(fix, reason)


def _without_ours(found: Survey, read: Reader, path: str) -> bytes | None:
    """A file without the fixes of the release's series, as far as they can be taken out of it."""
    state = found.files.get(path)
    if state is None or not state.applied:
        return read(path)
    try:
        return survey.rewrite(found, {path: frozenset()})[path]
    except PatchsetError:
        return state.content


def _contradiction(
    catalog: Catalog,
    fix: Fix,
    version: Version,
    state: State,
    read: Reader,
    own: Collection[str] = (),
) -> str:
    """What in the files says that they are none of a release in which the fix is not wanted.

    Of those in `own` it is known that they are that release's.
    """
    if state is State.NOT_AFFECTED:
        there = (path for path in fix.code if read(path) is not None)
        return next((f"{path}, without which it cannot be, is there" for path in there), "")
    lines = fix.upstream_lines(version)
    for release in catalog.releases.values():
        series = patches.load(catalog, release)
        patch = series.patch(fix.name)
        for path in patch.files if patch else ():
            content = None if path in own else read(path)
            if content is None or not patch:
                continue
            if git.blob_id(content) == series.published_id(path):
                return f"{path} is that of SGLang {release.version}"
            if path not in lines and survey.lacks(content, patch, path):
                return f"{path} has the lines of SGLang {release.version}, which lacks it"
    if not any(lines.values()):
        return "nobody has looked at how upstream did it there"
    for path, wanted in lines.items():
        if path in own:
            continue
        content = read(path)
        if wanted and content is None:
            return f"{path} is missing"
        if lacking := next((line for line in wanted if not survey.has(content or b"", line)), None):
            return f"{path} lacks upstream's `{lacking}`"
        if name := next(filter(None, (survey.repeated(content or b"", line) for line in wanted)), ""):
            return f"{path} binds {name} again"
    return ""
