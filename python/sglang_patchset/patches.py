"""The patch files of a release: `patches/<release>/series` and what it lists."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from sglang_patchset import scopes
from sglang_patchset.catalog import Catalog, Release, is_package_file
from sglang_patchset.errors import PatchsetError

# What stands after `diff --git `: a change of the text of one file that is there before and after.
_SECTION = re.compile(
    rb"a/python/(?P<path>[\x21-\x7e]+) b/python/(?P=path)\n"
    rb"index (?P<old>[0-9a-f]{40})\.\.(?P<new>[0-9a-f]{40}) 100(?:644|755)\n"
    rb"--- a/python/(?P=path)\n\+\+\+ b/python/(?P=path)\n@@ -"
)
_HUNK = re.compile(
    rb"^@@ -(?P<line>[0-9]+)(?:,[0-9]+)? \+[0-9]+(?:,[0-9]+)? @@(?: (?P<heading>.*))?", re.MULTILINE
)
# `refresh` heads a hunk with the names around it, git itself with a line that begins a definition before it.
_NAMES = re.compile(rb"[A-Za-z_]\w*(\.\w+)*")
_DEFINITION = re.compile(rb"(?:class|def|async def) (?P<name>\w+)")


@dataclass(frozen=True)
class Hunk:
    """One place that a patch changes: its first line's number before, and its lines before and after.

    `scope` names the classes and functions that it is in, the outermost first; git's own heading knows the
    first alone, and not where the hunk's own lines begin one. `above` and `below` count the lines around
    what changes.
    """

    line: int
    before: bytes
    after: bytes
    scope: tuple[str, ...] = ()
    above: int = 0
    below: int = 0

    @property
    def anchor(self) -> int:
        """The line above what changes: how many lines after the hunk's first one it is."""
        return self.above - 1

    def near(self, above: int, below: int) -> Hunk:
        """The same hunk with at most so many lines above and below what changes."""
        less, left_out = max(self.above - above, 0), max(self.below - below, 0)
        before, after = (
            b"".join(lines[less : len(lines) - left_out])
            for lines in (re.findall(rb".*\n|.+\Z", side) for side in (self.before, self.after))
        )
        return replace(self, before=before, after=after, above=self.above - less, below=self.below - left_out)


@dataclass(frozen=True)
class Patch:
    """One patch file. `files` maps each file that it changes to its blob ids before and after.

    The blob ids are those of the whole series up to here. Paths are a wheel's: `sglang/srt/…`. `needs` names
    the fixes of the series on top of which it applies.
    """

    fix: str
    path: Path
    files: Mapping[str, tuple[str, str]]
    needs: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """A name for what the patch changes, whatever it is called and says of itself, in hexadecimal."""
        _, _, change = self.path.read_bytes().partition(b"\ndiff --git ")
        unheaded = re.sub(rb"^(@@ -[0-9, +]+ @@).*$", rb"\1", change, flags=re.MULTILINE)
        return hashlib.sha256(unheaded).hexdigest()

    def hunks(self, path: str) -> list[Hunk]:
        """The hunks of one file."""
        _, _, rest = self.path.read_bytes().partition(f"\ndiff --git a/python/{path} b/".encode())
        ours, _, _ = rest.partition(b"\ndiff --git ")
        # A hunk's own lines begin with a blank, a sign or a backslash.
        _, *bodies = re.split(rb"^(?=@@ -)", ours + b"\n", flags=re.MULTILINE)
        return [_hunk(body) for body in bodies]


@dataclass(frozen=True)
class Series:
    """A release's patches in the order in which they apply; `damaged` says why a fix's is not among them."""

    release: Release
    patches: tuple[Patch, ...]
    damaged: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def files(self) -> Mapping[str, tuple[Patch, ...]]:
        """Every file that the series changes, with the patches that change it, in order."""
        files: dict[str, tuple[Patch, ...]] = {}
        for patch in self.patches:
            for path in patch.files:
                files[path] = (*files.get(path, ()), patch)
        return files

    def patch(self, fix: str) -> Patch | None:
        """The patch of a fix; None where the series has none."""
        return next((patch for patch in self.patches if patch.fix == fix), None)

    def published_id(self, path: str) -> str:
        """The blob id of the file as the release has it."""
        return self.files[path][0].files[path][0]

    def patched_id(self, path: str) -> str:
        """The blob id of the file with the whole series."""
        return self.files[path][-1].files[path][1]


