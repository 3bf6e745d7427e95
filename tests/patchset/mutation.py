"""What every fuzzer runs: a script of edits on real input, and what may come of it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from packaging.version import Version

from sglang_patchset import catalog, cli, patches, receipt, record, status, survey, transaction
from sglang_patchset.errors import PatchsetError
from sglang_patchset.git import blob_id
from sglang_patchset.targets import Wheel

from .conftest import ROOT, digest

# Takes a script; raises where something comes of it that may not.
Target = Callable[[bytes], None]

_TOKENS = (
    *(b"\0", b"\xff", b"\n", b"\r\n", b"\x0c", b"\xe2\x80\xa8", b'"', b"'", b"\\", b"[", b"]", b"{", b"}"),
    *(b"=", b",", b".", b"-", b"/", b"..", b"../../x", b"@@ -1 +1 @@\n", b"\ndiff --git a/x b/x\n", b"true"),
    *(
        b"9" * 30,
        b"[" * 3000,
        b" ",
        b"#",
        b"\n+",
        b"\n-",
        b"\n ",
        b"\\ No newline at end of file\n",
        b"0.5.12",
    ),
    *(b"sglang/", b"index ", b"==", b"null", b"1e999", b"\xed\xb0\x80", b"0" * 64, b'"""', b"[[x]]\n"),
)


def mutated(data: bytes, script: bytes) -> bytes:
    """The data after the edits that a script says, six bytes for each."""
    for start in range(0, len(script) - 5, 6):
        kind, token, high, low, length, other = script[start : start + 6]
        place = (high << 8 | low) * (len(data) + 1) >> 16
        end = min(len(data), place + length)
        if kind % 6 == 0:
            data = data[:place] + data[end:]
        elif kind % 6 == 1:
            data = data[:place] + _TOKENS[token % len(_TOKENS)] + data[place:]
        elif kind % 6 == 2:
            data = data[:place] + bytes([other]) + data[place + 1 :]
        elif kind % 6 == 3:
            data = data[:end] + data[place:]
        elif kind % 6 == 4:
            lines = data.split(b"\n")
            one, two = token % len(lines), other % len(lines)
            lines[one], lines[two] = lines[two], lines[one]
            data = b"\n".join(lines)
        elif other < 16:
            data = data[:place]
    return data


def tables(script: bytes) -> None:
    """The two tables, by `sglang-patchset list`."""
    tables = ("0.5.12/release.toml", "0.5.12/wheels.sha256", "fixes/dsa-index-sharing.toml", "default")
    name = tables[(script[0] if script else 0) % len(tables)]
    with _patches() as root:
        _write(root / name, mutated((root / name).read_bytes(), script[1:]))
        _command("list")


def series(script: bytes) -> None:
    """A series or one of its patches, and the hunks that are read of it."""
    with _patches() as root:
        files = [root / "0.5.12" / "series", *sorted((root / "0.5.12").glob("*.patch"))]
        file = files[(script[0] if script else 0) % len(files)]
        _write(file, mutated(file.read_bytes(), script[1:]))
        with contextlib.suppress(PatchsetError):
            tables = catalog.load(root)
            found = patches.load(tables, tables.default)
            for patch in found.patches:
                for path in patch.files:
                    assert path.startswith("sglang/")
                    assert ".." not in path
                    assert patch.hunks(path)
            survey.take(found, dict.fromkeys(found.files, b"x\n").get)


def records(script: bytes) -> None:
    """RECORD: what can be listed can be changed and moved, and taken back."""
    data = mutated(_RECORD, script)
    record.intact(data, lambda _: b"x")
    try:
        listed = record.lists(data, receipt.PATH)
    except ValueError:
        return
    record.move(data, "sglang-0.5.12.dist-info/", "sglang-1.dist-info/")
    added = record.update(data, {receipt.PATH: (None, b"x"), "sglang/a.py": (b"x", b"y")})
    if not listed:
        back = record.update(added, {receipt.PATH: (b"x", None), "sglang/a.py": (b"y", b"x")})
        assert back == data


def receipts(script: bytes) -> None:
    """A receipt is ours, or explains nothing."""
    found = receipt.parse(mutated(_RECEIPT, script))
    assert found is None or not found.left("sglang/a.py", b"x")


def journals(script: bytes) -> None:
    """A journal says what to do with the package's own files, or is damaged."""
    with tempfile.TemporaryDirectory() as scratch:
        outside, package = Path(scratch, "outside"), Path(scratch, "sglang")
        directory = package / ".patchset-transaction"
        directory.mkdir(parents=True)
        _write(outside, b"old")
        _write(package / "a.py", b"old")
        _write(directory / "0", b"new")
        _write(directory / "journal.json", mutated(_JOURNAL, script))
        with contextlib.suppress(PatchsetError):
            with transaction.locked(package) as held:
                held.complete()
            assert not directory.exists()
        assert outside.read_bytes() == b"old"
        assert (package / "a.py").read_bytes() in (b"old", b"new")


