"""Which fixes are in a tree, told by the bytes of the files that they touch."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from sglang_patchset import git, scopes
from sglang_patchset.errors import PatchsetError
from sglang_patchset.patches import Hunk, Patch, Series
from sglang_patchset.targets import Blobs, Reader


class Presence(Enum):
    """Whether a fix is in a tree."""

    IN = "in"
    OUT = "out"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class FileState:
    """One touched file: its bytes, and the fixes that are in it; or why nobody can tell.

    `foreign` says that somebody else's changes are in it too; `conflicts` names the fixes whose lines those
    touch, each with the place. `near` names those that are told by a single line on one side, where
    somebody else's changes come close. `base` is the file as the release has it, where that was needed and
    git has it.
    """

    content: bytes = b""
    applied: frozenset[str] = frozenset()
    problem: str = ""
    foreign: bool = False
    conflicts: Mapping[str, str] = field(default_factory=dict)
    near: frozenset[str] = frozenset()
    base: bytes | None = None


@dataclass(frozen=True)
class Survey:
    """The state of every file that a release's series touches, in one tree."""

    series: Series
    files: Mapping[str, FileState]

    def presence(self, patch: Patch) -> tuple[Presence, str]:
        """Whether a patch is in the tree, and the reason where it is unknown."""
        states = {path: self.files[path] for path in patch.files}
        reasons = {path: state.problem or state.conflicts.get(patch.fix) for path, state in states.items()}
        problems = [f"{path} {reason}" for path, reason in reasons.items() if reason]
        if problems:
            return Presence.UNKNOWN, "; ".join(problems)
        having = [path for path, state in states.items() if patch.fix in state.applied]
        if not having:
            return Presence.OUT, ""
        if len(having) == len(states):
            return Presence.IN, ""
        lacking = [path for path in states if path not in having]
        return Presence.UNKNOWN, f"half patched: {', '.join(having)} has it, {', '.join(lacking)} lacks it"

    def traces(self) -> frozenset[str]:
        """The fixes that are in some file, whole or not."""
        return frozenset().union(*(state.applied for state in self.files.values()))

    def foreign(self) -> list[str]:
        """The touched files that have somebody else's changes too, or are missing."""
        return [path for path, state in self.files.items() if state.foreign or state.problem]


def take(series: Series, read: Reader, blobs: Blobs = lambda _: None) -> Survey:
    """Look at every file that the series touches."""
    return Survey(series, {path: _inspect(series, path, read(path), blobs) for path in series.files})


def matches(series: Series, read: Reader) -> bool:
    """Whether every touched file is the release's own, with any of the fixes in it."""
    # Files that one patch touches come first: blob ids alone settle those.
    paths = sorted(series.files, key=lambda path: len(series.files[path]))
    contents = ((path, read(path)) for path in paths)
    return bool(paths) and all(
        content is not None and _own(series, path, content) for path, content in contents
    )


def rewrite(found: Survey, wanted: Mapping[str, Set[str]]) -> Mapping[str, bytes]:
    """The bytes of these files, by path, each with exactly the wanted fixes in it.

    Somebody else's changes stay as they are: what is wanted leads back to the bytes that were found.

    Raises:
        PatchsetError: git is missing, a patch file is broken, or somebody else's changes stand in the way.
    """
    contents = _rewrite(found, wanted)
    series = found.series
    foreign = [path for path in contents if found.files[path].foreign]
    _check_way_back(found, {path: contents[path] for path in foreign}, wanted)
    for path in contents.keys() - foreign:
        touching = series.files[path]
        whole = wanted[path] >= {patch.fix for patch in touching}
        if whole and git.blob_id(contents[path]) != series.patched_id(path):
            directory = touching[0].path.parent
            raise PatchsetError(
                f"{directory}: {path} does not become what these patches say: install sglang-patchset again"
            )
    return contents


def lacks(content: bytes, patch: Patch, path: str) -> bool:
    """Whether a file has every hunk's lines as they are before the patch, and none as they are after it."""
    return all(
        before and not after for before, after in (_sides(content, each) for each in patch.hunks(path))
    )


def has(content: bytes, line: str) -> bool:
    """Whether a line is in a file, whatever its indentation."""
    return _found(content, line) is not None


def repeated(content: bytes, line: str) -> str:
    """What a line stands in, where a file defines that twice at its top; empty for none.

    The first one is not what runs. Upstream's own files have such pairs elsewhere.
    """
    place = _found(content, line)
    top = re.compile(rb"^(?:class|def|async def) (\w+)", re.MULTILINE)
    around = top.findall(content, 0, place.start())[-1:] if place else []
    return next((name.decode() for name in around if top.findall(content).count(name) > 1), "")


def _found(content: bytes, line: str) -> re.Match[bytes] | None:
    return re.search(rb"(?m)^[ \t]*" + re.escape(line.encode()) + rb"[ \t]*\r?$", content)


