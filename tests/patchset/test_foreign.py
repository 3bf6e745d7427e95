"""Somebody else's changes in the files that fixes touch: they stay, byte for byte, or are named."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from random import Random

import pytest

from sglang_patchset import patches, record, survey
from sglang_patchset.catalog import Catalog
from sglang_patchset.git import blob_id
from sglang_patchset.patches import Series
from sglang_patchset.repair import contents
from sglang_patchset.survey import Presence

from .conftest import Command, change, digest, edit, git, link

HASH, DSV4, DSA = "hash-topk-dummy-weights", "dsv4-expert-distribution", "dsa-index-sharing"
EPLB = "eplb-double-mapping"  # without which the other one must not be
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
DEEPSEEK_V4 = "sglang/srt/models/deepseek_v4.py"
SERVER_ARGS = "sglang/srt/server_args.py"


def states(command: Command, target: Path) -> dict[str, tuple[str, str]]:
    report = json.loads(command("status", target, "--json").out)
    return {fix["name"]: (fix["state"], fix["detail"]) for fix in report["fixes"]}


def test_every_fix_among_other_changes(series: Series, unpacked: Mapping[str, Path]) -> None:
    """In every file at once: lines before and after what the fixes touch, so that all hunks have moved."""
    base = unpacked[str(series.release.version)]
    theirs = {path: b"# theirs\n" * 9 + (base / path).read_bytes() + b"# theirs\n" for path in series.files}
    found = survey.take(series, theirs.get)
    assert sorted(found.foreign()) == sorted(series.files)
    every = frozenset(patch.fix for patch in series.patches)
    for subset in (*(patch.needs | {patch.fix} for patch in series.patches), every):
        patched = {**theirs, **contents(found, add=subset)}
        after = survey.take(series, patched.get)
        for patch in series.patches:
            expected = Presence.IN if patch.fix in subset else Presence.OUT
            assert after.presence(patch) == (expected, "")
        assert {**patched, **contents(after, remove=subset)} == theirs
    # Theirs is no part of ours: taken out before or after, the same is left.
    ours = {**theirs, **contents(found, add=every)}
    assert {blob_id(data[9 * 9 : -9]) for data in ours.values()} == {
        series.patched_id(path) for path in series.files
    }


def test_round_trip_among_other_changes(tree: Path, command: Command, tables: Catalog) -> None:
    change(tree / HASH_TOPK, "class HashTopK(nn.Module):", "class Mine: pass\n\n\nclass HashTopK(nn.Module):")
    edit(tree / SERVER_ARGS, "# mine")
    before = digest(tree)
    vulnerable = states(command, tree)
    assert {state for state, _ in vulnerable.values()} == {"vulnerable", "fixed in part"}
    assert vulnerable[DSV4][1] == f"other changes too in {HASH_TOPK}"
    assert vulnerable[DSA][1] == f"other changes too in {SERVER_ARGS}"
    assert command("apply", tree).code == 0
    patched = digest(tree)
    assert {state for state, _ in states(command, tree).values()} == {"patched"}
    assert "nothing to do" in command("apply", tree).out
    for fix in (patch.fix for patch in patches.load(tables, tables.default).patches):
        needing = [each for each in tables.fixes if fix in tables.needed(each, tables.default.version)]
        assert command("revert", tree, fix, *needing).code == 0
        assert states(command, tree)[fix] == vulnerable[fix]
        assert command("apply", tree, fix, *needing).code == 0
        assert digest(tree) == patched
    assert command("revert", tree).code == 0
    assert digest(tree) == before


def test_changes_that_came_after_the_fixes(
    tree: Path, unpacked: Mapping[str, Path], command: Command
) -> None:
    assert command("apply", tree).code == 0
    change(tree / HASH_TOPK, "class HashTopK(nn.Module):", "class Mine: pass\n\n\nclass HashTopK(nn.Module):")
    assert command("revert", tree).code == 0
    original = (unpacked["0.5.12"] / HASH_TOPK).read_text()
    mine = original.replace("class HashTopK(nn.Module):", "class Mine: pass\n\n\nclass HashTopK(nn.Module):")
    assert (tree / HASH_TOPK).read_text() == mine
    published = digest(unpacked["0.5.12"])
    differing = {path for path, entry in digest(tree).items() if entry != published.get(path)}
    # RECORD has said nothing true about the file since it was edited.
    assert differing == {HASH_TOPK, "sglang-0.5.12.dist-info/RECORD"}


def test_one_fix_of_a_file_stands_in_nobody_s_way(tree: Path, command: Command) -> None:
    change(tree / HASH_TOPK, "self.score_func = scoring_func", "self.score_func = mine")
    before = digest(tree)
    found = states(command, tree)
    assert found[HASH] == (
        "unknown",
        f"{HASH_TOPK} has other changes in the place of the hunk at line 37 of {HASH}.patch",
    )
    assert found[DSV4][0] == "vulnerable"
    refusal = command("apply", tree).refusal()
    assert f"{HASH}: {HASH_TOPK} has other changes in the place of the hunk at line 37" in refusal
    assert digest(tree) == before
    assert command("apply", tree, EPLB, DSV4, DSA).code == 0
    assert states(command, tree)[DSV4][0] == "patched"
    assert command("revert", tree, EPLB, DSV4, DSA).code == 0
    assert digest(tree) == before


def test_changes_close_to_a_fix(tree: Path, command: Command) -> None:
    """All but the very next line may be another on one side, as where git merges three ways."""
    change(tree / HASH_TOPK, "self.routed_scaling_factor = routed_scaling_factor", "self.theirs = 1")
    before = digest(tree)
    assert states(command, tree)[HASH] == ("vulnerable", f"other changes too in {HASH_TOPK}")
    assert command("apply", tree, HASH, EPLB, DSV4).code == 0
    assert states(command, tree)[HASH] == ("patched", f"other changes too in {HASH_TOPK}")
    text = (tree / HASH_TOPK).read_text()
    assert "self.theirs = 1\n" in text
    assert "(token_ids.unsqueeze(1) + columns) % num_experts,\n" in text
    assert command("revert", tree, HASH, EPLB, DSV4).code == 0
    assert digest(tree) == before
    # On both sides, too little is left to know the place by.
    change(tree / HASH_TOPK, "assert not apply_routed_scaling_factor_on_output", "assert not theirs")
    change(
        tree / HASH_TOPK,
        "            requires_grad=False,\n        )\n\n",
        "            requires_grad=0,\n)\n",
    )
    before = digest(tree)
    assert states(command, tree)[HASH][0] == "unknown"
    assert "has other changes in the place of the hunk at line 37" in command("apply", tree, HASH).refusal()
    assert digest(tree) == before


def test_changes_close_to_a_fix_where_git_has_the_release(
    checkout: Path, tree: Path, command: Command
) -> None:
    """On both sides: in a checkout, the place is where git's three-way merge finds it."""
    fix = git(checkout, "rev-list", "--reverse", "release/0.5.12..patchset").split()[0]
    git(checkout, "checkout", "--quiet", "-b", "theirs", "release/0.5.12")
    for package in (checkout / "python", tree):
        change(package / HASH_TOPK, "self.routed_scaling_factor = routed_scaling_factor", "self.theirs = 1")
        change(package / HASH_TOPK, "=False,\n        )\n\n", "=False,\n        )  # theirs\n\n")
    # In a package, too little is left to know it by.
    assert "in the place of the hunk at line 37" in command("apply", tree, HASH).refusal()
    git(checkout, "commit", "--quiet", "--all", "--message", "Theirs")
    git(checkout, "checkout", "--quiet", "-b", "merged")
    git(checkout, "cherry-pick", fix)
    git(checkout, "checkout", "--quiet", "theirs")
    found = f"other changes too in {HASH_TOPK}"
    assert states(command, checkout)[HASH] == ("vulnerable", found)
    assert command("apply", checkout, HASH).code == 0
    assert git(checkout, "diff", "--stat", "merged") == ""
    assert command("apply", checkout).code == 0
    assert states(command, checkout)[HASH] == ("patched", found)
    assert command("revert", checkout, HASH).code == 0
    assert states(command, checkout)[HASH] == ("vulnerable", found)
    assert command("revert", checkout).code == 0
    assert git(checkout, "status", "--porcelain") == ""
    # Its lines elsewhere are not its place for git either.
    file = checkout / "python" / HASH_TOPK
    text = file.read_text()
    end = "        )  # theirs\n"
    lines = text[text.index("        self.score_func = ") : text.index(end) + len(end)]
    file.write_text(
        text.replace(lines, "").replace("    def forward(", f"    def mine(self):\n{lines}\n    def forward(")
    )
    assert states(command, checkout)[HASH][0] == "unknown"
    assert "in the place of the hunk at line 37" in command("apply", checkout, HASH).refusal()
    file.write_text(text)
    # The very next line is too close for git, too.
    change(
        checkout / "python" / HASH_TOPK, "requires_grad=False,\n        )  # theirs", "theirs=1\n        )"
    )
    assert "in the place of the hunk at line 37" in command("apply", checkout, HASH).refusal()


