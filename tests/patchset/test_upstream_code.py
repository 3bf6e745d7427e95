"""A later release has a fix where upstream's own lines of it are there, whatever its version says."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import patches, status, survey
from sglang_patchset.catalog import Catalog, Cell, Fix, State
from sglang_patchset.status import FixState
from sglang_patchset.targets import Package

from .conftest import Command, link

# A directory of wheels of the releases that nobody has pinned: `pip download --no-deps sglang==…` for each.
SHELF = os.environ.get("SGLANG_WHEELS")


UPSTREAM = (State.UPSTREAM, State.IN_PART)


def cells(tables: Catalog, *states: State, patch: bool = False) -> Iterator[tuple[Fix, Version, Cell]]:
    """The cells that are in one of these states, those with a patch or those without."""
    for fix in tables.fixes.values():
        for version in tables.releases:
            if (cell := fix.cell(version)) and cell.state in states and cell.patch is patch:
                yield fix, version, cell


def contents(wheel: Path, names: set[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in names & set(archive.namelist())}


@pytest.fixture(scope="module")
def trees(tables: Catalog, wheels: Mapping[str, Path]) -> Mapping[Version, Mapping[str, bytes]]:
    """Each pinned release's files that a fix or upstream's code is about."""
    names = {path for fix in tables.fixes.values() for path in fix.code}
    names |= {path for fix in tables.fixes.values() for each in fix.upstream_code.values() for path in each}
    for release in tables.releases.values():
        names |= set(patches.load(tables, release).files)
    return {Version(version): contents(wheel, names) for version, wheel in wheels.items()}


def test_every_pinned_release_that_has_a_fix(
    tables: Catalog, trees: Mapping[Version, Mapping[str, bytes]]
) -> None:
    """Its own files, each with a line more: no file is told by its bytes."""
    for fix, version, cell in cells(tables, *UPSTREAM):
        if version in trees:
            theirs = {path: content + b"# theirs\n" for path, content in trees[version].items()}
            assert status._contradiction(tables, fix, version, cell.state, theirs.get) == "", (
                fix.name,
                version,
            )


def test_every_line_is_lacking_where_the_fix_is(
    tables: Catalog, trees: Mapping[Version, Mapping[str, bytes]]
) -> None:
    told = 0
    for fix, version, _ in cells(tables, State.VULNERABLE, patch=True):
        for lines in fix.upstream_code.values():
            for path, wanted in lines.items():
                content = trees.get(version, {}).get(path)
                if content is not None and wanted:
                    assert not any(survey.has(content, line) for line in wanted), (fix.name, version, path)
                    told += 1
    assert told > 50


def test_an_old_file_in_a_later_release(
    tables: Catalog, trees: Mapping[Version, Mapping[str, bytes]]
) -> None:
    """Each file of each patch, with a line more, in each release that has the fix: no such tree is fixed."""
    tried, wrong = 0, []
    for fix, version, cell in cells(tables, *UPSTREAM):
        for release in tables.releases.values():
            patch = patches.load(tables, release).patch(fix.name)
            for path in patch.files if patch else ():
                new, old = trees.get(version, {}).get(path), trees.get(release.version, {}).get(path)
                # An empty list: upstream's own file is as it was.
                if new is None or old is None or fix.upstream_lines(version).get(path) == ():
                    continue
                tree = {**trees[version], path: old + b"# theirs\n"}
                tried += 1
                if not status._contradiction(tables, fix, version, cell.state, tree.get):
                    wrong.append((fix.name, str(version), str(release.version), path))
    assert tried > 80
    assert wrong == []


def test_a_release_without_the_code(tables: Catalog, trees: Mapping[Version, Mapping[str, bytes]]) -> None:
    for fix, version, _ in cells(tables, State.NOT_AFFECTED):
        if version in trees:
            tree = dict(trees[version])
            assert status._contradiction(tables, fix, version, State.NOT_AFFECTED, tree.get) == ""
            tree[fix.code[0]] = b""
            reason = status._contradiction(tables, fix, version, State.NOT_AFFECTED, tree.get)
            assert reason == f"{fix.code[0]}, without which it cannot be, is there"


def test_every_release_that_has_a_fix_has_lines(tables: Catalog) -> None:
    for fix, version, _ in cells(tables, *UPSTREAM):
        assert any(fix.upstream_lines(version).values()), (fix.name, version)


@pytest.mark.skipif(not SHELF, reason="SGLANG_WHEELS names no directory of the releases that are not pinned")
def test_every_release_that_was_looked_at(tables: Catalog, tmp_path: Path) -> None:
    seen = 0
    for wheel in sorted(Path(SHELF or "").glob("sglang-*.whl")):
        version = Version(wheel.name.split("-")[1])
        report = status.examine(tables, status_target(wheel, tmp_path / str(version)))
        for name, each in report.fixes.items():
            cell = tables.fixes[name].cell(version)
            if cell and cell.state in status._NOT_WANTED:
                assert each.state is status._FROM_TABLE[cell.state], (name, version, each.detail)
                seen += 1
    assert seen > 50


def status_target(wheel: Path, tree: Path) -> Package:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree, [name for name in archive.namelist() if name.endswith(".py")])
    return Package(tree / "sglang", Version(wheel.name.split("-")[1]))


def test_status_says_which_file(unpacked: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    if "0.5.23" not in unpacked:
        pytest.skip("0.5.23 has no wheel for this Python")
    tree = link(unpacked["0.5.23"], tmp_path / "tree")
    file = tree / "sglang" / "srt" / "layers" / "moe" / "hash_topk.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    old = unpacked["0.5.12"] / "sglang" / "srt" / "layers" / "moe" / "hash_topk.py"
    file.write_bytes(old.read_bytes() + b"# mine\n")
    report = json.loads(command("status", tree, "--json").out)
    (found,) = (fix for fix in report["fixes"] if fix["name"] == "hash-topk-dummy-weights")
    assert found["state"] == FixState.UNKNOWN.value
    assert "hash_topk.py lacks upstream's `self._init_default_tid2eid()`" in found["detail"]
