"""Looking at something runs nothing of it, takes nothing from the working directory, and comes to an end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sglang_patchset import cli, files
from sglang_patchset import git as module
from sglang_patchset.errors import PatchsetError

from .conftest import ROOT, Command, Result, change, git

HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
SOURCE = [sys.executable, "-m", "sglang_patchset"]
ENTRY = [sys.executable, "-c", "import sys; from sglang_patchset.__main__ import main; sys.exit(main())"]


def run(command: list[str], cwd: Path, *arguments: object, **env: str) -> Result:
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python"), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def older_git(directory: Path) -> str:
    """A PATH whose git knows no GIT_NO_LAZY_FETCH: Ubuntu 22.04's 2.34.1, or one that is as it was there."""
    real = os.environ.get("OLD_GIT") or shutil.which("git")
    program(directory / "git", f'unset GIT_NO_LAZY_FETCH\nexec {real} "$@"')
    return f"{directory}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def hostile(checkout: Path, tmp_path: Path) -> Path:
    """A checkout that has git run a program wherever it may, and lacks the object that is asked for."""
    trap, marker = tmp_path / "trap", tmp_path / "ran"
    program(trap, f'echo "$0 $@" >> {marker}\nexit 1')
    for name, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "theirs",
        "remote.theirs.promisor": "true",
        "remote.theirs.url": f"file://{tmp_path}",
        "remote.theirs.uploadpack": str(trap),
        "core.fsmonitor": str(trap),
        "core.pager": str(trap),
        "core.alternateRefsCommand": str(trap),
        "diff.external": str(trap),
        "filter.theirs.clean": str(trap),
        "filter.theirs.smudge": str(trap),
        "filter.theirs.process": str(trap),
        "diff.theirs.textconv": str(trap),
        "diff.theirs.command": str(trap),
    }.items():
        git(checkout, "config", name, value)
    (checkout / ".git" / "info" / "attributes").write_text("* filter=theirs diff=theirs\n")
    for hook in ("post-index-change", "reference-transaction", "post-checkout", "pre-commit"):
        shutil.copy(trap, program(checkout / ".git" / "hooks" / hook, ""))
    shutil.rmtree(checkout / ".git" / "objects")
    (checkout / ".git" / "objects").mkdir()
    # Changes on both sides: the file of the release is asked for.
    file = checkout / "python" / HASH_TOPK
    change(file, "self.routed_scaling_factor = routed_scaling_factor", "self.theirs = 1")
    change(file, "=False,\n        )\n\n", "=False,\n        )  # theirs\n\n")
    return checkout


def test_no_program_of_a_checkout_is_run(hostile: Path, tmp_path: Path) -> None:
    path = older_git(tmp_path / "bin")
    for verb in ("status", "apply", "revert"):
        result = run(SOURCE, tmp_path, verb, hostile, PATH=path)
        assert "other changes in the place of the hunk at line 37" in result.out + result.err
        assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.skipif("OLD_GIT" not in os.environ, reason="OLD_GIT names no git 2.34 or so: not run with one")
def test_an_old_git_is_old() -> None:
    said = subprocess.run([os.environ["OLD_GIT"], "--version"], capture_output=True, text=True, check=True)
    assert re.match(r"git version 2\.3[4-8]\b", said.stdout)


