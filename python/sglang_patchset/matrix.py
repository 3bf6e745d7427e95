"""What the catalogue says of each fix, with the releases folded into ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sglang_patchset.catalog import Catalog, Fix, State


def states(catalog: Catalog, fix: Fix) -> list[tuple[str, str]]:
    """Each state of a fix, and the releases that are in it; those that have a patch come first."""
    found: dict[str, list[str]] = {}
    if fix.patched:
        found["patch"] = folded(version for version in catalog.releases if version in fix.patched)
    for versions, state in fix.states.items():
        # A release of that range that has a patch is listed with those.
        some = any(version in SpecifierSet(versions) for version in fix.patched)
        others = " otherwise" if some and state is State.VULNERABLE else ""
        found.setdefault(state.words, []).append(named(versions) + others)
    return [(state, ", ".join(places)) for state, places in found.items()]


def remarks(catalog: Catalog, fix: Fix) -> Iterator[str]:
    """What else there is to say of a fix, a sentence each."""
    for versions, left in fix.left.items():
        yield f"left open, {named(versions)}: {left}"
    for versions, note in fix.notes.items():
        yield f"{named(versions)}: {note}"
    if needs := [name for name in fix.needs if name in catalog.fixes]:
        yield f"needs {', '.join(needs)}, where both have a patch"


def folded(versions: Iterable[Version]) -> list[str]:
    """Versions in order, those that follow one another as a range."""
    ranges: list[list[Version]] = []
    for version in versions:
        if ranges and _follows(ranges[-1][-1], version):
            ranges[-1].append(version)
        else:
            ranges.append([version])
    return [str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in ranges]


def _follows(one: Version, other: Version) -> bool:
    """Whether there can be no release between two."""
    if one.release == other.release:
        return True
    return other.post is None and one.release[:-1] == other.release[:-1] and other.micro == one.micro + 1


def named(versions: str) -> str:
    """A version specifier (PEP 440) in words."""
    parts = {each.operator: each.version for each in SpecifierSet(versions)}
    if "==" in parts:
        return parts["=="]
    begin, end = parts.get(">=", ""), parts.get("<=", "")
    if begin and end:
        return f"{begin} to {end}"
    before = f"up to {end}" if end else f"before {parts.get('<', '')}"
    return f"from {begin}, {before}" if begin else before
