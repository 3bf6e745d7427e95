"""The series and its branch never drift: what `checkout` makes of the patches, `refresh` gives back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset.patches import Series

from .conftest import Command, change, copy, digest, edit, from_copy, git

HASH, DSA, DSV4 = "hash-topk-dummy-weights", "dsa-index-sharing", "dsv4-expert-distribution"
ROUTED, SWA = "routed-experts-dp-buffer", "swa-graph-padding"
HASH_TOPK = "python/sglang/srt/layers/moe/hash_topk.py"
ROUTED_EXPERTS = "python/sglang/srt/state_capturer/routed_experts.py"


def changes(table: str) -> dict[str, str]:
    rows = [line.split() for line in table.splitlines()[1:]]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def rebase(repository: Path, todo: str) -> None:
    """An interactive rebase whose list is made from git's own by a line of shell."""
    command = ["git", "-C", str(repository), "rebase", "--quiet", "--interactive", "release/0.5.12"]
    env = {**os.environ, "GIT_SEQUENCE_EDITOR": todo}
    subprocess.run(command, check=True, capture_output=True, env=env)


def message(fix: str, **trailers: str) -> str:
    lines = {
        "Patchset-Fix": fix,
        "Upstream-PR": "https://github.com/sgl-project/sglang/pull/1",
        "Upstream-Status": "submitted",
        "Regression-Test": "tests/regression/swa-graph-padding/test_swa_graph_padding.py",
        **{name.replace("_", "-"): value for name, value in trailers.items()},
    }
    return "Mend it\n\nSymptom: it breaks.\n\n" + "\n".join(
        f"{name}: {value}" for name, value in lines.items() if value
    )


def commit(repository: Path, path: str, text: str) -> None:
    edit(repository / path, "# mine")
    git(repository, "commit", "--quiet", "--all", "--message", text)


def add_to_catalogue(project: Path, fix: str, more: str = "code = []") -> None:
    (project / "patches" / "fixes" / f"{fix}.toml").write_text(
        f'upstream-pr = 1\ntitle = ""\nsymptom = ""\n{more}\n[releases]\n"==0.5.11" = "not-affected"\n'
        '"==0.5.12.post1" = "not-affected"\n'
    )
    tests = project / "tests" / "regression" / fix
    tests.mkdir(exist_ok=True)
    (tests / "expected.toml").write_text('test = "test_mine.py"\n')
    (tests / "test_mine.py").write_text("")


def test_untouched_checkouts_give_the_very_bytes(
    series: Series, checkouts: Mapping[str, Path], project: Path
) -> None:
    patches = project / "patches"
    release = str(series.release.version)
    before, inode = digest(patches), (patches / release).stat().st_ino
    result = from_copy(project, "refresh", checkouts[release])
    assert (result.code, set(changes(result.out).values())) == (0, {"unchanged"})
    assert "release.toml" not in result.out
    assert (digest(patches), (patches / release).stat().st_ino) == (before, inode)
    # Nor does it hang on what was there.
    for file in (patches / release).glob("*.patch"):
        file.write_text("")
    assert from_copy(project, "refresh", checkouts[release]).code == 0
    assert digest(patches) == before


