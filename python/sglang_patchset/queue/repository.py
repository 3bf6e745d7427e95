"""The contributor's side: the series as commits on the release, in a git repository."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sglang_patchset import git, patches, releases
from sglang_patchset.catalog import Catalog, Release
from sglang_patchset.errors import PatchsetError

# The base commit's tag, before the version.
TAG = "release/"
# SGLang's own repository ignores these: a build makes them. The tree needs them to run.
_IGNORED = ("/python/sglang/_version.py", "*.so")


def checkout(catalog: Catalog, wheel: Path, directory: Path) -> None:
    """Make a git repository of a published wheel: the release is the base commit, each fix is one on top.

    The base commit has the tag `release/<version>`. The same wheel gives the same commits every time.

    Args:
        wheel: the published wheel of a pinned release.
        directory: what becomes the repository; new or empty.

    Raises:
        PatchsetError: nothing was made, the message says why.
    """
    release = releases.check(catalog, wheel)
    directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PatchsetError(f"{directory}: not an empty directory: name a new one")
    # The repository takes the directory's place, which the one that a shell is in, or a mount, cannot give.
    if directory == Path.cwd() or directory.is_mount():
        raise PatchsetError(f"{directory}: the working directory, or a mount: name a new one below it")
    series = patches.load(catalog, release)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".patchset-") as scratch:
        repository = Path(scratch, "repository")
        commit_release(release, wheel, repository)
        files = [str(patch.path) for patch in series.patches]
        _git(repository, release.date, "am", "--quiet", "--committer-date-is-author-date", *files)
        os.rename(repository, directory)


def commit_release(release: Release, wheel: Path, repository: Path) -> None:
    """Make a repository whose one commit is the release, with the tag `release/<version>`."""
    _unpack(wheel, repository / "python")
    _git(repository, release.date, "init", "--quiet", "--template=", "--initial-branch=patchset")
    (repository / ".git" / "info").mkdir()
    (repository / ".git" / "info" / "exclude").write_text("\n".join([*_IGNORED, "__pycache__/", ""]))
    _git(repository, release.date, "add", "--all", "python")
    message = f"SGLang {release.version}\n\nThe files of {wheel.name}\nsha256 {release.wheels[wheel.name]}\n"
    _git(repository, release.date, "commit", "--quiet", "--message", message)
    _git(repository, release.date, "tag", f"{TAG}{release.version}")


def tree(release: Release, wheel: Path) -> str:
    """git's id of the release's files, as `checkout` commits them."""
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        commit_release(release, wheel, Path(scratch))
        return git.run("rev-parse", "HEAD^{tree}", cwd=Path(scratch)).strip()


def _unpack(wheel: Path, directory: Path) -> None:
    """Unpack the package alone; of its files' modes, git keeps the executable bit."""
    with releases.opened(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith("sglang/") and not member.is_dir():
                file = directory / member.filename
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(member))
                if member.external_attr >> 16 & 0o100:
                    file.chmod(file.stat().st_mode | 0o111)


def _git(repository: Path, date: str, *args: str) -> None:
    git.run(*args, cwd=repository, env=person(date))


def person(date: str) -> dict[str, str]:
    """git's environment for one fixed person at one fixed time: commit ids depend on the content alone."""
    name, email, when = "sglang-patchset", "sglang-patchset@localhost", f"{date}T00:00:00+0000"
    who = {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email, "GIT_AUTHOR_DATE": when}
    return who | {key.replace("AUTHOR", "COMMITTER"): value for key, value in who.items()}
