"""The unpacked releases that tests run on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.tags import Tag
from packaging.version import Version

from sglang_patchset import releases, status
from sglang_patchset.catalog import Catalog, State
from sglang_patchset.proof.trees import Trees
from sglang_patchset.status import FixState
from sglang_patchset.targets import Package

from .conftest import edit

VERSION = Version("0.5.12")


@pytest.fixture
def published(wheels: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels are at hand."""
    monkeypatch.setattr(
        releases,
        "fetch",
        lambda release, scratch, **_: Path(shutil.copy(wheels[str(release.version)], scratch)),
    )


@pytest.mark.usefixtures("published")
def test_trees(tables: Catalog, tmp_path: Path) -> None:
    trees = Trees(tables, tmp_path)
    cells = {name: fix.cell(VERSION) for name, fix in tables.fixes.items()}
    published = {name: cell.state.words for name, cell in cells.items() if cell}
    assert FixState.VULNERABLE.value in published.values()
    patched = published | {
        name: FixState.PATCHED.value for name, cell in cells.items() if cell and cell.patch
    }
    for make, states in ((trees.published, published), (trees.patched, patched)):
        tree = make(tables.releases[VERSION])
        package = Package(tree / "sglang", VERSION)
        found = status.examine(tables, package).fixes
        assert {name: each.state.value for name, each in found.items()} == states
        (tree / "sglang" / "__pycache__").mkdir()
        assert make(tables.releases[VERSION]) == tree
        assert (tree / "sglang" / "__pycache__").is_dir()
        # What somebody tried out in a tree does not pass for the release.
        utils = tree / "sglang" / "utils.py"
        before = utils.read_bytes()
        edit(utils, "# tried out")
        assert make(tables.releases[VERSION]) == tree
        assert utils.read_bytes() == before


@pytest.mark.usefixtures("published")
def test_part_of_a_series(tables: Catalog, tmp_path: Path) -> None:
    trees = Trees(tables, tmp_path)
    release = tables.releases[VERSION]
    tree = trees.partly(release, ["swa-graph-padding"])
    found = status.examine(tables, Package(tree / "sglang", VERSION)).fixes
    patched = [name for name, each in found.items() if each.state is FixState.PATCHED]
    assert patched == ["swa-graph-padding"]
    assert trees.partly(release, ["no-patch-for-this-release"]) == trees.published(release)


@pytest.mark.usefixtures("published")
def test_a_needed_fix_left_out(tables: Catalog, tmp_path: Path) -> None:
    """What a test is red on has the fixes in front of its bug, one that needs the bug's own included."""
    trees = Trees(tables, tmp_path)
    release = tables.releases[VERSION]
    needing, needed = "dsv4-expert-distribution", "eplb-double-mapping"
    for without, expected in (("", {needed, needing}), (needed, {needing})):
        tree = trees.partly(release, [needing], without=without)
        found = status.examine(tables, Package(tree / "sglang", VERSION)).fixes
        assert {name for name, each in found.items() if each.state is FixState.PATCHED} == expected


def test_tree_for_another_python(tables: Catalog, tmp_path: Path) -> None:
    """The box that a tree is for need not have the Python that makes it."""
    other = "cp313" if sys.version_info < (3, 13) else "cp312"
    tree = Trees(tables, tmp_path, Tag(other, other, "manylinux_2_34_aarch64")).published(
        tables.releases[VERSION]
    )
    assert tree.name.endswith(f"-cpython-{other[2:]}")
    (extension,) = (tree / "sglang" / "srt" / "grpc").glob("_core*.so")
    assert extension.name == f"_core.cpython-{other[2:]}-aarch64-linux-gnu.so"


@pytest.mark.usefixtures("published")
def test_a_fix_without_a_patch_yet(tables: Catalog, tmp_path: Path) -> None:
    """Its test can be seen to be red before there is one."""
    new = replace(
        tables.fix("swa-graph-padding"),
        name="new",
        states={"==0.5.12": State.VULNERABLE},
        patched=frozenset[Version](),
    )
    with_new = replace(tables, fixes={**tables.fixes, "new": new})
    tree = Trees(with_new, tmp_path).patched(tables.releases[VERSION])
    found = status.examine(with_new, Package(tree / "sglang", VERSION)).fixes
    assert {name: each.state for name, each in found.items()} == {
        **dict.fromkeys(tables.releases[VERSION].fixes, FixState.PATCHED),
        "new": FixState.VULNERABLE,
    }
