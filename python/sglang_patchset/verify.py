"""Red on the release as published, green on the patched tree: the regression tests run, and judged.

A red counts only with its signature: `fixes.toml` says which tests fail on a published release, and with
what words. Each tree has a process of its own, with the same interpreter and test files; nothing but the
Python path differs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from importlib import util
from pathlib import Path
from xml.etree import ElementTree

from sglang_patchset.catalog import Catalog, CellState, Fix, Release
from sglang_patchset.errors import PatchsetError
from sglang_patchset.trees import Trees

# What a tree's tests may take, in seconds; a hang is a failure too.
_TIMEOUT = 1800


class Tree(Enum):
    """Which of a release's trees the tests ran on."""

    PUBLISHED = "published"
    PATCHED = "patched"


class Outcome(Enum):
    """What the tests of one fix say about one tree."""

    RED = "red"
    GREEN = "green"
    ABSENT = "no such code"
    NOT_RUN = "not run"
    ERROR = "error"


# What a cell of the matrix says about the published tree. On a release that has upstream's fix, a red test is
# what that fix left open.
_EXPECTED = {
    CellState.PATCH: Outcome.RED,
    CellState.UPSTREAM: Outcome.GREEN,
    CellState.NOT_AFFECTED: Outcome.ABSENT,
}


@dataclass(frozen=True)
class Case:
    """One test: `passed`, `failed` or `skipped`, with the text of its failure or skip."""

    result: str
    text: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one fix on one tree, against the expected one.

    `signatures` maps each red test to the words of its signature as they were found; `detail` says what is
    wrong, or why nothing was run.
    """

    release: str
    fix: str
    tree: Tree
    expected: Outcome
    outcome: Outcome
    seconds: float
    is_reference: bool
    detail: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0

    @property
    def holds(self) -> bool:
        """Whether the matrix is right about this; a later release need not run in this environment."""
        return self.outcome is self.expected or (self.is_reference and self.outcome is Outcome.NOT_RUN)


@dataclass(frozen=True)
class _Cell:
    release: Release
    fix: Fix
    tree: Tree
    expected: Outcome
    is_reference: bool


def run(catalog: Catalog, fixes: Sequence[Fix], releases: Sequence[Release], trees: Path) -> list[Verdict]:
    """Run the regression tests of these fixes on both trees of these releases.

    Args:
        catalog: the tables of a clone, which has the tests beside them.
        trees: a directory for the unpacked releases, kept for the next run.

    Raises:
        PatchsetError: no clone, an interpreter without SGLang's dependencies, or a release cannot be got.
    """
    _check_interpreter()
    for fix in fixes:
        if not (catalog.root.parent / fix.test).is_file():
            raise PatchsetError(f"{fix.test}: not installed: run verify from a clone of sglang-patchset")
    shelf = Trees(catalog, trees)
    groups = []
    for release in releases:
        for tree in Tree:
            if cells := list(_cells(catalog, release, tree, fixes)):
                path = shelf.patched(release) if tree is Tree.PATCHED else shelf.published(release)
                groups.append((path, cells))
    # A tree is a process: importing SGLang takes longer than most tests.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda group: _verify(catalog.root.parent, *group), groups)
        return [verdict for verdicts in results for verdict in verdicts]


def _check_interpreter() -> None:
    missing = [name for name in ("pytest", "torch", "transformers") if util.find_spec(name) is None]
    if missing:
        raise PatchsetError(
            f"{sys.executable}: has no {' and no '.join(missing)}: run ./scripts/test.sh once, "
            "then .venv-test/bin/sglang-patchset verify"
        )


def _cells(catalog: Catalog, release: Release, tree: Tree, fixes: Iterable[Fix]) -> Iterator[_Cell]:
    is_reference = release.version in catalog.references
    for fix in fixes:
        cell = fix.cell(release.version)
        if cell is None:
            continue
        if tree is Tree.PUBLISHED:
            yield _Cell(release, fix, tree, _EXPECTED[cell.state], is_reference)
        elif cell.state is CellState.PATCH:
            yield _Cell(release, fix, tree, Outcome.GREEN, is_reference)


def _verify(root: Path, tree: Path, cells: Sequence[_Cell]) -> list[Verdict]:
    to_run = [cell for cell in cells if cell.expected is not Outcome.ABSENT]
    start = time.monotonic()
    cases, output = _run_tests(root, tree, [cell.fix.test for cell in to_run]) if to_run else ({}, "")
    seconds = (time.monotonic() - start) / max(len(to_run), 1)
    verdicts = []
    for cell in cells:
        if cell.expected is Outcome.ABSENT:
            verdicts.append(_absent(cell, tree))
        else:
            verdicts.append(_judge(cell, cases.get(cell.fix.test, {}), output, seconds))
    return verdicts


def _absent(cell: _Cell, tree: Path) -> Verdict:
    found = [path for path in cell.fix.code if (tree / path).exists()]
    outcome = Outcome.ERROR if found else Outcome.ABSENT
    detail = f"has {', '.join(found)}" if found else ""
    return _verdict(cell, outcome, 0, detail)


def _run_tests(root: Path, tree: Path, files: Sequence[str]) -> tuple[dict[str, dict[str, Case]], str]:
    """Each file's cases by `Class::test`, and the end of what pytest printed."""
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-W", "ignore"]
        command += ["--rootdir", str(root), "--import-mode", "importlib", "--override-ini", "addopts="]
        command += ["--override-ini", "junit_family=xunit1", f"--junitxml={report}", *files]
        try:
            process = subprocess.run(
                command,
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_TIMEOUT,
                check=False,
            )
            output = process.stdout
        except subprocess.TimeoutExpired as error:
            output = f"{(error.stdout or b'')!r}\nnot done within {_TIMEOUT} s"
        cases: dict[str, dict[str, Case]] = {}
        if report.exists():
            for file, name, case in _cases(report):
                known = cases.setdefault(file, {})
                known[name] = _worse(known[name], case) if name in known else case
    return cases, output


