"""Every call of git, and the blob ids that git names a file's bytes by."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sglang_patchset import files
from sglang_patchset.errors import PatchsetError

# That of Ubuntu 22.04. Older ones lack GIT_CONFIG_COUNT (2.31), by which what runs programs is switched off.
_OLDEST = (2, 34)

# Neither the user's configuration nor a repository around the working directory may change what git does.
_CONFIG = (
    "core.autocrlf=false",
    "core.eol=lf",
    "core.fileMode=true",
    "core.fsmonitor=false",
    # A commit is the same everywhere, and nobody is asked for a passphrase or by a hook in its middle.
    f"core.hooksPath={os.devnull}",
    "commit.gpgSign=false",
    # Nothing is done behind what was asked for.
    "gc.auto=0",
    "maintenance.auto=false",
    # Without these, git takes ~/.config/git/ignore and attributes even where it reads no configuration.
    f"core.excludesFile={os.devnull}",
    f"core.attributesFile={os.devnull}",
)

# What a repository's own configuration may have git run, and what is put in its place; the part in the middle
# is a name of the repository's. An empty filter is none, where it is not required.
_PROGRAMS = {
    re.compile("filter[.].*[.](clean|smudge|process)", re.DOTALL): "",
    re.compile("filter[.].*[.]required", re.DOTALL): "false",
    re.compile("diff[.].*[.]textconv", re.DOTALL): "cat",
    re.compile("merge[.].*[.]driver", re.DOTALL): "{git} merge-file --marker-size=%L %A %O %B",
    re.compile("remote[.].*[.]uploadpack", re.DOTALL): "git-upload-pack",
}
# None is looked for: not in the directories above either, whose names could hide it from git.
_NO_REPOSITORY = {"GIT_DIR": os.devnull}
# What an object may have, and how long git may take to find it: a pipe can lie in its place.
_ALLOCATED, _SECONDS = "64m", 20

_UNWRITTEN = re.compile("^error: (failed|unable) to write .*: (?P<reason>.+)$", re.MULTILINE)


def blob_id(data: bytes) -> str:
    """The id under which git stores these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def apply(patch: Path, tree: Path, *, only: Sequence[str], reverse: bool = False, near: bool = False) -> bool:
    """Apply a patch's changes to these files under `tree` and to no other, without fuzz.

    With `near`, a single line above and below a hunk is enough to find its place.

    Returns:
        False where a file is not as the patch expects it; all of them are then left alone.

    Raises:
        PatchsetError: git is missing, or cannot read the patch.
        OSError: the tree cannot be written to.
    """
    if not only:
        return True
    # -p2: a patch names a file as SGLang's repository does, a/python/sglang/…, and a wheel has sglang/….
    args = ["apply", "-p2", "--whitespace=nowarn", *(f"--include={path}" for path in only)]
    args += ["--reverse"] * reverse + ["-C1"] * near
    result = _call(*args, str(patch), cwd=tree, env=_NO_REPOSITORY)
    if unwritten := _UNWRITTEN.search(result.stderr):
        raise OSError(errno.EIO, unwritten["reason"])
    if result.returncode and "patch does not apply" not in result.stderr:
        reason = _reason(result.stderr)
        raise PatchsetError(f"{patch}: git cannot read it ({reason}): install sglang-patchset again")
    return result.returncode == 0


def run(*args: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: Path | None = None) -> str:
    """Run git in a repository at `cwd` and return what it printed.

    Raises:
        PatchsetError: git is missing, or the command failed; the message has git's own first line.
    """
    result = _call(*args, cwd=cwd, env=env, stdin=stdin)
    if result.returncode:
        raise PatchsetError(f"git {args[0]} failed in {cwd}: {_reason(result.stderr)}")
    return result.stdout


