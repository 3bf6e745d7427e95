"""Others who can write where a run works, or who wait for it: nothing of theirs is taken for its own."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import py_compile
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sglang_patchset import cli, receipt, record, transaction
from sglang_patchset.handles import Directory, attributes, user

from .conftest import Command, Result, digest, edit
from .test_hostile import _blob

HASH = "hash-topk-dummy-weights"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
INFO = "sglang-0.5.12.dist-info"
JOURNAL = "sglang/.patchset-transaction/journal.json"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def own(unpacked: Mapping[str, Path], tmp_path: Path) -> Path:
    """An unpacked 0.5.12 that is linked to nothing: its files can be changed in place."""
    return Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "own"))


@needs_root
@pytest.mark.parametrize("path", ["sglang", "sglang/srt/layers/moe", INFO])
@pytest.mark.parametrize(
    ("owner", "mode", "message"),
    [
        (1000, 0o755, f"belongs to {user(1000)}, who is not root: run this as {user(1000)}"),
        (0, 0o777, "others than root may write to it"),
        (0, 0o1777, "others than root may write to it"),
        (0, 0o775, "others than root may write to it"),
    ],
)
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_root_where_others_can_write(
    verb: str, owner: int, mode: int, message: str, path: str, own: Path, command: Command
) -> None:
    if verb == "revert":
        assert command("apply", own).code == 0
    os.chown(own / path, owner, 2000)
    (own / path).chmod(mode)
    before = digest(own)
    assert f"{own / path}: {message}" in command(verb, own).refusal()
    assert digest(own) == before


@needs_root
@pytest.mark.parametrize(
    ("path", "owner", "group", "mode"),
    [("sglang", 0, 0, 0o2775), (".", 0, 0, 0o1777), ("sglang/srt", 0, 2000, 0o755)],
)
def test_root_where_nobody_else_can_write(
    path: str, owner: int, group: int, mode: int, own: Path, command: Command
) -> None:
    """As in a container, whose trees are root's own and its group's."""
    os.chown(own / path, owner, group)
    (own / path).chmod(mode)
    assert command("apply", own).code == 0
    assert command("revert", own).code == 0


@pytest.mark.parametrize("mask", [0, 0o777])
def test_nobody_can_open_what_is_staged(
    mask: int, tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = Directory.move
    modes = set()

    def look(source: Directory, name: str, to: Directory, new: str) -> None:
        modes.update(stat.S_IMODE(path.stat().st_mode) for path in (tree / "sglang").glob(".patchset-*"))
        move(source, name, to, new)

    monkeypatch.setattr(Directory, "move", look)
    before = os.umask(mask)
    try:
        assert command("apply", tree, HASH).code == 0
    finally:
        os.umask(before)
    assert modes == {0o700}
    assert (tree / receipt.PATH).stat().st_mode & 0o777 == 0o644


def swapped(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> Path:
    """Put a link to another directory in the place of one that the run has looked at, and works in."""
    outside = tmp_path / "outside"
    victim = tree / path
    shutil.copytree(victim, outside)
    begin = transaction.Transaction._finish

    def swap(*arguments: object) -> None:
        victim.rename(tmp_path / "moved")
        victim.symlink_to(outside)
        begin(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(transaction.Transaction, "_finish", swap)
    return outside


@pytest.mark.parametrize("path", ["sglang", "sglang/srt/layers/moe", INFO])
def test_a_directory_that_is_swapped_for_a_link(
    path: str, tree: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = swapped(tree, tmp_path, monkeypatch, path)
    before = digest(outside)
    assert command("apply", tree, HASH).code in (0, 2)
    assert digest(outside) == before


def test_staging_that_is_swapped(
    tree: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a directory of links, whose files would get what is staged, and its mode."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    stage = transaction._stage
    work = tree / "sglang" / ".patchset-transaction.tmp"

    def swap(staging: Directory, name: str, *arguments: object) -> None:
        if name == "0":
            work.rename(tmp_path / "moved")
            for directory in (work, work / "staged"):
                directory.mkdir()
            for number in range(9):
                (work / "staged" / str(number)).symlink_to(secret)
        stage(staging, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(transaction, "_stage", swap)
    command("apply", tree, HASH)
    assert (secret.read_bytes(), secret.stat().st_mode & 0o7777) == (b"secret", 0o600)


@pytest.mark.parametrize(
    "name", ["sglang-9.dist-info", "sglang-0.5.12.dist-info/../../../other/sglang-9.dist-info"]
)
@pytest.mark.parametrize(("old", "new"), [(b"theirs", b"evil"), (None, b"evil"), (b"theirs", None)])
def test_a_journal_of_another_record(
    name: str, old: bytes | None, new: bytes | None, tree: Path, command: Command
) -> None:
    """Replaced, created or removed: it lists another package, or lies in another directory of packages."""
    other = tree.parent / "other" / "sglang-9.dist-info" if "/" in name else tree / name
    other.mkdir(parents=True)
    if old is not None:
        (other / "RECORD").write_bytes(old)
    directory = (tree / JOURNAL).parent
    directory.mkdir()
    (directory / "0").write_bytes(b"evil")
    path = os.path.relpath(other / "RECORD", tree / "sglang")
    ids = {key: data and _blob(data) for key, data in (("old", old), ("new", new))}
    (tree / JOURNAL).write_text(json.dumps([{"path": path, **ids}]))
    before = digest(tree.parent)
    assert "journal.json: damaged: " in command("apply", tree).refusal()
    assert digest(tree.parent) == before


@needs_root
def test_a_lock_that_anybody_could_take(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Another user has the package open, and locked, for ever."""
    for directory in (own, *own.parents[:3]):
        directory.chmod(0o755)
    (ready, told), (wait, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(1000)
            os.setuid(1000)
            for path in (own / "sglang", own / "sglang" / "__init__.py", own / INFO / "RECORD"):
                fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)
            os.write(told, b"x")
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(told)
    assert os.read(ready, 1) == b"x"
    try:
        assert cli.main(["apply", str(own), HASH]) == 0
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["link", "file", "directory", "private"])
def test_what_lies_in_the_place_of_a_draft(
    kind: str, wheels: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    """In a directory for wheels that others write to as well."""
    out, secret = tmp_path / "out", tmp_path / "secret"
    out.mkdir()
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    name = wheels["0.5.12"].name.replace("-0.5.12-", "-0.5.12+patchset.1-")
    draft = out / f".{name}.draft"
    if kind == "link":
        draft.symlink_to(secret)
    elif kind == "file":
        draft.write_bytes(b"")
    else:
        draft.mkdir(mode=0o755 if kind == "directory" else 0o700)
        (draft / name).symlink_to(secret)
        if kind == "private":
            (draft / "theirs").write_bytes(b"")
    result = command("wheel", wheels["0.5.12"], out)
    assert secret.read_bytes() == b"secret"
    if kind in ("link", "file"):
        assert result.code == 0
        assert [path.name for path in out.iterdir()] == [name]
    else:
        assert f"{draft}: not what a run leaves: move it away" in result.refusal()


@needs_root
def test_a_draft_of_another_user_s(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    name = wheels["0.5.12"].name.replace("-0.5.12-", "-0.5.12+patchset.1-")
    draft = tmp_path / f".{name}.draft"
    draft.mkdir(mode=0o700)
    os.chown(draft, 1000, 1000)
    assert (
        f"{draft}: belongs to {user(1000)}: wait for"
        in command("wheel", wheels["0.5.12"], tmp_path).refusal()
    )


def test_a_draft_that_is_swapped(
    wheels: Mapping[str, Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, secret = tmp_path / "out", tmp_path / "secret"
    secret.write_bytes(b"secret")
    create = Directory.create

    def swap(directory: Directory, name: str, *arguments: int) -> object:
        directory.path.rename(tmp_path / "moved")
        directory.path.mkdir()
        (directory.path / name).symlink_to(secret)
        return create(directory, name, *arguments)

    monkeypatch.setattr(Directory, "create", swap)
    command("wheel", wheels["0.5.12"], out)
    assert secret.read_bytes() == b"secret"


ACCESS = bytes.fromhex(
    "02000000 01000600ffffffff 02000400e8030000 04000000ffffffff 10000400ffffffff 20000000ffffffff"
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user.note", b"mine"),
        pytest.param("system.posix_acl_access", ACCESS, id="acl"),
        pytest.param("security.note", b"x", marks=needs_root),
    ],
)
@pytest.mark.parametrize("links", [True, False])
def test_attributes_are_kept(
    links: bool, name: str, value: bytes, own: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the list of who may read a file beside its owner and group."""
    file = own / HASH_TOPK
    file.chmod(0o600)
    try:
        os.setxattr(file, name, value)
    except OSError as error:
        pytest.skip(f"no {name} here: {error}")
    if not links:
        monkeypatch.setattr(os, "link", _refuse)
    expected = (kept(file), stat.S_IMODE(file.stat().st_mode))
    for verb in ("apply", "revert"):
        assert command(verb, own, HASH).code == 0
        assert (kept(file), stat.S_IMODE(file.stat().st_mode)) == expected


def test_attributes_that_cannot_be_kept(own: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    os.setxattr(own / HASH_TOPK, "user.note", b"mine")
    monkeypatch.setattr(os, "setxattr", _refuse)
    before = digest(own)
    refusal = command("apply", own, HASH).refusal()
    assert f"{own / HASH_TOPK}: its attribute user.note cannot be kept (Operation not permitted)" in refusal
    assert digest(own) == before


def test_an_access_list_of_the_directory_gives_nobody_more(own: Path, command: Command) -> None:
    """What it gives to new files, a file that had none does not get."""
    try:
        os.setxattr(own / "sglang", "system.posix_acl_default", ACCESS)
    except OSError as error:
        pytest.skip(f"no access lists here: {error}")
    assert command("apply", own, HASH).code == 0
    assert "system.posix_acl_access" not in kept(own / HASH_TOPK)


def kept(file: Path) -> dict[str, bytes]:
    with file.open("rb") as opened:
        return attributes(opened.fileno())


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(1, os.strerror(1))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_bytecode_with_unchecked_hashes(
    verb: str, prefix: bool, tree: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would go on running it; what is checked, or another file's, stays."""
    if verb == "revert":
        assert command("apply", tree, HASH).code == 0
    if prefix:
        monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "prefix"))
        monkeypatch.setattr("sys.pycache_prefix", str(tmp_path / "prefix"))
    made = []
    for path in (HASH_TOPK, "sglang/utils.py"):
        for mode in py_compile.PycInvalidationMode:
            target = importlib.util.cache_from_source(str(tree / path), optimization=mode.value)
            py_compile.compile(str(tree / path), target, invalidation_mode=mode)
            made.append(Path(target))
    monkeypatch.setattr("sys.pycache_prefix", None)
    assert command(verb, tree, HASH).code == 0
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH.value
    gone = [path for path in made if not path.exists()]
    assert gone == [path for path in made if f"opt-{unchecked}." in path.name and "hash_topk" in path.name]


def test_bytecode_that_cannot_be_removed(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = importlib.util.cache_from_source(str(tree / HASH_TOPK))
    py_compile.compile(
        str(tree / HASH_TOPK), target, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    unlink = Directory.unlink

    def refuse(directory: Directory, name: str) -> None:
        if name.endswith(".pyc"):
            _refuse()
        unlink(directory, name)

    monkeypatch.setattr(Directory, "unlink", refuse)
    result = command("apply", tree, HASH)
    assert result.code == 0
    assert f"{target}: may have bytecode of hash_topk.py as it was" in result.err


OTHERS = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "form feeds": lambda data: data.replace(b"sglang/README", b"\x0csglang/README"),
    "U+2028": lambda data: b"sglang/x\xe2\x80\xa8y,,\n" + data,
    "a bare CR": lambda data: b"x,,\rsglang/y,,\n" + data,
    "every row twice": lambda data: data + data,
    "a row of the receipt": lambda data: data + b"sglang/_patchset.json,sha256=x,1\n" * 2,
    "no last end": lambda data: data.rstrip(b"\n"),
    "CRLF": lambda data: data.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_record_as_it_was(kind: str, own: Path, command: Command) -> None:
    file = own / INFO / "RECORD"
    make: Callable[[bytes], bytes] = OTHERS[kind]
    file.write_bytes(make(file.read_bytes()))
    # What names the version is nobody's to change here.
    edit(own / "sglang" / "_version.py", "# mine")
    before = digest(own)
    assert command("apply", own).code == 0
    found = file.read_bytes()
    for path in (HASH_TOPK, receipt.PATH):
        assert f"{path},{record._entry((own / path).read_bytes())}".encode() in found
    assert command("revert", own).code == 0
    assert digest(own) == before


@needs_root
def test_a_look_at_another_user_s_run(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody else can look into what it keeps: it may be at work."""
    from .test_file_systems import as_user

    (own / JOURNAL).parent.mkdir(mode=0o700)
    (own / JOURNAL).write_text("[]")
    assert as_user(["status", str(own)]) == 2
    assert "another run is at work or was interrupted" in Result(2, *capfd.readouterr()).out