def test_nobody_s_configuration_changes_a_byte(
    checkout: Path, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mailmap").write_text("Me <me@example.org> <maintainers@sglang-patchset.invalid>\n")
    configuration = f"""
[core]
    abbrev = 4
    autocrlf = true
    quotePath = false
[diff]
    algorithm = histogram
    noprefix = true
    mnemonicPrefix = true
    context = 1
    interHunkContext = 9
    renames = copies
    orderFile = {tmp_path / "order"}
    statGraphWidth = 5
    suppressBlankEmpty = true
    external = false
[format]
    signature = mine
    numbered = true
    subjectPrefix = mine
    attach = true
    signOff = true
    headers = "X-Mine: 1"
    cc = me@example.org
    from = Me <me@example.org>
    thread = true
    useAutoBase = true
    notes = true
    encodeEmailHeaders = false
    filenameMaxLength = 5
    suffix = .mine
    outputDirectory = {tmp_path / "elsewhere"}
[i18n]
    logOutputEncoding = utf-16
[log]
    showSignature = true
    date = iso
    mailmap = true
[mailmap]
    file = {tmp_path / "mailmap"}
[status]
    short = true
    branch = true
[color]
    ui = always
[trailer]
    separators = "#"
"""
    (tmp_path / "order").write_text("*.toml\n*worker*\n")
    (tmp_path / ".gitconfig").write_text(configuration)
    monkeypatch.setenv("HOME", str(tmp_path))
    with (checkout / ".git" / "config").open("a") as file:
        file.write(configuration)
    (checkout / ".git" / "info" / "attributes").write_text("*.py -diff diff=mine\n")
    git(checkout, "notes", "add", "--message", "a note", "HEAD")
    for file in (project / "patches" / "0.5.12").glob("*.patch"):
        file.unlink()
    (project / "patches" / "0.5.12" / "series").write_text("")
    result = from_copy(project, "refresh", checkout)
    assert (result.err, set(changes(result.out).values())) == ("", {"added"})
    original = Path(__file__).parents[2] / "patches"
    assert digest(project / "patches") == digest(original)


def test_amend(checkout: Path, project: Path) -> None:
    """A word in one message, a line in one patch; the patch after it in the same file has other blob ids."""
    before = {path.name: path.read_bytes() for path in (project / "patches" / "0.5.12").iterdir()}
    rebase(checkout, "sed -i -e '1s/^pick/edit/' -e '6s/^pick/edit/'")
    edit(checkout / HASH_TOPK, "# amended")
    git(checkout, "commit", "--quiet", "--all", "--amend", "--no-edit")
    git(checkout, "rebase", "--continue")
    text = git(checkout, "log", "-1", "--format=%B").replace("Symptom: ", "Symptom: always, ")
    git(checkout, "commit", "--quiet", "--amend", "--message", text)
    assert "rebase-merge" in from_copy(project, "refresh", checkout).refusal()
    git(checkout, "rebase", "--continue")
    result = from_copy(project, "refresh", checkout)
    expected = {HASH: "changed", DSA: "unchanged", DSV4: "changed", ROUTED: "changed", SWA: "unchanged"}
    assert changes(result.out).items() >= expected.items()
    assert "patch set 1 becomes 2 where it has been published" in result.out
    after = {path.name: path.read_bytes() for path in (project / "patches" / "0.5.12").iterdir()}
    assert b"+# amended\n" in after[f"{HASH}.patch"]
    assert b"Symptom: always, " in after[f"{ROUTED}.patch"]
    # Of the patch that comes after it in the same file, the blob ids alone are others.
    old, new = (files[f"{DSV4}.patch"].splitlines() for files in (before, after))
    differing = [line for line, other in zip(old, new, strict=True) if line != other]
    assert [line.split()[0] for line in differing] == [b"index"]
    # A checkout of what was written has the same files.
    assert_round_trip(project, checkout)
    assert set(changes(from_copy(project, "refresh", checkout).out).values()) == {"unchanged"}


def assert_round_trip(project: Path, checkout: Path) -> None:
    again = checkout.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    python = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    (wheel,) = (Path(__file__).parents[2] / ".cache").glob(f"0.5.12-{python}-*/*.whl")
    assert from_copy(project, "checkout", wheel, again).code == 0
    assert git(again, "rev-parse", "HEAD^{tree}") == git(checkout, "rev-parse", "HEAD^{tree}")
    before = digest(project / "patches")
    assert set(changes(from_copy(project, "refresh", again).out).values()) <= {"unchanged"}
    assert digest(project / "patches") == before


def test_reorder(checkout: Path, project: Path) -> None:
    rebase(checkout, "sed -i -e '1{h;d}' -e '5{G}'")
    result = from_copy(project, "refresh", checkout)
    expected = {DSA: "unchanged", DSV4: "changed", ROUTED: "unchanged", SWA: "unchanged", HASH: "changed"}
    assert changes(result.out).items() >= expected.items()
    names = (project / "patches" / "0.5.12" / "series").read_text().split()
    assert (names[0], names[4]) == (f"{DSA}.patch", f"{HASH}.patch")
    assert {path.name for path in (project / "patches" / "0.5.12").glob("*.patch")} == set(names)
    assert_round_trip(project, checkout)


def test_drop_and_add(checkout: Path, project: Path) -> None:
    rebase(checkout, "sed -i -e 5d")
    add_to_catalogue(project, "mine")
    commit(checkout, ROUTED_EXPERTS, message("mine"))
    result = from_copy(project, "refresh", checkout)
    expected = {HASH: "unchanged", DSA: "unchanged", ROUTED: "unchanged", "mine": "added", DSV4: "dropped"}
    assert changes(result.out).items() >= expected.items()
    assert f"patches/fixes/{DSV4}.toml: says nothing of 0.5.12, whose series lacks it" in result.out
    assert "mine.toml" not in result.out
    assert_round_trip(project, checkout)


def test_the_bare_release_empties_no_series(checkout: Path, project: Path) -> None:
    before = digest(project / "patches")
    git(checkout, "checkout", "--quiet", "release/0.5.12")
    refusal = from_copy(project, "refresh", checkout).refusal()
    words = f"{checkout}: HEAD is SGLang 0.5.12 without a fix: `git -C {checkout} checkout patchset` first"
    assert words in refusal
    assert digest(project / "patches") == before
    # With an empty series already, it is none that gets lost.
    for file in (project / "patches" / "0.5.12").glob("*.patch"):
        file.unlink()
    (project / "patches" / "0.5.12" / "series").write_text("")
    assert from_copy(project, "refresh", checkout).code == 0
    assert list((project / "patches" / "0.5.12").glob("*.patch")) == []


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "Mend it",
            "lacks the trailers Patchset-Fix, Upstream-PR, Upstream-Status, Regression-Test",
        ),
        (message(SWA, Upstream_Status=""), "lacks the trailer Upstream-Status: reword it"),
        (message(SWA, Upstream_Status=" "), "lacks the trailer Upstream-Status: reword it"),
        (message("nonsense"), "unknown fix nonsense: write patches/fixes/nonsense.toml, or choose from "),
        (message(SWA), f"{SWA} again, after "),
        (message(SWA) + "\nUpstream-Status: x", "has Upstream-Status more than once"),
        (
            message("mine", Regression_Test="tests/regression/mine.py"),
            "tests/regression/mine.py does not exist",
        ),
        ("[x] " + message("mine"), "`git am` would not give it back"),
        (
            message("mine").replace("\n\nUp", "\n---\n\nUp").replace("it breaks.", "a\n---\nb"),
            "`git am` would not",
        ),
    ],
)
def test_messages_that_a_patch_cannot_have(checkout: Path, project: Path, text: str, refusal: str) -> None:
    add_to_catalogue(project, "mine")
    commit(checkout, ROUTED_EXPERTS, text)
    before = digest(project / "patches")
    line = from_copy(project, "refresh", checkout).refusal()
    assert refusal in line
    assert f"commit {git(checkout, 'rev-parse', '--short=10', 'HEAD').strip()} " in line
    assert digest(project / "patches") == before


