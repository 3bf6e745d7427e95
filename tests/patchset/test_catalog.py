"""The two tables, and the series against them."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from sglang_patchset import catalog, matrix, patches
from sglang_patchset.catalog import Catalog, State
from sglang_patchset.patches import Series
from sglang_patchset.proof import expected, verify

from .conftest import RELEASES, ROOT, Command, from_copy, link


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


def test_every_fix_has_a_cell_for_each_pinned_release(tables: Catalog) -> None:
    assert tables.damaged == {}
    for fix in tables.fixes.values():
        for version in tables.releases:
            assert fix.cell(version)


def test_a_patch_is_for_what_is_open(tables: Catalog) -> None:
    for fix in tables.fixes.values():
        for version in fix.patched:
            cell = fix.cell(version)
            assert cell
            assert cell.state in (State.VULNERABLE, State.IN_PART)


@pytest.mark.parametrize("release", RELEASES)
def test_series_is_what_lies_there(tables: Catalog, release: str) -> None:
    series = patches.load(tables, tables.releases[Version(release)])
    assert series.damaged == {}
    files = (tables.root / release).glob("*.patch")
    assert {patch.path for patch in series.patches} == set(files)


def test_fixed_upstream_is_green_and_what_is_left_is_said(tables: Catalog) -> None:
    """Where a test of ours is red on a release without a patch, it is fixed in part, and in words."""
    for each in expected.load_all(tables):
        for version in tables.releases:
            cell = each.fix.cell(version)
            assert cell
            if each.suite.reds_of(version) and not cell.patch:
                assert cell.state in (State.IN_PART, State.VULNERABLE), (each.fix.name, version)
            assert bool(cell.left) or cell.state is not State.IN_PART


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
        assert trailers["Regression-Test"] == expected.load(tables, fix).suite.test
        assert trailers["Upstream-Status"]
        # What depends on other releases and fixes is in no patch.
        assert "Affects" not in trailers
        assert not re.search(r"\b[0-9]{4}-[a-z]", patch.path.name)


def test_code_is_where_the_bug_can_be(tables: Catalog, wheels: Mapping[str, Path]) -> None:
    """A mistyped path is in no release, and would pass for code that is absent."""
    names = {release: set(ZipFile(wheel).namelist()) for release, wheel in wheels.items()}
    for fix in tables.fixes.values():
        having = [
            files
            for version, files in names.items()
            if (cell := fix.cell(Version(version))) and cell.state is not State.NOT_AFFECTED
        ]
        assert all(any(path in files for path in fix.code) for files in having)
        assert all(any(path in files for files in having) for path in fix.code)


def test_cells_without_a_patch(wheels: Mapping[str, Path]) -> None:
    hash_topk = "sglang/srt/layers/moe/hash_topk.py"
    assert not {hash_topk, "sglang/srt/models/deepseek_v4.py"} & set(ZipFile(wheels["0.5.11"]).namelist())
    assert b"self._init_default_tid2eid()" in ZipFile(wheels["0.5.12.post1"]).read(hash_topk)


def test_list_is_the_matrix(tables: Catalog, command: Command) -> None:
    result = command("list")
    assert (result.code, result.err) == (0, "")
    blocks = re.split(r"^(?=\S)", result.out, flags=re.MULTILINE)[1:]
    for block, fix in zip(blocks, tables.fixes.values(), strict=True):
        first, title, *lines = block.splitlines()
        assert first == f"{fix.name}  #{fix.upstream_pr}"
        assert title.strip() == fix.title
        rows = dict(
            re.split(r"  +", line.strip(), maxsplit=1) for line in lines[: 1 + len(set(fix.states.values()))]
        )
        for version in fix.patched:
            assert (
                rows["patch"].startswith(str(version))
                or str(version) in rows["patch"]
                or " to " in rows["patch"]
            )
        for state in set(fix.states.values()):
            assert state.words in rows


@pytest.mark.parametrize(
    ("versions", "ranges"),
    [
        ("0.5.11 0.5.12 0.5.12.post1 0.5.13", ["0.5.11 to 0.5.13"]),
        # There is a 0.5.15 between the first two, and six releases between the last.
        ("0.5.14 0.5.15.post1 0.5.23", ["0.5.14", "0.5.15.post1", "0.5.23"]),
        ("0.5.12.post1 0.5.14", ["0.5.12.post1", "0.5.14"]),
    ],
)
def test_releases_are_folded_where_nothing_lies_between(versions: str, ranges: list[str]) -> None:
    assert matrix.folded(map(Version, versions.split())) == ranges


def test_list_is_readable_on_80_columns(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_patchset.tables.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("list").out.splitlines()
    assert max(map(len, lines)) <= 80


def test_a_missing_cell_is_named(tables: Catalog, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    new = dataclasses.replace(tables.default, version=Version("0.5.99"))
    more = dataclasses.replace(tables, releases={**tables.releases, new.version: new})
    monkeypatch.setattr(catalog, "load", lambda: more)
    result = command("list")
    assert result.code == 0
    for fix in tables.fixes:
        assert f"patches/fixes/{fix}.toml: says nothing of 0.5.99, whose series lacks it\n" in result.out
    # Where nothing can be verified, nothing is.
    monkeypatch.setattr(verify, "_check_interpreter", lambda: None)
    monkeypatch.setattr(verify, "Run", FakeRun)
    result = command("verify", "swa-graph-padding", "--release", "0.5.99")
    assert result.code == 1
    assert result.out.endswith("swa-graph-padding.toml: says nothing of 0.5.99, whose series lacks it\n")


class FakeRun:
    """A record of nothing."""

    @classmethod
    def start(cls, *_: object) -> FakeRun:
        return cls()

    def finish(self) -> None:
        pass


def test_patched_ids_chain(series: Series) -> None:
    """Each patch starts from where the one before it left the file."""
    for path, touching in series.files.items():
        steps = [patch.files[path] for patch in touching]
        assert all(before[1] == after[0] for before, after in pairwise(steps))


def test_upper_bound_is_the_same_for_every_fix(tables: Catalog) -> None:
    """A release that is newer than the last one looked at is unknown for all fixes alike."""
    for fix in tables.fixes.values():
        ends = {
            Version(each.version)
            for versions in fix.states
            for each in SpecifierSet(versions)
            if each.operator == "<="
        }
        assert max(ends) == max(tables.releases)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("fixes/swa-graph-padding.toml", "title = 1"),
        ("fixes/swa-graph-padding.toml", "nonsense"),
        ("fixes/swa-graph-padding.toml", 'needs = ["swa-graph-padding"]'),
        ("0.5.12/swa-graph-padding.patch", "nonsense"),
        ("0.5.12/swa-graph-padding.patch", None),
    ],
)
def test_what_is_damaged_is_out_and_the_rest_works(
    project: Path, tree: Path, file: str, content: str | None
) -> None:
    place = project / "patches" / file
    if content is None:
        place.unlink()
    else:
        before = place.read_text()
        place.write_text(f"{content}\n{before if 'needs' in content else ''}")
    result = from_copy(project, "status", tree)
    assert result.code == 1
    assert re.search(r"^swa-graph-padding +(#24743)? +unknown$", result.out, re.MULTILINE)
    assert place.name in result.out
    assert from_copy(project, "apply", tree).code == 0
    result = from_copy(project, "status", tree)
    assert result.code == 2
    assert result.out.count(" unknown\n") == 1
    assert result.out.count(" patched\n") > 5
    assert place.name in from_copy(project, "apply", tree, "swa-graph-padding").refusal()
    assert from_copy(project, "list").code == 0
    assert from_copy(project, "revert", tree).code == 0


def test_a_damaged_release_is_out_and_the_rest_works(
    project: Path, tree: Path, unpacked: Mapping[str, Path], tmp_path: Path
) -> None:
    (project / "patches" / "0.5.11" / "release.toml").write_text("nonsense")
    assert from_copy(project, "status", tree).code == 1
    other = link(unpacked["0.5.11"], tmp_path / "other")
    result = from_copy(project, "status", other)
    assert result.code == 2
    assert "0.5.11/release.toml: " in result.out


def test_a_tester_s_mistake_stops_no_operator(project: Path, tree: Path) -> None:
    (project / "tests" / "regression" / "swa-graph-padding" / "expected.toml").write_text("nonsense")
    (project / "results").mkdir()
    (project / "results" / "gpu-x.json").write_text("nonsense")
    assert from_copy(project, "status", tree).code == 1
    assert from_copy(project, "apply", tree).code == 0


@pytest.mark.parametrize("side", ["queue", "proof"])
def test_an_operator_s_verbs_import_nothing_of_the_others(side: str, tree: Path) -> None:
    code = (
        "import sys\nfrom sglang_patchset import cli\n"
        f"for words in (['list'], *([verb, {str(tree)!r}] for verb in ('status', 'apply', 'revert'))):\n"
        "    cli.main(words)\n"
        f"sys.exit(any(name.startswith('sglang_patchset.{side}') for name in sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False).returncode
        == 0
    )


def test_patch_files_are_bytes_to_git(tables: Catalog) -> None:
    files = [*tables.root.glob("*/*.patch"), *tables.root.glob("*/*.sha256"), *tables.root.glob("*/series")]
    command = ["git", "-C", str(ROOT), "check-attr", "text", "--", *map(str, files)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(told) == len(files)
    assert all(line.endswith(": text: unset") for line in told)
