"""What each fix is to a target: the report that the other verbs act on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from packaging.version import Version

from sglang_patchset import git, patches, receipt, releases, survey, transaction
from sglang_patchset.catalog import Catalog, CellState, Fix, Release, published_version
from sglang_patchset.receipt import Receipt
from sglang_patchset.survey import Presence, Survey
from sglang_patchset.targets import Package, Reader, Target


class FixState(Enum):
    """What a fix is to a target."""

    VULNERABLE = "vulnerable"
    PATCHED = "patched"
    FIXED_UPSTREAM = "fixed upstream"
    NOT_AFFECTED = "not affected"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class FixStatus:
    """One fix's state, with the reason or a remark."""

    fix: Fix
    state: FixState
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """Every fix's state in a target, by the fix's name; `survey` is there where it is a pinned release.

    `wheel` says of a wheel file how `releases.toml` lists it: published, patched, or unlisted.
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
    CellState.UNPATCHED: FixState.VULNERABLE,
    CellState.UPSTREAM: FixState.FIXED_UPSTREAM,
    CellState.NOT_AFFECTED: FixState.NOT_AFFECTED,
}
# The two that reassure, which no version alone may do.
_NOT_WANTED = {CellState.UPSTREAM: "has it", CellState.NOT_AFFECTED: "does not need it"}
_FROM_TREE = {
    Presence.IN: FixState.PATCHED,
    Presence.OUT: FixState.VULNERABLE,
    Presence.UNKNOWN: FixState.UNKNOWN,
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
            statuses = [FixStatus(fix, FixState.UNKNOWN, reason) for fix in catalog.fixes.values()]
            return _report(target, None, statuses)
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
            return _report(target, None, [_by_version(catalog, fix, target.version, read) for fix in fixes])
        applied = receipt.parse(read(receipt.PATH))
        statuses = [_by_bytes(catalog, fix, found, applied, read) for fix in fixes]
    return _report(target, found, statuses)


def _report(target: Target, found: Survey | None, statuses: Sequence[FixStatus]) -> Report:
    return Report(target, found, {status.fix.name: status for status in statuses})


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
        return FixStatus(fix, FixState.UNKNOWN, f"fixes.toml says nothing of it in {release}")
    if cell.state in _NOT_WANTED and (reason := _contradiction(catalog, fix, release, cell.state, read)):
        return FixStatus(fix, FixState.UNKNOWN, f"SGLang {release} {_NOT_WANTED[cell.state]}, but {reason}")
    if cell.state is not CellState.PATCH:
        return FixStatus(fix, _FROM_TABLE[cell.state], cell.note)
    patch = found.series.patch(fix.name)
    if patch is None:
        return FixStatus(fix, FixState.UNKNOWN, f"the series of {release} has no patch for it")
    presence, reason = found.presence(patch)
    foreign = [path for path in found.foreign() if path in patch.files]
    # Among other changes, a patch that has more than ours cannot be told from them.
    unsure = presence is Presence.UNKNOWN or foreign
    if unsure and applied and applied.fixes.get(fix.name, patch.sha256) != patch.sha256:
        reason = f"applied by {applied.tool} from another patch: revert it with that version"
        return FixStatus(fix, FixState.UNKNOWN, reason)
    # What the patch leaves open is of those who have it, every other note of those who have not.
    remark = cell.note if presence is not Presence.IN or cell.note.startswith("left open: ") else ""
    notes = [reason or remark]
    if foreign and presence is not Presence.UNKNOWN:
        notes.append(f"other changes too in {', '.join(foreign)}")
    return FixStatus(fix, _FROM_TREE[presence], "; ".join(filter(None, notes)))


def _by_version(catalog: Catalog, fix: Fix, version: Version | None, read: Reader) -> FixStatus:
    if version is None:
        return FixStatus(fix, FixState.UNKNOWN, "no version, and the files are not those of a pinned release")
    if cell := fix.cell(version):
        if cell.state in _NOT_WANTED and (reason := _contradiction(catalog, fix, version, cell.state, read)):
            return FixStatus(fix, FixState.UNKNOWN, f"the version says {version}, but {reason}")
        return FixStatus(fix, _FROM_TABLE[cell.state], cell.note)
    if version.is_prerelease or version.local:
        reason = f"SGLang {version} is no release, and the files are not those of a pinned one"
    elif version < min(catalog.releases):
        reason = f"SGLang {version} is older than the releases that were looked at"
    else:
        reason = f"SGLang {version} is none of the releases that were looked at: update sglang-patchset"
    return FixStatus(fix, FixState.UNKNOWN, reason)


def _contradiction(catalog: Catalog, fix: Fix, version: Version, state: CellState, read: Reader) -> str:
    """What in the files says that they are none of a release in which the fix is not wanted."""
    if state is CellState.NOT_AFFECTED:
        there = (path for path in fix.code if read(path) is not None)
        return next((f"{path}, without which it cannot be, is there" for path in there), "")
    lines = fix.upstream_lines(version)
    for release in catalog.releases.values():
        series = patches.load(catalog, release)
        patch = series.patch(fix.name)
        for path in patch.files if patch else ():
            content = read(path)
            if content is None or not patch:
                continue
            if git.blob_id(content) == series.published_id(path):
                return f"{path} is that of SGLang {release.version}"
            if path not in lines and survey.lacks(content, patch, path):
                return f"{path} has the lines of SGLang {release.version}, which lacks it"
    if not any(lines.values()):
        return "nobody has looked at how upstream did it there"
    for path, wanted in lines.items():
        content = read(path)
        if wanted and content is None:
            return f"{path} is missing"
        if lacking := next((line for line in wanted if not survey.has(content or b"", line)), None):
            return f"{path} lacks upstream's `{lacking}`"
        if wanted and (name := survey.repeated(content or b"")):
            return f"{path} binds {name} again"
    return ""
