"""A checkout reads like a pull request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest

from sglang_patchset.catalog import Catalog
from sglang_patchset.patches import Series

from .conftest import Command, git
from .test_wheels import rest


def test_one_commit_for_each_fix(
    series: Series, wheels: Mapping[str, Path], command: Command, tables: Catalog, tmp_path: Path
) -> None:
    release = str(series.release.version)
    checkout = tmp_path / "checkout"
    assert command("checkout", wheels[release], checkout).code == 0
    assert git(checkout, "status", "--porcelain") == ""
    base = f"release/{release}"
    assert git(checkout, "rev-list", "--max-parents=0", "HEAD") == git(checkout, "rev-parse", base)
    assert series.release.wheels[wheels[release].name] in git(checkout, "show", "--no-patch", base)
    assert command("status", checkout).code == rest(tables, release)

    trailer = "--format=%(trailers:key=Patchset-Fix,valueonly)"
    assert git(checkout, "log", "--reverse", trailer, f"{base}..").split() == [
        patch.fix for patch in series.patches
    ]
    # The series is what format-patch writes of these commits, but for what heads a hunk.
    options = ("--zero-commit", "--no-signature", "--full-index", "--stdout", "-1")
    commits = git(checkout, "rev-list", "--reverse", f"{base}..").split()
    for commit, patch in zip(commits, series.patches, strict=True):
        written = git(checkout, "format-patch", *options, commit)
        texts = [
            re.sub(r"(?m)^(@@ -[0-9, +]+ @@).*$", r"\1", each) for each in (written, patch.path.read_text())
        ]
        assert texts[0].rstrip("\n") == texts[1].rstrip("\n")

    # The base is the wheel's package, without what a build makes; the working tree runs with that.
    listed = set(git(checkout, "ls-tree", "-r", "-z", "--name-only", base).rstrip("\0").split("\0"))
    names = ZipFile(wheels[release]).namelist()
    files = {f"python/{name}" for name in names if name.startswith("sglang/") and not name.endswith("/")}
    built = files - listed
    assert listed < files
    assert {Path(path).name for path in built if not path.endswith(".so")} == {"_version.py"}
    assert all((checkout / path).is_file() for path in built)


def test_same_commits_every_time(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    heads = set()
    (tmp_path / "empty").mkdir()
    (tmp_path / "b").symlink_to("empty")
    for name in ("a", "b"):
        assert command("checkout", wheels["0.5.11"], tmp_path / name).code == 0
        heads.add(git(tmp_path / name, "rev-parse", "HEAD"))
    assert len(heads) == 1


def test_the_user_s_own_git_files_change_nothing(
    tree: Path, wheels: Mapping[str, Path], command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert command("checkout", wheels["0.5.12"], tmp_path / "plain").code == 0
    own = tmp_path / "home" / ".config" / "git"
    own.mkdir(parents=True)
    (own / "ignore").write_text("*.json\n*_test.py\n")
    (own / "attributes").write_text("*.py text eol=crlf ident\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert command("checkout", wheels["0.5.12"], tmp_path / "own").code == 0
    heads = {git(tmp_path / name, "rev-parse", "HEAD") for name in ("plain", "own")}
    assert len(heads) == 1
    assert command("apply", tree).code == 0
    assert command("status", tree).code == 0
