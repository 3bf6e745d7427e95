"""Releases unpacked to run tests on: as published, and with the whole series."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from sglang_patchset import patches, releases, series
from sglang_patchset.catalog import Catalog, Release
from sglang_patchset.targets import Package


class Trees:
    """A directory of trees. One that is there already is used again, its bytecode included."""

    def __init__(self, catalog: Catalog, directory: Path) -> None:
        self._catalog = catalog
        self._directory = directory

    def published(self, release: Release) -> Path:
        """The release as published; the directory goes on the Python path.

        Raises:
            PatchsetError: the release's wheel cannot be got, or is not the published one.
        """
        tree = self._directory / f"{release.version}-published"
        if not tree.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
                wheel = releases.fetch(release, Path(scratch))
                draft = Path(scratch, "tree")
                with releases.opened(wheel) as archive:
                    archive.extractall(draft)
                os.rename(draft, tree)
        return tree

    def patched(self, release: Release) -> Path:
        """The release with every fix of its series. As `published` otherwise."""
        loaded = patches.load(self._catalog, release)
        digest = hashlib.sha256("".join(patch.sha256 for patch in loaded.patches).encode()).hexdigest()
        tree = self._directory / f"{release.version}-patched-{digest[:12]}"
        if not tree.exists():
            published = self.published(release)
            with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
                draft = Path(scratch, "tree")
                # The bytecode of what the series leaves alone is good for the patched tree too.
                shutil.copytree(published, draft)
                series.apply(self._catalog, Package(draft / "sglang", release.version), ())
                os.rename(draft, tree)
        return tree
