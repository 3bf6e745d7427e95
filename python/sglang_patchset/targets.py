"""What can be patched: an installed SGLang, an editable one, a directory, a wheel file.

Nothing here imports sglang.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from sglang_patchset import files, git, record
from sglang_patchset.errors import PatchsetError
from sglang_patchset.releases import opened

# Returns the bytes of a file by its path in the wheel, None where there is none.
Reader = Callable[[str], "bytes | None"]
# The same by the id that git names a file's bytes by.
Blobs = Callable[[str], "bytes | None"]

INSTALLED = "installed"
_INFO = re.compile(r"sglang(-[^-]+(-py[0-9.]+)?)?[.](dist|egg)-info", re.IGNORECASE)
_VERSION = re.compile(r"^(?:__version__ = )?version = ['\"](?P<version>[^'\"]+)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A directory `sglang` that can be imported, and the version that it claims to be."""

    directory: Path
    version: Version | None

    def __str__(self) -> str:
        return str(self.directory)

    def path(self, path: str) -> Path:
        """Where a file lies, given its path in the wheel."""
        return self.directory / path.removeprefix("sglang/")

    def read(self, path: str) -> bytes | None:
        """A file's bytes, given its path in the wheel; None where there is none."""
        try:
            return files.read(self.path(path))
        except FileNotFoundError:
            return None

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """`read`; a wheel has to be opened for it."""
        yield self.read

    def blob(self, name: str) -> bytes | None:
        """What the repository that the package is in has under a blob id; None where there is none."""
        repository = next((path for path in self.directory.parents if (path / ".git").exists()), None)
        return git.blob(repository, name) if repository else None

    def record(self) -> Path | None:
        """The RECORD that lists the package's files; an editable install's lists none of them."""
        found = []
        for path in sorted(self.directory.parent.glob("sglang-*.dist-info/RECORD")):
            try:
                if record.lists(files.read(path), "sglang/__init__.py"):
                    found.append(path)
            except ValueError as error:
                raise PatchsetError(f"{path}: damaged ({error}): reinstall SGLang") from None
        if len(found) > 1:
            # What an interrupted upgrade left says another version.
            names = [path.parent.name.removeprefix("sglang-").removesuffix(".dist-info") for path in found]
            ours = [path for path, name in zip(found, names, strict=True) if _parse(name) == self.version]
            if len(ours) != 1:
                raise PatchsetError(
                    f"{self.directory.parent}: the dist-info of SGLang {' and '.join(names)} lie in it, and "
                    f"the package is {self.version or 'of no version'}: uninstall SGLang and install it again"
                )
            found = ours
        return found[0] if found else None


@dataclass(frozen=True)
class Wheel:
    """A wheel file. It is never changed: what is made of it lies beside it."""

    file: Path
    version: Version

    def __str__(self) -> str:
        return str(self.file)

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open the wheel to read members by their path; None stands for no such member."""
        with opened(self.file) as wheel:
            names = set(wheel.namelist())
            yield lambda path: wheel.read(path) if path in names else None

    def blob(self, _: str) -> bytes | None:
        """As a package's; a wheel is in no repository."""
        return None


Target = Package | Wheel


def find(name: str) -> Target:
    """The target that a user names: `installed`, a wheel file or a directory.

    A directory is the package itself, what holds it (site-packages, an unpacked wheel, `python/`), a
    checkout's root, or the prefix of an environment.

    Raises:
        PatchsetError: there is no SGLang, or more than one.
    """
    if name == INSTALLED:
        return _installed()
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise PatchsetError(f"{name}: no such user: name the directory in full") from None
    if path.suffix == ".whl" and path.is_file():
        return _wheel(path)
    if not path.is_dir():
        raise PatchsetError(
            f"{name}: neither a fix, nor a directory, nor a wheel file: see `sglang-patchset list`"
        )
    packages = {package.directory: package for package in _packages(path.resolve())}
    if not packages:
        raise PatchsetError(
            f"{name}: no SGLang in it: name the package, its site-packages, environment or checkout"
        )
    if len(packages) > 1:
        raise PatchsetError(
            f"{name}: more than one SGLang in it: name one of {', '.join(map(str, packages))}"
        )
    return packages.popitem()[1]


def _installed() -> Package:
    # For a name without dots, find_spec imports nothing.
    spec = util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise PatchsetError("this interpreter has no sglang: name the environment or directory that has it")
    # A file may be a link into a package cache, which belongs to other environments too.
    return _package(Path(spec.origin).parent.resolve(), _distributions(None)[:1])


def _wheel(path: Path) -> Wheel:
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except InvalidWheelFilename:
        raise PatchsetError(
            f"{path}: not a wheel's file name: give it back the name it was published by"
        ) from None
    files.check(path, files.WHEEL)
    if name != "sglang":
        raise PatchsetError(f"{path}: a wheel of {name}: name one of sglang")
    return Wheel(path, version)


def _packages(directory: Path) -> Iterator[Package]:
    for candidate in (directory, directory / "sglang", directory / "python" / "sglang"):
        if _is_package(candidate):
            yield _package(candidate, _distributions(candidate.parent))
            return
    sites = [
        directory,
        *directory.glob("lib/python3*/site-packages"),
        *directory.glob("lib/python3*/dist-packages"),
    ]
    for site in sites:
        distributions = _distributions(site)
        if not distributions:
            continue
        for root in (site, *(each.editable for each in distributions)):
            if root and _is_package(root / "sglang"):
                yield _package((root / "sglang").resolve(), distributions)
                break


@dataclass(frozen=True)
class _Distribution:
    """What an installer wrote about SGLang: its version, and where an editable install's packages lie."""

    version: Version | None
    editable: Path | None


def _distributions(site: Path | None) -> list[_Distribution]:
    """What says that it is SGLang in a directory of packages; None stands for this interpreter's path."""
    found = []
    for directory in sys.path if site is None else [str(site)]:
        with suppress(OSError):
            found += sorted(path for path in Path(directory).iterdir() if _INFO.fullmatch(path.name))
    return [_distribution(path) for path in found]


def _distribution(info: Path) -> _Distribution:
    # An egg's may be a file.
    places = (info / "METADATA", info / "PKG-INFO", *([info] if info.is_file() else []))
    text = next(filter(None, map(_text, places)), "")
    header, _, _ = text.replace("\r\n", "\n").partition("\n\n")
    version = re.search(r"^Version:[ \t]*(\S+)", header, re.MULTILINE | re.IGNORECASE)
    return _Distribution(_parse(version[1] if version else None), _editable_root(info))


def _editable_root(info: Path) -> Path | None:
    """Where an editable install's packages lie (PEP 610)."""
    try:
        url = urlsplit(json.loads(_text(info / "direct_url.json"))["url"])
        return Path(unquote(url.path)) if url.scheme == "file" else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _text(path: Path) -> str:
    """A file's text, whatever it is written in; empty where there is none."""
    try:
        return files.read(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _is_package(directory: Path) -> bool:
    return (directory / "__init__.py").is_file() and (directory / "srt").is_dir()


def _package(directory: Path, distributions: Sequence[_Distribution]) -> Package:
    if match := _VERSION.search(_text(directory / "_version.py")):
        return Package(directory, _parse(match["version"]))
    claims = {distribution.version for distribution in distributions}
    # Where they differ, none is to be believed.
    return Package(directory, claims.pop() if len(claims) == 1 else None)


def _parse(claim: str | None) -> Version | None:
    try:
        return Version(claim) if claim else None
    except InvalidVersion:
        return None
