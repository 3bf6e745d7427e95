"""The unpacked releases that tests run on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import releases, status
from sglang_patchset.catalog import Catalog
from sglang_patchset.status import FixState
from sglang_patchset.targets import Package
from sglang_patchset.trees import Trees

from .conftest import edit

VERSION = Version("0.5.12")


def test_trees(
    tables: Catalog, wheels: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        releases, "fetch", lambda release, scratch: Path(shutil.copy(wheels[str(release.version)], scratch))
    )
    trees = Trees(tables, tmp_path)
    for make, state in ((trees.published, FixState.VULNERABLE), (trees.patched, FixState.PATCHED)):
        tree = make(tables.releases[VERSION])
        package = Package(tree / "sglang", VERSION)
        found = status.examine(tables, package).fixes.values()
        assert {each.state for each in found} == {state}
        (tree / "sglang" / "__pycache__").mkdir()
        assert make(tables.releases[VERSION]) == tree
        assert (tree / "sglang" / "__pycache__").is_dir()
        # What somebody tried out in a tree does not pass for the release.
        utils = tree / "sglang" / "utils.py"
        before = utils.read_bytes()
        edit(utils, "# tried out")
        assert make(tables.releases[VERSION]) == tree
        assert utils.read_bytes() == before