def wheels(script: bytes) -> None:
    """A wheel that nobody has pinned."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "sglang-0.5.12-py3-none-any.whl")
        _write(file, mutated(_WHEEL, script))
        with contextlib.suppress(PatchsetError):
            status.examine(_TABLES, Wheel(file, Version("0.5.12")))


@contextmanager
def trees() -> Iterator[Target]:
    """`apply` and `revert` on a tree of a series of one patch, with other bytes in its files and its RECORD.

    Both done, or refused and nothing changed; in the end every byte is what it was.
    """
    with tempfile.TemporaryDirectory() as scratch, _patches() as root:
        base = Path(scratch, "base", "sglang")
        (base / "srt").mkdir(parents=True)
        files = {"__init__.py": b"", "srt/a.py": _file(b"a"), "srt/b.py": _file(b"b")}
        files["_version.py"] = b"__version__ = version = '0.5.12'\n"
        for name, data in files.items():
            (base / name).write_bytes(data)
        info = base.parent / "sglang-0.5.12.dist-info"
        info.mkdir()
        lines = {f"sglang/{name}": (None, data) for name, data in files.items()}
        (info / "RECORD").write_bytes(record.update(b"sglang-0.5.12.dist-info/RECORD,,\n", lines))
        for file in (root / "0.5.12" / "series", *(root / "0.5.12").glob("*.patch")):
            file.unlink()
        names, files = [], dict(files)
        for fix, texts in _EDITS.items():
            names.append(f"{fix}.patch")
            (root / "0.5.12" / names[-1]).write_bytes(_patch(files, texts))
        (root / "0.5.12" / "series").write_text("".join(f"{name}\n" for name in names))

        def run(script: bytes) -> None:
            tree = Path(scratch, "tree")
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(base.parent, tree)
            paths = ("sglang/srt/a.py", "sglang/srt/b.py", "sglang-0.5.12.dist-info/RECORD")
            for path in paths:
                part, script = script[:24], script[24:]
                (tree / path).write_bytes(mutated((tree / path).read_bytes(), part))
            before = digest(tree)
            for fixes in ((), *((fix,) for fix in _EDITS)):
                if _command("apply", str(tree), *fixes):
                    assert digest(tree) == before
                    continue
                changed = digest(tree)
                assert _command("apply", str(tree), *fixes) == 0
                assert digest(tree) == changed
                assert _command("revert", str(tree), *fixes) == 0
                assert digest(tree) == before

        yield run


_EDITS = {
    "hash-topk-dummy-weights": {"a.py": [(10, b"patched\n")], "b.py": [(5, b"patched\n")]},
    "dsv4-expert-distribution": {"a.py": [(30, b"again\n"), (50, b"and again\n")]},
}


def _file(name: bytes) -> bytes:
    return b"".join(b"%s = %d\n" % (name, number) for number in range(60))


def _patch(files: dict[str, bytes], edits: Mapping[str, list[tuple[int, bytes]]]) -> bytes:
    """A patch of the files, which have it afterwards."""
    text = b"Subject: x\n\n"
    for name, changes in edits.items():
        lines = files[f"srt/{name}"].splitlines(keepends=True)
        hunks = b""
        for line, new in changes:
            around = [b" " + each for each in lines[line - 3 : line + 4]]
            around[3:4] = [b"-" + lines[line], b"+" + new]
            hunks += b"@@ -%d,7 +%d,7 @@\n" % (line - 2, line - 2) + b"".join(around)
        after = list(lines)
        for line, new in changes:
            after[line] = new
        old, files[f"srt/{name}"] = files[f"srt/{name}"], b"".join(after)
        path = f"python/sglang/srt/{name}"
        ids = f"{blob_id(old)}..{blob_id(files[f'srt/{name}'])}"
        text += (
            f"diff --git a/{path} b/{path}\nindex {ids} 100644\n--- a/{path}\n+++ b/{path}\n".encode() + hunks
        )
    return text


@contextmanager
def _patches() -> Iterator[Path]:
    """A copy of the tables and series, which the tool takes for its own."""
    with tempfile.TemporaryDirectory() as scratch:
        # By links: what is changed is replaced.
        root = Path(shutil.copytree(ROOT / "patches", Path(scratch, "patches"), copy_function=_link))
        original = catalog._patches_dir
        catalog._patches_dir = lambda: root
        try:
            yield root
        finally:
            catalog._patches_dir = original


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _write(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def _command(*arguments: str) -> int:
    """Run the tool; it is done, or says in one line why not."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    if code == 2:
        assert (out.getvalue(), err.getvalue().count("\n")) == ("", 1)
        assert err.getvalue().rstrip("\n").isprintable()
    else:
        assert (code, err.getvalue()) == (0, "")
    return code


def _wheel() -> bytes:
    file = io.BytesIO()
    info = "sglang-0.5.12.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("sglang/__init__.py", "sglang/srt/layers/moe/hash_topk.py"):
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, "x = 1\n" * 9)
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), _RECORD)
    return file.getvalue()


_TABLES = catalog.load()
_RECORD = record.update(
    b'sglang-0.5.12.dist-info/RECORD,,\n"sglang/a,b.py",sha256=x,1\nsglang/c.py,,\n',
    {"sglang/a.py": (None, b"x"), "sglang/__init__.py": (None, b"")},
)
_RECEIPT = receipt.render(Version("0.5.12"), {"sglang/a.py": b"y", "sglang/b.py": b"z"})
_JOURNAL = f'[{{"path": "a.py", "old": "{blob_id(b"old")}", "new": "{blob_id(b"new")}"}}]'.encode()
_WHEEL = _wheel()
PARSERS: Mapping[str, Target] = {
    "tables": tables,
    "series": series,
    "records": records,
    "receipts": receipts,
    "journals": journals,
    "wheels": wheels,
}
