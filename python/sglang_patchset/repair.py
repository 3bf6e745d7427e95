"""Apply fixes to a package in place, and take them out again: all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

from sglang_patchset import receipt, record, status, survey, transaction
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.record import Change
from sglang_patchset.status import OPEN, FixState, FixStatus, Report
from sglang_patchset.survey import Presence, Survey
from sglang_patchset.targets import Package


def apply(catalog: Catalog, package: Package, names: Sequence[str]) -> list[str]:
    """Put fixes into a package: those named, or all that its release lacks.

    Returns:
        The names of the fixes that were put in; those that it had already are left as they are.

    Raises:
        PatchsetError: nothing was changed, the message says why.
    """
    return _change(catalog, package, names, FixState.VULNERABLE)


def revert(catalog: Catalog, package: Package, names: Sequence[str]) -> list[str]:
    """Take fixes out of a package: those named, or all that are in it. As `apply` otherwise."""
    return _change(catalog, package, names, FixState.PATCHED)


def select(
    catalog: Catalog, report: Report, names: Sequence[str], state: FixState
) -> tuple[Survey, list[str]]:
    """The survey of a pinned release, and the fixes among those named (or all) that are in this state.

    Raises:
        PatchsetError: an unknown fix, a release that is not pinned, a fix whose state is unknown, or one
            that needs another.
    """
    chosen = [report.fixes[catalog.fix(name).name] for name in names]
    # What is out of the catalogue, or of the series, is in nobody's way.
    chosen = chosen or [each for each in report.fixes.values() if not _is_damaged(report, each)]
    if report.survey is None:
        found = f"SGLang {report.target.version}" if report.target.version else "no version"
        raise PatchsetError(
            f"{report.target}: {found}, not a pinned release ({catalog.pinned()}): "
            "see `sglang-patchset status`"
        )
    if unknown := [f"{each.name}: {each.detail}" for each in chosen if each.state is FixState.UNKNOWN]:
        raise PatchsetError(
            f"{report.target}: {'; '.join(unknown)}: put these files back as the release has them, "
            "or name the other fixes alone"
        )
    wanted = OPEN if state is FixState.VULNERABLE else (state,)
    fixes = [each.name for each in chosen if each.state in wanted]
    release = report.survey.series.release
    if unpatched := [name for name in fixes if report.survey.series.patch(name) is None]:
        if names:
            raise PatchsetError(
                f"{report.target}: no patch of {', '.join(unpatched)} for SGLang {release.version}: "
                "see `sglang-patchset list`"
            )
        fixes = [name for name in fixes if name not in unpatched]
    if state is FixState.VULNERABLE:
        _check_needs(report, report.survey, fixes)
    else:
        _check_needed(report, report.survey, fixes)
    return report.survey, fixes


def _is_damaged(report: Report, each: FixStatus) -> bool:
    return each.fix is None or (report.survey is not None and each.name in report.survey.series.damaged)


def _check_needs(report: Report, found: Survey, fixes: Sequence[str]) -> None:
    """See that what these fixes need goes in with them, or is in."""
    ready = {name for name, each in report.fixes.items() if each.state is FixState.PATCHED}.union(fixes)
    for patch in found.series.patches:
        if patch.fix in fixes and not patch.needs <= ready:
            lacking = ", ".join(sorted(patch.needs - ready))
            raise PatchsetError(f"{report.target}: {patch.fix} needs {lacking}: apply them together")


def _check_needed(report: Report, found: Survey, fixes: Sequence[str]) -> None:
    """See that what needs these fixes comes out with them, or is not in."""
    unknown = {name for name, each in report.fixes.items() if each.state is FixState.UNKNOWN}
    staying = (found.traces() | unknown).difference(fixes)
    for patch in found.series.patches:
        if patch.fix in staying and not patch.needs.isdisjoint(fixes):
            leaving = ", ".join(sorted(patch.needs.intersection(fixes)))
            raise PatchsetError(f"{report.target}: {patch.fix} needs {leaving}: revert them together")


def contents(
    found: Survey, *, add: Set[str] = frozenset(), remove: Set[str] = frozenset()
) -> Mapping[str, bytes]:
    """The new bytes of every file that these fixes touch, by its path in the wheel."""
    paths = {path for patch in found.series.patches if patch.fix in add | remove for path in patch.files}
    return survey.rewrite(found, {path: (found.files[path].applied | add) - remove for path in sorted(paths)})


def changed(
    found: Survey, *, add: Set[str] = frozenset(), remove: Set[str] = frozenset()
) -> dict[str, bytes | None]:
    """`contents`, and the receipt; None stands for no file."""
    new = contents(found, add=add, remove=remove)
    patched: dict[str, bytes] = {}
    applied = False
    for path, touching in found.series.files.items():
        state = found.files[path]
        fixes = {patch.fix for patch in touching if patch.fix in (state.applied | add) - remove}
        applied |= bool(fixes)
        if fixes and not state.foreign and not state.problem:
            patched[path] = new.get(path, state.content)
    written = receipt.render(found.series.release.version, patched) if applied else None
    return {**new, receipt.PATH: written}


def _change(catalog: Catalog, package: Package, names: Sequence[str], state: FixState) -> list[str]:
    # By whichever link the package is named: RECORD is what lies beside it.
    package = replace(package, directory=package.directory.resolve())
    with transaction.locked(package.directory) as held:
        held.complete(partial(_is_as_installed, package))
        found, fixes = select(catalog, status.examine(catalog, package), names, state)
        if fixes:
            held.commit(_changes(package, found, frozenset(fixes), state))
    return fixes


def _is_as_installed(package: Package, paths: Iterable[str]) -> bool:
    """Whether RECORD is right of these files, named from the package; any receipt may lie there."""
    found = package.record()
    if found is None:
        return False
    data = found.read_bytes()
    listed = [f"sglang/{path}" for path in paths]
    return all(path == receipt.PATH or record.agrees(data, path, package.read(path)) for path in listed)


def _changes(package: Package, found: Survey, fixes: frozenset[str], state: FixState) -> dict[str, Change]:
    """Every file that changes, by its path from the package, the receipt and RECORD included."""
    new = changed(found, add=fixes) if state is FixState.VULNERABLE else changed(found, remove=fixes)
    # What a touched file was is what the new bytes were made of, whatever has happened to it since.
    before: dict[str, bytes | None] = {path: each.content for path, each in found.files.items()}
    before[receipt.PATH] = package.read(receipt.PATH)
    lines = {path: (before[path], content) for path, content in new.items()}
    _check_effect(package, found, fixes, state, new)
    changes: dict[str, Change] = {path.removeprefix("sglang/"): change for path, change in lines.items()}
    if path := package.record():
        old = path.read_bytes()
        changes[f"../{path.parent.name}/{path.name}"] = (old, record.update(old, lines))
    return changes


def _check_effect(
    package: Package,
    found: Survey,
    fixes: frozenset[str],
    state: FixState,
    changed: Mapping[str, bytes | None],
) -> None:
    """See that the new bytes have the fixes, or lack them: git may not have done what it was told."""
    told = survey.take(found.series, changed.get, package.blob)
    wanted = Presence.IN if state is FixState.VULNERABLE else Presence.OUT
    for patch in found.series.patches:
        if patch.fix in fixes and told.presence(patch)[0] is not wanted:
            raise PatchsetError(
                f"{package}: git has not done what {patch.path} says: see whether TMPDIR is an ordinary "
                "directory, and run this again"
            )
