"""Every subset of every release's series, and how a tree's state is told from its bytes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping, Set
from itertools import combinations
from pathlib import Path

import pytest

from sglang_patchset import catalog, patches, survey
from sglang_patchset.catalog import Catalog, State
from sglang_patchset.patches import Series
from sglang_patchset.repair import contents
from sglang_patchset.survey import Presence

from .conftest import Command, change, digest

DSV4, HASH, DSA = "dsv4-expert-distribution", "hash-topk-dummy-weights", "dsa-index-sharing"
EPLB = "eplb-double-mapping"  # without which the other one must not be
TBO = "dsa-sharing-two-batch-overlap"  # needs DSA
# No repository around the temporary directory may have a say.
_ENVIRONMENT = {"PATH": os.environ["PATH"], "GIT_CEILING_DIRECTORIES": "/"}
HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"


@pytest.fixture(scope="session")
def published(series: Series, unpacked: Mapping[str, Path]) -> Mapping[str, bytes]:
    """The touched files as the release has them."""
    return {path: (unpacked[str(series.release.version)] / path).read_bytes() for path in series.files}


def test_every_subset(series: Series, published: Mapping[str, bytes], tmp_path: Path) -> None:
    """What becomes of a file depends on the fixes that touch it: every set of those that `needs` allows."""
    subsets = {
        frozenset(chosen).union(*(patch.needs for patch in series.patches if patch.fix in chosen))
        for touching in series.files.values()
        for size in range(len(touching) + 1)
        for chosen in combinations([patch.fix for patch in touching], size)
    }
    subsets.add(frozenset(patch.fix for patch in series.patches))
    base = survey.take(series, published.get)
    compiled: set[tuple[str, bytes]] = set()
    for number, subset in enumerate(sorted(subsets, key=sorted)):
        patched = {**published, **contents(base, add=subset)}
        assert patched == _by_git(series, published, subset, tmp_path / str(number))
        for path, data in set(patched.items()) - compiled:
            compile(data, path, "exec")
        compiled |= set(patched.items())
        found = survey.take(series, patched.get)
        for patch in series.patches:
            expected = Presence.IN if patch.fix in subset else Presence.OUT
            assert found.presence(patch) == (expected, "")
        assert {**patched, **contents(found, remove=subset)} == published


def _by_git(series: Series, published: Mapping[str, bytes], subset: Set[str], tree: Path) -> dict[str, bytes]:
    """What `git apply` alone makes of the release."""
    for path, data in published.items():
        file = tree / "python" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    files = [str(patch.path) for patch in series.patches if patch.fix in subset]
    if files:
        subprocess.run(["git", "apply", *files], cwd=tree, check=True, env=_ENVIRONMENT)
    patched = {path: (tree / "python" / path).read_bytes() for path in published}
    shutil.rmtree(tree)
    return patched


def test_series_gives_the_files_that_its_blob_ids_name(
    series: Series, published: Mapping[str, bytes]
) -> None:
    base = survey.take(series, published.get)
    patched = contents(base, add=frozenset(patch.fix for patch in series.patches))
    found = survey.take(series, patched.get)
    assert {state.applied for state in found.files.values()} == {
        frozenset(patch.fix for patch in touching) for touching in series.files.values()
    }


@pytest.mark.parametrize("order", [(HASH, EPLB, DSV4), (EPLB, DSV4, HASH)])
def test_fixes_of_one_file_come_in_any_order(tree: Path, command: Command, order: tuple[str, ...]) -> None:
    before = digest(tree)
    for fix in order:
        assert command("apply", tree, fix).code == 0
    one_by_one = digest(tree)
    for fix in reversed(order):
        assert command("revert", tree, fix).code == 0
    assert digest(tree) == before
    assert command("apply", tree, *order).code == 0
    assert digest(tree) == one_by_one


def test_patches_applied_by_hand_are_recognised(tree: Path, tables: Catalog, command: Command) -> None:
    patch = patches.load(tables, tables.default).patch(DSV4)
    subprocess.run(["git", "apply", "-p2", patch.path], cwd=tree, check=True, env=_ENVIRONMENT)
    assert _states(command("status", tree).out)[DSV4] == "patched"
    assert command("revert", tree, EPLB, DSV4).code == 0
    assert _states(command("status", tree).out)[DSV4] == "vulnerable"


def test_a_bug_that_nothing_is_carried_for(
    tree: Path, tables: Catalog, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncarried = dataclasses.replace(
        tables.fix(DSV4),
        name="uncarried",
        states={"==0.5.12": State.VULNERABLE},
        notes={"==0.5.12": "no patch for this release"},
        patched=frozenset(),
    )
    fixes = {**tables.fixes, uncarried.name: uncarried}
    monkeypatch.setattr(catalog, "load", lambda: dataclasses.replace(tables, fixes=fixes))
    refusal = command("apply", tree, EPLB, DSV4, uncarried.name).refusal()
    assert "no patch of uncarried for SGLang 0.5.12: see `sglang-patchset list`" in refusal
    result = command("apply", tree)
    assert (result.code, result.err) == (0, "")
    states = _states(result.out)
    assert {fix for fix, state in states.items() if state == "vulnerable"} == {uncarried.name}
    result = command("status", tree)
    assert result.code == 1
    assert "no patch for this release" in result.out


def _states(table: str) -> dict[str, str]:
    """Each fix's state, by the lines that are no paragraph."""
    rows = [line for line in table.splitlines()[2:] if not line.startswith(" ") and "  #" in line]
    return {line.split()[0]: " ".join(line.split()[2:]) for line in rows}


def test_an_edit_in_a_fix_s_place_makes_it_unknown(tree: Path, command: Command) -> None:
    assert command("apply", tree, EPLB, DSV4).code == 0
    change(tree / HASH_TOPK, "self.score_func = scoring_func", "self.score_func = mine")
    states = _states(command("status", tree).out)
    assert {fix for fix, state in states.items() if state == "unknown"} == {HASH}
    assert states[DSV4] == "patched"


def test_half_a_fix_is_named(tree: Path, unpacked: Mapping[str, Path], command: Command) -> None:
    assert command("apply", tree).code == 0
    deepseek_v4 = "sglang/srt/models/deepseek_v4.py"
    (tree / deepseek_v4).unlink()
    shutil.copy(unpacked["0.5.12"] / deepseek_v4, tree / deepseek_v4)
    before = digest(tree)
    refusal = command("revert", tree).refusal()
    assert f"{DSV4}: half patched: " in refusal
    assert f" has it, {deepseek_v4} lacks it" in refusal
    assert digest(tree) == before
    # The others are still exactly known.
    assert command("revert", tree, HASH).code == 0


def test_a_missing_file_is_named(tree: Path, command: Command) -> None:
    (tree / HASH_TOPK).unlink()
    refusal = command("apply", tree).refusal()
    assert f"{HASH}: {HASH_TOPK} is missing" in refusal
