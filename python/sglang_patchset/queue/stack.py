"""The stack: a release's fixes as the commits on it, checked, and written to `patches/` again."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from packaging.version import InvalidVersion, Version

from sglang_patchset import git, patches
from sglang_patchset.catalog import Catalog, Release, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.queue.repository import TAG

_FIX, _TEST = "Patchset-Fix", "Regression-Test"
_TRAILERS = (_FIX, "Upstream-PR", "Upstream-Status", _TEST)
# What git leaves in its directory while an operation waits for the user.
_UNDER_WAY = ("rebase-apply", "rebase-merge", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD")
_SERIES_CANNOT = {"A": "adds", "D": "removes", "T": "changes the type of", "M": "changes the mode of"}


@dataclass(frozen=True)
class Mail:
    """One fix's commit, and the file that `git format-patch` writes of it."""

    fix: str
    commit: str
    path: Path


@dataclass(frozen=True)
class Stack:
    """The commits on a release, in order, as mails."""

    release: Release
    mails: tuple[Mail, ...]


class PatchChange(Enum):
    """What became of a patch file."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    ADDED = "added"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did: each fix's change, and what is left to do in the tables."""

    release: Release
    changes: Sequence[tuple[str, PatchChange]]
    reminders: Sequence[str]


def refresh(catalog: Catalog, directory: Path) -> Refreshed:
    """Write `patches/<release>/` again from the commits of a repository that `checkout` made.

    Raises:
        PatchsetError: a commit is none that the series can have; nothing was written.
    """
    with opened(catalog, directory) as stack:
        version = str(stack.release.version)
        before = _files(catalog.root / version)
        if len(before) > 1 and not stack.mails:
            raise PatchsetError(
                f"{without_a_fix(directory, stack.release)} (to drop every patch of {version}, delete them "
                "and empty its series by hand)"
            )
        with tempfile.TemporaryDirectory(dir=catalog.root, prefix=".patchset-") as scratch:
            draft = Path(scratch, version)
            shutil.copytree(catalog.root / version, draft, ignore=shutil.ignore_patterns("*.patch", "series"))
            for mail in stack.mails:
                shutil.copy(mail.path, draft / f"{mail.fix}.patch")
                # What was written is read before it counts.
                patches.read_patch(draft / f"{mail.fix}.patch")
            names = "".join(f"{mail.fix}.patch\n" for mail in stack.mails)
            (draft / "series").write_text(names, encoding="utf-8")
            after = _files(draft)
            if before != after:
                _swap(draft, catalog.root / version, Path(scratch, "old"))
    changes = list(_changes(before, after))
    return Refreshed(stack.release, changes, list(_reminders(catalog, stack, before != after)))


@contextmanager
def opened(catalog: Catalog, directory: Path) -> Iterator[Stack]:
    """The stack of a repository that `checkout` made; its mails are there until the end.

    Neither the user's nor the repository's configuration changes a byte of them.

    Raises:
        PatchsetError: the repository is none of a pinned release, or not clean, or a commit is none that
            the series can have.
    """
    catalog.clone()
    check_clean(directory)
    release = base_release(catalog, directory)
    head = git.run("rev-parse", "HEAD", cwd=directory).strip()
    base = git.run("rev-parse", f"refs/tags/{TAG}{release.version}^{{commit}}", cwd=directory).strip()
    with git.reading(directory) as bare, tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        between = f"{base}..{head}"
        if merges := git.run("rev-list", "--merges", between, cwd=bare).split():
            raise PatchsetError(
                f"{_named(bare, merges[0])}: a merge: rebase, so that each fix is one commit on the last"
            )
        commits = git.run("rev-list", "--reverse", "--topo-order", between, cwd=bare).split()
        fixes: dict[str, str] = {}
        for commit in commits:
            fix = _check(catalog, bare, commit)
            if fix in fixes:
                raise PatchsetError(
                    f"{_named(bare, commit)}: {fix} again, after {fixes[fix][:10]}: make one commit of them"
                )
            fixes[fix] = commit
        needs = {fix: _needed(catalog, fix, release, fixes.keys()) for fix in fixes}
        yield Stack(release, tuple(_write(bare, base, head, list(fixes.items()), needs, Path(scratch))))


def without_a_fix(directory: Path, release: Release) -> str:
    """A refusal's words for a HEAD that is the bare release, where a series is wanted."""
    git_there, branch = f"git -C {directory}", f"patchset-{release.version}"
    # Where `git am --abort` leaves one, after `rebase`.
    left = git.run("branch", "--show-current", cwd=directory).strip() == branch
    rest = f" && {git_there} branch -D {branch}" * left
    return (
        f"{directory}: HEAD is SGLang {release.version} without a fix: "
        f"`{git_there} checkout patchset{rest}` first"
    )


