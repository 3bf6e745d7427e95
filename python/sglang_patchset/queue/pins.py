"""A release in `patches/`: what the package index has of it, and the wheels that are made of that."""

from __future__ import annotations

import email
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from sglang_patchset import releases, wheels
from sglang_patchset.catalog import Catalog, Release, read_release
from sglang_patchset.errors import PatchsetError
from sglang_patchset.queue import repository
from sglang_patchset.targets import Wheel

# What decides whether a release's patch can matter, or its tests can run.
_RUNS_WITH = ("torch", "transformers", "torchao", "sglang-kernel", "flashinfer-python")


def pin(catalog: Catalog, name: str, find_links: Path | None = None) -> Release:
    """Add a release to `patches/`, with an empty series.

    Args:
        find_links: a directory of wheels to use in place of the package index.

    Raises:
        PatchsetError: pip finds no wheel of it, or finds other wheels than those that are pinned already.
    """
    catalog.clone()
    try:
        version = Version(name)
    except InvalidVersion:
        raise PatchsetError(f"{name}: not a version: name a release of SGLang, as 0.5.12") from None
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        release = _look(version, Path(scratch), find_links)
    if pinned := catalog.releases.get(version):
        _compare(pinned, release)
        return pinned
    directory = catalog.root / str(version)
    with tempfile.TemporaryDirectory(dir=catalog.root, prefix=".patchset-") as scratch:
        draft = Path(scratch, str(version))
        draft.mkdir()
        (draft / "release.toml").write_text(_table(release), encoding="utf-8")
        (draft / "wheels.sha256").write_text(_hashes(release.wheels), encoding="utf-8")
        (draft / "series").touch()
        # What was written is read before it counts.
        read_release(draft)
        os.rename(draft, directory)
    return release


def list_patched(catalog: Catalog, find_links: Path | None = None) -> None:
    """Write into each release's `patched.sha256` what its patched wheels are, by making all of them.

    Raises:
        PatchsetError: a published wheel cannot be got.
    """
    catalog.clone()
    for release in catalog.releases.values():
        patched = {}
        for name in release.wheels if release.patchset else ():
            *_, tags = parse_wheel_filename(name)
            with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
                wheel = releases.fetch(release, Path(scratch), find_links, min(tags, key=str))
                made = wheels.patch(catalog, Wheel(wheel, release.version), Path(scratch, "out"))
                patched[made.name] = releases.sha256(made)
        if patched:
            place = catalog.root / str(release.version) / "patched.sha256"
            place.write_text(_hashes(patched), encoding="utf-8")


def _look(version: Version, scratch: Path, find_links: Path | None) -> Release:
    """What the index has of a release."""
    names = sorted(_names(version, find_links))
    if not names:
        # The same question as a download, for pip to say why.
        failed = releases.pip("download", f"--dest={scratch}", f"sglang=={version}", find_links=find_links)
        raise PatchsetError(releases.why(version, failed, any_machine=True))
    files = [_download(version, name, scratch, find_links) for name in names]
    pythons = {python for name in names for python in re.findall(r"-cp(\d)(\d+)-", name)}
    wheel = files[0]
    with releases.opened(wheel) as archive:
        info = archive.getinfo(f"{archive.dist_info_path}/METADATA")
        metadata = email.message_from_bytes(archive.read(info))
    release = Release(
        version=version,
        # The index does not tell pip when a file came; the wheel tells when it was built.
        date="{:04}-{:02}-{:02}".format(*info.date_time),
        patchset=0,
        python=tuple(sorted((".".join(python) for python in pythons), key=Version)),
        runs_with=_runs_with(metadata.get_all("Requires-Dist", [])),
        wheels={file.name: releases.sha256(file) for file in files},
        tree="",
    )
    return replace(release, tree=repository.tree(release, wheel))


def _names(version: Version, find_links: Path | None) -> set[str]:
    """The names of all wheels of a release: where it is verbose, pip names those for other machines too."""
    result = releases.pip("index versions", "--pre", "sglang", find_links=find_links)
    return set(re.findall(rf"sglang-{re.escape(str(version))}-[\w.]+-[\w.]+-[\w.]+\.whl", result.stdout))


def _download(version: Version, name: str, scratch: Path, find_links: Path | None) -> Path:
    try:
        *_, tags = parse_wheel_filename(name)
    except InvalidWheelFilename as error:
        raise PatchsetError(f"{name}: {error}: pin this release by hand") from None
    options = [f"--dest={scratch}", *releases.for_tag(min(tags, key=str))]
    result = releases.pip("download", *options, f"sglang=={version}", find_links=find_links)
    if not (scratch / name).exists():
        raise PatchsetError(releases.why(version, result))
    return scratch / name


def _runs_with(requirements: Sequence[str]) -> dict[str, str]:
    """The versions that the release pins, of the packages that matter, in their order."""
    pinned = {}
    for requirement in map(Requirement, requirements):
        (specifier,) = requirement.specifier if len(requirement.specifier) == 1 else (None,)
        if specifier and specifier.operator == "==" and requirement.marker is None:
            pinned[canonicalize_name(requirement.name)] = specifier.version
    return {name: pinned[canonicalize_name(name)] for name in _RUNS_WITH if canonicalize_name(name) in pinned}


def _compare(pinned: Release, found: Release) -> None:
    """See that the index still has what was pinned; it may have less."""
    for name, digest in found.wheels.items():
        if pinned.wheels.get(name) != digest:
            raise PatchsetError(
                f"{name}: pip's index has it with the sha256 {digest}, wheels.sha256 says "
                f"{pinned.wheels.get(name, 'nothing of it')}: find out which is SGLang's"
            )
    if (pinned.tree, pinned.runs_with) != (found.tree, found.runs_with):
        raise PatchsetError(
            f"patches/{pinned.version}: has other files, or runs with others, than its wheels say: "
            "take it out and pin it again"
        )


def _table(release: Release) -> str:
    pythons = ", ".join(f'"{python}"' for python in release.python)
    runs_with = "".join(f'{package} = "{version}"\n' for package, version in release.runs_with.items())
    return (
        f'date = "{release.date}"\npatchset = {release.patchset}\npython = [{pythons}]\n'
        f'tree = "{release.tree}"\n\n[runs-with]\n{runs_with}'
    )


def _hashes(files: Mapping[str, str]) -> str:
    """A list for `sha256sum --check`."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
