"""A series is carried to another release; what conflicts is named, and git's own state goes on."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import catalog, patches
from sglang_patchset.catalog import Catalog

from .conftest import Command, change, digest, edit, from_copy, git
from .test_stack import rebase as reorder

HASH, DSA, DSV4 = "hash-topk-dummy-weights", "dsa-index-sharing", "dsv4-expert-distribution"
ROUTED, SWA = "routed-experts-dp-buffer", "swa-graph-padding"
EPLB = "eplb-double-mapping"
NEW = "0.5.12.post1"
DEEPSEEK_V4 = "python/sglang/srt/models/deepseek_v4.py"


def outcomes(table: str) -> dict[str, str]:
    rows = [line.split() for line in table.splitlines()[1:]]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def hash_message(checkout: Path) -> str:
    """The first commit's message."""
    first = git(checkout, "rev-list", "--reverse", "release/0.5.12..").split()[0]
    return git(checkout, "log", "-1", "--format=%B", first)


def solve(checkout: Path, solution: Path) -> None:
    """Take the conflicting file as the published series of the new release has it."""
    content = (solution / DEEPSEEK_V4).read_bytes()
    (checkout / DEEPSEEK_V4).write_bytes(content)
    git(checkout, "add", DEEPSEEK_V4)


@pytest.mark.parametrize("way", ["git", "rebase"])
def test_to_the_next_release(
    way: str,
    checkout: Path,
    checkouts: Mapping[str, Path],
    wheels: Mapping[str, Path],
    project: Path,
    tables: Catalog,
) -> None:
    """0.5.12.post1 has hash_topk.py's fix, in other words; upstream changed the imports beside another's."""
    before, old = digest(project / "patches"), git(checkout, "rev-parse", "HEAD")
    result = from_copy(project, "rebase", checkout, wheels[NEW])
    assert (result.code, result.err) == (1, "")
    expected = {HASH: "dropped", DSA: "carried", DSV4: "conflict", ROUTED: "waits", SWA: "waits"}
    assert outcomes(result.out).items() >= expected.items()
    assert f"{HASH}: fixed upstream in {NEW}, as patches/fixes/{HASH}.toml says\n" in result.out
    assert f"{DSV4}: {DEEPSEEK_V4} line 5\n" in result.out
    assert (checkout / DEEPSEEK_V4).read_text().splitlines()[4].startswith("<<<<<<<")
    assert "am --continue` (or --skip)\n" in result.out
    assert "rebase-apply" in from_copy(project, "refresh", checkout).refusal()
    # Not solved yet: the same again.
    again = from_copy(project, "rebase", checkout, NEW)
    assert (again.code, outcomes(again.out)[DSV4]) == (1, "conflict")
    assert f"on its way to SGLang {NEW}" in from_copy(project, "rebase", checkout, "0.5.11").refusal()

    solve(checkout, checkouts[NEW])
    if way == "git":
        git(checkout, "am", "--continue")
    else:
        done = from_copy(project, "rebase", checkout, NEW)
        assert done.code == 0
        assert outcomes(done.out).items() >= dict.fromkeys((DSA, DSV4, ROUTED, SWA), "carried").items()
    assert (
        "stands on SGLang 0.5.12.post1 already"
        in from_copy(project, "rebase", checkout, wheels[NEW]).refusal()
    )
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "rev-parse", "patchset") == old
    # The very files of the series that was written by hand.
    solution = checkouts[NEW]
    for commit in ("HEAD", f"release/{NEW}"):
        assert git(checkout, "rev-parse", f"{commit}^{{tree}}") == git(
            solution, "rev-parse", f"{commit}^{{tree}}"
        )
    # What a build makes, and git ignores, is the new release's too.
    version = Path("python", "sglang", "_version.py")
    assert (checkout / version).read_bytes() == (solution / version).read_bytes()
    # The checkout that this one is linked to keeps its own.
    assert (checkouts["0.5.12"] / version).read_bytes() != (solution / version).read_bytes()
    assert digest(project / "patches") == before

    assert from_copy(project, "refresh", checkout).code == 0
    carried = patches.load(catalog.load(project / "patches"), tables.releases[Version(NEW)])
    published = patches.load(tables, tables.releases[Version(NEW)])
    assert [(patch.fix, patch.files) for patch in carried.patches] == [
        (patch.fix, patch.files) for patch in published.patches
    ]


