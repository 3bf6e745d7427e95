"""What a package may lie on: caches that it is linked to, mounts, full disks, other owners and modes."""

from __future__ import annotations

import mmap
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import cli, patches, receipt
from sglang_patchset.catalog import Catalog

from .conftest import ROOT, Command, Result, digest, link
from .test_install import environment, site, tool

HASH = "hash-topk-dummy-weights"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
INFO = "sglang-0.5.12.dist-info"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and mount")


def contents(tree: Path) -> dict[str, bytes]:
    """The bytes of every file, whatever a link leads through."""
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def symlinks(cache: Path, target: Path) -> Path:
    """A copy of a tree whose every file is a link into it, as `uv --link-mode symlink` makes it."""
    for path in cache.rglob("*"):
        place = target / path.relative_to(cache)
        if path.is_dir():
            place.mkdir(parents=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return target


@pytest.mark.parametrize("make", [link, symlinks])
def test_a_cache_and_another_environment_keep_theirs(
    make: object, unpacked: Mapping[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "cache"))
    before = digest(cache)
    assert callable(make)
    pythons = []
    for name in ("one", "two"):
        pythons.append(environment(tmp_path / name))
        site(tmp_path / name).rmdir()
        make(cache, next((tmp_path / name / "lib").glob("python3*")) / "site-packages")
    other = digest(site(tmp_path / "two"))
    # The package that an interpreter has is another way to it than the one that its path is.
    for arguments in ((), (tmp_path / "one",)):
        assert tool(pythons[0], "apply", *arguments).returncode == 0
        assert tool(pythons[0], "status", *arguments).returncode == 0
        assert tool(pythons[1], "status").returncode == 1
        assert not (site(tmp_path / "one") / HASH_TOPK).is_symlink()
        assert digest(cache) == before
        assert tool(pythons[0], "revert", *arguments).returncode == 0
        assert digest(cache) == before
        assert digest(site(tmp_path / "two")) == other
        assert contents(site(tmp_path / "one")) == contents(cache)


@pytest.mark.parametrize("path", ["sglang/srt", INFO])
def test_a_directory_that_others_share(path: str, tree: Path, command: Command, tmp_path: Path) -> None:
    shared = (tree / path).rename(tmp_path / "shared")
    (tree / path).symlink_to(shared)
    before = digest(tree), digest(shared)
    assert ": behind a link, which others may share" in command("apply", tree).refusal()
    assert (digest(tree), digest(shared)) == before
    assert command("status", tree).code == 1


@pytest.mark.parametrize("mode", ["hardlink", "symlink", "clone"])
def test_a_cache_of_uv_s(mode: str, wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    uv = shutil.which("uv") or pytest.importorskip("uv", reason="needs uv").find_uv_bin()
    python = environment(tmp_path / "venv")
    line = [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--link-mode", mode]
    line += ["--cache-dir", tmp_path / "cache", "--python", python, wheels["0.5.12"]]
    subprocess.run(line, check=True, capture_output=True)
    (info,) = (tmp_path / "cache").rglob(f"{INFO}/METADATA")
    cache = info.parents[1]
    before = digest(cache), contents(site(tmp_path / "venv"))
    assert tool(python, "apply").returncode == 0
    assert digest(cache) == before[0]
    assert tool(python, "status").returncode == 0
    assert command("revert", tmp_path / "venv").code == 0
    assert (digest(cache), contents(site(tmp_path / "venv"))) == before


def test_other_modes_are_kept(tree: Path, command: Command) -> None:
    modes = {HASH_TOPK: 0o600, "sglang/srt/server_args.py": 0o755, f"{INFO}/RECORD": 0o2755}
    for path, mode in modes.items():
        content = (tree / path).read_bytes()
        (tree / path).unlink()
        (tree / path).write_bytes(content)
        (tree / path).chmod(mode)
    before = digest(tree)
    for verb in ("apply", "revert"):
        assert command(verb, tree).code == 0
        assert {path: (tree / path).stat().st_mode & 0o7777 for path in modes} == modes
    assert digest(tree) == before


@needs_root
def test_other_owners_are_kept(tree: Path, command: Command) -> None:
    """In a directory that gives what is made in it a group of its own; the owner's set-id bits stay too."""
    for directory in (tree / "sglang", *(path for path in (tree / "sglang").rglob("*") if path.is_dir())):
        os.chown(directory, 0, 2000)
        directory.chmod(0o2755)
    modes = {HASH_TOPK: (0, 0, 0o640), "sglang/srt/server_args.py": (1000, 1000, 0o2755)}
    for path, (owner, group, mode) in modes.items():
        content = (tree / path).read_bytes()
        (tree / path).unlink()
        (tree / path).write_bytes(content)
        os.chown(tree / path, owner, group)
        (tree / path).chmod(mode)
    for verb in ("apply", "revert"):
        assert command(verb, tree).code == 0
        for path, expected in modes.items():
            stat = (tree / path).stat()
            assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == expected


@needs_root
@pytest.mark.parametrize(("owner", "group", "mode"), [(1001, 1000, 0o644), (1000, 1001, 0o640)])
def test_an_owner_that_cannot_be_kept(
    owner: int,
    group: int,
    mode: int,
    unpacked: Mapping[str, Path],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Who may write to the directories, but is not the files' owner."""
    tree = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "tree"))
    for path in (tree, *tree.rglob("*")):
        os.chown(path, 1000, 1000)
    os.chown(tree / HASH_TOPK, owner, group)
    (tree / HASH_TOPK).chmod(mode)
    before = digest(tree)
    assert as_user(["apply", str(tree), HASH]) == 2
    refusal = Result(2, *capfd.readouterr()).refusal()
    assert f"{tree / HASH_TOPK}: its owner and group cannot be kept: run this as its owner" in refusal
    assert digest(tree) == before


@needs_root
def test_a_group_that_says_nothing(unpacked: Mapping[str, Path], tmp_path: Path) -> None:
    """`chown user` alone leaves root's group, in which the user is not; all may read the files."""
    tree = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "tree"))
    for path in (tree, *tree.rglob("*")):
        os.chown(path, 1000, 0)
    assert as_user(["apply", str(tree)]) == 0
    assert as_user(["revert", str(tree)]) == 0


