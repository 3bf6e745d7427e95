"""Tables, patches, wheels and trees that somebody made to do harm: refused in one line, nothing changed."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import catalog, releases
from sglang_patchset.errors import PatchsetError

from .conftest import ROOT, Command, digest, link

HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
INFO = "sglang-0.5.12.dist-info"
FIRST = "hash-topk-dummy-weights.patch"


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tool's own tables and series, which can be changed."""
    copy = Path(shutil.copytree(ROOT / "patches", tmp_path / "project" / "patches"))
    monkeypatch.setattr(catalog, "_patches_dir", lambda: copy)
    return copy


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("0.5.11/release.toml", 'date = "2026-05-05"', "date = ", "Invalid value"),
        ("0.5.11/release.toml", 'date = "2026-05-05"', "date = [[[", "Invalid value"),
        ("0.5.11/release.toml", 'date = "2026-05-05"', "date = " + "[" * 5000, "nested"),
        ("0.5.11/release.toml", 'date = "2026-05-05"', "date = 3", "date"),
        ("0.5.11/release.toml", 'date = "2026-05-05"', 'date = "today"', "date"),
        ("0.5.11/release.toml", "patchset = 1", 'patchset = "x"', "patchset"),
        ("0.5.11/release.toml", "patchset = 1", "patchset = -1", "patchset"),
        ("0.5.11/release.toml", '"3.10"', "3.10", "python"),
        ("0.5.11/wheels.sha256", "  sglang-0.5.11-cp310", "  ../sglang-0.5.11-cp310", "wheel"),
        ("0.5.11/wheels.sha256", "  sglang-0.5.11-cp310", "  other-0.5.11-cp310", "wheel"),
        ("0.5.11/wheels.sha256", "a9002c6377e0", "--index-url=x", "wheel"),
        ("0.5.11/series", "swa-graph-padding.patch", "../../x/x.patch", "no name of a patch file"),
        ("0.5.11/series", "swa-graph-padding.patch", "/tmp/x.patch", "no name of a patch file"),
        ("0.5.11/series", "swa-graph-padding.patch", "x\0.patch", "no name of a patch file"),
        ("0.5.11/series", "swa-graph-padding.patch", "-p0", "no name of a patch file"),
        ("0.5.11/series", "swa-graph-padding.patch", "../x.patch", "no name of a patch file"),
        ("0.5.11/series", "swa-graph-padding.patch", "x.PATCH", "no name of a patch file"),
        ("0.5.11/series", "swa-graph-padding.patch", "dsa-index-sharing.patch", "twice"),
        ("fixes/hash-topk-dummy-weights.toml", '= "not-affected"', '= "perhaps"', "perhaps"),
        ("fixes/hash-topk-dummy-weights.toml", '"==0.5.11" =', '"=0.5.11" =', "Invalid specifier"),
        ("fixes/hash-topk-dummy-weights.toml", '"==0.5.11" = "not-affected"', '"==0.5.11" = 7', "==0.5.11"),
        ("fixes/hash-topk-dummy-weights.toml", "upstream-pr = 25892", 'upstream-pr = "25892"', "upstream-pr"),
        ("fixes/hash-topk-dummy-weights.toml", 'code = ["sglang/', 'code = ["../', "code"),
        ("fixes/hash-topk-dummy-weights.toml", "log = ['(", "log = ['((", "no regular expression"),
        ("fixes/hash-topk-dummy-weights.toml", '"--load-format=dummy"', '"rm -rf /"', "no flag"),
        (
            "fixes/hash-topk-dummy-weights.toml",
            "upstream-pr = 25892",
            'upstream-pr = 1\nneeds = "x"',
            "needs",
        ),
    ],
)
def test_tables(file: str, old: str, new: str, message: str, patches: Path, command: Command) -> None:
    """What one of them describes is out, with a line that says why; the others are there."""
    table = patches / file
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new))
    result = command("list")
    assert (result.code, result.err) == (0, "")
    place = table.parent / "release.toml" if file.startswith("0") else table
    (line,) = (line for line in result.out.splitlines() if line.startswith(f"{place}: "))
    assert message in line
    assert line.endswith("install sglang-patchset again")
    assert result.out.count("  #") == len(catalog.load(ROOT / "patches").fixes) - (not file.startswith("0"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", b"x" * 9])
@pytest.mark.parametrize("file", ["0.5.11/release.toml", "fixes/swa-graph-padding.toml", "0.5.11/series"])
def test_tables_that_are_none(file: str, content: bytes, patches: Path, tree: Path, command: Command) -> None:
    (patches / file).write_bytes(content)
    result = command("status", tree)
    assert (result.code, result.err) == (1, "")
    assert ("unknown" in result.out) == file.startswith("fixes")


def test_a_patch_set_that_is_not_there(patches: Path, tree: Path, command: Command) -> None:
    (patches / "default").write_text("latest\n")
    assert f"{patches}: no patch set" in command("status", tree).refusal()
    (patches / "default").unlink()
    assert f"{patches}: no patch set" in command("status", tree).refusal()


SECTION = "diff --git a/{0} b/{0}\nindex {1}..{1} 100644\n--- a/{0}\n+++ b/{0}\n@@ -0,0 +1 @@\n+x\n"


@pytest.mark.parametrize(
    "path",
    [
        *("setup.py", "python/setup.py", "python/../sglang/x.py", "python/sglang/../../x.py", "/etc/passwd"),
        *("python/sglang/./x.py", "python/sglang//x.py", "python/sglang/-x y.py", "python/sglang/[ab].py"),
        *("../x.py", "python/sglang/x\x7f.py", "python/sglang/.git/config", "python/SGLANG/x.py"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_patch_of_other_files(path: str, alone: bool, patches: Path, tree: Path, command: Command) -> None:
    patch = patches / "0.5.12" / FIRST
    section = SECTION.format(path, "0" * 40)
    patch.write_text(f"Subject: x\n\n{section}" if alone else patch.read_text() + section)
    before = digest(tree)
    refusal = command("apply", tree, patch.stem).refusal()
    assert f"{patch}: not a patch of files under python/sglang/" in refusal
    assert digest(tree) == before


@pytest.mark.parametrize(
    "lines",
    [
        "old mode 100644\nnew mode 120000\nindex {0}..{0}\n",
        "new file mode 120000\nindex {0}..{0}\n--- /dev/null\n+++ b/python/sglang/x.py\n@@ -0,0 +1 @@\n+x\n",
        "similarity index 100%\nrename from python/sglang/x.py\nrename to ../../x.py\n",
        "index {0}..{0} 100644\nGIT binary patch\nliteral 1\nIcmZPo000310RR91\n",
        "index {0}..{0} 100644\n@@ nonsense @@\n+x\n",
        "index {0}..{0} 100644\n",
    ],
)
def test_a_patch_that_is_more_than_text(lines: str, patches: Path, tree: Path, command: Command) -> None:
    patch = patches / "0.5.12" / FIRST
    section = "diff --git a/python/sglang/x.py b/python/sglang/x.py\n" + lines.format("0" * 40)
    patch.write_text(patch.read_text() + section)
    before = digest(tree)
    assert "not a patch of files under python/sglang/" in command("apply", tree, patch.stem).refusal()
    assert digest(tree) == before


def test_a_patch_with_a_file_twice(patches: Path, tree: Path, command: Command) -> None:
    """Or with two names that are one where names have no case."""
    patch = patches / "0.5.12" / FIRST
    text = patch.read_text()
    section = text[text.index("diff --git") :]
    for again in (section, section.replace("/hash_topk.py", "/Hash_TopK.py")):
        patch.write_text(text + again)
        result = command("status", tree)
        assert re.search(r"^hash-topk-dummy-weights +#25892 +unknown$", result.out, re.MULTILINE)
        assert f"{patch}: not a patch of files under python/sglang/" in result.out


def test_a_line_of_a_patch_is_no_header(patches: Path, tree: Path, command: Command) -> None:
    """What Python takes for a line's end and git does not."""
    patch = patches / "0.5.12" / FIRST
    text = patch.read_text().replace("Symptom: ", "Symptom: \x0cdiff --git a/setup.py b/setup.py ")
    patch.write_text(text)
    assert command("status", tree).code == 1


def made(directory: Path, members: Mapping[str, bytes | zipfile.ZipInfo], name: str = "") -> Path:
    """A wheel that nobody has pinned, with a RECORD of its members."""
    wheel = directory / (name or "sglang-0.5.12-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in members.items():
            archive.writestr(path, data if isinstance(data, bytes) else b"")
        archive.writestr(f"{INFO}/RECORD", f"{INFO}/RECORD,,\n")
    return wheel


@pytest.mark.parametrize(
    "member",
    [
        *("../evil.py", "/evil.py", "sglang/../../evil.py", "evil/__init__.py", "sglang\\..\\evil.py"),
        *("sglang-0.5.11.dist-info/RECORD", "C:/evil.py", "sglang/a\nb.py", "sglang/\x1b[31m.py"),
    ],
)
def test_members_elsewhere(member: str, command: Command, tmp_path: Path) -> None:
    wheel = made(tmp_path, {member: b""})
    refusal = command("status", wheel).refusal()
    assert "which is not SGLang's" in refusal
    assert refusal.rstrip("\n").isprintable()


def test_members_that_collide(command: Command, tmp_path: Path) -> None:
    wheel = made(tmp_path, {"sglang/utils.py": b"", "sglang/Utils.py": b""})
    assert "has the member sglang/Utils.py twice" in command("status", wheel).refusal()
    wheel.write_bytes(wheel.read_bytes().replace(b"sglang/Utils.py", b"sglang/utils.py"))
    assert "has the member sglang/utils.py twice" in command("status", wheel).refusal()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_members_that_are_no_files(kind: int, command: Command, tmp_path: Path) -> None:
    member = zipfile.ZipInfo("sglang/utils.py")
    member.external_attr = (kind | 0o644) << 16
    wheel = tmp_path / "sglang-0.5.12-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    assert "has the member sglang/utils.py, which is not SGLang's" in command("status", wheel).refusal()


@pytest.mark.parametrize("path", [f"{INFO}/RECORD", HASH_TOPK])
@pytest.mark.parametrize("declared", [True, False])
def test_a_zip_bomb(path: str, declared: bool, tmp_path: Path) -> None:
    """4 GB in 4 MB, whether the archive's directory says so or not; read by a process that has 2 GB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    chunks = [packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    packed = chunks[0] + 254 * chunks[1] + packer.flush()
    size = 255 << 24 if declared else 100
    header = struct.pack("<5H3L2H", 20, 0, 8, 0, 33, 0, len(packed), size, len(path), 0)
    start = b"PK\3\4" + header + path.encode() + packed
    entry = b"PK\1\2" + struct.pack("<H", 20) + header + struct.pack("<3H2L", 0, 0, 0, 0, 0) + path.encode()
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(entry), len(start), 0)
    wheel = tmp_path / "sglang-0.5.12-py3-none-any.whl"
    wheel.write_bytes(start + entry + end)
    line = f"ulimit -v 2000000; exec {sys.executable} -m sglang_patchset status {wheel}"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=env, check=False, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert ("has more than" if declared else "damaged") in done.stderr


def test_a_hash_is_checked_before_anything_is_opened(
    wheels: Mapping[str, Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / wheels["0.5.12"].name
    wheel.write_bytes(b"anything")

    def never(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(releases, "WheelFile", never)
    monkeypatch.setattr(zipfile, "ZipFile", never)
    for arguments in (("apply", wheel), ("wheel", wheel, tmp_path), ("checkout", wheel, tmp_path / "co")):
        assert "its sha256 is" in command(*arguments).refusal()


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    "receipt",
    [
        NESTED,
        b'{"tool": ' + NESTED,
        b'{"tool": 1, "fixes": {}}',
        b'{"tool": "\\u001b[2J\\n", "fixes": {}}',
        b"\xff",
    ],
)
def test_receipts(receipt: bytes, tree: Path, command: Command) -> None:
    """They explain; what is none of ours explains nothing."""
    (tree / "sglang" / "_patchset.json").write_bytes(receipt)
    result = command("status", tree)
    assert result.code == 1
    assert "\x1b[2J" not in result.out
    assert command("apply", tree).code == 0
    assert command("revert", tree).code == 0


def test_nested_metadata(tree: Path, command: Command) -> None:
    (tree / INFO / "direct_url.json").write_bytes(NESTED)
    (tree / "sglang").rename(tree / "elsewhere")
    assert "no SGLang in it" in command("status", tree).refusal()


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/outside",
        "../../outside",
        "a\0b",
        "../x/RECORD",
        "../sglang-1.dist-info/../outside",
        "",
    ],
)
def test_a_journal_that_leads_elsewhere(path: str, tree: Path, command: Command) -> None:
    """Whoever may write into the package may not have root replace another file for him."""
    for outside in (tree / "outside", tree.parent / "outside"):
        outside.write_bytes(b"")
    directory = tree / "sglang" / ".patchset-transaction"
    directory.mkdir()
    (directory / "0").write_bytes(b"evil")
    entry = {"path": path, "old": _blob(b""), "new": _blob(b"evil")}
    (directory / "journal.json").write_text(json.dumps([entry]))
    before = digest(tree.parent)
    assert "journal.json: damaged: " in command("apply", tree).refusal()
    assert digest(tree.parent) == before


@pytest.mark.parametrize("link", ["sglang/link", "sglang-1.dist-info", "sglang/.patchset-transaction"])
def test_a_journal_that_leads_through_a_link(link: str, tree: Path, command: Command, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("RECORD", "journal.json"):
        (outside / name).write_bytes(b"")
    (tree / link).symlink_to(outside)
    directory = tree / "sglang" / ".patchset-transaction"
    directory.mkdir(exist_ok=True)
    (directory / "0").write_bytes(b"evil")
    path = os.path.relpath(tree / link / "RECORD", tree / "sglang")
    entry = {"path": path, "old": _blob(b""), "new": _blob(b"evil")}
    (directory / "journal.json").write_text(json.dumps([entry]))
    before = digest(tree.parent)
    assert "journal.json: damaged: " in command("apply", tree).refusal()
    assert digest(tree.parent) == before


def test_staging_that_is_a_link(tree: Path, command: Command, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "journal.json").write_bytes(b"")
    (tree / "sglang" / ".patchset-transaction.tmp").symlink_to(outside)
    assert command("apply", tree).code == 0
    assert [path.name for path in outside.iterdir()] == ["journal.json"]


def test_a_nested_journal(tree: Path, command: Command) -> None:
    directory = tree / "sglang" / ".patchset-transaction"
    directory.mkdir()
    (directory / "journal.json").write_bytes(NESTED)
    assert "journal.json: damaged: " in command("revert", tree).refusal()


def _blob(data: bytes) -> str:
    from sglang_patchset.git import blob_id

    return blob_id(data)


@pytest.mark.parametrize(
    "name",
    ["-rf", "--help", "a b", "a\nb", "$(touch pwned)", "'\"", "*?[a]", "é\udcff", "; touch pwned", "a:b"],
)
def test_names_that_a_shell_would_read(
    name: str, unpacked: Mapping[str, Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = link(unpacked["0.5.12"], tmp_path / name)
    before = digest(tree)
    scratch = tmp_path / f"tmp{name}"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    for target in (tree, f"./{name}"):
        assert command("apply", target).code == 0
        assert command("status", target).code == 0
        assert command("revert", target).code == 0
    assert digest(tree) == before
    assert {path.name for path in tmp_path.iterdir()} == {name, f"tmp{name}"}
    assert list(scratch.iterdir()) == []


def test_no_shell_is_ever_called() -> None:
    for file in [*(ROOT / "python").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword):
                assert node.arg != "shell", file
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"system", "popen", "getoutput", "getstatusoutput"}, file


def test_a_message_is_one_line_of_what_can_be_printed() -> None:
    error = PatchsetError("a\nb\x1b[2Jc\x85d \u202e é")
    assert str(error) == "a b\\x1b[2Jc d \\u202e é"
    assert io.StringIO().write(str(PatchsetError("\udcff"))) == len("\\udcff")
