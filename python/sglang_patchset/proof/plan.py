"""Which regression tests run on which tree of which release, and what has to come of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from sglang_patchset.catalog import Catalog, Cell, Fix, Release, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof.expected import Expected, Suite
from sglang_patchset.proof.trees import Trees


class Tree(Enum):
    """Which of a release's trees the tests run on."""

    PUBLISHED = "published"
    PATCHED = "patched"


class Outcome(Enum):
    """What the tests of one fix say about one tree."""

    RED = "red"
    GREEN = "green"
    ABSENT = "no such code"
    NOT_RUN = "not run"
    ERROR = "error"


@dataclass(frozen=True)
class Job:
    """One suite on one tree of one release; `hindrance` is why it cannot be run here.

    Where a green is expected, `reds` are what upstream's fix left open.
    """

    release: Release
    fix: Fix
    suite: Suite
    tree: Tree
    expected: Outcome
    hindrance: str = ""

    @property
    def reds(self) -> dict[str, str]:
        """The tests that have to fail, with their signatures."""
        return {} if self.tree is Tree.PATCHED else dict(self.suite.reds_of(self.release.version))


def expected_outcome(cell: Cell, tree: Tree) -> Outcome | None:
    """What has to come of a suite on a tree; None where there is no such tree."""
    if tree is Tree.PATCHED:
        return Outcome.GREEN if cell.patch else None
    if cell.patch or cell.state is State.VULNERABLE:
        return Outcome.RED
    return Outcome.ABSENT if cell.state is State.NOT_AFFECTED else Outcome.GREEN


def jobs(release: Release, tree: Tree, suites: Iterable[Expected]) -> Iterator[Job]:
    """What there is to run without a GPU on one tree."""
    for each in suites:
        cell = each.fix.cell(release.version)
        outcome = expected_outcome(cell, tree) if cell else None
        if outcome:
            hindrance = _hindrance(release, each.suite)
            yield Job(
                release, each.fix, each.suite, tree, Outcome.NOT_RUN if hindrance else outcome, hindrance
            )


def grouped(
    suites: Sequence[Expected], releases: Sequence[Release], trees: Trees
) -> list[tuple[Path, list[Job]]]:
    """Each tree, with the jobs that one process runs on it: importing SGLang takes longer than most tests.

    Raises:
        PatchsetError: a release cannot be got.
    """
    groups = []
    for release in releases:
        for tree in Tree:
            if runnable := [job for job in jobs(release, tree, suites) if not job.hindrance]:
                path = trees.patched(release) if tree is Tree.PATCHED else trees.published(release)
                groups.append((path, runnable))
    return groups


def check_tests(catalog: Catalog, suites: Iterable[Expected]) -> None:
    """See that every test is there.

    Raises:
        PatchsetError: one is not.
    """
    for each in suites:
        if not (catalog.clone() / each.suite.test).is_file():
            raise PatchsetError(
                f"{catalog.clone() / each.suite.test}: no such file: write it, or correct `test` in "
                "expected.toml beside it"
            )


def _hindrance(release: Release, suite: Suite) -> str:
    """Why this Python and its packages cannot run a suite on a release; empty where they can."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in release.python:
        return f"SGLang {release.version} has no wheel for Python {python}"
    misfit = suite.misfit(release.version)
    if misfit or not suite.needs_own_packages(release.version):
        return misfit
    lacking = {
        name: (wanted, found)
        for name, wanted in release.runs_with.items()
        if name in ("torch", "transformers") and Version(found := metadata.version(name)).public != wanted
    }
    needed = " and ".join(f"{name} {wanted}" for name, (wanted, _) in lacking.items())
    installed = " and ".join(found for _, found in lacking.values())
    return f"on SGLang {release.version} this test needs {needed}: here is {installed}" if lacking else ""
