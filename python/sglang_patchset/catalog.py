"""The pinned releases and the fixes, as `patches/releases.toml` and `patches/fixes.toml` list them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from sglang_patchset.errors import PatchsetError
from sglang_patchset.schema import Table, must, pattern

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")
# No part is empty, or begins as an option or as what goes up.
_PATH = re.compile("([A-Za-z0-9_][A-Za-z0-9_.+-]*/)+[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class CellState(Enum):
    """What a release needs of a fix; an UNPATCHED one has the bug, and nothing is carried for it."""

    PATCH = "patch"
    UNPATCHED = "unpatched"
    UPSTREAM = "upstream"
    NOT_AFFECTED = "not-affected"


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix of fixes and releases."""

    state: CellState
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """A file of regression tests.

    `reds` maps version specifiers (PEP 440) to the tests that fail on those releases as published, each with
    a regular expression for its failure's text. `gpus` is how many GPUs they take. `behind` names fixes
    without which the bug cannot be reached: they are in the tree that the tests are red on. `own_packages`
    are version specifiers too, of the releases that the tests can say something of only where the torch and
    the transformers are those that the release runs with. `not_run` maps those of the releases that the
    tests do not fit to the reason.
    """

    test: str
    reds: Mapping[str, Mapping[str, str]]
    gpus: int = 0
    behind: tuple[str, ...] = ()
    own_packages: tuple[str, ...] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)

    def needs_own_packages(self, version: Version) -> bool:
        """Whether the tests take that release's own torch and transformers."""
        return any(version in SpecifierSet(versions) for versions in self.own_packages)

    def misfit(self, version: Version) -> str:
        """Why the tests do not fit that release; empty where they do."""
        reasons = (reason for versions, reason in self.not_run.items() if version in SpecifierSet(versions))
        return next(reasons, "")

    def reds_of(self, version: Version) -> Mapping[str, str]:
        """The tests that fail on that release as published, with their signatures."""
        matching = (tests for versions, tests in self.reds.items() if version in SpecifierSet(versions))
        return {name: signature for tests in matching for name, signature in tests.items()}


@dataclass(frozen=True)
class Fix:
    """One fix; `cells` is keyed by version specifiers, of which at most one holds a release.

    `code` names the files without which a release cannot have the bug. `suite` runs without a GPU, and on
    every release; those of `cuda` on the releases that have reds there. `needs` names earlier fixes on top
    of which the patch of this one applies; `Catalog.needed` says where. `upstream_code` is keyed by version
    specifiers too, of releases that have the fix: lines without their indentation, by their file.
    """

    name: str
    upstream_pr: int
    title: str
    symptom: str
    code: tuple[str, ...]
    cells: Mapping[str, Cell]
    suite: Suite
    cuda: tuple[Suite, ...] = ()
    needs: tuple[str, ...] = ()
    upstream_code: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def upstream_lines(self, version: Version) -> Mapping[str, tuple[str, ...]]:
        """Lines of upstream's own fix in that release, by their file; none of a file that it leaves alone."""
        matching = (files for each, files in self.upstream_code.items() if version in SpecifierSet(each))
        return {path: lines for files in matching for path, lines in files.items()}

    def cell(self, version: Version) -> Cell | None:
        """The fix's state in that release; None for a release that nobody has looked at.

        A development version or a local build is nobody's release, whatever range it falls into.
        """
        if version.is_prerelease or version.local:
            return None
        return next(
            (cell for versions, cell in self.cells.items() if version in SpecifierSet(versions)), None
        )

    def ranges(self, pinned: Iterable[Version]) -> list[str]:
        """The version specifiers of the cells that hold more than a single one of the pinned releases."""
        single = [SpecifierSet(f"=={version}") for version in pinned]
        return [versions for versions in self.cells if SpecifierSet(versions) not in single]


@dataclass(frozen=True)
class Release:
    """A pinned SGLang release.

    `patchset` is the number of the release's patch set, raised with every change to its series. `wheels`
    maps the published wheels' file names to their sha256, `patched` those that are made of them, and
    `runs_with` the packages that the release pins to their versions. `tree` is git's id of the files, as
    `checkout` commits them.
    """

    version: Version
    date: str
    patchset: int
    python: tuple[str, ...]
    runs_with: Mapping[str, str]
    wheels: Mapping[str, str]
    tree: str
    patched: Mapping[str, str] = field(default_factory=dict)

    @property
    def patched_version(self) -> Version:
        """The version of a wheel that has the whole series."""
        return Version(f"{self.version}+patchset.{self.patchset}")