def load(catalog: Catalog, release: Release) -> Series:
    """Read a release's series; a patch that this package could not have come with is left out of it."""
    read, damaged = [], {}
    for fix in release.fixes:
        try:
            patch = read_patch(catalog.root / str(release.version) / f"{fix}.patch")
            read.append(replace(patch, needs=catalog.needed(fix, release.version)))
        except PatchsetError as error:
            damaged[fix] = str(error)
    return Series(release, tuple(read), damaged)


def digest(patches: Iterable[Patch]) -> str:
    """A name for what these patches change in this order, in hexadecimal."""
    return hashlib.sha256("".join(patch.digest for patch in patches).encode()).hexdigest()


def _hunk(body: bytes) -> Hunk:
    header, *lines = re.findall(rb".*\n", body)
    match = _HUNK.match(header)
    assert match, "git writes no other header"
    sides: dict[bytes, list[bytes]] = {b"-": [], b"+": []}
    kind = b""
    for line in lines:
        if line.startswith(b"\\"):  # "\ No newline at end of file" is said of the line before
            for sign in sides:
                if sides[sign] and kind in (b" ", sign):
                    sides[sign][-1] = sides[sign][-1].removesuffix(b"\n")
            continue
        kind = line[:1]
        for sign in sides:
            if kind in (b" ", sign):
                sides[sign].append(line[1:])
    above, below = (
        list(itertools.takewhile(lambda line: line.startswith(b" "), each))
        for each in (lines, [line for line in reversed(lines) if line != b"\n"])
    )
    own = any(re.match(rb" [A-Za-z_$]", line) for line in above)
    heading = match["heading"] or b""
    if _NAMES.fullmatch(heading):
        scope = tuple(heading.decode("ascii").split("."))
    else:
        definition = None if own else _DEFINITION.match(heading)
        scope = (definition["name"].decode("ascii"),) if definition else ()
    before, after = (b"".join(sides[sign]) for sign in (b"-", b"+"))
    return Hunk(int(match["line"]), before, after, scope, len(above), len(below))


def headed(data: bytes, read: Callable[[str], bytes]) -> bytes:
    """A patch file whose every hunk is headed by the names of the classes and functions around it.

    Args:
        read: the bytes of a file, by its path in the wheel, as the patch's line numbers count them.
    """
    sections = re.split(rb"^(?=diff --git )", data, flags=re.MULTILINE)
    return sections[0] + b"".join(_headed(section, read) for section in sections[1:])


def _headed(section: bytes, read: Callable[[str], bytes]) -> bytes:
    match = _SECTION.match(section.removeprefix(b"diff --git "))
    if not match:
        return section
    content = read(match["path"].decode())
    header, *bodies = re.split(rb"^(?=@@ -)", section, flags=re.MULTILINE)
    for body in bodies:
        first, newline, rest = body.partition(b"\n")
        found = _HUNK.match(first)
        assert found, "git writes no other header"
        hunk = _hunk(body)
        names = b".".join(each.encode() for each in scopes.enclosing(content, hunk.line + hunk.anchor))
        marks = first.removesuffix(b" " + found["heading"]) if found["heading"] else first
        header += marks.rstrip() + (b" " + names if names else b"") + newline + rest
    return header


def read_patch(path: Path) -> Patch:
    """The patch of a fix, `<fix>.patch`.

    Raises:
        PatchsetError: it is none of files under `sglang/`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PatchsetError(f"{path}: {error.strerror}: install sglang-patchset again") from None
    # A section for each file, as git cuts it: Python knows more line ends than git does.
    _, *sections = re.split(rb"^diff --git ", data, flags=re.MULTILINE)
    files: dict[str, tuple[str, str]] = {}
    for section in sections:
        match = _SECTION.match(section)
        hunks = len(re.findall(rb"^@@", section, re.MULTILINE))
        if (
            match
            and is_package_file(changed := match["path"].decode())
            and hunks == len(_HUNK.findall(section))
        ):
            files[changed] = (match["old"].decode(), match["new"].decode())
    # Where names have no case, two of them may be one file.
    if not files or len({file.casefold() for file in files}) < len(sections):
        raise PatchsetError(
            f"{path}: not a patch of files under python/sglang/ with full blob ids: "
            "install sglang-patchset again"
        )
    return Patch(path.stem, path, files)