def _check_way_back(found: Survey, contents: Mapping[str, bytes], wanted: Mapping[str, Set[str]]) -> None:
    """See that files with somebody else's changes have what is wanted, and lead back to the same bytes."""
    series = found.series
    after = {
        path: _among_others(series, path, content, found.files[path].base)
        for path, content in contents.items()
    }
    back = _rewrite(Survey(series, after), {path: found.files[path].applied for path in after})
    for path, state in after.items():
        before = found.files[path]
        fixes = wanted[path] & {patch.fix for patch in series.files[path]}
        if state.applied != fixes or back[path] != before.content:
            raise PatchsetError(_in_the_way([path], fixes ^ before.applied))


def _rewrite(found: Survey, wanted: Mapping[str, Set[str]]) -> Mapping[str, bytes]:
    series, states = found.series, {path: found.files[path] for path in wanted}
    with _scratch({path: state.content for path, state in states.items()}) as tree:
        for patch in reversed(series.patches):
            paths = [path for path, state in states.items() if patch.fix in state.applied]
            near = any(patch.fix in states[path].near for path in paths)
            _must(git.apply(patch.path, tree, only=paths, reverse=True, near=near), patch, paths, found)
        for patch in series.patches:
            paths = [path for path in wanted if patch.fix in wanted[path] and path in patch.files]
            near = any(patch.fix in states[path].near for path in paths)
            _must(git.apply(patch.path, tree, only=paths, near=near), patch, paths, found)
        return {path: (tree / path).read_bytes() for path in wanted}


def _inspect(series: Series, path: str, content: bytes | None, blobs: Blobs) -> FileState:
    if content is None:
        return FileState(problem="is missing")
    state = _own(series, path, content) or _among_others(series, path, content)
    if state.conflicts and (base := blobs(series.published_id(path))):
        return _among_others(series, path, content, base)
    return state


def _own(series: Series, path: str, content: bytes) -> FileState | None:
    """The state of a file that is the release's own, with any of the fixes in it; None for any other."""
    patches = series.files[path]
    found = git.blob_id(content)
    if found == series.published_id(path):
        return FileState(content)
    if found == series.patched_id(path):
        return FileState(content, frozenset(patch.fix for patch in patches))
    # With two patches or more, some of them may be in.
    if len(patches) > 1 and (applied := _take_off(series, path, content)):
        state = FileState(content, applied)
        if _rewrite(Survey(series, {path: state}), {path: applied})[path] == content:
            return state
    return None


def _among_others(series: Series, path: str, content: bytes, base: bytes | None = None) -> FileState:
    """The state of a file that has somebody else's changes, told by the lines of each patch alone.

    A patch is in, or out, where each of its hunks has its lines after, or before, exactly once, in the class
    or function that it is for, and those of the other side nowhere: whatever git does with it, there is no
    second place. A patch that needs others comes off before those are looked for, and is out where they are.
    With `base`, the file as the release has it, git's three-way merge may bear a place out.
    """
    applied, conflicts, near, found = set(), {}, set(), content
    try:
        scopes.parsed(content)
    except ValueError as error:
        reason = f"is no Python that this one reads ({error})"
        conflicts = {patch.fix: reason for patch in series.files[path]}
        return FileState(content, foreign=True, conflicts=conflicts, base=base)
    for patch in reversed(series.files[path]):
        hunks = patch.hunks(path)
        sides = [_sides(found, hunk) for hunk in hunks]
        for number, hunk in enumerate(hunks):
            if sides[number] == (0, 0) and (close := _sides_near(found, hunk, base)) != (0, 0):
                sides[number] = close
                hunks[number] = hunk.near(1, 1)
                near.add(patch.fix)
        if len(set(sides)) == 1 and (again := _replaced(found, hunks)):
            conflicts[patch.fix] = f"{again} of {patch.path.name}"
        elif set(sides) == {(0, 1)}:
            applied.add(patch.fix)
            for hunk in hunks if patch.needs else ():
                found = _exchanged(found, hunk.after, hunk.before)
        elif set(sides) != {(1, 0)}:
            line, reason = _conflict([hunk.line for hunk in hunks], sides)
            conflicts[patch.fix] = f"{reason} the hunk at line {line} of {patch.path.name}"
            if 0 < content.count(b"\n") == content.count(b"\r\n"):
                conflicts[patch.fix] = "has other line ends (CRLF) than the release"
    for patch in series.files[path]:
        lacking = patch.needs - applied - conflicts.keys()
        if any(each.fix in lacking for each in series.files[path]):
            conflicts.pop(patch.fix, None)
    return FileState(
        content, frozenset(applied), foreign=True, conflicts=conflicts, near=frozenset(near), base=base
    )


def _conflict(lines: Sequence[int], sides: Sequence[tuple[int, int]]) -> tuple[int, str]:
    """The first hunk in whose way something stands, by its line, and what that is."""
    for line, side in zip(lines, sides, strict=True):
        if side == (0, 0):
            return line, "has other changes in the place of"
        if side not in ((0, 1), (1, 0)):
            return line, "has more than one place for"
    line = next(line for line, side in zip(lines, sides, strict=True) if side != sides[0])
    return line, f"is half patched, and {'lacks' if sides[0] == (0, 1) else 'has'}"


