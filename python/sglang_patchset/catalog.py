"""The pinned releases and the fixes, as `patches/` has them: a table for each, and each release's series.

    patches/default                     the release that verbs take where none is named
    patches/fixes/<fix>.toml            what a fix is
    patches/<release>/release.toml      what a release is
    patches/<release>/wheels.sha256     its wheels, and patched.sha256 those that are made of them
    patches/<release>/series            its patches, <fix>.patch, in the order in which they apply

A table that is damaged takes what it describes out of the catalogue, and nothing else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from sglang_patchset.errors import PatchsetError
from sglang_patchset.schema import Table, must, pattern

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_T = TypeVar("_T")

_NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")
# No part is empty, or begins as an option or as what goes up.
_PATH = re.compile("([A-Za-z0-9_][A-Za-z0-9_.+-]*/)+[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_LISTED = re.compile(r"(?P<sha256>[0-9a-f]{64})  (?P<name>[A-Za-z0-9_.+-]+\.whl)")
# A flag of the server: set, set to a value, or set to more than a number.
_FLAG = re.compile(r"--[a-z0-9]+(-[a-z0-9]+)*(=[A-Za-z0-9_.:/-]+|>[0-9]+)?")


class State(Enum):
    """What a release as published is, where a fix is concerned."""

    VULNERABLE = "vulnerable"
    IN_PART = "in-part"
    UPSTREAM = "upstream"
    NOT_AFFECTED = "not-affected"

    @property
    def words(self) -> str:
        """The state as every table, page and report names it."""
        return _WORDS[self]


_WORDS = {
    State.VULNERABLE: "vulnerable",
    State.IN_PART: "fixed in part",
    State.UPSTREAM: "fixed upstream",
    State.NOT_AFFECTED: "not affected",
}


@dataclass(frozen=True)
class Cell:
    """One fix in one release: the published release's state, and whether there is a patch.

    `note` is of those who have not the fix; `left` is what it leaves open, upstream's or the patch, and
    since which release.
    """

    state: State
    patch: bool = False
    note: str = ""
    left: str = ""


@dataclass(frozen=True)
class Exposure:
    """A server that a bug can reach: of one of these architectures, or any, with all of these flags."""

    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fix:
    """One fix, as `patches/fixes/<fix>.toml` has it.

    `states`, `notes` and `left` are keyed by version specifiers (PEP 440); a release whose series has the fix
    is vulnerable where `states` says nothing. `code` names the files without which a release cannot have the
    bug. `when` says which servers it reaches, `log` has regular expressions of what those or their clients
    say. `needs` names the fixes without which this one must not be: `Catalog.needed` says where that counts.
    `upstream_code` is keyed by version specifiers too, of releases that have upstream's fix: lines of it
    without their indentation, by their file.
    """

    name: str
    upstream_pr: int
    title: str
    symptom: str
    code: tuple[str, ...]
    states: Mapping[str, State]
    notes: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    when: tuple[Exposure, ...] = ()
    log: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    patched: frozenset[Version] = frozenset()
    upstream_code: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def upstream_lines(self, version: Version) -> Mapping[str, tuple[str, ...]]:
        """Lines of upstream's own fix in that release, by their file; none of a file that it leaves alone."""
        matching = (files for each, files in self.upstream_code.items() if version in _specifier(each))
        return {path: lines for files in matching for path, lines in files.items()}

    def cell(self, version: Version) -> Cell | None:
        """The fix in that release; None for a release that nobody has looked at.

        A development version or a local build is nobody's release, whatever range it falls into.
        """
        if version.is_prerelease or version.local:
            return None
        patch = version in self.patched
        state = self.state(version) or (State.VULNERABLE if patch else None)
        if state is None:
            return None
        return Cell(state, patch, _at(self.notes, version) or "", self._left(version))

    def state(self, version: Version) -> State | None:
        """What the fix's own table says of a release."""
        return _at(self.states, version)

    def _left(self, version: Version) -> str:
        specifier = next((each for each in self.left if version in _specifier(each)), "")
        since = [each.version for each in _specifier(specifier) if each.operator in (">=", "==")]
        return (
            f"since {since[0].removesuffix('.*')}: {self.left[specifier]}"
            if since
            else self.left.get(specifier, "")
        )