def _cases(report: Path) -> Iterator[tuple[str, str, Case]]:
    for element in ElementTree.parse(report).iter("testcase"):
        file = element.get("file", element.get("name", ""))
        # A class is a.b.file.Class; what stands for a whole file has none.
        owner = element.get("classname", "").rpartition(".")[2]
        name = f"{owner}::{element.get('name')}" if element.get("classname") else ""
        failures = [*element.findall("failure"), *element.findall("error")]
        if failures:
            text = "\n".join(f"{each.get('message', '')}\n{each.text or ''}" for each in failures)
            yield file, name, Case("failed", text)
        elif (skip := element.find("skipped")) is not None:
            # Where a whole file skips itself, the reason stands in the text alone.
            yield file, name, Case("skipped", f"{skip.get('message', '')} {skip.text or ''}".strip())
        else:
            yield file, name, Case("passed")


def _worse(one: Case, other: Case) -> Case:
    """Subtests have their test's name; one that fails is the test's failure."""
    if one.result == other.result == "failed":
        return Case("failed", f"{one.text}\n{other.text}")
    return next((case for case in (one, other) if case.result == "failed"), one)


def _judge(cell: _Cell, cases: Mapping[str, Case], output: str, seconds: float) -> Verdict:
    failed = {name: case.text for name, case in cases.items() if case.result == "failed"}
    skips = {case.text for case in cases.values() if case.result == "skipped"}
    passed = sum(case.result == "passed" for case in cases.values())
    counts = {"passed": passed, "skipped": sum(case.result == "skipped" for case in cases.values())}
    if not cases:
        last = output.strip().splitlines()[-1:] or ["pytest printed nothing"]
        return _verdict(cell, Outcome.ERROR, seconds, f"no test ran: {last[0]}")
    if "" in failed and cell.is_reference:
        # A later release may need later dependencies.
        return _verdict(cell, Outcome.NOT_RUN, seconds, _last_line(failed[""]), **counts)
    if not passed and not failed:
        return _verdict(cell, Outcome.NOT_RUN, seconds, "; ".join(sorted(skips)), **counts)
    reds = cell.fix.reds_of(cell.release.version)
    allowed = {} if cell.tree is Tree.PATCHED else reds
    signatures = {
        name: match.group(0).strip()
        for name, text in failed.items()
        if name in allowed and (match := re.search(allowed[name], text))
    }
    problems = [
        f"{name or 'the import'} fails{' without its signature' * (name in allowed)}: {_last_line(text)}"
        for name, text in failed.items()
        if name not in signatures
    ]
    problems += [f"{name} does not fail" for name in allowed if name not in failed]
    if cell.tree is Tree.PATCHED:
        problems += [
            f"{name} did not run" for name in reds if cases.get(name, Case("skipped")).result == "skipped"
        ]
    if cell.expected is Outcome.RED and not reds:
        problems.append("fixes.toml names no red test")
    outcome = Outcome.ERROR if problems else cell.expected
    return _verdict(cell, outcome, seconds, "; ".join(problems), signatures=signatures, **counts)


def _verdict(cell: _Cell, outcome: Outcome, seconds: float, detail: str, **found: object) -> Verdict:
    return Verdict(
        release=str(cell.release.version),
        fix=cell.fix.name,
        tree=cell.tree,
        expected=cell.expected,
        outcome=outcome,
        seconds=round(seconds, 1),
        is_reference=cell.is_reference,
        detail=detail,
        **found,  # type: ignore[arg-type]
    )


def _last_line(text: str) -> str:
    """The last exception's own line; SGLang's test case raises one more around each failure."""
    lines = [line.removeprefix("E").strip() for line in text.splitlines()]
    errors = [
        line
        for line in lines
        if re.match(r"[\w.]*(Error|Exception)\b", line) and "retry() exceed" not in line
    ]
    return (errors or [line for line in lines if line] or ["no message"])[-1][:300]