def test_commits_that_a_patch_cannot_have(checkout: Path, project: Path) -> None:
    add_to_catalogue(project, "mine")
    before, head = digest(project / "patches"), git(checkout, "rev-parse", "HEAD").strip()

    def refusal() -> str:
        line = from_copy(project, "refresh", checkout).refusal()
        assert digest(project / "patches") == before
        git(checkout, "reset", "--quiet", "--hard", head)
        git(checkout, "clean", "--quiet", "--force", "-d")
        return line

    def committed(*arguments: str) -> str:
        git(checkout, "add", "--all")
        git(checkout, "commit", "--quiet", "--message", message("mine"), *arguments)
        return refusal()

    assert "changes nothing: drop it" in committed("--allow-empty")
    (checkout / "python" / "sglang" / "new.py").write_text("")
    assert "adds python/sglang/new.py: a patch can only change" in committed()
    (checkout / HASH_TOPK).unlink()
    assert f"removes {HASH_TOPK}" in committed()
    (checkout / HASH_TOPK).unlink()
    (checkout / HASH_TOPK).symlink_to("topk.py")
    assert f"changes the type of {HASH_TOPK}" in committed()
    edit(checkout / HASH_TOPK, "# mine")
    (checkout / HASH_TOPK).chmod(0o755)
    assert f"changes the mode of {HASH_TOPK}" in committed()
    (checkout / "test").mkdir()
    (checkout / "test" / "mine.py").write_text("")
    assert "test/mine.py is outside of python/sglang: take it out" in committed()

    # A line that the series' first commit added: nobody could have this fix without that one.
    change(checkout / HASH_TOPK, "columns) % num_experts,\n", "columns) % num_experts,  # mine\n")
    assert "does not apply to the release without the commits before it: keep it" in committed()

    edit(checkout / HASH_TOPK, "# mine")
    assert f"uncommitted changes (M {HASH_TOPK})" in refusal()
    (checkout / "notes.txt").write_text("")
    assert "uncommitted changes (?? notes.txt)" in refusal()
    git(checkout, "checkout", "--quiet", "-b", "side", "HEAD~1")
    commit(checkout, ROUTED_EXPERTS, message("mine"))
    git(checkout, "merge", "--quiet", "--no-edit", head)
    assert ": a merge: rebase, so that each fix is one commit" in refusal()


