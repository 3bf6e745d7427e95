"""The matrix of fixes and releases, proved: one test for each release, fix and tree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import catalog
from sglang_patchset.catalog import State
from sglang_patchset.proof import expected, verify
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Outcome, Tree

TABLES = catalog.load()
RELEASES = list(TABLES.releases.values())
CACHE = Path(__file__).parents[2] / ".cache"

# What the published tree has to say where there is no patch.
_PUBLISHED = {
    State.VULNERABLE: Outcome.RED,
    State.IN_PART: Outcome.GREEN,
    State.UPSTREAM: Outcome.GREEN,
    State.NOT_AFFECTED: Outcome.ABSENT,
}
# There, each test of the file needs the code that the patch mends.
_NOTHING_PASSES = {
    (release, "routed-experts-speculation", Tree.PUBLISHED)
    for release in ("0.5.11", "0.5.12", "0.5.12.post1")
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
    for tree, outcome in (
        {Tree.PUBLISHED: Outcome.RED, Tree.PATCHED: Outcome.GREEN}
        if cell.patch
        else {Tree.PUBLISHED: _PUBLISHED[cell.state]}
    ).items()
]


@pytest.fixture(scope="module")
def verdicts() -> Mapping[tuple[str, str, Tree], Verdict]:
    found = verify.run(TABLES, expected.load_all(TABLES), RELEASES, CACHE)
    return {(each.release, each.fix, each.tree): each for each in found}


@pytest.mark.parametrize(("cell", "outcome"), CELLS)
def test_cell(
    verdicts: Mapping[tuple[str, str, Tree], Verdict], cell: tuple[str, str, Tree], outcome: Outcome
) -> None:
    verdict = verdicts[cell]
    if verdict.expected is Outcome.NOT_RUN:
        pytest.skip(f"not run: {verdict.detail}")
    assert verdict.outcome is outcome, verdict.detail
    assert bool(verdict.passed) == (outcome is not Outcome.ABSENT and cell not in _NOTHING_PASSES)
    if outcome is Outcome.RED:
        assert verdict.signatures