def identity(repository: Path) -> dict[str, str]:
    """Who commits there, by the user's own configuration; for the environment of `run`.

    Raises:
        PatchsetError: git does not know.
    """
    command = [_git(), "-c", "user.useConfigOnly=true", "var", "GIT_AUTHOR_IDENT"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    who = re.match(r"(?P<name>.*) <(?P<email>.*)> ", result.stdout)
    if not who:
        raise PatchsetError(
            f"{repository}: git knows no author: `git config --global user.name` and `user.email` say one"
        )
    return {
        f"GIT_{role}_{part.upper()}": who[part]
        for role in ("AUTHOR", "COMMITTER")
        for part in ("name", "email")
    }


def blob(repository: Path, name: str) -> bytes | None:
    """The bytes that a repository has under a blob id; None where it has none, or cannot be read.

    git never runs in the repository, and reads none of its configuration.
    """
    _git()
    with contextlib.suppress(OSError, PatchsetError), reading(repository) as bare:
        # A chain of deltas may say that it becomes anything; a stream is not held in memory.
        env = {"GIT_DIR": str(bare), "GIT_ALLOC_LIMIT": _ALLOCATED, "GIT_NO_LAZY_FETCH": "1"}
        result = _process("cat-file", "blob", name, cwd=bare, env=env, timeout=_SECONDS, largest=files.SOURCE)
        if result.returncode == 0 and blob_id(result.stdout) == name:
            return result.stdout
    return None


def merge(ours: Path, base: Path, theirs: Path) -> bool:
    """Merge the changes from `base` to `theirs` into `ours`; False where they meet its own."""
    args = ("merge-file", "--quiet", str(ours), str(base), str(theirs))
    return _call(*args, cwd=ours.parent, env=_NO_REPOSITORY).returncode == 0


def succeeds(*args: str, cwd: Path, env: Mapping[str, str] | None = None) -> bool:
    """Whether a command of git succeeds; as `run` otherwise."""
    return _call(*args, cwd=cwd, env=env).returncode == 0


@contextlib.contextmanager
def reading(repository: Path) -> Iterator[Path]:
    """A bare repository that has another one's objects, and none of its configuration and attributes.

    What is written into it goes with it.
    """
    objects = str(_objects(repository))
    if "\n" in objects:
        raise PatchsetError(f"{repository}: a line end in its path, which git's lists cannot say: rename it")
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        bare = Path(scratch)
        for name in ("objects/info", "refs"):
            (bare / name).mkdir(parents=True)
        (bare / "HEAD").write_text("ref: refs/heads/none\n", encoding="utf-8")
        config = "[core]\n\trepositoryFormatVersion = 0\n\tbare = true\n"
        (bare / "config").write_text(config, encoding="utf-8")
        (bare / "objects" / "info" / "alternates").write_bytes(os.fsencode(f"{objects}\n"))
        yield bare


def _objects(repository: Path) -> Path:
    """Where a repository keeps its objects, told without git; the `.git` of a worktree is a file."""
    place = repository / ".git"
    if not place.exists() and (repository / "HEAD").exists():
        place = repository  # a bare one
    elif not place.is_dir():
        place = _named_in(place, repository, "gitdir: ")
    if (place / "commondir").exists():
        place = _named_in(place / "commondir", place, "")
    return (place / "objects").resolve()


def _named_in(file: Path, directory: Path, label: str) -> Path:
    text = os.fsdecode(files.read(file)).rstrip("\r\n")
    if not text.startswith(label) or "\0" in text:
        raise PatchsetError(f"{file}: not what git writes there: see `git -C {directory} status`")
    return directory / text.removeprefix(label)


def _call(
    *args: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: Path | None = None
) -> subprocess.CompletedProcess[str]:
    result = _process(*args, cwd=cwd, env=env, stdin=stdin)
    stdout, stderr = (
        io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace").read()
        for data in (result.stdout, result.stderr)
    )
    return subprocess.CompletedProcess(result.args, result.returncode, stdout, stderr)


def _process(
    *args: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: Path | None = None,
    timeout: int | None = None,
    largest: int = 0,
) -> subprocess.CompletedProcess[bytes]:
    """Run git; with a timeout, it is killed once that is over, or once it has printed `largest` bytes."""
    command = [_git(), *(word for setting in _CONFIG for word in ("-c", setting)), *args]
    env = _environment(cwd) | dict(env or {})
    if (cwd / ".git").exists() and "GIT_DIR" not in env:
        env |= _without_programs(cwd, env)
    with Path(stdin or os.devnull).open("rb") as source:
        if timeout is None:
            return subprocess.run(command, cwd=cwd, env=env, stdin=source, capture_output=True, check=False)
        with subprocess.Popen(
            command, cwd=cwd, env=env, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout
            timer = threading.Timer(timeout, process.kill)
            timer.start()
            try:
                stdout = process.stdout.read(largest)
                # More than that is left unread.
                if not process.stdout.read(1):
                    process.wait()
            finally:
                process.kill()
                timer.cancel()
        return subprocess.CompletedProcess(command, process.returncode, stdout, b"")


def _environment(cwd: Path) -> dict[str, str]:
    """What git is told of where it runs: nothing that the user's own environment says to git."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return clean | {
        # What git itself looks for is not looked for in the working directory either.
        "PATH": _path(),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent),
        # A repository may name a program as a remote's address (ext::).
        "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",  # messages are told apart by their text
    }


def _without_programs(repository: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment in which git runs nothing that the repository's configuration names as these do."""
    command = [_git(), "config", "--list", "--name-only", "-z"]
    listed = subprocess.run(command, cwd=repository, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    git = shlex.quote(_git()).replace("%", "%%")
    settings = [
        (name, value.format(git=git))
        for name in dict.fromkeys(os.fsdecode(listed.stdout).split("\0"))
        for pattern, value in _PROGRAMS.items()
        if pattern.fullmatch(name)
    ]
    numbered = {
        f"GIT_CONFIG_{part}_{number}": each
        for number, setting in enumerate(settings)
        for part, each in zip(("KEY", "VALUE"), setting, strict=True)
    }
    return {"GIT_CONFIG_COUNT": str(len(settings)), **numbered}


def _path() -> str:
    return os.pathsep.join(
        each for each in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(each).is_absolute()
    )


def _git() -> str:
    """The absolute path of git, once it is seen to be no older than what is supported."""
    return _found(_path())


@functools.lru_cache(maxsize=1)
def _found(path: str) -> str:
    git = shutil.which("git", path=path)
    if git is None:
        raise PatchsetError("there is no git on the PATH: install git and run this again")
    said = subprocess.run([git, "--version"], cwd="/", capture_output=True, check=False).stdout
    version = re.match(rb"git version (\d+)[.](\d+)", said)
    oldest = ".".join(map(str, _OLDEST))
    if not version or (int(version[1]), int(version[2])) < _OLDEST:
        found = said.decode(errors="replace").strip() or "says no version"
        raise PatchsetError(f"{git}: {found}: put git {oldest} or later on the PATH")
    return git


def _reason(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return lines[0] if lines else "no message"