def as_user(arguments: list[str]) -> int:
    """The tool run by the user 1000."""
    tree = Path(arguments[1])
    for directory in (tree, *tree.parents[:3]):
        directory.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(1000)
        os.setuid(1000)
        os._exit(cli.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mounted(script: str, tree: Path, *arguments: str) -> Result:
    """The tool run where `script` has mounted something; the mounts go with it.

    It prints the sums of all files before and after, which have to be the same.
    """
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("only root can mount")
    sums = f"cd {shlex.quote(str(tree))} && find . -type f -exec sha256sum {{}} + | sort"
    line = " ".join(map(shlex.quote, [sys.executable, "-m", "sglang_patchset", *arguments]))
    text = f"set -e\n{script}\nbefore=$({sums})\ncode=0\n{line} || code=$?\n"
    text += f'[ "$before" = "$({sums})" ] || {{ echo CHANGED; exit 3; }}\nexit $code\n'
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "tree": str(tree)}
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", text], capture_output=True, text=True, env=env, check=False
    )
    if "mount:" in done.stderr:
        pytest.skip(f"cannot be mounted here: {done.stderr.splitlines()[0]}")
    return Result(done.returncode, done.stdout, done.stderr)


MOUNTS = {
    "full": (
        'cp -a "$tree" "$tree.copy"\nsize=$(($(du -sk "$tree" | cut -f1) + 64))\n'
        'mount -t tmpfs -o size="${size}k" tmpfs "$tree"\n'
        'cp -a "$tree.copy/." "$tree"\nrm -r "$tree.copy"',
        "{tree}/sglang: cannot be written to (No space left on device): make room",
    ),
    "read-only": (
        'mount --bind "$tree" "$tree"\nmount -o remount,bind,ro "$tree"',
        "{tree}/sglang: no permission to write there, or mounted read-only: ",
    ),
    "a single file": (
        f'cp "$tree/{HASH_TOPK}" "$tree.copy"\nmount --bind "$tree.copy" "$tree/{HASH_TOPK}"',
        f"{{tree}}/{HASH_TOPK}: cannot be replaced (Device or resource busy): see whether it is a mount",
    ),
    "the dist-info": (
        f'cp -a "$tree/{INFO}" "$tree.copy"\nmount -t tmpfs tmpfs "$tree/{INFO}"\n'
        f'cp -a "$tree.copy/." "$tree/{INFO}"',
        f"{{tree}}/{INFO}: not on the file system of {{tree}}/sglang",
    ),
    "a directory": (
        'cp -a "$tree/sglang/srt/layers" "$tree.copy"\nmount -t tmpfs tmpfs "$tree/sglang/srt/layers"\n'
        'cp -a "$tree.copy/." "$tree/sglang/srt/layers"',
        "{tree}/sglang/srt/layers: not on the file system of {tree}/sglang",
    ),
}


