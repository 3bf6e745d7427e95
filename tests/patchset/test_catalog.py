"""The two tables, and the series against them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from sglang_patchset import catalog, patches
from sglang_patchset.catalog import Catalog, CellState
from sglang_patchset.patches import Series
from sglang_patchset.proof import verify

from .conftest import RELEASES, Command


def test_pinned_releases(tables: Catalog) -> None:
    assert list(tables.releases) == sorted(tables.releases)
    assert str(tables.default.version) == "0.5.12"


def test_every_published_wheel_is_pinned(tables: Catalog) -> None:
    for release in tables.releases.values():
        tags = set()
        for name, sha256 in release.wheels.items():
            project, version, _, (tag,) = parse_wheel_filename(name)
            assert (project, version) == ("sglang", release.version)
            assert re.fullmatch("[0-9a-f]{64}", sha256)
            tags.add((tag.interpreter, tag.platform))
        assert tags == {
            (f"cp{python.replace('.', '')}", f"manylinux_2_34_{machine}")
            for python in release.python
            for machine in ("x86_64", "aarch64")
        }
    every = [sha256 for release in tables.releases.values() for sha256 in release.wheels.values()]
    assert len(set(every)) == len(every)


def test_every_fix_has_one_cell_for_each_pinned_release(tables: Catalog) -> None:
    for fix in tables.fixes.values():
        for version in tables.releases:
            assert len([cell for cell in fix.cells if version in SpecifierSet(cell)]) == 1


@pytest.mark.parametrize("release", RELEASES)
def test_series_is_what_the_matrix_says(tables: Catalog, release: str) -> None:
    version = Version(release)
    series = patches.load(tables, tables.releases[version])
    assert [patch.fix for patch in series.patches] == [
        name for name in tables.fixes if version in _affected(tables, name)
    ]
    files = (tables.root / release).glob("*.patch")
    assert [patch.path for patch in series.patches] == sorted(files)


def _affected(tables: Catalog, name: str) -> list[Version]:
    cells = {version: tables.fix(name).cell(version) for version in tables.releases}
    return [version for version, cell in cells.items() if cell and cell.state is CellState.PATCH]


def test_only_pinned_releases_are_patched(tables: Catalog) -> None:
    for fix in tables.fixes.values():
        ranges = fix.ranges(tables.releases)
        # Without a release that has it, nothing is said of those that are not pinned.
        assert ranges or _affected(tables, fix.name)[-1] == max(tables.releases)
        assert all(fix.cells[versions].state is not CellState.PATCH for versions in ranges)


def test_nobody_has_looked_at_unreleased_versions(tables: Catalog) -> None:
    for fix in tables.fixes.values():
        for version in ("0.5.10", "99.0", "0.5.14.dev3", "0.5.14rc1", "0.5.14+local"):
            assert fix.cell(Version(version)) is None


def test_trailers_are_what_the_catalogue_says(tables: Catalog, series: Series) -> None:
    for patch in series.patches:
        message = patch.path.read_text().partition("\n---\n")[0]
        trailers = dict(re.findall(r"^([A-Z][A-Za-z-]+): (.+)$", message, re.MULTILINE))
        fix = tables.fixes[patch.fix]
        assert trailers["Upstream-PR"].endswith(f"/{fix.upstream_pr}")
        assert trailers["Regression-Test"] == fix.suite.test
        assert trailers["Upstream-Status"]
        assert trailers["Affects"] == ", ".join(map(str, _affected(tables, patch.fix)))


def test_code_is_where_the_bug_can_be(tables: Catalog, wheels: Mapping[str, Path]) -> None:
    """A mistyped path is in no release, and would pass for code that is absent."""
    names = {release: set(ZipFile(wheel).namelist()) for release, wheel in wheels.items()}
    for fix in tables.fixes.values():
        having = [
            files
            for version, files in names.items()
            if (cell := fix.cell(Version(version))) and cell.state is not CellState.NOT_AFFECTED
        ]
        assert all(any(path in files for path in fix.code) for files in having)
        assert all(any(path in files for files in having) for path in fix.code)


def test_cells_without_a_patch(wheels: Mapping[str, Path]) -> None:
    hash_topk = "sglang/srt/layers/moe/hash_topk.py"
    assert not {hash_topk, "sglang/srt/models/deepseek_v4.py"} & set(ZipFile(wheels["0.5.11"]).namelist())
    assert b"self._init_default_tid2eid()" in ZipFile(wheels["0.5.12.post1"]).read(hash_topk)


def test_list_is_the_matrix(tables: Catalog, command: Command) -> None:
    result = command("list")
    assert result.code == 0
    header, *rows = [line.split() for line in result.out.splitlines()]
    assert header[2:] == [*RELEASES, "ranges"]
    for row, fix in zip(rows, tables.fixes.values(), strict=False):
        cells = [fix.cell(version) for version in tables.releases]
        states = [cell.state.value for cell in cells if cell]
        assert row[: len(header) - 1] == [fix.name, f"#{fix.upstream_pr}", *states]


def test_a_range_that_holds_a_pinned_release_is_listed(
    tables: Catalog, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says something of others, too."""
    new = dataclasses.replace(tables.default, version=Version("0.5.16"))
    more = dataclasses.replace(tables, releases={**tables.releases, new.version: new})
    monkeypatch.setattr(catalog, "load", lambda: more)
    _, first, *_ = command("list").out.splitlines()
    assert re.search(r" upstream +upstream >=0\.5\.13,<=0\.5\.23 *$", first)


def test_a_missing_cell_is_named(tables: Catalog, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    new = dataclasses.replace(tables.default, version=Version("0.5.99"))
    more = dataclasses.replace(tables, releases={**tables.releases, new.version: new})
    monkeypatch.setattr(catalog, "load", lambda: more)
    result = command("list")
    assert result.code == 0
    for fix in tables.fixes:
        assert f"fixes.toml: says nothing of {fix} in 0.5.99\n" in result.out
    # Where nothing can be verified, nothing is.
    monkeypatch.setattr(verify, "_check_interpreter", lambda: None)
    result = command("verify", "swa-graph-padding", "--release", "0.5.99")
    assert result.code == 1
    assert result.out.endswith("fixes.toml: says nothing of swa-graph-padding in 0.5.99\n")


def test_patched_ids_chain(series: Series) -> None:
    """Each patch starts from where the one before it left the file."""
    for path, touching in series.files.items():
        steps = [patch.files[path] for patch in touching]
        assert all(before[1] == after[0] for before, after in pairwise(steps))


def test_upper_bound_is_the_same_for_every_fix(tables: Catalog) -> None:
    """A release that is newer than the last one looked at is unknown for all fixes alike."""
    last = [ranges[-1] for fix in tables.fixes.values() if (ranges := fix.ranges(tables.releases))]
    ends = set(map(SpecifierSet, last))
    assert len({str(spec) for end in ends for spec in end if spec.operator == "<="}) == 1
