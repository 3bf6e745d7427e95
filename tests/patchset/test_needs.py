"""A fix whose patch applies only on top of another one's goes in and out with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import chain, combinations
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import catalog, patches, releases, survey
from sglang_patchset.catalog import Catalog
from sglang_patchset.proof.trees import Trees
from sglang_patchset.repair import contents
from sglang_patchset.survey import Presence

from .conftest import ROOT, Command, change, copy, digest, edit, from_copy, git
from .test_stack import add_to_catalogue, message, rebase

HASH, EPLB, DSV4 = "hash-topk-dummy-weights", "eplb-double-mapping", "dsv4-expert-distribution"
MINE = "mine"
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"
RELEASE = Version("0.5.12")
BEFORE = f'"Mend it": {MINE} needs {HASH}: put the commit of that before it'


@pytest.fixture(scope="module")
def made(checkouts: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A project, and its checkout, with a fix that changes a line of the first one's and another line."""
    directory = tmp_path_factory.mktemp("made")
    project, checkout = directory / "project", copy(checkouts[str(RELEASE)], directory / "checkout")
    for name in ("python", "patches", "tests/regression"):
        shutil.copytree(ROOT / name, project / name)
    add_to_catalogue(project, MINE, f'code = ["{HASH_TOPK}"]\nneeds = ["{HASH}"]')
    change(checkout / "python" / HASH_TOPK, "columns) % num_experts,\n", "columns) % num_experts,  # mine\n")
    change(checkout / "python" / HASH_TOPK, "num_token = scores.shape[0]\n", "num_token = scores.size(0)\n")
    git(checkout, "commit", "--quiet", "--all", "--message", message(MINE))
    result = from_copy(project, "refresh", checkout)
    assert (result.code, result.err) == (0, "")
    return project, checkout