def _sides(content: bytes, hunk: Hunk) -> tuple[int, int]:
    """How often a hunk's lines before and after stand in a file; a single place elsewhere counts for none."""
    before, after = (_places(content, lines) for lines in (hunk.before, hunk.after))
    if hunk.scope and len(before + after) == 1:
        line = scopes.line_of(content, *before, *after)
        if scopes.enclosing(content, line + hunk.anchor)[: len(hunk.scope)] != hunk.scope:
            return 0, 0
    return len(before), len(after)


def _replaced(content: bytes, hunks: Sequence[Hunk]) -> str:
    """What takes the place of a definition that a hunk with one place is in; empty where nothing does."""
    for hunk in hunks:
        places = [(at, lines) for lines in (hunk.before, hunk.after) for at in _places(content, lines)]
        if len(places) == 1:
            ((at, lines),) = places
            first, last = scopes.line_of(content, at), scopes.line_of(content, at + len(lines) - 1)
            if again := scopes.replaced(content, first, last):
                return f"{again}, after the hunk at line {hunk.line}"
    return ""


def _sides_near(content: bytes, hunk: Hunk, base: bytes | None) -> tuple[int, int]:
    """As `_sides`, where somebody else's changes come close, but not to the next line.

    A single line on both sides must tell the place by itself: git, which looks for that, then finds no other.
    The same has to hold when the hunk is changed there. And all lines on one side have to be there, or
    git's merge, from the file as the release has it, has to come to the same.
    """
    near = hunk.near(1, 1)
    sides = _sides(content, near)
    if sides not in ((1, 0), (0, 1)):
        return 0, 0
    is_in = sides == (0, 1)
    old, new = (near.after, near.before) if is_in else (near.before, near.after)
    changed = _exchanged(content, old, new)
    if _sides(changed, near) != sides[::-1]:
        return 0, 0
    whole = (hunk.near(hunk.above, 1), hunk.near(1, hunk.below))
    if all(
        told in [_sides(each, lines) for lines in whole]
        for each, told in ((content, sides), (changed, sides[::-1]))
    ):
        return sides
    return sides if base and _merged(content, hunk, base, is_in) == changed else (0, 0)


def _merged(content: bytes, hunk: Hunk, base: bytes, is_in: bool) -> bytes | None:
    """What git's three-way merge makes of a file when the hunk is put in, or taken out where it is in."""
    if len(_places(base, hunk.before)) != 1:
        return None
    patched = _exchanged(base, hunk.before, hunk.after)
    old, new = (patched, base) if is_in else (base, patched)
    with _scratch({"ours": content, "base": old, "theirs": new}) as tree:
        return (
            (tree / "ours").read_bytes()
            if git.merge(*map(tree.joinpath, ("ours", "base", "theirs")))
            else None
        )


def _places(content: bytes, lines: bytes) -> list[int]:
    """Where whole lines stand in a file, those that overlap included."""
    found, at = [], content.find(lines)
    while at >= 0:
        end = at + len(lines)
        begins = at == 0 or content[at - 1 : at] == b"\n"
        if begins and (lines.endswith(b"\n") or end == len(content)):
            found.append(at)
        at = content.find(lines, at + 1)
    return found


def _exchanged(content: bytes, old: bytes, new: bytes) -> bytes:
    """A file with other lines in the one place of these."""
    (place,) = _places(content, old)
    return content[:place] + new + content[place + len(old) :]


def _take_off(series: Series, path: str, content: bytes) -> frozenset[str]:
    """The fixes whose removal leads back to the release's own file; none where nothing leads there."""
    applied = set()
    with _scratch({path: content}) as tree:
        for patch in reversed(series.files[path]):
            if git.apply(patch.path, tree, only=[path], reverse=True):
                applied.add(patch.fix)
        if git.blob_id((tree / path).read_bytes()) != series.published_id(path):
            return frozenset()
    return frozenset(applied)


@contextmanager
def _scratch(contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary tree that has these files."""
    try:
        with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as directory:
            for path, content in contents.items():
                file = Path(directory, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            yield Path(directory)
    except OSError as error:
        raise PatchsetError(
            f"{tempfile.gettempdir()}: cannot be written to ({error.strerror}): make room there, "
            "or name another directory by TMPDIR"
        ) from None


def _must(done: bool, patch: Patch, paths: Sequence[str], found: Survey) -> None:
    if done:
        return
    if foreign := [path for path in paths if found.files[path].foreign]:
        raise PatchsetError(_in_the_way(foreign, {patch.fix}))
    release = patch.path.parent.name
    raise PatchsetError(f"{patch.path}: does not fit SGLang {release}: install sglang-patchset again")


def _in_the_way(paths: Sequence[str], fixes: Set[str]) -> str:
    return (
        f"{', '.join(paths)}: other changes in it stand in the way of {', '.join(sorted(fixes))}: "
        "put it back as the release has it, or name other fixes alone"
    )