def keep_merged(checkout: Path) -> tuple[str, ...]:
    """Leave the six fixes in a checkout of 0.5.12 that 0.5.13 has, in part or all."""
    kept = (HASH, DSA, EPLB, DSV4, ROUTED, SWA)
    trailer = "--format=%H %(trailers:key=Patchset-Fix,valueonly,separator=)"
    lines = git(checkout, "log", "--reverse", trailer, "release/0.5.12..").splitlines()
    git(checkout, "reset", "--quiet", "--hard", "release/0.5.12")
    for commit, fix in map(str.split, lines):
        if fix in kept:
            git(checkout, "cherry-pick", commit)
    return kept


def test_everything_is_in_already(checkout: Path, wheels: Mapping[str, Path], project: Path) -> None:
    """0.5.13 has these six, and nothing of ours is carried."""
    fixes = keep_merged(checkout)
    result = from_copy(project, "rebase", checkout, wheels["0.5.13"])
    assert (result.code, outcomes(result.out)) == (0, dict.fromkeys(fixes, "dropped"))
    for fix in fixes:
        assert re.search(
            rf"^{fix}: fixed (upstream|in part) in 0.5.13, as patches/fixes/{fix}.toml says$",
            result.out,
            re.M,
        )
    for name in ("HEAD", "patchset-0.5.13"):
        assert git(checkout, "rev-parse", name) == git(checkout, "rev-parse", "release/0.5.13^{commit}")


def test_to_a_release_that_nobody_has_looked_at(
    checkout: Path, wheels: Mapping[str, Path], project: Path
) -> None:
    """Upstream did it all in other words: the conflicts are named, and what nobody has said so far."""
    fixes = keep_merged(checkout)
    # The second one changes a file, too, that upstream removed.
    reorder(checkout, "sed -i -e '2s/^pick/edit/'")
    edit(checkout / "python" / "sglang" / "srt" / "speculative" / "eagle_worker.py", "# mine")
    git(checkout, "commit", "--quiet", "--all", "--amend", "--no-edit")
    git(checkout, "rebase", "--continue")
    for table in (project / "patches" / "fixes").iterdir():
        lines = table.read_text().splitlines(keepends=True)
        table.write_text(
            "".join(line for line in lines if not line.startswith(('">=0.5.13,<', '">=0.5.12.post1,')))
        )
    result = from_copy(project, "rebase", checkout, wheels["0.5.13"])
    assert result.code == 1
    found = outcomes(result.out)
    assert set(found) == set(fixes)
    for fix, outcome in found.items():
        assert (f"{fix}.toml: says nothing of 0.5.13, whose" in result.out) == (outcome != "dropped")
    assert found[DSA] == "conflict"
    (places,) = (line for line in result.out.splitlines() if line.startswith(f"{DSA}: "))
    assert "; python/sglang/srt/speculative/eagle_worker.py, which 0.5.13 does not have" in places
    named = re.findall(r"(python/\S+\.py) line ([\d, ]+\d)", places)
    assert len(named) == 3
    for path, numbers in named:
        content = (checkout / path).read_text().splitlines()
        marks = [str(number) for number, line in enumerate(content, 1) if line.startswith("<<<<<<< ")]
        assert numbers.split(", ") == marks
    # One file that is solved, and not added yet.
    path = named[0][0]
    git(checkout, "checkout", "--quiet", "--ours", path)
    again = from_copy(project, "rebase", checkout, "0.5.13")
    assert f"{path} has no marks left: add it; " in again.out