def test_repositories_that_checkout_did_not_make(
    checkout: Path, checkouts: Mapping[str, Path], project: Path, command: Command, tmp_path: Path
) -> None:
    assert "not the top of a git repository" in command("refresh", checkout / "python").refusal()
    git(checkout, "tag", "release/0.5.11", "HEAD")
    assert "the tags release/0.5.11, release/0.5.12 below HEAD" in command("refresh", checkout).refusal()
    git(checkout, "tag", "--delete", "release/0.5.12")
    assert "release/0.5.11 are not SGLang 0.5.11's" in command("refresh", checkout).refusal()
    git(checkout, "tag", "--delete", "release/0.5.11")
    assert "no tag release/<version> below HEAD" in command("refresh", checkout).refusal()
    git(checkout, "tag", "release/0.5.10", "HEAD~1")
    assert "0.5.10, which its tag says, is not a pinned release" in command("refresh", checkout).refusal()
    # The base commit, amended.
    git(checkout, "tag", "--delete", "release/0.5.10")
    git(checkout, "reset", "--quiet", "--hard", git(checkout, "rev-list", "--max-parents=0", "HEAD").strip())
    edit(checkout / HASH_TOPK, "# mine")
    git(checkout, "commit", "--quiet", "--all", "--amend", "--no-edit")
    git(checkout, "tag", "release/0.5.12")
    assert "the files of its base commit release/0.5.12 are not SGLang 0.5.12's" in (
        command("refresh", checkout).refusal()
    )
    before = digest(project / "patches")
    (project / "patches" / "0.5.12" / "notes.patch").write_text("mine")
    other = copy(checkouts["0.5.12"], tmp_path / "other")
    words = f"move it away, or add it to {project / 'patches' / '0.5.12' / 'series'}"
    assert f"notes.patch: not in the series: {words}" in from_copy(project, "refresh", other).refusal()
    (project / "patches" / "0.5.12" / "notes.patch").unlink()
    assert digest(project / "patches") == before


def test_an_installed_tool_has_no_patches_to_write(project: Path, checkout: Path) -> None:
    (project / "tests" / "regression").rename(project / "elsewhere")
    assert "work in a clone of sglang-patchset" in from_copy(project, "refresh", checkout).refusal()


def test_a_directory_that_cannot_be_replaced(
    checkout: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old series is put back."""
    from sglang_patchset import catalog
    from sglang_patchset.queue import stack

    git(checkout, "reset", "--quiet", "--hard", "HEAD~1")
    before = digest(project / "patches")
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        stack.refresh(catalog.load(project / "patches"), checkout)
    assert digest(project / "patches") == before
