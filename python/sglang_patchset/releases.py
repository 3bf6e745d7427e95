"""The published wheels of the pinned releases: got by the user's own pip, checked before they are opened."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from packaging.tags import Tag
from packaging.version import Version

from sglang_patchset import files, record
from sglang_patchset.catalog import Catalog, Release
from sglang_patchset.errors import PatchsetError

# What zipfile raises over a bad archive: an encrypted member and an unknown compression are a RuntimeError,
# a malformed RECORD is a ValueError, a missing member a KeyError.
_DAMAGES = (BadZipFile, zlib.error, csv.Error, EOFError, MemoryError, RuntimeError, ValueError, KeyError)

_UNREACHED = re.compile(r"Could not fetch URL (\S+): (.+?)(?: for url: \S+)? - skipping")


class WheelFile(ZipFile):
    """A wheel that is read; each member is compared with RECORD as it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        name, version, *_ = path.name.split("-")
        self.dist_info_path = f"{name}-{version}.dist-info"
        self.record_path = f"{self.dist_info_path}/RECORD"
        lines = super().open(self.record_path).read().decode("utf-8").splitlines()
        self._hashes = {path: digest for path, digest, _ in csv.reader(lines)}

    def open(self, name: str | ZipInfo, *_: object, **__: object) -> BinaryIO:
        """A member's bytes, which are those that RECORD lists."""
        info = name if isinstance(name, ZipInfo) else self.getinfo(name)
        with super().open(info) as member:
            data = member.read()
        path = info.filename
        if not info.is_dir() and path != self.record_path and self._hashes.get(path) != record.digest(data):
            raise BadZipFile(f"Hash mismatch for file '{path}'")
        return io.BytesIO(data)


def obtain(catalog: Catalog, name: str, scratch: Path, find_links: Path | None = None) -> Path:
    """The published wheel that `name` says: a wheel file as it is, a release's version by way of pip.

    Args:
        scratch: an empty directory, for what is downloaded.
        find_links: a directory of wheels to use in place of the package index.

    Raises:
        PatchsetError: the release is not pinned, pip cannot get it, or the wheel is not the published one.
    """
    wheel = Path(name)
    if wheel.suffix != ".whl":
        return fetch(catalog.release(name), scratch, find_links)
    if not wheel.is_file():
        raise PatchsetError(f"{wheel}: no such file: name a wheel, or one of {catalog.pinned()}")
    check(catalog, wheel)
    return wheel


def fetch(release: Release, scratch: Path, find_links: Path | None = None, tag: Tag | None = None) -> Path:
    """A release's published wheel by way of pip, as `obtain` gets it, for another Python if `tag` says so."""
    wheel = _download(release, scratch, find_links, tag)
    _check_sha256(wheel, release)
    return wheel


def check(catalog: Catalog, wheel: Path) -> Release:
    """The release that a wheel file is the published wheel of, by its name and sha256.

    Raises:
        PatchsetError: it is none of the pinned ones.
    """
    for release in catalog.releases.values():
        if wheel.name in release.wheels:
            _check_sha256(wheel, release)
            return release
    raise PatchsetError(f"{wheel}: not the wheel of a pinned release ({catalog.pinned()}): get one of those")


def listed(catalog: Catalog, wheel: Path) -> str:
    """Whether a release lists a wheel file, by its name and sha256, as "published" or as "patched"."""
    found = sha256(wheel)
    for release in catalog.releases.values():
        for kind, wheels in (("published", release.wheels), ("patched", release.patched)):
            if wheels.get(wheel.name) == found:
                return kind
    return "unlisted"


def sha256(file: Path) -> str:
    """A file's sha256, in hexadecimal."""
    return hashlib.sha256(files.read(file, files.WHEEL)).hexdigest()


@contextmanager
def opened(wheel: Path) -> Iterator[WheelFile]:
    """Open a wheel whose every member is checked against RECORD as it is read.

    Raises:
        PatchsetError: it is damaged, larger than any of SGLang's, or has a member that theirs cannot have.
    """
    try:
        # Before WheelFile, which reads RECORD at once, however large.
        with ZipFile(wheel) as archive:
            _check_members(wheel, archive.infolist())
        with WheelFile(wheel) as opened:
            yield opened
    except _DAMAGES as error:
        raise PatchsetError(f"{wheel}: damaged ({error}): download or build it again") from None