@dataclass(frozen=True)
class Release:
    """A pinned SGLang release.

    `patchset` is the number of the release's patch set, raised with every change to a series that has been
    published. `wheels` maps the published wheels' file names to their sha256, `patched` those that are made
    of them, and `runs_with` the packages that the release pins to their versions. `tree` is git's id of the
    files, as `checkout` commits them. `fixes` are those of the series, in its order.
    """

    version: Version
    date: str
    patchset: int
    python: tuple[str, ...]
    runs_with: Mapping[str, str]
    wheels: Mapping[str, str]
    tree: str
    patched: Mapping[str, str] = field(default_factory=dict)
    fixes: tuple[str, ...] = ()

    @property
    def patched_version(self) -> Version:
        """The version of a wheel that has the whole series."""
        return Version(f"{self.version}+patchset.{self.patchset}")


@dataclass(frozen=True)
class Catalog:
    """All tables; `root` is the directory that holds them.

    `damaged` says of fixes and releases, by their names, why they are not among the others.
    """

    root: Path
    default_version: Version
    releases: Mapping[Version, Release]
    fixes: Mapping[str, Fix]
    damaged: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def default(self) -> Release:
        """The release that verbs take where none is named.

        Raises:
            PatchsetError: its table is damaged.
        """
        return self.release(str(self.default_version))

    def pinned(self) -> str:
        """The pinned versions as a message names them."""
        return ", ".join(map(str, self.releases))

    def release(self, name: str) -> Release:
        """The pinned release of that version.

        Raises:
            PatchsetError: there is none.
        """
        if name in self.damaged:
            raise PatchsetError(f"{name}: out of the catalogue: {self.damaged[name]}")
        try:
            return self.releases[Version(name)]
        except (InvalidVersion, KeyError):
            raise PatchsetError(f"{name}: not a pinned release: choose from {self.pinned()}") from None

    def clone(self) -> Path:
        """The clone of this project that the tables lie in; an installed package has no tests beside them.

        Raises:
            PatchsetError: they are those of an installed package.
        """
        if not (self.root.parent / "tests" / "regression").is_dir():
            raise PatchsetError(
                f"{self.root}: an installed package's patches: work in a clone of sglang-patchset, "
                "installed by `pip install -e .`"
            )
        return self.root.parent

    def fix(self, name: str) -> Fix:
        """The fix of that name.

        Raises:
            PatchsetError: there is none, or its table is damaged.
        """
        if name in self.damaged:
            raise PatchsetError(f"{name}: out of the catalogue: {self.damaged[name]}")
        try:
            return self.fixes[name]
        except KeyError:
            raise PatchsetError(f"unknown fix {name}: choose from {', '.join(self.fixes)}") from None

    def needed(self, name: str, version: Version) -> frozenset[str]:
        """The fixes that have to be in that release with this one: what it needs, and what that needs.

        It counts where both have a patch.
        """
        names = (name, *self.fixes[name].needs) if name in self.fixes else ()
        patched = [each for each in names if each in self.fixes and version in self.fixes[each].patched]
        if name not in patched:
            return frozenset()
        _, *direct = patched
        return frozenset(direct).union(*(self.needed(each, version) for each in direct))


def published_version(version: Version) -> Version:
    """The version without the mark of a patched wheel."""
    return Version(version.public) if (version.local or "").startswith("patchset.") else version


def is_package_file(path: str) -> bool:
    """Whether a patch may change this file of a wheel; no program reads its path as anything but a name."""
    return bool(_PATH.fullmatch(path)) and path.startswith("sglang/")


def load(root: Path | None = None) -> Catalog:
    """Read all tables under `root`, by default the patch set that came with this package.

    Raises:
        PatchsetError: there is no patch set; a single table that is damaged is none (`Catalog.damaged`).
    """
    root = root or _patches_dir()
    damaged: dict[str, str] = {}
    releases: dict[Version, Release] = {}
    fixes: dict[str, Fix] = {}
    try:
        default = Version((root / "default").read_text(encoding="utf-8").strip())
        directories = sorted(file.parent for file in root.glob("*/release.toml"))
        tables = sorted((root / "fixes").glob("*.toml"))
    except (OSError, ValueError) as error:
        raise PatchsetError(f"{root}: no patch set ({error}): install sglang-patchset again") from None
    for directory in directories:
        with _reading(directory.name, directory / "release.toml", damaged):
            release = read_release(directory)
            releases[release.version] = release
    for file in tables:
        with _reading(file.stem, file, damaged):
            patched = frozenset(version for version, each in releases.items() if file.stem in each.fixes)
            fixes[file.stem] = _fix(file, patched)
    for name in [name for name in fixes if _needs_itself(fixes, name)]:
        damaged[name] = f"{root / 'fixes' / name}.toml: needs leads back to it: mend it"
        del fixes[name]
    return Catalog(root, default, dict(sorted(releases.items())), fixes, damaged)