def check_clean(directory: Path) -> None:
    """Whether a directory is a repository without anything that is not committed.

    Raises:
        PatchsetError: it is not; the message says what to do.
    """
    if state := under_way(directory):
        raise PatchsetError(
            f"{directory}: git has something under way there ({state}): finish it, or abort it, as "
            f"`git -C {directory} status` says"
        )
    status = git.run("status", "--porcelain", "--untracked-files=normal", cwd=directory)
    if lines := status.splitlines():
        raise PatchsetError(
            f"{directory}: uncommitted changes ({lines[0].strip()}{', …' * (len(lines) > 1)}): "
            "commit them, or put them away"
        )


def under_way(directory: Path) -> str:
    """The operation that waits for the user in a repository; empty where there is none.

    Raises:
        PatchsetError: it is no repository.
    """
    if not (directory / ".git").exists():
        raise PatchsetError(f"{directory}: not the top of a git repository: see `sglang-patchset checkout`")
    for name in _UNDER_WAY:
        place = git.run("rev-parse", "--git-path", name, cwd=directory).rstrip("\n")
        if (directory / place).exists():
            return name
    return ""


def base_release(catalog: Catalog, directory: Path) -> Release:
    """The pinned release that HEAD stands on, told by its tag and checked by its files.

    Raises:
        PatchsetError: there is none, or the tagged commit is not the release.
    """
    tags = git.run("tag", "--merged", "HEAD", "--list", f"{TAG}*", cwd=directory).split()
    if len(tags) != 1:
        found = f"the tags {', '.join(tags)}" if tags else "no tag release/<version>"
        raise PatchsetError(f"{directory}: {found} below HEAD: make one by `sglang-patchset checkout`")
    name = tags[0].removeprefix(TAG)
    try:
        release = catalog.releases[Version(name)]
    except (InvalidVersion, KeyError):
        raise PatchsetError(
            f"{directory}: {name}, which its tag says, is not a pinned release ({catalog.pinned()}): "
            "see `sglang-patchset pin`"
        ) from None
    if git.run("rev-parse", f"refs/tags/{tags[0]}^{{tree}}", cwd=directory).strip() != release.tree:
        raise PatchsetError(
            f"{directory}: the files of its base commit {tags[0]} are not SGLang {name}'s: "
            "make it again by `sglang-patchset checkout`"
        )
    return release


def _check(catalog: Catalog, bare: Path, commit: str) -> str:
    """The fix that a commit is.

    Raises:
        PatchsetError: the series cannot have it.
    """
    values = {name: _trailer(bare, commit, name) for name in _TRAILERS}
    if missing := [name for name, found in values.items() if not any(found)]:
        raise PatchsetError(
            f"{_named(bare, commit)}: lacks the trailer{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            "reword it, CONTRIBUTING.md says what they are"
        )
    if twice := [name for name, found in values.items() if len(found) > 1]:
        raise PatchsetError(f"{_named(bare, commit)}: has {', '.join(twice)} more than once: reword it")
    (fix,), (test,) = values[_FIX], values[_TEST]
    if fix not in catalog.fixes:
        raise PatchsetError(
            f"{_named(bare, commit)}: unknown fix {fix}: write patches/fixes/{fix}.toml, or choose from "
            f"{', '.join(catalog.fixes)}"
        )
    if not (catalog.clone() / test).is_file():
        raise PatchsetError(f"{_named(bare, commit)}: its regression test {test} does not exist: write it")
    changes = git.run("diff-tree", "-r", "--no-renames", "--raw", "-z", "--no-commit-id", commit, cwd=bare)
    fields = changes.rstrip("\0").split("\0")
    if fields == [""]:
        raise PatchsetError(f"{_named(bare, commit)}: changes nothing: drop it")
    for line, path in zip(fields[::2], fields[1::2], strict=True):
        before, after, _, _, kind = line.removeprefix(":").split()
        if not path.startswith("python/sglang/"):
            raise PatchsetError(f"{_named(bare, commit)}: {path} is outside of python/sglang: take it out")
        if kind != "M" or before != after:
            raise PatchsetError(
                f"{_named(bare, commit)}: {_SERIES_CANNOT.get(kind, kind)} {path}: "
                "a patch can only change the text of the release's files"
            )
    return fix