@pytest.fixture
def needing(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """The tables of that project: what the command reads, too."""
    tables = catalog.load(made[0] / "patches")
    monkeypatch.setattr(catalog, "load", lambda: tables)
    return tables


def test_where_it_counts(needing: Catalog) -> None:
    assert needing.needed(MINE, RELEASE) == {HASH}
    for version in needing.releases:
        assert version == RELEASE or not needing.needed(MINE, version)
    assert not needing.needed(HASH, RELEASE)


@pytest.mark.parametrize("theirs", [b"", b"# theirs\n"])
def test_every_subset(theirs: bytes, needing: Catalog, unpacked: Mapping[str, Path]) -> None:
    series = patches.load(needing, needing.releases[RELEASE])
    published = {path: theirs + (unpacked[str(RELEASE)] / path).read_bytes() for path in series.files}
    names = (HASH, EPLB, DSV4, MINE)
    for chosen in chain.from_iterable(combinations(names, size) for size in range(len(names) + 1)):
        if any(not needing.needed(name, RELEASE) <= {*chosen} for name in chosen):
            continue
        base = survey.take(series, published.get)
        patched = {**published, **contents(base, add=set(chosen))}
        found = survey.take(series, patched.get)
        for patch in series.patches:
            expected = Presence.IN if patch.fix in chosen else Presence.OUT
            assert found.presence(patch) == (expected, "")
        assert {**patched, **contents(found, remove=set(chosen))} == published


@pytest.mark.usefixtures("needing")
def test_apply_and_revert(tree: Path, command: Command) -> None:
    before = digest(tree)
    refusal = command("apply", tree, MINE).refusal()
    assert refusal == f"sglang-patchset: {tree}/sglang: {MINE} needs {HASH}: apply them together\n"
    assert digest(tree) == before
    assert command("apply", tree, MINE, HASH).code == 0
    both = digest(tree)
    refusal = command("revert", tree, HASH).refusal()
    assert refusal == f"sglang-patchset: {tree}/sglang: {MINE} needs {HASH}: revert them together\n"
    assert digest(tree) == both
    # One by one, in the order that leaves none without what it needs.
    assert command("revert", tree, MINE).code == 0
    assert command("apply", tree, MINE).code == 0
    assert digest(tree) == both
    assert command("revert", tree, HASH, MINE).code == 0
    assert digest(tree) == before
    # Without names it is all of them.
    assert command("apply", tree).code == 0
    assert command("revert", tree).code == 0
    assert digest(tree) == before


@pytest.mark.usefixtures("needing")
def test_an_edit_in_the_needed_fix_s_place(tree: Path, command: Command) -> None:
    change(tree / HASH_TOPK, "self.score_func = scoring_func", "self.score_func = mine")
    before = digest(tree)
    for names in ([MINE], [MINE, HASH]):
        assert "has other changes in the place of the hunk" in command("apply", tree, *names).refusal()
    assert digest(tree) == before


@pytest.mark.usefixtures("needing")
def test_an_edit_of_the_needing_fix_s_place(tree: Path, command: Command) -> None:
    assert command("apply", tree, HASH, MINE).code == 0
    change(tree / HASH_TOPK, "% num_experts,  # mine\n", "% num_experts,  # theirs\n")
    before = digest(tree)
    assert "has other changes in the place of the hunk" in command("revert", tree, HASH, MINE).refusal()
    assert digest(tree) == before


def test_part_of_a_series(
    needing: Catalog, wheels: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        releases, "fetch", lambda release, scratch, **_: link_file(wheels[str(release.version)], scratch)
    )
    tree = Trees(needing, tmp_path).partly(needing.releases[RELEASE], [MINE])
    series = patches.load(needing, needing.releases[RELEASE])
    found = survey.take(series, lambda path: (tree / path).read_bytes())
    assert {patch.fix for patch in series.patches if found.presence(patch)[0] is Presence.IN} == {HASH, MINE}


def link_file(source: Path, directory: Path) -> Path:
    (directory / source.name).hardlink_to(source)
    return directory / source.name


def test_the_order_of_the_commits(made: tuple[Path, Path], tmp_path: Path) -> None:
    project = Path(shutil.copytree(made[0], tmp_path / "project"))
    repository = copy(made[1], tmp_path / "checkout")
    git(repository, "tag", "whole")
    before = digest(project / "patches")
    # Behind it, others may come between.
    rebase(repository, "sed -i '6{h;d};8{G}'")
    assert from_copy(project, "refresh", repository).code == 0
    assert digest(project / "patches") != before
    before = digest(project / "patches")
    git(repository, "reset", "--quiet", "--hard", "release/0.5.12")
    edit(repository / "python" / HASH_TOPK, "# mine")
    git(repository, "commit", "--quiet", "--all", "--message", message(MINE))
    first = git(repository, "rev-list", "--reverse", "release/0.5.12..whole").split()[0]
    git(repository, "cherry-pick", first)
    assert BEFORE in from_copy(project, "refresh", repository).refusal()
    assert digest(project / "patches") == before


def test_a_needed_commit_is_missing(made: tuple[Path, Path], tmp_path: Path) -> None:
    project = Path(shutil.copytree(made[0], tmp_path / "project"))
    repository = copy(made[1], tmp_path / "checkout")
    before = digest(project / "patches")
    git(repository, "reset", "--quiet", "--hard", "release/0.5.12")
    edit(repository / "python" / HASH_TOPK, "# mine")
    git(repository, "commit", "--quiet", "--all", "--message", message(MINE))
    assert BEFORE in from_copy(project, "refresh", repository).refusal()
    assert digest(project / "patches") == before


@pytest.mark.usefixtures("needing")
def test_export(
    made: tuple[Path, Path], checkouts: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    upstream = copy(checkouts[str(RELEASE)], tmp_path / "upstream")
    # The blobs of all fixes are there, for a three-way merge to go wrong with.
    git(upstream, "fetch", "--quiet", str(made[1]))
    git(upstream, "checkout", "--quiet", "-b", "main", f"release/{RELEASE}")
    text = tmp_path / "text.md"
    refusal = command("export", MINE, upstream, text).refusal()
    assert f"its HEAD lacks {HASH}, which {MINE} needs: export that first, and check out its" in refusal
    assert not text.exists()
    assert command("export", HASH, upstream, tmp_path / "hash.md").code == 0
    git(upstream, "checkout", "--quiet", f"fix/{HASH}")
    assert command("export", MINE, upstream, text).code == 0
    changed = git(upstream, "diff", f"fix/{HASH}", f"fix/{MINE}", "--", f"python/{HASH_TOPK}")
    assert changed.count("\n+") == 3