@dataclass(frozen=True)
class Catalog:
    """Both tables; `root` is the directory that holds them and each release's series."""

    root: Path
    default: Release
    releases: Mapping[Version, Release]
    fixes: Mapping[str, Fix]

    def pinned(self) -> str:
        """The pinned versions as a message names them."""
        return ", ".join(map(str, self.releases))

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
            PatchsetError: there is none.
        """
        try:
            return self.fixes[name]
        except KeyError:
            raise PatchsetError(f"unknown fix {name}: choose from {', '.join(self.fixes)}") from None

    def needed(self, name: str, version: Version) -> frozenset[str]:
        """The fixes that have to be in that release with this one: what it needs, and what that needs.

        It counts where both have a patch.
        """
        names = (name, *self.fixes[name].needs) if name in self.fixes else ()
        cells = {each: self.fixes[each].cell(version) for each in names}
        patched = [each for each, cell in cells.items() if cell and cell.state is CellState.PATCH]
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
    """Read both tables from `root`, by default the patch set that came with this package.

    Raises:
        PatchsetError: a table is missing, or says what it cannot say.
    """
    root = root or _patches_dir()
    with _reading(root / "releases.toml") as text:
        default, releases = parse_releases(text)
    with _reading(root / "fixes.toml") as text:
        table = Table(tomllib.loads(text))
        fixes: dict[str, Fix] = {}
        for name in table:
            fix = _fix(name, table)
            # None after it: there are no cycles.
            must(fixes.keys() >= set(fix.needs), f"{name}: needs names what is no fix before it")
            fixes[name] = fix
        for suite in (suite for fix in fixes.values() for suite in fix.cuda):
            must(all(name in fixes for name in suite.behind), "behind names a fix that is not there")
    return Catalog(root, releases[default], releases, fixes)


def parse_releases(text: str) -> tuple[Version, dict[Version, Release]]:
    """The default release and the pinned releases, of the text of `releases.toml`.

    Raises:
        ValueError: it is none.
    """
    table = Table(tomllib.loads(text))
    releases = _releases(table.table("releases"))
    default = Version(table.text("default"))
    must(default in releases, "default is not one of the releases")
    return default, releases


@contextmanager
def _reading(file: Path) -> Iterator[str]:
    """A table's text; what is wrong with it is said of the file."""
    try:
        yield file.read_text(encoding="utf-8")
    except OSError as error:
        raise PatchsetError(f"{file}: {error.strerror}: install sglang-patchset again") from None
    except RecursionError:
        raise PatchsetError(f"{file}: nested too deeply: mend it, or install sglang-patchset again") from None
    except ValueError as error:
        raise PatchsetError(f"{file}: {error}: mend it, or install sglang-patchset again") from None


def _fix(name: str, table: Table) -> Fix:
    must(_NAME.fullmatch(name), f"{name} is no name of a fix")
    try:
        entry = table.table(name)
        must(all(map(is_package_file, entry.texts("code"))), "code names a file outside of sglang/")
        return Fix(
            name=name,
            upstream_pr=entry.number("upstream-pr"),
            title=entry.text("title"),
            symptom=entry.text("symptom"),
            code=entry.texts("code"),
            cells={
                versions: Cell(CellState(cell.text("state")), cell.text("note", ""))
                for versions, cell in entry.by_versions("releases").items()
            },
            suite=_suite(entry),
            cuda=tuple(map(_suite, entry.tables("cuda"))),
            needs=entry.texts("needs"),
            upstream_code={
                versions: _lines(files) for versions, files in entry.by_versions("upstream-code", {}).items()
            },
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _lines(files: Table) -> dict[str, tuple[str, ...]]:
    lines = {path: files.texts(path) for path in files}
    must(all(map(is_package_file, lines)), "upstream-code names a file outside of sglang/")
    must(
        all(line.strip() == line != "" for each in lines.values() for line in each), "upstream-code: no line"
    )
    return lines


def _suite(entry: Table) -> Suite:
    test = entry.text("test")
    must(_PATH.fullmatch(test) and test.startswith("tests/regression/"), "test is not in tests/regression/")
    reds = {
        versions: {name: pattern(tests.text(name)) for name in tests}
        for versions, tests in entry.by_versions("reds", {}).items()
    }
    own_packages = entry.texts("own-packages")
    not_run = entry.table("not-run", {})
    for versions in (*own_packages, *not_run):
        SpecifierSet(versions)
    return Suite(
        test=test,
        reds=reds,
        gpus=entry.number("gpus", 0),
        behind=entry.texts("behind"),
        own_packages=own_packages,
        not_run={versions: not_run.text(versions) for versions in not_run},
    )


def _releases(table: Table) -> dict[Version, Release]:
    return {Version(version): _release(Version(version), table.table(version)) for version in table}


def _release(version: Version, entry: Table) -> Release:
    try:
        date, tree, pythons = entry.text("date"), entry.text("tree", ""), entry.texts("python")
        must(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", date), "date is no date")
        must(re.fullmatch("([0-9a-f]{40})?", tree), "tree is no id of git's")
        must(all(re.fullmatch("3[.][0-9]+", python) for python in pythons), "python names no Python")
        runs_with = entry.table("runs-with")
        return Release(
            version=version,
            date=date,
            patchset=entry.number("patchset", 0),
            python=pythons,
            runs_with={package: runs_with.text(package) for package in runs_with},
            wheels=_wheels(version, entry.table("wheels")),
            tree=tree,
            patched=_wheels(version, entry.table("patched", {})),
        )
    except ValueError as error:
        raise ValueError(f"{version}: {error}") from None


def _wheels(version: Version, table: Table) -> Mapping[str, str]:
    """The sha256 of each wheel."""
    for name in table:
        must("/" not in name, f"{name} is no wheel of {version}")
        project, found, _, _ = parse_wheel_filename(name)
        must((project, published_version(found)) == ("sglang", version), f"{name} is no wheel of {version}")
        must(re.fullmatch("[0-9a-f]{64}", table.text(name)), f"{name} has no sha256")
    return {name: table.text(name) for name in table}


def _patches_dir() -> Path:
    """`patches/` lies inside an installed package, and at the top of a checkout that runs in place."""
    packaged = Path(__file__).parent / "patches"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "patches"