def _write(
    bare: Path,
    base: str,
    head: str,
    commits: Sequence[tuple[str, str]],
    needs: Mapping[str, Set[str]],
    scratch: Path,
) -> Iterator[Mail]:
    """Each commit's mail, once it is seen to need no other, and to give the same commit again.

    `needs` names, for each fix, those that it does need.
    """
    if not commits:
        return
    git.run(
        *("format-patch", "-N", "--zero-commit", "--no-signature", "--full-index", "--no-renames"),
        *("--numbered-files", f"--output-directory={scratch}", "--topo-order", f"{base}..{head}"),
        cwd=bare,
    )
    index, alone = ({"GIT_INDEX_FILE": str(scratch / name)} for name in ("index", "alone"))
    git.run("read-tree", base, cwd=bare, env=index)
    before: dict[str, Path] = {}
    for number, (fix, commit) in enumerate(commits, 1):
        if missing := sorted(needs[fix] - before.keys()):
            raise PatchsetError(
                f"{_named(bare, commit)}: {fix} needs {', '.join(missing)}: put the commit of that before it"
            )
        git.run("read-tree", base, cwd=bare, env=alone)
        for needed in (mail for each, mail in before.items() if each in needs[fix]):
            git.run("apply", "--cached", "--whitespace=nowarn", str(needed), cwd=bare, env=alone)
        mail = (scratch / str(number)).rename(scratch / f"{fix}.patch")
        mail.write_bytes(patches.headed(mail.read_bytes(), functools.partial(_before, bare, commit)))
        if not git.succeeds("apply", "--cached", "--check", str(mail), cwd=bare, env=alone):
            raise PatchsetError(
                f"{_named(bare, commit)}: does not apply to the release without the commits before it: "
                "keep it more than three lines away from theirs, make one fix of them, or say in "
                "its table what it needs"
            )
        git.run("apply", "--cached", "--whitespace=nowarn", str(mail), cwd=bare, env=index)
        tree = git.run("write-tree", cwd=bare, env=index)
        body, subject = scratch / "body", git.run("log", "-1", "--format=%s", commit, cwd=bare).strip()
        header = git.run("mailinfo", str(body), str(scratch / "diff"), cwd=bare, stdin=mail)
        message = git.run("log", "-1", "--format=%b", commit, cwd=bare)
        if (
            tree != git.run("rev-parse", f"{commit}^{{tree}}", cwd=bare)
            or f"Subject: {subject}\n" not in header
            or body.read_text(encoding="utf-8", errors="replace").strip() != message.strip()
        ):
            raise PatchsetError(
                f"{_named(bare, commit)}: `git am` would not give it back as it is: "
                "reword it without [brackets] in front, `---` and `diff`"
            )
        before[fix] = mail
        yield Mail(fix, commit, mail)


def _before(bare: Path, commit: str, path: str) -> bytes:
    """A file, by its path in the wheel, as it is before a commit."""
    name = git.run("rev-parse", f"{commit}^:python/{path}", cwd=bare).strip()
    content = git.blob(bare, name)
    assert content is not None, "the commit changes it"
    return content


def _trailer(bare: Path, commit: str, name: str) -> list[str]:
    text = git.run("log", "-1", f"--format=%(trailers:key={name},valueonly,unfold)", commit, cwd=bare)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _named(bare: Path, commit: str) -> str:
    return git.run("log", "-1", "--abbrev=10", '--format=commit %h "%s"', commit, cwd=bare).strip()


def _files(directory: Path) -> dict[str, bytes]:
    """`series`, and the patch files that it lists, in its order."""
    series = directory / "series"
    listed = series.read_bytes() if series.exists() else b""
    names = listed.decode("utf-8").split()
    if strangers := {path.name for path in directory.glob("*.patch")}.difference(names):
        raise PatchsetError(
            f"{directory / min(strangers)}: not in the series: move it away, or add it to {series}"
        )
    return {"series": listed, **{name: (directory / name).read_bytes() for name in names}}


def _swap(draft: Path, place: Path, aside: Path) -> None:
    """Put one directory in another's place."""
    if place.exists():
        os.rename(place, aside)
    try:
        os.rename(draft, place)
    except BaseException:
        if aside.exists():
            os.rename(aside, place)
        raise


def _changes(before: dict[str, bytes], after: dict[str, bytes]) -> Iterator[tuple[str, PatchChange]]:
    for name in [*after, *(name for name in before if name not in after)]:
        if name == "series":
            continue
        if name not in after:
            change = PatchChange.DROPPED
        elif name not in before:
            change = PatchChange.ADDED
        else:
            change = PatchChange.UNCHANGED if before[name] == after[name] else PatchChange.CHANGED
        yield name.removesuffix(".patch"), change


def _needed(catalog: Catalog, fix: str, release: Release, carried: Set[str]) -> frozenset[str]:
    """What has to come before a fix in a series: what it needs, where upstream's code does not stand in."""
    direct = {
        need
        for need in catalog.fix(fix).needs
        if need in carried or catalog.fix(need).state(release.version) in (None, State.VULNERABLE)
    }
    return frozenset(direct).union(*(_needed(catalog, need, release, carried) for need in direct))


def _reminders(catalog: Catalog, stack: Stack, changed: bool) -> Iterator[str]:
    release = stack.release
    if changed:
        yield (
            f"patches/{release.version}/release.toml: the series is another one: patch set "
            f"{release.patchset} becomes {release.patchset + 1} where it has been published, and "
            "scripts/list_patched.py lists its wheels"
        )
    carried = {mail.fix for mail in stack.mails}
    for fix in catalog.fixes.values():
        state, table = fix.state(release.version), f"patches/fixes/{fix.name}.toml"
        if state is None and fix.name not in carried:
            yield f"{table}: says nothing of {release.version}, whose series lacks it"
        elif state in (State.UPSTREAM, State.NOT_AFFECTED) and fix.name in carried:
            yield f"{table}: says {state.words} of {release.version}, whose series has it"
