"""A series carried to another release: by `git am -3`, in the repository that has the old one."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sglang_patchset import git, releases
from sglang_patchset.catalog import Catalog, Release, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.queue import repository, stack
from sglang_patchset.queue.repository import TAG
from sglang_patchset.queue.stack import Mail


class Fate(Enum):
    """What became of a fix on the way."""

    CARRIED = "carried"
    DROPPED = "dropped"
    CONFLICT = "conflict"
    WAITS = "waits"


@dataclass(frozen=True)
class Rebased:
    """Each fix's outcome, with the reason or the place."""

    release: Release
    fixes: Sequence[tuple[str, Fate, str]]

    @property
    def done(self) -> bool:
        """Whether nothing is left to solve."""
        return not any(outcome is Fate.CONFLICT for _, outcome, _ in self.fixes)


def rebase(catalog: Catalog, directory: Path, name: str, find_links: Path | None = None) -> Rebased:
    """Carry a series to another pinned release, on the new branch `patchset-<version>`.

    Where a fix conflicts, git waits for the user: `git am --continue` goes on, and so does this once more.

    Args:
        directory: a repository that `checkout` made; it has the old release's series.
        name: the release's version, or its wheel file.

    Raises:
        PatchsetError: nothing was changed, the message says why.
    """
    if stack.under_way(directory) == "rebase-apply":
        return _go_on(catalog, directory, name)
    with stack.opened(catalog, directory) as old, tempfile.TemporaryDirectory() as scratch:
        if not old.mails:
            raise PatchsetError(stack.without_a_fix(directory, old.release))
        wheel = releases.obtain(catalog, name, Path(scratch), find_links)
        release = releases.check(catalog, wheel)
        if release == old.release:
            raise PatchsetError(
                f"{directory}: stands on SGLang {release.version} already: "
                "`sglang-patchset refresh` writes its series"
            )
        branch, tag = f"patchset-{release.version}", f"{TAG}{release.version}"
        if git.run("branch", "--list", branch, cwd=directory):
            raise PatchsetError(f"{directory}: has a branch {branch}: check it out, or delete it")
        base = Path(scratch, "base")
        base.mkdir()
        repository.commit_release(release, wheel, base)
        git.run("fetch", "--quiet", "--no-tags", str(base), f"refs/tags/{tag}:refs/tags/{tag}", cwd=directory)
        dropped = {
            mail.fix: reason for mail in old.mails if (reason := _dropped(catalog, mail, release, directory))
        }
        git.run("checkout", "--quiet", "--no-track", "-b", branch, tag, cwd=directory)
        _copy_built(base, directory)
        mails = [mail for mail in old.mails if mail.fix not in dropped]
        if mails:
            _am(directory, release, "-3", *(str(mail.path) for mail in mails))
    rest = _report(directory, release, dict.fromkeys(mail.fix for mail in mails))
    return Rebased(release, [*((fix, Fate.DROPPED, reason) for fix, reason in dropped.items()), *rest])


def _dropped(catalog: Catalog, mail: Mail, release: Release, directory: Path) -> str:
    """Why a fix is not carried; empty where it is."""
    cell = catalog.fix(mail.fix).cell(release.version)
    # What upstream fixed in part may need a patch; where a series is there, somebody has decided.
    decided = (State.UPSTREAM, State.NOT_AFFECTED, *([State.IN_PART] if release.fixes else []))
    if cell and not cell.patch and cell.state in decided:
        return f"{cell.state.words} in {release.version}, as patches/fixes/{mail.fix}.toml says"
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
        git.run("read-tree", f"{TAG}{release.version}", cwd=directory, env=index)
        already = git.succeeds("apply", "--cached", "--check", "-R", str(mail.path), cwd=directory, env=index)
    return f"already in {release.version}" if already else ""


def _go_on(catalog: Catalog, directory: Path, name: str) -> Rebased:
    release = stack.base_release(catalog, directory)
    if str(release.version) != name:
        away = f"git am --abort && git checkout patchset && git branch -D patchset-{release.version}"
        raise PatchsetError(
            f"{directory}: on its way to SGLang {release.version}: finish that with `git am --continue`, "
            f"or give it up: `{away}`"
        )
    given = [*_carried(directory, release), *_pending(directory)]
    if not git.run("diff", "--name-only", "--diff-filter=U", cwd=directory):
        _am(directory, release, "--continue")
    return Rebased(release, list(_report(directory, release, dict.fromkeys(given))))


def _am(directory: Path, release: Release, *args: str) -> None:
    """Run git am; where it stops, its state says so."""
    options = [] if args == ("--continue",) else ["--committer-date-is-author-date"]
    git.succeeds("am", "--quiet", *options, *args, cwd=directory, env=repository.person(release.date))


def _report(directory: Path, release: Release, given: dict[str, None]) -> Iterator[tuple[str, Fate, str]]:
    carried, pending = _carried(directory, release), _pending(directory)
    for fix in given:
        if fix in carried:
            yield fix, Fate.CARRIED, ""
        elif fix not in pending:
            yield fix, Fate.DROPPED, f"already in {release.version}: nothing is left of it"
        elif fix == pending[0]:
            places = "; ".join(_conflicts(directory, release))
            yield fix, Fate.CONFLICT, places or "nothing of it is staged: `git am --skip` leaves it out"
        else:
            yield fix, Fate.WAITS, ""


def _carried(directory: Path, release: Release) -> list[str]:
    fixes = "--format=%(trailers:key=Patchset-Fix,valueonly)"
    return git.run("log", "--reverse", fixes, f"{TAG}{release.version}..", cwd=directory).split()


def _pending(directory: Path) -> list[str]:
    """The fixes that `git am` has before it, the one that it stopped at first."""
    state = directory / git.run("rev-parse", "--git-path", "rebase-apply", cwd=directory).rstrip("\n")
    if not state.exists():
        return []
    first, last = (int((state / name).read_text()) for name in ("next", "last"))
    mails = [(state / f"{number:04}").read_text(errors="replace") for number in range(first, last + 1)]
    return [fix for mail in mails for fix in re.findall(r"^Patchset-Fix: (\S+)$", mail, re.MULTILINE)]


def _conflicts(directory: Path, release: Release) -> Iterator[str]:
    """Where git's markers stand, by file and line."""
    for path in git.run("diff", "--name-only", "--diff-filter=U", "-z", cwd=directory).split("\0")[:-1]:
        lines = (directory / path).read_bytes().splitlines() if (directory / path).exists() else []
        marks = [str(number) for number, line in enumerate(lines, 1) if line.startswith(b"<<<<<<< ")]
        if marks:
            yield f"{path} line {', '.join(marks)}"
        elif git.succeeds("cat-file", "-e", f"HEAD:{path}", cwd=directory):
            yield f"{path} has no marks left: add it"
        else:
            yield f"{path}, which {release.version} does not have"


def _copy_built(base: Path, directory: Path) -> None:
    """Put what a build makes, which git ignores, in the place of the old release's."""
    for path in git.run("ls-files", "--others", "--ignored", "--exclude-standard", "-z", cwd=base).split(
        "\0"
    )[:-1]:
        # Replaced, not written into: the checkout may be a copy by hard links.
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).unlink(missing_ok=True)
        shutil.copy2(base / path, directory / path)
