"""The published wheels, got once by the tool itself and kept in .cache/, and packages made of them."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import catalog, cli, patches, releases
from sglang_patchset.catalog import Catalog
from sglang_patchset.patches import Series
from sglang_patchset.queue import repository

ROOT = Path(__file__).parents[2]
_TABLES = catalog.load()
# Each pinned release; those that have a wheel for this interpreter; those that have patches.
RELEASES = tuple(str(version) for version in _TABLES.releases)
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HERE = tuple(str(version) for version, each in _TABLES.releases.items() if _PYTHON in each.python)
PATCHED = tuple(str(version) for version, release in _TABLES.releases.items() if release.fixes)


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line of a refusal."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("sglang-patchset: ")
        assert self.err.count("\n") == 1
        return self.err


Command = Callable[..., Result]


@pytest.fixture(scope="session")
def tables() -> Catalog:
    return _TABLES


@pytest.fixture(scope="session", params=PATCHED)
def series(request: pytest.FixtureRequest, tables: Catalog) -> Series:
    """Each series in turn that is not empty."""
    return patches.load(tables, tables.releases[Version(request.param)])


@pytest.fixture(scope="session")
def wheels(tables: Catalog) -> Mapping[str, Path]:
    """Each pinned release's published wheel for this interpreter."""
    found = {}
    for release in HERE:
        cache = ROOT / ".cache" / f"{release}-{sys.implementation.cache_tag}-{platform.machine()}"
        cache.mkdir(parents=True, exist_ok=True)
        source = next((str(wheel) for wheel in cache.glob("*.whl")), release)
        found[release] = releases.obtain(tables, source, cache)
    return found


@pytest.fixture(scope="session")
def unpacked(
    wheels: Mapping[str, Path], tables: Catalog, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """As much of each wheel, unpacked, as the tool looks at, and a file that it does not.

    Nothing may change these files: the trees below are hard links to them.
    """
    found = {}
    for version, wheel in wheels.items():
        release = tables.releases[Version(version)]
        info = f"sglang-{version}.dist-info"
        others = [f"sglang/{name}.py" for name in ("__init__", "_version", "utils")]
        others += [f"{info}/RECORD", f"{info}/METADATA"]
        looked_at = {
            path
            for fix in tables.fixes.values()
            for path in (*fix.code, *fix.upstream_lines(release.version))
        }
        tree = tmp_path_factory.mktemp(version)
        with zipfile.ZipFile(wheel) as archive:
            files = {*patches.load(tables, release).files, *others}
            archive.extractall(tree, files | looked_at & set(archive.namelist()))
        found[version] = tree
    return found


@pytest.fixture
def tree(unpacked: Mapping[str, Path], tmp_path: Path) -> Path:
    """An unpacked 0.5.12."""
    return link(unpacked["0.5.12"], tmp_path / "tree")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `sglang-patchset` in this process."""

    def run(*arguments: object) -> Result:
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of this project whose patches can be changed."""
    for name in ("python", "patches", "tests/regression"):
        shutil.copytree(ROOT / name, tmp_path / "project" / name)
    return tmp_path / "project"


def from_copy(project: Path, *arguments: object) -> Result:
    """Run the tool of a copy."""
    env = {**os.environ, "PYTHONPATH": str(project / "python")}
    command = [sys.executable, "-m", "sglang_patchset", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def checkouts(
    wheels: Mapping[str, Path], tables: Catalog, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """A checkout of each release that has patches; nothing may change them."""
    directory = tmp_path_factory.mktemp("checkouts")
    for release in PATCHED:
        repository.checkout(tables, wheels[release], directory / release)
    return {release: directory / release for release in PATCHED}


@pytest.fixture
def checkout(checkouts: Mapping[str, Path], tmp_path: Path) -> Path:
    """A checkout of 0.5.12."""
    return copy(checkouts["0.5.12"], tmp_path / "checkout")


def copy(checkout: Path, target: Path) -> Path:
    """A copy of a checkout, in which its maker commits; git appends to some of its own files."""
    link(checkout, target)
    shutil.rmtree(target / ".git")
    shutil.copytree(checkout / ".git", target / ".git")
    for name, value in (("name", "A Contributor"), ("email", "contributor@example.org")):
        git(target, "config", f"user.{name}", value)
    return target


def git(repository: Path, *arguments: str) -> str:
    """Run the user's git in a repository."""
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def link(source: Path, target: Path) -> Path:
    """A copy of a tree by hard links, as a package cache makes it."""
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)
    return target


def edit(file: Path, text: str) -> None:
    """Add a line to a file; the file is replaced, so that others who link to it keep theirs."""
    content = file.read_text() + text + "\n"
    file.unlink()
    file.write_text(content)


def change(file: Path, old: str, new: str) -> None:
    """Change the one place in a file; the file is replaced."""
    content = file.read_text()
    assert content.count(old) == 1
    file.unlink()
    file.write_text(content.replace(old, new))


def digest(tree: Path) -> dict[str, str]:
    """What a tree consists of: every path, with its mode and the sha256 of its bytes."""
    return {
        str(path.relative_to(tree)): f"{path.stat().st_mode:o} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in sorted(tree.rglob("*"))
    }