def _check_members(wheel: Path, members: Sequence[ZipInfo]) -> None:
    """See that a wheel consists of what SGLang's do, by the archive's directory alone."""
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    seen = set()
    for member in members:
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        parts = PurePosixPath(name).parts
        if (
            not parts
            or parts[0] not in {"sglang", "tools", info}
            or ".." in parts
            or not name.isprintable()
            or "\\" in name
            or kind not in (0, stat.S_IFREG, stat.S_IFDIR)
        ):
            raise PatchsetError(f"{wheel}: has the member {name}, which is not SGLang's: download it again")
        # Where names have no case, two of them may be one file.
        if name.casefold() in seen:
            raise PatchsetError(f"{wheel}: has the member {name} twice: download it again")
        seen.add(name.casefold())
        # zipfile takes what lies before the archive for a part of something else.
        if member.header_offset < 0:
            raise BadZipFile(f"{name} lies outside of it")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise BadZipFile(f"{name} is compressed as no wheel is")
    # zipfile reads no more of a member than is declared.
    if sum(member.file_size for member in members) > files.WHEEL:
        raise PatchsetError(f"{wheel}: has more than {files.WHEEL >> 20} MB in it: download it again")


def _check_sha256(wheel: Path, release: Release) -> None:
    expected = release.wheels.get(wheel.name)
    found = sha256(wheel)
    if found != expected:
        raise PatchsetError(
            f"{wheel}: its sha256 is {found}, the published wheel's is {expected}: download it again"
        )


def _download(release: Release, scratch: Path, find_links: Path | None, tag: Tag | None) -> Path:
    requirement = f"sglang=={release.version}"
    scratch = scratch.absolute()
    requirements = scratch / "requirements.txt"
    # With the hashes in its hands, pip refuses anything but the published wheels before it opens them.
    hashes = [f"--hash=sha256:{digest}" for digest in release.wheels.values()]
    requirements.write_text(" ".join([requirement, *hashes]) + "\n", encoding="utf-8")
    options = [f"--dest={scratch}", f"--requirement={requirements}"]
    if tag:
        options += for_tag(tag)
    result = pip("download", *options, find_links=find_links)
    if result.returncode:
        raise PatchsetError(
            why(release.version, result, f" (there are some for {', '.join(release.python)})", find_links)
        )
    (wheel,) = scratch.glob("*.whl")
    return wheel


def pip(verb: str, *options: str, find_links: Path | None) -> subprocess.CompletedProcess[str]:
    """Run the user's pip on wheels, and say all that it can about them.

    Args:
        find_links: a directory of wheels to use in place of the package index.
    """
    # Only its verbose output says what a package index answered; it must not wait for a password.
    # Nothing that lies in the working directory, or that PYTHONPATH names from there, is taken for pip.
    safe = ["-P"] * (sys.version_info >= (3, 11))
    command = [sys.executable, *safe, "-m", "pip", *verb.split(), "-vv", "--no-input", "--only-binary=:all:"]
    command += ["--no-deps"] * (verb == "download")
    if find_links:
        command += ["--no-index", f"--find-links={find_links.absolute()}"]
    return subprocess.run(
        [*command, *options],
        cwd=os.sep,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def for_tag(tag: Tag) -> list[str]:
    """pip's options to get the wheel of that tag, whatever this machine and Python are."""
    options = [f"--platform={tag.platform}", f"--abi={tag.abi}"]
    if match := re.fullmatch(r"(cp|py)(\d)(\d*)", tag.interpreter):
        options += [f"--implementation={match[1]}", f"--python-version={match[2]}.{match[3] or 99}"]
    return options


def why(
    version: Version,
    result: subprocess.CompletedProcess[str],
    others: str = "",
    find_links: Path | None = None,
    *,
    any_machine: bool = False,
) -> str:
    """What a failed download means to its user; `others` says which wheels there are.

    With `find_links`, only those in it; with `any_machine`, a wheel of any would have done.
    """
    requirement = f"sglang=={version}"
    stdout, stderr = result.stdout, result.stderr
    # An index that does not have SGLang says 404; another one may have it.
    failures = [each for each in _UNREACHED.findall(stdout) if not each[1].startswith("404 ")]
    if failures:
        url, reason = failures[0]
        return (
            f"{requirement}: pip cannot reach {url} ({reason}): check the network and pip's index and "
            "credentials, or name a wheel file"
        )
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"{requirement}: what pip found is not the published wheel: check pip's index and find-links"
    missing = "No matching distribution found" in stderr
    if missing and any_machine:
        return f"{requirement}: pip finds no wheel of it: check the version, and pip's index"
    if missing and find_links:
        return (
            f"{find_links}: no wheel of {requirement} that fits{others}: put it there, or name a wheel file"
        )
    if missing:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"{requirement}: pip finds no wheel for this machine and Python {python}{others}: "
            "check pip's index, or name a wheel file"
        )
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return (
        f"{requirement}: pip cannot get it ({errors[-1] if errors else 'no message'}): "
        f"try `{Path(sys.executable).name} -m pip download --no-deps {requirement}`"
    )
