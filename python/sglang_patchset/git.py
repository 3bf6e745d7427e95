"""Every call of git, and the blob ids that git names a file's bytes by."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sglang_patchset.errors import PatchsetError

# Neither the user's configuration nor a repository around the working directory may change what git does.
_CONFIG = (
    "core.autocrlf=false",
    "core.eol=lf",
    "core.fileMode=true",
    "core.fsmonitor=false",
    # A commit is the same everywhere, and nobody is asked for a passphrase or by a hook in its middle.
    f"core.hooksPath={os.devnull}",
    "commit.gpgSign=false",
    # Without these, git takes ~/.config/git/ignore and attributes even where it reads no configuration.
    f"core.excludesFile={os.devnull}",
    f"core.attributesFile={os.devnull}",
)

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
    result = _call(*args, str(patch), cwd=tree)
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
    command = ["git", "-c", "user.useConfigOnly=true", "var", "GIT_AUTHOR_IDENT"]
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
    """The bytes that a repository has under a blob id; None where it has none, or cannot be read."""
    # No remote is asked for what a partial clone lacks.
    result = _process("cat-file", "blob", name, cwd=repository, env={"GIT_NO_LAZY_FETCH": "1"})
    return result.stdout if result.returncode == 0 else None


def merge(ours: Path, base: Path, theirs: Path) -> bool:
    """Merge the changes from `base` to `theirs` into `ours`; False where they meet its own."""
    return succeeds("merge-file", "--quiet", str(ours), str(base), str(theirs), cwd=ours.parent)


def succeeds(*args: str, cwd: Path, env: Mapping[str, str] | None = None) -> bool:
    """Whether a command of git succeeds; as `run` otherwise."""
    return _call(*args, cwd=cwd, env=env).returncode == 0


@contextlib.contextmanager
def reading(repository: Path) -> Iterator[Path]:
    """A bare repository that has another one's objects, and none of its configuration and attributes.

    What is written into it goes with it.
    """
    objects = run("rev-parse", "--path-format=absolute", "--git-path", "objects", cwd=repository)
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        bare = Path(scratch)
        run("init", "--quiet", "--bare", "--template=", cwd=bare)
        (bare / "objects" / "info" / "alternates").write_text(objects)
        yield bare


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
    *args: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    clean |= {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(cwd.resolve().parent),
        "LC_ALL": "C",  # messages are told apart by their text
    }
    config = [word for setting in _CONFIG for word in ("-c", setting)]
    with Path(stdin or os.devnull).open("rb") as source:
        try:
            return subprocess.run(
                ["git", *config, *args],
                cwd=cwd,
                env=clean | dict(env or {}),
                stdin=source,
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            raise PatchsetError("there is no git on the PATH: install git and run this again") from None


def _reason(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    return lines[0] if lines else "no message"