@pytest.mark.parametrize("kind", ["plain", "worktree", "separate", "borrowed"])
def test_what_a_repository_has_is_found(kind: str, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    options = ["--separate-git-dir", str(tmp_path / "separate")] if kind == "separate" else []
    git(tmp_path, "init", "--quiet", *options, str(repository))
    (repository / "a").write_bytes(b"a\n")
    name = git(repository, "hash-object", "-w", "a").strip()
    if kind == "worktree":
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        git(repository, *who, "commit", "--quiet", "--allow-empty", "--message", "x")
        git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
        repository = tmp_path / "tree"
    elif kind == "borrowed":
        git(tmp_path, "clone", "--quiet", "--shared", str(repository), str(tmp_path / "clone"))
        repository = tmp_path / "clone"
    assert module.blob(repository, name) == b"a\n"
    assert module.blob(repository, "0" * 40) is None


def test_objects_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    data = b"a" * 100
    name = module.blob_id(data)
    place = tmp_path / ".git" / "objects" / name[:2] / name[2:]
    place.parent.mkdir()
    # Other bytes than its name says.
    place.write_bytes(zlib.compress(b"blob 1\0b"))
    assert module.blob(tmp_path, name) is None
    place.write_bytes(zlib.compress(b"blob 100\0" + data))
    assert module.blob(tmp_path, name) == data
    # More than a source has: it says 2 GB, and begins so.
    place.write_bytes(zlib.compress(b"blob 2147483648\0" + bytes(64 << 20)))
    assert module.blob(tmp_path, name) is None
    monkeypatch.setattr(module, "_SECONDS", 1)
    place.unlink()
    os.mkfifo(place)
    assert module.blob(tmp_path, name) is None
    for text in (b"", b"gitdir: \0", b"gitdir: /nonexistent\n", b"gitdir: .\n" * 3, b"\xff"):
        shutil.rmtree(tmp_path / ".git", ignore_errors=True)
        (tmp_path / ".git").unlink(missing_ok=True)
        (tmp_path / ".git").write_bytes(text)
        assert module.blob(tmp_path, name) is None
        (tmp_path / ".git").unlink()


def test_a_git_that_is_too_old(
    tree: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said, found in (("git version 2.33.8", "git version 2.33.8"), ("", "says no version")):
        git = program(tmp_path / said[-6:] / "git", f"echo {said}")
        monkeypatch.setenv("PATH", str(git.parent))
        assert f"{git}: {found}: put git 2.34 or later on the PATH" in command("apply", tree).refusal()
    for said in ("git version 2.34.1", "git version 2.39.3 (Apple Git-146)", "git version 3.0.rc1"):
        git = program(tmp_path / said[-3:] / "git", f"echo '{said}'")
        monkeypatch.setenv("PATH", str(git.parent))
        assert module._git() == str(git)


def test_filters_of_a_contributor_s_checkout_are_off(checkout: Path, project: Path, tmp_path: Path) -> None:
    """`refresh` runs git there; what its configuration names as programs is not run."""
    marker = tmp_path / "ran"
    trap = program(tmp_path / "trap", f'echo "$@" >> {marker}\ncat')
    (checkout / ".git" / "info" / "attributes").write_text("*.py filter=a.b=c diff=a.b=c merge=a.b=c\n")
    for key in ("filter.a.b=c.clean", "filter.a.b=c.smudge", "filter.a.b=c.process", "diff.a.b=c.textconv"):
        git(checkout, "config", key, str(trap))
    git(checkout, "config", "filter.a.b=c.required", "true")
    git(checkout, "config", "core.fsmonitor", str(trap))
    for hook in ("post-index-change", "reference-transaction"):
        program(checkout / ".git" / "hooks" / hook, f"echo hook >> {marker}")
    # Its time is another: git looks whether the file is.
    os.utime(checkout / "python" / HASH_TOPK, (1, 1))
    result = run(
        [sys.executable, "-m", "sglang_patchset"],
        tmp_path,
        "refresh",
        checkout,
        PYTHONPATH=str(project / "python"),
    )
    assert (result.code, result.err) == (0, "")
    assert not marker.exists(), marker.read_text()


@pytest.mark.parametrize("name", ["packaging", "json", "argparse", "tempfile", "rich", "tomli"])
def test_nothing_is_imported_from_the_working_directory(name: str, tree: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    program(place / f"{name}.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    for tool in (SOURCE, ENTRY[:1] + ["-P"] * (sys.version_info >= (3, 11)) + ENTRY[1:]):
        result = run(tool, place, "status", tree)
        assert (result.code, result.err) == (1, "")
        assert not (tmp_path / "ran").exists()
        if sys.version_info < (3, 11):
            break


def test_pip_is_not_that_of_the_working_directory(wheels: Mapping[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "place"
    program(place / "pip" / "__main__.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    (place / "pip" / "__init__.py").touch()
    for path in (str(ROOT / "python"), f"{ROOT / 'python'}{os.pathsep}."):
        result = run(
            SOURCE,
            place,
            "wheel",
            "0.5.12",
            "out",
            "--find-links",
            os.path.relpath(wheels["0.5.12"].parent, place),
            PYTHONPATH=path,
        )
        assert not (tmp_path / "ran").exists()
        assert (result.code, result.err) == (0, "")
        shutil.rmtree(place / "out")


def test_git_is_not_that_of_the_working_directory(tree: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    program(place / "git", f"touch {tmp_path / 'ran'}")
    result = run(SOURCE, place, "apply", tree, PATH=f".{os.pathsep}{os.environ['PATH']}")
    assert (result.code, result.err) == (0, "")
    assert not (tmp_path / "ran").exists()


def test_patch_sh_takes_nothing_from_the_working_directory() -> None:
    """Every call of Python is an isolated one."""
    for script in ("patch.sh", "test.sh"):
        text = (ROOT / "scripts" / script).read_text()
        calls = re.findall(r'"\$(?:python|tool/bin/python|\{PYTHON:-python3\})" ([-\w]+)', text)
        assert calls
        assert {each for each in calls if each != "-I"} <= ({"-m"} if script == "test.sh" else set())


def test_a_colon_in_tmpdir_hides_no_repository(tree: Path, command: Command, tmp_path: Path) -> None:
    """git would look for a repository above, and take the files for none of it."""
    place = tmp_path / "a:b"
    place.mkdir()
    git(tmp_path, "init", "--quiet")
    result = run(SOURCE, tmp_path, "apply", tree, TMPDIR=str(place))
    assert (result.code, result.err) == (0, "")
    assert command("status", tree).code == 0


SPECIAL: Mapping[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 60 << 30),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "path",
    [
        HASH_TOPK,
        "sglang/_version.py",
        "sglang/_patchset.json",
        "sglang-0.5.12.dist-info/RECORD",
    ],
)
def test_what_is_no_file(path: str, kind: str, tree: Path, command: Command) -> None:
    (tree / path).unlink(missing_ok=True)
    SPECIAL[kind](tree / path)
    words = "has more than 16 MB" if kind == "sparse" else "not a regular file"
    refused = [verb for verb in ("status", "apply") if "RECORD" not in path or verb == "apply"]
    for verb in refused:
        assert f"{tree / path}: {words}" in command(verb, tree).refusal()


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
@pytest.mark.parametrize("name", ["METADATA", "direct_url.json"])
def test_metadata_that_is_no_file(name: str, kind: str, tree: Path, command: Command) -> None:
    (tree / "sglang" / "_version.py").unlink()
    (tree / "sglang-0.5.12.dist-info" / name).unlink(missing_ok=True)
    SPECIAL[kind](tree / "sglang-0.5.12.dist-info" / name)
    assert f"{tree / 'sglang-0.5.12.dist-info' / name}: " in command("status", tree).refusal()


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_wheel_that_is_no_file(kind: str, command: Command, tmp_path: Path) -> None:
    wheel = tmp_path / "sglang-0.5.12-cp311-cp311-manylinux_2_34_x86_64.whl"
    SPECIAL[kind](wheel)
    for arguments in (("status", wheel), ("apply", wheel), ("wheel", wheel)):
        assert f"{wheel}: " in command(*arguments).refusal()


def test_zeros_are_read_at_once(tree: Path, command: Command) -> None:
    """400 MB of them are refused; as many as are read take no longer than a source does."""
    (tree / HASH_TOPK).unlink()
    (tree / HASH_TOPK).write_bytes(bytes(400 << 20))
    assert "has more than 16 MB" in command("status", tree).refusal()
    os.truncate(tree / HASH_TOPK, files.SOURCE)
    assert "is no Python that this one reads" in command("apply", tree).refusal()


def test_a_file_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 9)
    assert files.read(file, 9) == b"x" * 9
    monkeypatch.setattr(files, "_check", lambda *_: None)
    with pytest.raises(PatchsetError, match="has more than 0 MB"):
        files.read(file, 8)


def test_a_parent_that_is_a_file(tree: Path, command: Command) -> None:
    shutil.rmtree(tree / "sglang" / "srt" / "layers")
    (tree / "sglang" / "srt" / "layers").touch()
    assert f"{HASH_TOPK} is missing" in command("apply", tree).refusal()


def test_a_user_that_is_not_there(command: Command) -> None:
    assert "~nosuchuser/venv: no such user: name" in command("status", "~nosuchuser/venv").refusal()


@pytest.mark.parametrize(
    "metadata", [b"\xff\xfe", b"Version: 0.5.12\r\nAuthor: \xff\r\n\r\n", b"Version: x\n", b""]
)
def test_metadata_in_other_bytes(metadata: bytes, tree: Path, command: Command) -> None:
    (tree / "sglang" / "_version.py").unlink()
    (tree / "sglang-0.5.12.dist-info" / "METADATA").unlink()
    (tree / "sglang-0.5.12.dist-info" / "METADATA").write_bytes(metadata)
    version = "0.5.12" if b"0.5.12" in metadata else "(no version)"
    result = command("status", tree)
    assert result.out.startswith(f"SGLang {version} in ")
    assert (result.code, result.err) == (1, "")


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("sglang.egg-info", "PKG-INFO"),
        ("sglang-0.5.12-py3.11.egg-info", ""),
        ("SGLang-0.5.12.dist-info", "METADATA"),
    ],
)
def test_metadata_of_other_installers(name: str, metadata: str, tree: Path, command: Command) -> None:
    (tree / "sglang" / "_version.py").unlink()
    shutil.rmtree(tree / "sglang-0.5.12.dist-info")
    file = tree / name / metadata
    file.parent.mkdir(exist_ok=True)
    file.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.12\n\nVersion: 9\n")
    assert command("status", tree).out.startswith("SGLang 0.5.12 in ")


# Ctrl-C and faults


def test_an_exception_that_nobody_has_foreseen(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 would say that the target is vulnerable."""

    def fail(*_: object) -> None:
        raise LookupError("what\nnobody foresaw")

    monkeypatch.setattr(cli.status, "examine", fail)
    for verb in ("status", "apply"):
        result = command(verb, tree)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert "LookupError (what nobody foresaw): a fault of sglang-patchset" in result.err


def test_a_dependency_that_cannot_be_imported(tree: Path, tmp_path: Path) -> None:
    program(tmp_path / "broken" / "packaging" / "__init__.py", "raise ValueError('broken')")
    path = f"{ROOT / 'python'}{os.pathsep}{tmp_path / 'broken'}"
    for tool in (SOURCE, ENTRY):
        result = run(tool, tmp_path, "status", tree, PYTHONPATH=path)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert "cannot start (broken): install sglang-patchset again" in result.err


@pytest.mark.parametrize("tool", [SOURCE, ENTRY], ids=["module", "script"])
@pytest.mark.parametrize("where", ["packaging", "sglang_patchset.cli", "packaging.version", "json"])
def test_ctrl_c_during_the_start(where: str, tool: list[str], tree: Path, tmp_path: Path) -> None:
    """As each of these is imported, in a place where Python keeps exceptions to itself."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {where!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                for _ in range(100): pass\n"
        "            except KeyboardInterrupt:\n"
        "                pass\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = f"{ROOT / 'python'}{os.pathsep}{tmp_path / 'site'}"
    result = run(tool, tmp_path, "status", tree, PYTHONPATH=path)
    assert (result.code, result.out) == (130, "")
    assert result.err == "sglang-patchset: interrupted: run it again\n"


def test_ctrl_c_that_is_ignored_stays_ignored(tree: Path) -> None:
    """As a shell has it for what runs in the background."""
    line = f"trap '' INT; ({' '.join(SOURCE)} status {tree} & p=$!; kill -INT $p; wait $p)"
    result = run(["bash", "-c", line], tree)
    assert (result.code, result.err) == (1, "")
