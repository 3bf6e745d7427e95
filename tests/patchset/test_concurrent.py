"""Several at work on one tree: runs, looks, a user's edits, and servers that run from it."""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sglang_patchset import cli
from sglang_patchset.handles import Directory
from sglang_patchset.transaction import Transaction

from .conftest import Command, digest, edit, link

HASH = "hash-topk-dummy-weights"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
INFO = "sglang-0.5.12.dist-info"


def spawn(output: Path, action: Callable[[], int]) -> int:
    """Start `action` in a process whose stdout and stderr go to a file."""
    child = os.fork()
    if child == 0:
        try:
            with output.open("w") as sys.stdout:
                sys.stderr = sys.stdout
                code = action()
            os._exit(code)
        finally:
            os._exit(99)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_many_runs_on_one_tree(
    unpacked: Mapping[str, Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is done or refused, and what is left is one of the two."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    tree = link(unpacked["0.5.12"], tmp_path / "tree")
    before = digest(tree)
    assert command("apply", tree).code == 0
    after = digest(tree)
    codes = {0: 0, 2: 0}
    for number in range(12):
        verbs = ["apply", "revert", "apply", "revert"]
        outputs = [tmp_path / f"{number}-{worker}" for worker in range(len(verbs))]
        workers = [
            spawn(output, lambda verb=verb: cli.main([verb, str(tree)]))  # type: ignore[misc]
            for verb, output in zip(verbs, outputs, strict=True)
        ]
        for code, output in zip(map(wait, workers), outputs, strict=True):
            codes[code] += 1
            assert (code == 2) == ("another run is at work on it: wait for its end" in output.read_text())
        assert digest(tree) in (before, after)
    assert all(codes.values())
    assert command("revert", tree).code == 0
    assert digest(tree) == before


def test_a_hundred_looks_at_a_tree_that_changes(
    unpacked: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    """They see one of the two or that a run is at work, never a mixture; and they are in nobody's way."""
    tree = link(unpacked["0.5.12"], tmp_path / "tree")
    before = digest(tree)
    lookers = [
        spawn(tmp_path / f"look-{number}", lambda: cli.main(["status", str(tree)])) for number in range(100)
    ]
    for verb in ("apply", "revert") * 3:
        assert command(verb, tree).code == 0
    codes = [wait(looker) for looker in lookers]
    for number, code in enumerate(codes):
        text = (tmp_path / f"look-{number}").read_text()
        states = set(re.findall(r" (patched|vulnerable|fixed in part|unknown)$", text, re.MULTILINE))
        assert (code, states) in [(0, {"patched"}), (1, {"vulnerable", "fixed in part"}), (2, {"unknown"})]
        assert (code == 2) == ("another run is at work or was interrupted" in text)
        assert "half patched" not in text
    assert digest(tree) == before


def test_two_wheels_at_once(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    name = wheels["0.5.12"].name.replace("-0.5.12-", "-0.5.12+patchset.1-")
    with Directory.at(tmp_path) as directory, directory.workspace(f".{name}.draft", name):
        refusal = command("wheel", wheels["0.5.12"], tmp_path).refusal()
    assert f"{tmp_path}: another run is at work on it: wait for its end" in refusal
    assert list(tmp_path.iterdir()) == []


def test_a_look_between_two_files(tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is looked at again where a whole run came between."""
    from sglang_patchset.targets import Package

    read = Package.read
    runs = iter(["apply"])

    def interfere(package: Package, path: str) -> bytes | None:
        content = read(package, path)
        for verb in runs:
            assert command(verb, tree).code == 0
        return content

    monkeypatch.setattr(Package, "read", interfere)
    assert command("status", tree).code == 0


@pytest.mark.parametrize("path", [HASH_TOPK, f"{INFO}/RECORD"])
def test_an_edit_while_a_run_is_at_work(
    path: str, tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the run has looked at the file and before it has replaced it; nobody's work is lost."""
    check = Transaction._check_directories

    def before_staging(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        edit(tree / path, "# mine")

    monkeypatch.setattr(Transaction, "_check_directories", before_staging)
    untouched = {name: entry for name, entry in digest(tree).items() if name != path}
    refusal = command("apply", tree, HASH).refusal()
    assert f"{tree / path}: changed while this run was at work: run it again" in refusal
    assert (tree / path).read_text().endswith("# mine\n")
    assert {name: entry for name, entry in digest(tree).items() if name != path} == untouched
    monkeypatch.undo()
    assert command("apply", tree, HASH).code == 0
    assert (tree / path).read_text().endswith("# mine\n")


def test_an_edit_between_two_replacements(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = Directory.move
    record = tree / INFO / "RECORD"

    def interfere(source: Directory, name: str, to: Directory, new: str) -> None:
        move(source, name, to, new)
        if to.path / new == tree / HASH_TOPK and not record.read_text().endswith("# mine\n"):
            edit(record, "# mine")

    before = {name: entry for name, entry in digest(tree).items() if not name.endswith("RECORD")}
    monkeypatch.setattr(Directory, "move", interfere)
    assert f"{record}: changed while this run was at work" in command("apply", tree, HASH).refusal()
    assert {name: entry for name, entry in digest(tree).items() if not name.endswith("RECORD")} == before
    assert record.read_text().endswith("# mine\n")


def test_a_server_that_runs_from_the_tree(tree: Path, command: Command) -> None:
    """It keeps what it has open or mapped: the files are others, under the same names."""
    file = tree / HASH_TOPK
    content, inode = file.read_bytes(), file.stat().st_ino
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for verb, remark in (("apply", "applied"), ("revert", "took out")):
            out = command(verb, tree).out
            assert re.search(rf"{remark} .*{HASH}, .*: restart the servers that run from {tree}/sglang", out)
            assert (opened.read(), mapped[:]) == (content, content)
            opened.seek(0)
            assert file.stat().st_ino != inode