def read_release(directory: Path) -> Release:
    """The release that a directory of `patches/` is of.

    Raises:
        ValueError, OSError: it is of none.
    """
    version = Version(directory.name)
    entry = Table(tomllib.loads((directory / "release.toml").read_text(encoding="utf-8")))
    date, tree, pythons = entry.text("date"), entry.text("tree"), entry.texts("python")
    must(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", date), "date is no date")
    must(re.fullmatch("[0-9a-f]{40}", tree), "tree is no id of git's")
    must(all(re.fullmatch("3[.][0-9]+", python) for python in pythons), "python names no Python")
    runs_with = entry.table("runs-with")
    fixes = tuple(_fixes_of(directory / "series"))
    must(len(set(fixes)) == len(fixes), "series lists a fix twice")
    patched = directory / "patched.sha256"
    return Release(
        version=version,
        date=date,
        patchset=entry.number("patchset", 0),
        python=pythons,
        runs_with={package: runs_with.text(package) for package in runs_with},
        wheels=_hashes(directory / "wheels.sha256", f"sglang-{version}-"),
        tree=tree,
        patched=_hashes(patched, f"sglang-{version}+patchset.") if patched.exists() else {},
        fixes=fixes,
    )


def _fixes_of(series: Path) -> Iterator[str]:
    for name in series.read_bytes().decode("utf-8").split():
        fix = name.removesuffix(".patch")
        must(_NAME.fullmatch(fix) and fix != name, f"{name} in series is no name of a patch file")
        yield fix


def _hashes(file: Path, prefix: str) -> dict[str, str]:
    """What a list for `sha256sum --check` says of wheels."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        match = _LISTED.fullmatch(line)
        must(match and match["name"].startswith(prefix), f"{file.name} lists what is no such wheel")
        assert match
        found[match["name"]] = match["sha256"]
    return found


@contextmanager
def _reading(name: str, file: Path, damaged: dict[str, str]) -> Iterator[None]:
    """What is wrong with a table is said of what it describes."""
    try:
        yield
    except RecursionError:
        damaged[name] = f"{file}: nested too deeply: mend it, or install sglang-patchset again"
    except (OSError, ValueError) as error:
        damaged[name] = f"{file}: {error}: mend it, or install sglang-patchset again"


def _needs_itself(fixes: Mapping[str, Fix], name: str) -> bool:
    seen: set[str] = set()
    ahead = list(fixes[name].needs)
    while ahead:
        each = ahead.pop()
        if each == name:
            return True
        if each in fixes and each not in seen:
            seen.add(each)
            ahead += fixes[each].needs
    return False


def _fix(file: Path, patched: frozenset[Version]) -> Fix:
    must(_NAME.fullmatch(file.stem), f"{file.stem} is no name of a fix")
    entry = Table(tomllib.loads(file.read_text(encoding="utf-8")))
    must(all(map(is_package_file, entry.texts("code"))), "code names a file outside of sglang/")
    states = entry.texts_by_versions("releases")
    return Fix(
        name=file.stem,
        upstream_pr=entry.number("upstream-pr"),
        title=entry.text("title"),
        symptom=entry.text("symptom"),
        code=entry.texts("code"),
        states={versions: State(states[versions]) for versions in states},
        notes=entry.texts_by_versions("notes"),
        left=entry.texts_by_versions("left-open"),
        when=tuple(map(_exposure, entry.tables("when"))),
        log=tuple(map(pattern, entry.texts("log"))),
        needs=entry.texts("needs"),
        patched=patched,
        upstream_code={
            versions: _lines(files) for versions, files in entry.by_versions("upstream-code").items()
        },
    )


def _lines(files: Table) -> dict[str, tuple[str, ...]]:
    lines = {path: files.texts(path) for path in files}
    must(all(map(is_package_file, lines)), "upstream-code names a file outside of sglang/")
    every = (line for each in lines.values() for line in each)
    must(all(line.strip() == line != "" for line in every), "upstream-code has what is no line")
    return lines


def _exposure(entry: Table) -> Exposure:
    flags = entry.texts("flags")
    must(all(map(_FLAG.fullmatch, flags)), "when has what is no flag, --flag=value or --flag>number")
    return Exposure(entry.texts("architectures"), flags)


def _at(table: Mapping[str, _T], version: Version) -> _T | None:
    return next((value for versions, value in table.items() if version in _specifier(versions)), None)


_specifier = lru_cache(maxsize=None)(SpecifierSet)


def _patches_dir() -> Path:
    package = Path(__file__).parent
    # A wheel carries the patches inside the package; a checkout has them beside python/.
    inside = package / "patches"
    return inside if inside.is_dir() else package.parents[1] / "patches"
