"""The patch files of a release: `patches/<release>/series` and what it lists."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from sglang_patchset.catalog import Catalog, Release, is_package_file
from sglang_patchset.errors import PatchsetError

# What stands after `diff --git `: a change of the text of one file that is there before and after.
_SECTION = re.compile(
    rb"a/python/(?P<path>[\x21-\x7e]+) b/python/(?P=path)\n"
    rb"index (?P<old>[0-9a-f]{40})\.\.(?P<new>[0-9a-f]{40}) 100(?:644|755)\n"
    rb"--- a/python/(?P=path)\n\+\+\+ b/python/(?P=path)\n@@ -"
)
_HUNK = re.compile(
    rb"^@@ -(?P<line>[0-9]+)(?:,[0-9]+)? \+[0-9]+(?:,[0-9]+)? @@(?: (?P<scope>(?:class|def|async def) \w+))?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Hunk:
    """One place that a patch changes: its first line's number before, and its lines before and after.

    `scope` begins the class or function that it is in; empty where its own lines do, or there is none.
    `above` and `below` count the lines around what changes.
    """

    line: int
    before: bytes
    after: bytes
    scope: bytes = b""
    above: int = 0
    below: int = 0

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
        return hashlib.sha256(change).hexdigest()

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
    scope = b"" if own else match["scope"] or b""
    before, after = (b"".join(sides[sign]) for sign in (b"-", b"+"))
    return Hunk(int(match["line"]), before, after, scope, len(above), len(below))


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