def test_to_a_release_that_was_pinned_just_now(
    checkout: Path,
    checkouts: Mapping[str, Path],
    wheels: Mapping[str, Path],
    project: Path,
    tables: Catalog,
) -> None:
    """From `pin` to a series that is not empty any more."""
    shutil.rmtree(project / "patches" / NEW)
    assert "not a pinned release" in from_copy(project, "rebase", checkout, NEW).refusal()
    shelf = wheels[NEW].parent
    assert from_copy(project, "pin", NEW, "--find-links", shelf).code == 0
    result = from_copy(project, "rebase", checkout, NEW, "--find-links", shelf)
    assert (result.code, outcomes(result.out)[DSV4]) == (1, "conflict")
    solve(checkout, checkouts[NEW])
    git(checkout, "am", "--continue")
    assert git(checkout, "rev-parse", "HEAD^{tree}") == git(checkouts[NEW], "rev-parse", "HEAD^{tree}")
    result = from_copy(project, "refresh", checkout)
    carried = [patch.fix for patch in patches.load(tables, tables.releases[Version(NEW)]).patches]
    assert (result.code, result.out.count(" added")) == (0, len(carried))
    series = (project / "patches" / NEW / "series").read_text().split()
    assert series == [f"{fix}.patch" for fix in carried]


def test_hooks_and_signatures_stay_out(checkout: Path, wheels: Mapping[str, Path], command: Command) -> None:
    """A hook that fails, or a key that is not there, is no conflict; nor does it stop the way half gone."""
    hook = checkout / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    for name in ("post-checkout", "applypatch-msg", "pre-applypatch"):
        hook.with_name(name).write_text("#!/bin/sh\nexit 1\n")
        hook.with_name(name).chmod(0o755)
    git(checkout, "config", "commit.gpgSign", "true")
    git(checkout, "config", "gpg.program", "false")
    result = command("rebase", checkout, wheels[NEW])
    assert (result.code, result.err) == (1, "")
    assert outcomes(result.out).items() >= {DSA: "carried", DSV4: "conflict"}.items()
    # Solved by leaving all of it out: git does not go on from there by itself.
    git(checkout, "reset", "--quiet", "--hard")
    result = command("rebase", checkout, NEW)
    assert f"{DSV4}: nothing of it is staged: `git am --skip` leaves it out\n" in result.out


def test_what_is_in_already(
    checkout: Path, checkouts: Mapping[str, Path], wheels: Mapping[str, Path], project: Path
) -> None:
    """Without a word in its table, git tells: one fix reverse-applies, of another nothing is left."""
    change(
        project / "patches" / "fixes" / f"{HASH}.toml", '">=0.5.12.post1,<=0.5.23" =', '">=0.5.13,<=0.5.23" ='
    )
    result = from_copy(project, "rebase", checkout, wheels["0.5.11"])
    assert result.code == 1
    assert outcomes(result.out)[HASH] == "dropped"
    assert f"{HASH}: not affected in 0.5.11, as patches/fixes/{HASH}.toml says" in result.out
    git(checkout, "am", "--abort")
    git(checkout, "checkout", "--quiet", "patchset")
    # One commit, which is what the new release has.
    git(checkout, "reset", "--quiet", "--hard", "release/0.5.12")
    ours = "python/sglang/srt/layers/moe/hash_topk.py"
    upstream = git(checkouts[NEW], "show", f"release/{NEW}:{ours}")
    (checkout / ours).write_text(upstream)
    message = hash_message(checkouts["0.5.12"])
    git(checkout, "commit", "--quiet", "--all", "--message", message)
    result = from_copy(project, "rebase", checkout, wheels[NEW])
    assert (result.code, outcomes(result.out)) == (0, {HASH: "dropped"})
    assert f"{HASH}: already in {NEW}\n" in result.out
    assert git(checkout, "rev-parse", "HEAD") == git(checkout, "rev-parse", f"release/{NEW}^{{commit}}")


