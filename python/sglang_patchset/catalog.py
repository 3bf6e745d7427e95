"""The pinned releases and the fixes, as `patches/releases.toml` and `patches/fixes.toml` list them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sglang_patchset.errors import PatchsetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class CellState(Enum):
    """What a release needs of a fix."""

    PATCH = "patch"
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
    without which the bug cannot be reached: they are in the tree that the tests are red on.
    """

    test: str
    reds: Mapping[str, Mapping[str, str]]
    gpus: int = 0
    behind: tuple[str, ...] = ()

    def reds_of(self, version: Version) -> Mapping[str, str]:
        """The tests that fail on that release as published, with their signatures."""
        matching = (tests for versions, tests in self.reds.items() if version in SpecifierSet(versions))
        return {name: signature for tests in matching for name, signature in tests.items()}


@dataclass(frozen=True)
class Fix:
    """One fix; `cells` is keyed by version specifiers, of which at most one holds a release.

    `code` names the files without which a release cannot have the bug. `suite` runs without a GPU, and on
    every release; those of `cuda` on the releases that have reds there.
    """

    name: str
    upstream_pr: int
    title: str
    symptom: str
    code: tuple[str, ...]
    cells: Mapping[str, Cell]
    suite: Suite
    cuda: tuple[Suite, ...] = ()

    def cell(self, version: Version) -> Cell | None:
        """The fix's state in that release; None for a release that nobody has looked at.

        A development version or a local build is nobody's release, whatever range it falls into.
        """
        if version.is_prerelease or version.local:
            return None
        return next(
            (cell for versions, cell in self.cells.items() if version in SpecifierSet(versions)), None
        )

    def later(self, pinned: Iterable[Version]) -> list[str]:
        """The version specifiers of the cells that hold more than a single one of the pinned releases."""
        single = [SpecifierSet(f"=={version}") for version in pinned]
        return [versions for versions in self.cells if SpecifierSet(versions) not in single]


@dataclass(frozen=True)
class Release:
    """A pinned SGLang release.

    `patchset` is the number of the release's patch set, raised with every change to its series. `wheels`
    maps the published wheels' file names to their sha256, and `runs_with` the packages that the release
    pins to their versions. `tree` is git's id of the files, as `checkout` commits them.
    """

    version: Version
    date: str
    patchset: int
    python: tuple[str, ...]
    runs_with: Mapping[str, str]
    wheels: Mapping[str, str]
    tree: str

    @property
    def patched_version(self) -> Version:
        """The version of a wheel that has the whole series."""
        return Version(f"{self.version}+patchset.{self.patchset}")


@dataclass(frozen=True)
class Catalog:
    """Both tables; `root` is the directory that holds them and each release's series.

    `references` are later releases, without a series, on which upstream's own fixes are tested.
    """

    root: Path
    default: Release
    releases: Mapping[Version, Release]
    references: Mapping[Version, Release]
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


def published_version(version: Version) -> Version:
    """The version without the mark of a patched wheel."""
    return Version(version.public) if (version.local or "").startswith("patchset.") else version


def load(root: Path | None = None) -> Catalog:
    """Read both tables from `root`, by default the patch set that came with this package."""
    root = root or _patches_dir()
    default, releases, references = parse_releases((root / "releases.toml").read_text(encoding="utf-8"))
    fixes = {
        name: Fix(
            name=name,
            upstream_pr=entry["upstream-pr"],
            title=entry["title"],
            symptom=entry["symptom"],
            code=tuple(entry["code"]),
            cells={
                versions: Cell(CellState(cell["state"]), cell.get("note", ""))
                for versions, cell in entry["releases"].items()
            },
            suite=_suite(entry),
            cuda=tuple(_suite(suite) for suite in entry.get("cuda", ())),
        )
        for name, entry in tomllib.loads((root / "fixes.toml").read_text(encoding="utf-8")).items()
    }
    return Catalog(root, releases[default], releases, references, fixes)


def parse_releases(text: str) -> tuple[Version, dict[Version, Release], dict[Version, Release]]:
    """The default release, the pinned releases and the references, of the text of `releases.toml`."""
    table = tomllib.loads(text)
    releases, references = (_releases(table.get(key, {})) for key in ("releases", "references"))
    return Version(table["default"]), releases, references


def _suite(table: Mapping[str, Any]) -> Suite:
    return Suite(table["test"], table.get("reds", {}), table.get("gpus", 0), tuple(table.get("behind", ())))


def _releases(table: Mapping[str, Any]) -> dict[Version, Release]:
    return {
        Version(version): Release(
            version=Version(version),
            date=entry["date"],
            patchset=entry.get("patchset", 0),
            python=tuple(entry["python"]),
            runs_with=entry["runs-with"],
            wheels=entry["wheels"],
            tree=entry.get("tree", ""),
        )
        for version, entry in table.items()
    }


def _patches_dir() -> Path:
    """`patches/` lies inside an installed package, and at the top of a checkout that runs in place."""
    packaged = Path(__file__).parent / "patches"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "patches"
