"""An interrupted run's journal, files that cannot be replaced, and two runs at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_patchset import git, receipt, status, transaction
from sglang_patchset.errors import PatchsetError
from sglang_patchset.handles import Directory

from .conftest import Command, digest, edit, link

DSV4, HASH = "dsv4-expert-distribution", "hash-topk-dummy-weights"
EPLB = "eplb-double-mapping"  # without which the other one must not be
DEEPSEEK = "sglang/srt/models/deepseek_v4.py"
RECORD = "sglang-0.5.12.dist-info/RECORD"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"


@pytest.fixture
def tree(tree: Path, command: Command) -> Path:
    """With what the fix needs in it already."""
    assert command("apply", tree, EPLB).code == 0
    return tree


def interrupt(tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let an `apply` end, as where it is killed, after it has put this many of its five files in place."""
    replaced: list[str] = []
    replace = transaction._Step.replace

    def stop(step: transaction._Step) -> None:
        if len(replaced) == count:
            raise KeyboardInterrupt
        replaced.append(step.entry.path)
        replace(step)

    def stop_at_the_end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transaction._Step, "replace", stop)
        patched.setattr(transaction.Transaction, "_forget", stop_at_the_end)
        assert command("apply", tree, DSV4).code == 130
    assert transaction.interrupted(tree / "sglang")


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_an_edit_after_the_interruption_stays(
    verb: str, count: int, tree: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the old file or of the new one: the others follow it, and what the run was to do can be done."""
    expected = link(tree, tmp_path / "expected")
    if verb == "apply":
        assert command("apply", expected, DSV4).code == 0
    interrupt(tree, command, monkeypatch, count)
    edit(tree / HASH_TOPK, "# mine")
    assert command(verb, tree, DSV4).code == 0
    assert (tree / HASH_TOPK).read_text() == (expected / HASH_TOPK).read_text() + "# mine\n"
    # What RECORD and the receipt say of the edited file is said elsewhere.
    ends = [{**digest(each), HASH_TOPK: "", RECORD: "", receipt.PATH: ""} for each in (tree, expected)]
    assert ends[0] == ends[1]


def test_edits_of_an_old_and_of_a_new_file(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows which way to go: the message says how to."""
    interrupt(tree, command, monkeypatch, 1)
    edit(tree / HASH_TOPK, "# mine")
    edit(tree / DEEPSEEK, "# mine")
    before = digest(tree)
    for verb in ("apply", "revert"):
        refusal = command(verb, tree).refusal()
        assert f"{tree / HASH_TOPK}: edited after a run was interrupted: save it, `cp " in refusal
        assert digest(tree) == before
    subprocess.run(["bash", "-c", refusal.split("`")[1]], check=True)
    assert command("apply", tree, DSV4).code == 0
    assert (tree / DEEPSEEK).read_text().endswith("# mine\n")


@pytest.mark.parametrize("release", ["0.5.12", "0.5.11"])
@pytest.mark.parametrize("count", [0, 3, 5])
def test_installed_again_after_the_interruption(
    count: int,
    release: str,
    tree: Path,
    unpacked: Mapping[str, Path],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pip leaves the directory of the interrupted run, which it does not know, and another RECORD."""
    if release not in unpacked:
        pytest.skip(f"{release} has no wheel for this Python")
    interrupt(tree, command, monkeypatch, count)
    directory = tree / "sglang" / ".patchset-transaction"
    directory.rename(tree / "kept")
    shutil.rmtree(tree / "sglang")
    shutil.rmtree(tree / "sglang-0.5.12.dist-info")
    shutil.copytree(unpacked[release], tree, dirs_exist_ok=True)
    with (tree / f"sglang-{release}.dist-info" / "RECORD").open("a") as file:
        file.write(f"sglang-{release}.dist-info/REQUESTED,,\n")
    before = digest(tree / "sglang")
    (tree / "kept").rename(directory)
    result = command("revert", tree)
    assert result.code == 0
    assert "before SGLang was installed again: removed" in result.err
    assert digest(tree / "sglang") == before
    assert command("apply", tree).code == 0


@pytest.mark.parametrize("replaced", [0, 1, 5])
def test_an_edit_just_after_the_commit(
    replaced: int, tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first file is in place, after that, and after its last: it is told, the next run works."""
    move = Directory.move
    moved: list[str] = []

    def interfere(source: Directory, name: str, to: Directory, new: str) -> None:
        move(source, name, to, new)
        moved.append(new)
        placed = [each for each in moved if not each.endswith(".old")]
        if placed[0] == ".patchset-transaction" and len(placed) == replaced + 1 and not new.endswith(".old"):
            edit(tree / HASH_TOPK, "# mine")

    monkeypatch.setattr(Directory, "move", interfere)
    refusal = command("apply", tree, DSV4).refusal()
    assert f"{tree / HASH_TOPK}: changed while this run was at work: run it again" in refusal
    monkeypatch.undo()
    assert not transaction.interrupted(tree / "sglang")
    assert command("apply", tree, DSV4).code == 0
    assert command("revert", tree, DSV4).code == 0
    assert (tree / HASH_TOPK).read_text().endswith("# mine\n")


def test_what_cannot_be_removed_is_no_failure(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink

    def refuse(path: str, **options: int) -> None:
        if path.endswith(".old"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    result = command("apply", tree, DSV4)
    directory = tree / "sglang" / ".patchset-transaction"
    assert result.code == 0
    assert f"applied {DSV4}" in result.out
    assert (
        f"{directory}: done, but it cannot be removed (Device or resource busy): the next run" in result.err
    )
    monkeypatch.undo()
    assert command("apply", tree, DSV4).out.endswith("nothing to do\n")
    assert not directory.exists()


def test_a_status_that_cannot_be_told_is_no_failure(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where TMPDIR is full by now."""
    commit = transaction.Transaction.commit

    def then_nothing(*arguments: Any) -> None:
        commit(*arguments)
        monkeypatch.setattr(status, "examine", fail)

    def fail(*_: object) -> None:
        raise PatchsetError("/tmp: cannot be written to (No space left on device)")

    monkeypatch.setattr(transaction.Transaction, "commit", then_nothing)
    result = command("apply", tree, DSV4)
    assert result.code == 0
    assert f"applied {DSV4}: restart" in result.out
    assert "done, but its status cannot be told: /tmp: cannot be written to" in result.err


def test_a_git_that_changes_nothing(tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a TMPDIR that git takes for a part of a repository."""
    before = digest(tree)
    monkeypatch.setattr(git, "apply", lambda *_, **__: True)
    assert "git has not done what " in command("apply", tree, HASH).refusal()
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


@pytest.mark.parametrize(
    "journal",
    [
        *("", "{}}", "[1]", '[{"path": 1, "old": null, "new": null}]'),
        *('[{"path": "a", "old": 1, "new": null}]', '[{"path": "\\ud800", "old": null, "new": "0"}]'),
    ],
)
def test_a_damaged_journal(journal: str, tree: Path, command: Command) -> None:
    directory = tree / "sglang" / ".patchset-transaction"
    directory.mkdir()
    (directory / "journal.json").write_text(journal)
    before = digest(tree)
    refusal = command("apply", tree).refusal()
    assert "journal.json: damaged: " in refusal
    assert f"remove {directory}" in refusal
    assert digest(tree) == before


def fifo(path: Path) -> None:
    os.mkfifo(path)


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(60 << 30)


def linked(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, large, linked, Path.mkdir])
@pytest.mark.parametrize("name", [".patchset-transaction", ".patchset-transaction/journal.json"])
def test_what_lies_in_the_place_of_a_journal(
    name: str, make: Callable[[Path], None], tree: Path, command: Command
) -> None:
    if name == ".patchset-transaction" and make is Path.mkdir:
        return
    place = tree / "sglang" / name
    place.parent.mkdir(exist_ok=True)
    make(place)
    for verb in ("apply", "revert"):
        assert "journal.json: damaged: " in command(verb, tree).refusal()


def test_a_package_behind_a_link(tree: Path, command: Command, tmp_path: Path) -> None:
    """It is the same by either name; a RECORD that does not lie beside it says nothing of it."""
    assert command("revert", tree).code == 0
    elsewhere = tmp_path / "far" / "away"
    elsewhere.parent.mkdir()
    (tree / "sglang").rename(elsewhere)
    (tree / "sglang").symlink_to(elsewhere)
    before = digest(tree), digest(elsewhere)
    for ways in ((tree, elsewhere), (elsewhere, tree), (tree, tree)):
        for verb, way in zip(("apply", "revert"), ways, strict=True):
            assert command(verb, way).code == 0
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
