"""An interrupted run's journal, files that cannot be replaced, and two runs at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import cli, receipt, transaction
from sglang_patchset.handles import Directory

from .conftest import Command, digest, edit, link
from .faults import killed_at, stumble

DSV4 = "dsv4-expert-distribution"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"


def interrupted(published: Path, tmp_path: Path) -> Path:
    """A tree whose run was killed between two of its files."""
    for step in range(1, 1000):
        tree = link(published, tmp_path / str(step))
        assert stumble(lambda tree=tree: cli.main(["apply", str(tree), DSV4]), tree, killed_at(step)) == -9
        if transaction.interrupted(tree / "sglang") and (tree / HASH_TOPK).stat().st_nlink == 1:
            return tree
    raise AssertionError("no such step")


def test_an_edit_after_the_interruption_is_refused(
    unpacked: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    tree = interrupted(unpacked["0.5.12"], tmp_path)
    edit(tree / HASH_TOPK, "# mine")
    before = digest(tree)
    for verb in ("apply", "revert"):
        refusal = command(verb, tree).refusal()
        assert f"{tree / HASH_TOPK}: edited after a run was interrupted" in refusal
        assert digest(tree) == before


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_a_file_that_cannot_be_replaced(
    links: bool, verb: str, tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bind mount answers, which no permission tells in advance."""
    if verb == "revert":
        assert command("apply", tree).code == 0
    before = digest(tree)
    stuck = tree / "sglang-0.5.12.dist-info" / "RECORD"
    move, link_ = Directory.move, os.link

    def refuse(source: Directory, name: str, to: Directory, new: str) -> None:
        if to.path / new == stuck:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        move(source, name, to, new)

    def other_device(source: str, target: str, **options: int) -> None:
        if not links:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        link_(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Directory, "move", refuse)
    monkeypatch.setattr(os, "link", other_device)
    assert f"{stuck}: cannot be replaced (Device or resource busy)" in command(verb, tree).refusal()
    assert digest(tree) == before
    monkeypatch.undo()
    assert command(verb, tree).code == 0
    assert digest(tree) != before


@pytest.mark.parametrize("journal", ["", "{}}", "[1]", '[{"path": 1, "old": null, "new": null}]'])
def test_a_damaged_journal(journal: str, tree: Path, command: Command) -> None:
    directory = tree / "sglang" / ".patchset-transaction"
    directory.mkdir()
    (directory / "journal.json").write_text(journal)
    before = digest(tree)
    refusal = command("apply", tree).refusal()
    assert "journal.json: damaged: " in refusal
    assert f"remove {directory}" in refusal
    assert digest(tree) == before


def test_a_package_behind_a_link(tree: Path, command: Command, tmp_path: Path) -> None:
    elsewhere = tmp_path / "far" / "away"
    elsewhere.parent.mkdir()
    (tree / "sglang").rename(elsewhere)
    (tree / "sglang").symlink_to(elsewhere)
    before = digest(tree), digest(elsewhere)
    assert command("apply", tree).code == 0
    assert "sglang/_patchset.json" in (tree / "sglang-0.5.12.dist-info" / "RECORD").read_text()
    assert command("revert", tree).code == 0
    assert (digest(tree), digest(elsewhere)) == before


def test_one_run_at_a_time(tree: Path, command: Command) -> None:
    before = digest(tree)
    with transaction.locked(tree / "sglang"):
        assert "another run is at work on it" in command("apply", tree).refusal()
    assert digest(tree) == before
    assert command("apply", tree).code == 0


def test_modes_are_kept_and_files_replaced(tree: Path, command: Command) -> None:
    file = tree / HASH_TOPK
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o640)
    mask = os.umask(0o077)
    with file.open("rb") as opened:
        assert command("apply", tree).code == 0
        assert opened.read() == content
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o640
    assert (tree / receipt.PATH).stat().st_mode & 0o777 == 0o644
