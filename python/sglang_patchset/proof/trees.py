"""Releases unpacked to run tests on: as published, and with some or all of the series."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from packaging.tags import Tag

from sglang_patchset import patches, record, releases, repair
from sglang_patchset.catalog import Catalog, Release
from sglang_patchset.targets import Package


class Trees:
    """A directory of trees. One that is there already is used again, its bytecode included.

    `tag` is the Python and platform that they are for, by default those that run this.
    """

    def __init__(self, catalog: Catalog, directory: Path, tag: Tag | None = None) -> None:
        self._catalog = catalog
        self._directory = directory
        self._tag = tag

    def published(self, release: Release) -> Path:
        """The release as published; the directory goes on the Python path.

        Raises:
            PatchsetError: the release's wheel cannot be got, or is not the published one.
        """
        return self._tree(f"{release.version}-published", lambda draft: self._unpack(release, draft))

    def patched(self, release: Release) -> Path:
        """The release with every fix of its series. As `published` otherwise."""
        return self.partly(release, [patch.fix for patch in patches.load(self._catalog, release).patches])

    def partly(self, release: Release, fixes: Collection[str], without: str = "") -> Path:
        """The release with those of the fixes that it has a patch for, and with what they need.

        `without` is left out, although some of them may need it. As `published` otherwise.
        """
        listed = patches.load(self._catalog, release).patches
        wanted = {*fixes}.union(*(patch.needs for patch in listed if patch.fix in fixes)) - {without}
        chosen = [patch for patch in listed if patch.fix in wanted]
        if not chosen:
            return self.published(release)
        digest = patches.digest(chosen)
        names = [patch.fix for patch in chosen]
        return self._tree(
            f"{release.version}-{digest[:12]}", lambda draft: self._patch(release, names, draft)
        )

    def _tree(self, name: str, make: Callable[[Path], None]) -> Path:
        # The extension modules in it are for one Python.
        python = f"cpython-{self._tag.interpreter[2:]}" if self._tag else sys.implementation.cache_tag
        tree = self._directory / f"{name}-{python}"
        if tree.exists() and not _intact(tree):
            shutil.rmtree(tree)
        if not tree.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
                draft = Path(scratch, "tree")
                make(draft)
                try:
                    os.rename(draft, tree)
                except OSError:
                    if not tree.exists():  # else another run was quicker
                        raise
        return tree

    def _unpack(self, release: Release, draft: Path) -> None:
        wheel = releases.fetch(release, draft.parent, tag=self._tag)
        with releases.opened(wheel) as archive:
            archive.extractall(draft)

    def _patch(self, release: Release, fixes: list[str], draft: Path) -> None:
        # The bytecode of what the series leaves alone is good for the patched tree too.
        shutil.copytree(self.published(release), draft)
        among = {
            name: replace(fix, needs=tuple(each for each in fix.needs if each in fixes))
            for name, fix in self._catalog.fixes.items()
        }
        repair.apply(replace(self._catalog, fixes=among), Package(draft / "sglang", release.version), fixes)


def _intact(tree: Path) -> bool:
    """Whether every file is the one that RECORD lists: somebody may have tried something out here."""
    (path,) = tree.glob("*.dist-info/RECORD")
    return record.intact(
        path.read_bytes(), lambda name: (tree / name).read_bytes() if (tree / name).is_file() else None
    )