def test_nothing_is_left_of_a_fix(
    checkout: Path, checkouts: Mapping[str, Path], wheels: Mapping[str, Path], project: Path
) -> None:
    """Its context is another, so that it does not reverse-apply; the merge finds it."""
    change(
        project / "patches" / "fixes" / f"{HASH}.toml", '">=0.5.12.post1,<=0.5.23" =', '">=0.5.13,<=0.5.23" ='
    )
    git(checkout, "reset", "--quiet", "--hard", "release/0.5.12")
    ours = "python/sglang/srt/models/deepseek_v4.py"
    upstream = git(checkouts[NEW], "show", f"release/{NEW}:{ours}").splitlines(keepends=True)
    old = (checkout / ours).read_text().splitlines(keepends=True)
    # One of the lines that the new release has more.
    blocks = [
        op
        for op in difflib.SequenceMatcher(None, old, upstream, autojunk=False).get_opcodes()
        if op[0] != "equal"
    ]
    _, a, b, c, d = blocks[0]
    (checkout / ours).write_text("".join(old[:a] + upstream[c:d] + old[b:]))
    message = hash_message(checkouts["0.5.12"])
    git(checkout, "commit", "--quiet", "--all", "--message", message)
    result = from_copy(project, "rebase", checkout, wheels[NEW])
    assert (result.code, outcomes(result.out)) == (0, {HASH: "dropped"})
    assert f"already in {NEW}" in result.out


def test_giving_up(checkout: Path, wheels: Mapping[str, Path], command: Command) -> None:
    """The words of the conflict lead back to where `rebase` began; half of them are no dead end."""
    before = git(checkout, "rev-parse", "HEAD"), git(checkout, "branch")
    result = command("rebase", checkout, wheels[NEW])
    abort, back = f"git -C {checkout} am --abort", f"git -C {checkout} checkout patchset"
    delete = f"git -C {checkout} branch -D patchset-{NEW}"
    assert result.out.endswith(f"to give up: `{abort} && {back} && {delete}`\n")
    subprocess.run(abort, shell=True, check=True)
    advice = f"HEAD is SGLang {NEW} without a fix: `{back} && {delete}` first"
    for verb in (("rebase", checkout, wheels[NEW]), ("refresh", checkout)):
        assert advice in command(*verb).refusal()
    subprocess.run(f"{back} && {delete}", shell=True, check=True, capture_output=True)
    assert (git(checkout, "rev-parse", "HEAD"), git(checkout, "branch")) == before


def test_the_bare_release_has_nothing_to_carry(
    checkout: Path, wheels: Mapping[str, Path], command: Command
) -> None:
    git(checkout, "checkout", "--quiet", "release/0.5.12")
    before = git(checkout, "for-each-ref")
    refusal = command("rebase", checkout, wheels[NEW]).refusal()
    assert f"HEAD is SGLang 0.5.12 without a fix: `git -C {checkout} checkout patchset` first" in refusal
    assert git(checkout, "for-each-ref") == before


def test_what_cannot_be_carried(checkout: Path, wheels: Mapping[str, Path], command: Command) -> None:
    before = git(checkout, "for-each-ref"), git(checkout, "status", "--porcelain")
    assert "stands on SGLang 0.5.12 already" in command("rebase", checkout, wheels["0.5.12"]).refusal()
    assert "0.5.99: not a pinned release" in command("rebase", checkout, "0.5.99").refusal()
    assert "not the top of a git repository" in command("rebase", checkout / "python", wheels[NEW]).refusal()
    git(checkout, "branch", f"patchset-{NEW}")
    assert f"has a branch patchset-{NEW}" in command("rebase", checkout, wheels[NEW]).refusal()
    git(checkout, "branch", "--delete", "--force", f"patchset-{NEW}")
    git(checkout, "tag", f"release/{NEW}", "HEAD~2")
    refusal = command("rebase", checkout, wheels[NEW]).refusal()
    assert "release/0.5.12, release/0.5.12.post1 below HEAD" in refusal
    git(checkout, "tag", "--delete", f"release/{NEW}")
    edit(checkout / DEEPSEEK_V4, "# mine")
    assert "uncommitted changes" in command("rebase", checkout, wheels[NEW]).refusal()
    git(checkout, "checkout", "--quiet", ".")
    assert (git(checkout, "for-each-ref"), git(checkout, "status", "--porcelain")) == before