@pytest.mark.parametrize("git_has_the_release", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_changes_anywhere(
    seed: int, git_has_the_release: bool, tables: Catalog, unpacked: Mapping[str, Path]
) -> None:
    """Whatever lines somebody changed: what a fix is told to be, putting it in or taking it out bears out."""
    random = Random(seed)
    series = patches.load(tables, tables.default)
    base = {path: (unpacked["0.5.12"] / path).read_bytes() for path in series.files}
    patched = contents(survey.take(series, base.get), add={patch.fix for patch in series.patches})
    blobs = {series.published_id(path): content for path, content in base.items() if git_has_the_release}
    told = 0
    for path, touching in series.files.items():
        hunks = [hunk for patch in touching for hunk in patch.hunks(path)]
        for source in (base[path], patched[path]):
            lines = source.splitlines(keepends=True)
            for at in {max(0, random.choice(hunks).line + random.randint(-2, 6)) for _ in range(2)}:
                kind = random.randrange(3)
                lines[at : at + (kind > 0)] = [b"# theirs\n"] * (kind < 2)
            theirs = b"".join(lines)
            found = survey.take(series, {**base, path: theirs}.get, blobs.get).files[path]
            for patch in touching:
                if patch.fix in found.conflicts:
                    continue
                # Neither without what it needs, nor out of what needs it.
                needing = {each.fix for each in touching if patch.fix in each.needs}
                if needing & (found.applied | found.conflicts.keys()):
                    continue
                if patch.needs & {each.fix for each in touching} - found.applied:
                    continue
                told += 1
                single = survey.Survey(series, {path: found})
                other = found.applied ^ {patch.fix}
                changed = survey.rewrite(single, {path: other})[path]
                after = survey.take(series, {**base, path: changed}.get, blobs.get).files[path]
                assert after.applied == other
                back = survey.rewrite(survey.Survey(series, {path: after}), {path: found.applied})[path]
                assert back == theirs
                assert changed.count(b"# theirs\n") == theirs.count(b"# theirs\n")
    assert told > 5


def test_two_places_for_one_hunk(tree: Path, tables: Catalog, command: Command) -> None:
    """git would take the nearest; nobody knows whether that is the right one."""
    (hunk,) = patches.load(tables, tables.default).patch(HASH).hunks(HASH_TOPK)
    text = (tree / HASH_TOPK).read_text()
    for lines in (hunk.before, hunk.after):
        (tree / HASH_TOPK).unlink()
        (tree / HASH_TOPK).write_text(text + lines.decode())
        before = digest(tree)
        assert states(command, tree)[HASH] == (
            "unknown",
            f"{HASH_TOPK} has more than one place for the hunk at line 37 of {HASH}.patch",
        )
        assert "has more than one place" in command("apply", tree, HASH).refusal()
        assert digest(tree) == before


def test_the_lines_of_a_fix_in_another_class(tree: Path, command: Command) -> None:
    """A class set aside has our lines, and what runs is another's: that is neither patched nor vulnerable."""
    theirs = "\n\nclass HashTopK(nn.Module):\n    pass"
    for _ in range(2):
        before = (tree / HASH_TOPK).read_bytes()
        change(tree / HASH_TOPK, "class HashTopK(nn.Module):", "class Old(nn.Module):")
        edit(tree / HASH_TOPK, theirs)
        state, detail = states(command, tree)[HASH]
        assert (state, detail.partition(" the hunk")[0]) == (
            "unknown",
            f"{HASH_TOPK} has other changes in the place of",
        )
        assert "other changes in the place of" in command("revert", tree, HASH).refusal()
        (tree / HASH_TOPK).write_bytes(before)
        assert command("apply", tree, HASH).code == 0
    # Its own head may change.
    change(tree / HASH_TOPK, "class HashTopK(nn.Module):", "class HashTopK(Base):")
    assert states(command, tree)[HASH][0] == "patched"


def test_an_older_release_s_file(
    tree: Path, unpacked: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    """The table says that 0.5.12.post1 has the fix; the file is that of 0.5.12, which lacks it."""
    newer = link(unpacked["0.5.12.post1"], tmp_path / "newer")
    (newer / HASH_TOPK).unlink()
    (newer / HASH_TOPK).write_bytes((tree / HASH_TOPK).read_bytes())
    state, detail = states(command, newer)[HASH]
    assert (state, detail) == (
        "unknown",
        f"SGLang 0.5.12.post1 has it, but {HASH_TOPK} is that of SGLang 0.5.12",
    )


def test_half_of_a_file_s_hunks(tree: Path, command: Command) -> None:
    assert command("apply", tree, EPLB, DSV4).code == 0
    edit(tree / HASH_TOPK, "# mine")
    change(
        tree / HASH_TOPK,
        "        get_global_expert_distribution_recorder().on_select_experts(topk_ids=topk_ids)\n",
        "",
    )
    assert states(command, tree)[DSV4] == (
        "unknown",
        f"{HASH_TOPK} is half patched, and lacks the hunk at line 131 of {DSV4}.patch",
    )
    before = digest(tree)
    assert "is half patched" in command("revert", tree, EPLB, DSV4).refusal()
    assert digest(tree) == before


def test_half_of_the_files(tree: Path, unpacked: Mapping[str, Path], command: Command) -> None:
    assert command("apply", tree, EPLB, DSV4).code == 0
    (tree / DEEPSEEK_V4).unlink()
    (tree / DEEPSEEK_V4).write_bytes((unpacked["0.5.12"] / DEEPSEEK_V4).read_bytes() + b"# mine\n")
    state, detail = states(command, tree)[DSV4]
    assert state == "unknown"
    assert detail.startswith("half patched: ")
    assert detail.endswith(f"has it, {DEEPSEEK_V4} lacks it")


def test_other_line_ends_are_other_lines(tree: Path, command: Command) -> None:
    content = (tree / HASH_TOPK).read_bytes()
    (tree / HASH_TOPK).unlink()
    (tree / HASH_TOPK).write_bytes(content.replace(b"\n", b"\r\n"))
    assert {states(command, tree)[fix][0] for fix in (HASH, DSV4)} == {"unknown"}


def test_what_git_does_is_checked(tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that does not lead back to the bytes that were found is none."""
    from sglang_patchset import git as module

    edit(tree / HASH_TOPK, "# mine")
    before = digest(tree)
    apply = module.apply

    def careless(
        patch: Path, at: Path, *, only: list[str], reverse: bool = False, near: bool = False
    ) -> bool:
        done = apply(patch, at, only=only, reverse=reverse, near=near)
        for path in only:
            (at / path).write_bytes((at / path).read_bytes().replace(b"# mine\n", b""))
        return done

    monkeypatch.setattr(module, "apply", careless)
    refusal = command("apply", tree, HASH).refusal()
    assert f"{HASH_TOPK}: other changes in it stand in the way of {HASH}" in refusal
    monkeypatch.setattr(module, "apply", lambda *_, only, **__: not only)
    assert f"{HASH_TOPK}: other changes in it stand in the way of {HASH}" in (
        command("apply", tree, HASH).refusal()
    )
    assert digest(tree) == before


def test_a_checkout_with_a_patch_of_somebody_else(checkout: Path, command: Command) -> None:
    """One large patch for a training stack, on a container's checkout; then ours, and without ours."""
    git(checkout, "checkout", "--quiet", "-b", "theirs", "release/0.5.12")
    package = checkout / "python"
    change(
        package / HASH_TOPK, "class HashTopK(nn.Module):", "TRAINING = True\n\n\nclass HashTopK(nn.Module):"
    )
    edit(package / "sglang" / "utils.py", "# theirs")
    edit(package / SERVER_ARGS, "# theirs")
    theirs = git(checkout, "diff")
    assert command("apply", checkout).code == 0
    assert git(checkout, "diff") != theirs
    # Theirs can be taken out under ours, and put back.
    for reverse in (["--reverse"], []):
        command_line = ["git", "-C", str(checkout), "apply", *reverse, "-"]
        subprocess.run(command_line, check=True, input=theirs, text=True)
        assert {state for state, _ in states(command, checkout).values()} == {"patched"}
    assert command("revert", checkout).code == 0
    assert git(checkout, "diff") == theirs


def test_a_release_s_own_files_count_more_than_its_version(
    unpacked: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    """What fits another release to the byte is that one, however well the claimed one's hunks would fit."""
    tree = link(unpacked["0.5.12.post1"], tmp_path / "tree")
    (tree / "sglang" / "_version.py").unlink()
    (tree / "sglang" / "_version.py").write_text("__version__ = version = '0.5.12'\n")
    report = json.loads(command("status", tree, "--json").out)
    assert (report["version"], report["release"]) == ("0.5.12", "0.5.12.post1")


def test_another_version_s_patch_among_other_changes(tree: Path, command: Command) -> None:
    """What it has more than ours cannot be told from the other changes."""
    assert command("apply", tree, HASH).code == 0
    edit(tree / HASH_TOPK, "# as the other version's patch has it")
    assert states(command, tree)[HASH][0] == "patched"
    # What that version had left, to the byte, has none of a user's changes in it.
    receipt = tree / "sglang" / "_patchset.json"
    entry = json.loads(receipt.read_text())
    entry["files"][HASH_TOPK] = blob_id((tree / HASH_TOPK).read_bytes())
    receipt.write_text(json.dumps(entry))
    state, detail = states(command, tree)[HASH]
    assert state == "unknown"
    assert f"{HASH_TOPK} as another version of this tool left it: revert it with that version" in detail


def test_a_patched_wheel_with_other_changes_does_not_become_the_published_one(
    tree: Path, command: Command, tmp_path: Path
) -> None:
    assert command("apply", tree).code == 0
    edit(tree / HASH_TOPK, "# mine")
    info = tree / "sglang-0.5.12+patchset.1.dist-info"
    (tree / "sglang-0.5.12.dist-info").rename(info)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: py3-none-any\n")
    wheel = tmp_path / "sglang-0.5.12+patchset.1-py3-none-any.whl"
    lines = {
        str(path.relative_to(tree)): (None, path.read_bytes())
        for path in sorted(tree.rglob("*"))
        if path.is_file() and path.name != "RECORD"
    }
    (info / "RECORD").write_bytes(record.update(b"", lines))
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (*lines, f"{info.name}/RECORD"):
            archive.write(tree / path, path)
    before = sorted(tmp_path.iterdir())
    assert (
        f"has other changes in {HASH_TOPK}, which was not published so" in command("revert", wheel).refusal()
    )
    assert sorted(tmp_path.iterdir()) == before


def test_hunks_without_a_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    patch = patches.Patch("x", tmp_path / "x.patch", {})
    head = "Subject: x\n\ndiff --git a/python/sglang/a.py b/python/sglang/a.py\n@@ -3,2 +3,2 @@\n a\n"
    for body, before, after in [
        ("-b\n\\ No newline at end of file\n+c\n", b"a\nb", b"a\nc\n"),
        ("-b\n+c\n\\ No newline at end of file\n", b"a\nb\n", b"a\nc"),
        ("+c\n b\n\\ No newline at end of file\n", b"a\nb", b"a\nc\nb"),
        # Only \n ends a line.
        ("-b\f\rb\n+c\r\n", b"a\nb\f\rb\n", b"a\nc\r\n"),
    ]:
        patch.path.write_bytes((head + body).encode())
        (hunk,) = patch.hunks("sglang/a.py")
        assert (hunk.line, hunk.before, hunk.after) == (3, before, after)
    # A last line without its end is not the beginning of a longer one.
    patch.path.write_text(head + "+c\n b\n\\ No newline at end of file\n")
    series = Series(None, (patches.Patch("x", patch.path, {"sglang/a.py": ("0", "1")}),))  # type: ignore[arg-type]
    for content, presence in [
        (b"# theirs\na\nb", Presence.OUT),
        (b"# theirs\na\nc\nb", Presence.IN),
        (b"# theirs\na\nc\nbb", Presence.UNKNOWN),
        (b"# theirs\na\nbb\n", Presence.UNKNOWN),
    ]:
        found = survey.take(series, {"sglang/a.py": content}.get)
        assert found.presence(series.patches[0])[0] is presence
    assert patch.hunks("sglang/b.py") == []


def test_every_hunk_is_read(series: Series, unpacked: Mapping[str, Path]) -> None:
    """The hunks are those of the files: each has its place there, and the right line."""
    base = unpacked[str(series.release.version)]
    for path, touching in series.files.items():
        lines = (base / path).read_bytes().splitlines(keepends=True)
        for hunk in touching[0].hunks(path):
            assert b"".join(lines[hunk.line - 1 :]).startswith(hunk.before)
            assert hunk.before != hunk.after
        for patch in touching:
            text = patch.path.read_text()
            section = text.split(f"diff --git a/python/{path} ")[1].split("\ndiff --git ")[0]
            assert len(patch.hunks(path)) == section.count("\n@@ -")