@pytest.mark.parametrize("mount", MOUNTS)
def test_mounts(mount: str, unpacked: Mapping[str, Path], tmp_path: Path) -> None:
    tree = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "tree"))
    script, message = MOUNTS[mount]
    refusal = mounted(script, tree, "apply", str(tree)).refusal()
    assert message.format(tree=tree) in refusal


@pytest.mark.parametrize("spare", [True, False])
def test_a_full_temporary_directory(
    spare: bool, unpacked: Mapping[str, Path], tables: Catalog, tmp_path: Path
) -> None:
    """For what git patches, or for what comes of it: a file that needs one more page."""
    tree = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "tree"))
    touched = patches.load(tables, tables.default).files
    pages = sum(-(-(tree / path).stat().st_size // mmap.PAGESIZE) for path in touched) if spare else 1
    script = (
        f'mkdir "$tree.tmp"\nmount -t tmpfs -o size={pages * mmap.PAGESIZE} tmpfs "$tree.tmp"\n'
        'export TMPDIR="$tree.tmp"'
    )
    refusal = mounted(script, tree, "apply", str(tree)).refusal()
    assert f"{tree}.tmp: cannot be written to (No space left on device): make room there, or name" in refusal


def test_names_without_case(unpacked: Mapping[str, Path], tmp_path: Path) -> None:
    tree = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "tree"))
    script = (
        'mkdir "$tree.copy"\nmount -t tmpfs -o casefold tmpfs "$tree.copy"\nmkdir "$tree.copy/t"\n'
        'chattr +F "$tree.copy/t"\ncp -a "$tree/." "$tree.copy/t"\n[ -e "$tree.copy/t/SGLANG" ]\n'
    )
    copy = f"{tree}.copy/t"
    line = [sys.executable, "-m", "sglang_patchset"]
    both = f"{script}{' '.join(line)} apply {copy} && {' '.join(line)} status {copy}"
    assert mounted(both, tree, "revert", copy).code == 0


@needs_root
def test_an_immutable_file(unpacked: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(unpacked["0.5.12"], tmp_path / "tree"))
    file = tree / HASH_TOPK
    before = digest(tree)
    if subprocess.run(["chattr", "+i", file], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable files")
    try:
        assert f"{file}: cannot be replaced (Operation not permitted)" in command("apply", tree).refusal()
        assert digest(tree) == before
    finally:
        subprocess.run(["chattr", "-i", file], check=True)


def test_a_package_on_another_file_system(unpacked: Mapping[str, Path], command: Command) -> None:
    """Than the temporary directory: what is renamed into its place is made beside it."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == unpacked["0.5.12"].stat().st_dev:
        pytest.skip("there is no other file system")
    tree = memory / f"sglang-patchset-{os.getpid()}"
    try:
        shutil.copytree(unpacked["0.5.12"], tree)
        before = digest(tree)
        assert command("apply", tree).code == 0
        assert command("status", tree).code == 0
        assert command("revert", tree).code == 0
        assert digest(tree) == before
    finally:
        shutil.rmtree(tree)


def test_line_ends_changed_by_a_tool(tree: Path, command: Command) -> None:
    """In RECORD they are kept; in a file that a fix touches they are named."""
    record = tree / INFO / "RECORD"
    for path in (record, tree / HASH_TOPK):
        content = path.read_bytes().replace(b"\r", b"").replace(b"\n", b"\r\n")
        path.unlink()
        path.write_bytes(content)
        before = digest(tree)
        if path == record:
            assert command("apply", tree).code == 0
            lines = record.read_bytes().splitlines(keepends=True)
            assert all(line.endswith(b"\r\n") for line in lines)
            assert any(line.startswith(receipt.PATH.encode()) for line in lines)
            assert command("revert", tree).code == 0
        else:
            assert f"{HASH_TOPK} has other line ends (CRLF) than the release" in (
                command("apply", tree).refusal()
            )
        assert digest(tree) == before
