"""The matrix of fixes and releases, proved: one test for each release, fix and tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import catalog
from sglang_patchset.catalog import CellState
from sglang_patchset.proof import verify
from sglang_patchset.proof.verify import Outcome, Tree, Verdict

TABLES = catalog.load()
RELEASES = list(TABLES.releases.values())
TREES = Path(__file__).parents[2] / ".cache" / "trees"

_EXPECTED = {
    CellState.PATCH: {Tree.PUBLISHED: Outcome.RED, Tree.PATCHED: Outcome.GREEN},
    CellState.UNPATCHED: {Tree.PUBLISHED: Outcome.RED},
    CellState.UPSTREAM: {Tree.PUBLISHED: Outcome.GREEN},
    CellState.NOT_AFFECTED: {Tree.PUBLISHED: Outcome.ABSENT},
}
CELLS = [
    pytest.param(
        (str(release.version), fix.name, tree),
        outcome,
        id=f"{release.version}-{fix.name}-{tree.value}-{outcome.value.replace(' ', '-')}",
    )
    for release in RELEASES
    for fix in TABLES.fixes.values()
    if (cell := fix.cell(release.version))
    for tree, outcome in _EXPECTED[cell.state].items()
]


@pytest.fixture(scope="module")
def verdicts() -> Mapping[tuple[str, str, Tree], Verdict]:
    found = verify.run(TABLES, list(TABLES.fixes.values()), RELEASES, TREES)
    return {(each.release, each.fix, each.tree): each for each in found}


@pytest.mark.parametrize(("cell", "outcome"), CELLS)
def test_cell(
    verdicts: Mapping[tuple[str, str, Tree], Verdict], cell: tuple[str, str, Tree], outcome: Outcome
) -> None:
    verdict = verdicts[cell]
    if verdict.expected is Outcome.NOT_RUN:
        pytest.skip(f"not run: {verdict.detail}")
    assert verdict.outcome is outcome, verdict.detail
    assert bool(verdict.passed) == (outcome is not Outcome.ABSENT)
    if outcome is Outcome.RED:
        assert verdict.signatures
