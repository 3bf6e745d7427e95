"""Red on the release as published, green on the patched tree: the regression tests run, and judged.

A red counts only with its signature: `fixes.toml` says which tests fail on a published release, and with
what words. Each tree has a process of its own, with the same interpreter and test files; nothing but the
Python path differs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib import metadata, util
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog, CellState, Fix, Release, Suite
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof.trees import Trees

# What a tree's tests may take, in seconds; a hang is a failure too.
_TIMEOUT = 1800

# Of every process that imports SGLang: it asks no hub, and keeps its bytecode, which container images turn
# off. To compile that takes longer than most of the tests.
IMPORTING = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# How a line begins in which a test says what it measured.
_MEASURED = "measured: "


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
    CellState.UNPATCHED: Outcome.RED,
    CellState.UPSTREAM: Outcome.GREEN,
    CellState.NOT_AFFECTED: Outcome.ABSENT,
}


@dataclass(frozen=True)
class Case:
    """One test: `passed`, `failed` or `skipped`.

    `texts` has each failure's words, or the reason to skip; `measured` the figures that the test printed.
    """

    result: str
    seconds: float
    texts: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of one suite on one tree, against the expected one.

    `seconds` is what its tests took, importing SGLang aside. `signatures` maps each red test to the words of
    its signature as they were found, `measured` each test to the figures that it printed, and `durations` to
    its seconds; `detail` says what is wrong, or why nothing was run.
    """

    release: str
    fix: str
    test: str
    tree: Tree
    expected: Outcome
    outcome: Outcome
    seconds: float
    detail: str = ""
    signatures: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Sequence[str]] = field(default_factory=dict)
    durations: Mapping[str, float] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against the matrix here; where this could not be run, nothing does."""
        return self.outcome is self.expected


@dataclass(frozen=True)
class Cell:
    """What one suite has to say about one tree of one release; `hindrance` is why it cannot be run here."""

    release: Release
    fix: Fix
    suite: Suite
    tree: Tree
    expected: Outcome
    hindrance: str = ""


def run(catalog: Catalog, fixes: Sequence[Fix], releases: Sequence[Release], trees: Path) -> list[Verdict]:
    """Run the regression tests of these fixes, those without a GPU, on both trees of these releases.

    Args:
        catalog: the tables of a clone, which has the tests beside them.
        trees: a directory for the unpacked releases, kept for the next run.

    Raises:
        PatchsetError: no clone, an interpreter without SGLang's dependencies, or a release cannot be got.
    """
    _check_interpreter()
    clone = catalog.clone()
    for fix in fixes:
        if not (clone / fix.suite.test).is_file():
            raise PatchsetError(
                f"{clone / fix.suite.test}: no such file: write it, "
                f"or correct `test` of {fix.name} in fixes.toml"
            )
    shelf = Trees(catalog, trees)
    groups = grouped(fixes, releases, shelf)
    with Runner(clone) as runner, ThreadPoolExecutor(os.cpu_count()) as pool:
        # There are as many processes as cores.
        results = [pool.submit(runner.verify, path, cells, ONE_THREAD) for path, cells in groups]
        verdicts = runner.wait(pool, results)
    whose = [(path, cell) for path, cells in groups for cell in cells]
    judged = iter(
        _without_patch(catalog, cell, _without_code(catalog, shelf, path, cell, verdict))
        for (path, cell), verdict in zip(whose, verdicts, strict=True)
    )
    return [
        _verdict(cell, Outcome.NOT_RUN, {}, cell.hindrance) if cell.hindrance else next(judged)
        for release in releases
        for tree in Tree
        for cell in _cells(release, tree, fixes)
    ]


def grouped(fixes: Sequence[Fix], releases: Sequence[Release], shelf: Trees) -> list[tuple[Path, list[Cell]]]:
    """Each tree, with the cells that one process runs on it: importing SGLang takes longer than most tests.

    Raises:
        PatchsetError: a release cannot be got.
    """
    groups = []
    for release in releases:
        for tree in Tree:
            if cells := [cell for cell in _cells(release, tree, fixes) if not cell.hindrance]:
                path = shelf.patched(release) if tree is Tree.PATCHED else shelf.published(release)
                groups.append((path, cells))
    return groups


def _without_code(catalog: Catalog, shelf: Trees, tree: Path, cell: Cell, verdict: Verdict) -> Verdict:
    """The verdict, or what is wrong with `code`: where a path is mistyped, that it is absent says nothing."""
    fix = cell.fix
    if cell.expected is not Outcome.ABSENT:
        missing = [] if any((tree / path).exists() for path in fix.code) else list(fix.code)
        places = verdict.release
    else:
        having = [each for each in catalog.releases.values() if _has_code(fix, each)]
        missing = list(fix.code)
        for release in having:
            if missing:
                published = shelf.published(release)
                missing = [path for path in missing if not (published / path).exists()]
        places = ", ".join(str(each.version) for each in having) or "any release that has the bug"
    if not missing and fix.code:
        return verdict
    paths = f"no {' and no '.join(missing)} in {places}" if missing else "no path"
    return replace(
        verdict, outcome=Outcome.ERROR, detail=f"{paths}: correct `code` of {fix.name} in fixes.toml"
    )


def _has_code(fix: Fix, release: Release) -> bool:
    cell = fix.cell(release.version)
    return cell is not None and cell.state is not CellState.NOT_AFFECTED


def _without_patch(catalog: Catalog, cell: Cell, verdict: Verdict) -> Verdict:
    """The verdict, which says first that there is no patch yet."""
    if cell.tree is Tree.PUBLISHED or patches.load(catalog, cell.release).patch(cell.fix.name):
        return verdict
    words = f"no patch of {verdict.fix} in patches/{verdict.release}/series"
    return replace(verdict, outcome=Outcome.ERROR, detail="; ".join(filter(None, (words, verdict.detail))))


def _check_interpreter() -> None:
    missing = [name for name in ("pytest", "torch", "transformers") if util.find_spec(name) is None]
    if missing:
        raise PatchsetError(
            f"{sys.executable}: has no {' and no '.join(missing)}: run ./scripts/test.sh once, "
            "then .venv-test/bin/sglang-patchset verify"
        )


def _cells(release: Release, tree: Tree, fixes: Iterable[Fix]) -> Iterator[Cell]:
    for fix in fixes:
        cell = fix.cell(release.version)
        if cell is None or (tree is Tree.PATCHED and cell.state is not CellState.PATCH):
            continue
        expected = Outcome.GREEN if tree is Tree.PATCHED else _EXPECTED[cell.state]
        hindrance = _hindrance(release, fix.suite)
        yield Cell(release, fix, fix.suite, tree, Outcome.NOT_RUN if hindrance else expected, hindrance)


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


class Runner:
    """Runs tests of the clone at `root`, each call in a process of its own, which ends with this."""

    def __init__(self, root: Path, logs: Path | None = None) -> None:
        self._root = root
        self._logs = logs
        self._processes: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for process in self._processes:
                if process.poll() is None:
                    _kill(process)

    def wait(self, pool: ThreadPoolExecutor, results: Sequence[Future[list[Verdict]]]) -> list[Verdict]:
        """The verdicts of what was submitted; when one raises, or Ctrl-C does, nothing runs on."""
        try:
            return [verdict for result in results for verdict in result.result()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.__exit__()
            raise

    def verify(
        self, tree: Path, cells: Sequence[Cell], environment: Mapping[str, str] | None = None
    ) -> list[Verdict]:
        """Run the suites of these cells on a tree, which stands on the Python path, and judge them."""
        to_run = [cell.suite.test for cell in cells if cell.expected is not Outcome.ABSENT]
        cases: dict[str, dict[str, Case]] = {}
        output = ""
        if to_run:
            cases, output = self._run_tests(tree, to_run, environment or {})
            if self._logs:
                self._logs.mkdir(parents=True, exist_ok=True)
                name = f"{cells[0].release.version}-{Path(to_run[0]).stem}-{cells[0].tree.value}.log"
                (self._logs / name).write_text(output, encoding="utf-8")
        return [
            _absent(cell, tree)
            if cell.expected is Outcome.ABSENT
            else _judge(cell, cases.get(cell.suite.test, {}), output)
            for cell in cells
        ]

    def _run_tests(
        self, tree: Path, files: Sequence[str], extra: Mapping[str, str]
    ) -> tuple[dict[str, dict[str, Case]], str]:
        """Each file's cases by `Class::test`, and what pytest printed."""
        with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
            report = Path(scratch, "report.xml")
            command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-W", "ignore"]
            command += ["--rootdir", str(self._root), "--import-mode", "importlib"]
            for override in ("addopts=", "junit_family=xunit1", "junit_logging=system-out"):
                command += ["--override-ini", override]
            if not self._logs:
                # Nobody reads the source around a failure: to find it takes pytest longer than the tests.
                command.append("--tb=line")
            command += [f"--junitxml={report}", *files]
            environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
            process = self._start(command, {**environment, "PYTHONPATH": str(tree), **extra})
            try:
                output, _ = process.communicate(timeout=_TIMEOUT)
            except subprocess.TimeoutExpired:
                _kill(process)
                output = process.communicate()[0] + f"\nnot done within {_TIMEOUT} s"
            else:
                _kill(process)
            if self._ended:
                raise CancelledError
            cases: dict[str, dict[str, Case]] = {}
            if report.exists():
                for file, name, case in _cases(report):
                    known = cases.setdefault(file, {})
                    known[name] = _worse(known[name], case) if name in known else case
        return cases, output

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise CancelledError
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env={**environment, **IMPORTING},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # What it starts ends with it.
                start_new_session=True,
            )
            self._processes.append(process)
        return process


def _absent(cell: Cell, tree: Path) -> Verdict:
    found = [path for path in cell.fix.code if (tree / path).exists()]
    outcome = Outcome.ERROR if found else Outcome.ABSENT
    detail = f"has {', '.join(found)}" if found else ""
    return _verdict(cell, outcome, {}, detail)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _cases(report: Path) -> Iterator[tuple[str, str, Case]]:
    for element in ElementTree.parse(report).iter("testcase"):
        file = element.get("file", element.get("name", ""))
        # A class is a.b.file.Class; what stands for a whole file has none.
        owner = element.get("classname", "").rpartition(".")[2]
        name = f"{owner}::{element.get('name')}" if element.get("classname") else ""
        seconds = float(element.get("time", 0))
        printed = element.findtext("system-out", "").splitlines()
        measured = tuple(line.removeprefix(_MEASURED) for line in printed if line.startswith(_MEASURED))
        failures = [*element.findall("failure"), *element.findall("error")]
        if failures:
            texts = tuple(_words(each.text or "") for each in failures)
            yield file, name, Case("failed", seconds, texts, measured)
        elif (skip := element.find("skipped")) is not None:
            # Where a whole file skips itself, the reason stands in the text alone.
            yield file, name, Case("skipped", seconds, (f"{skip.get('message', '')} {skip.text or ''}",))
        else:
            yield file, name, Case("passed", seconds, (), measured)


def _words(text: str) -> str:
    """What was raised, without the source around it: that may have a message in it that nobody raised."""
    words: list[str] = []
    inside = False
    for line in text.splitlines():
        # Where pytest shows no source, it marks a message's first line alone and indents the others.
        inside = line.startswith("E ") or (inside and line.startswith("    "))
        if inside:
            words.append(line[1:].strip())
    return "\n".join(words)


def _worse(one: Case, other: Case) -> Case:
    """Subtests have their test's name; one that fails is the test's failure, and each has to be judged."""
    seconds = one.seconds + other.seconds
    measured = tuple(dict.fromkeys((*one.measured, *other.measured)))
    failed = [case for case in (one, other) if case.result == "failed"]
    if failed:
        return Case("failed", seconds, tuple(text for case in failed for text in case.texts), measured)
    return replace(one, seconds=seconds, measured=measured)


def _judge(cell: Cell, cases: Mapping[str, Case], output: str) -> Verdict:
    failed = {name: case.texts for name, case in cases.items() if case.result == "failed"}
    passed = [name for name, case in cases.items() if case.result == "passed"]
    if not cases:
        last = output.strip().splitlines()[-1:] or ["pytest printed nothing"]
        return _verdict(cell, Outcome.ERROR, cases, f"no test ran: {last[0]}")
    if not passed and not failed:
        reasons = sorted({text for case in cases.values() for text in case.texts})
        return _verdict(cell, Outcome.NOT_RUN, cases, f"every test skips: {'; '.join(reasons)}")
    reds = cell.suite.reds_of(cell.release.version)
    allowed = {} if cell.tree is Tree.PATCHED else reds
    signatures = {}
    for name, texts in failed.items():
        matches = [re.search(allowed[name], text) for text in texts] if name in allowed else [None]
        if matches[0] and all(matches):
            signatures[name] = matches[0].group(0)
    problems = [
        f"{name or 'the import'} fails{' without its signature' * (name in allowed)}: {_last_line(texts[-1])}"
        for name, texts in failed.items()
        if name not in signatures
    ]
    problems += [f"{name} does not fail" for name in allowed if name not in failed]
    if cell.tree is Tree.PATCHED:
        problems += [f"{name} did not run" for name in reds if name not in passed and name not in failed]
    if cell.expected is Outcome.RED and not reds:
        problems.append("fixes.toml names no red test")
    if cell.expected is Outcome.GREEN and not passed:
        problems.append("no test passes")
    if problems:
        return _verdict(cell, Outcome.ERROR, cases, "; ".join(problems), signatures)
    left_open = cell.expected is Outcome.GREEN and signatures
    detail = f"left open: {', '.join(signatures)}" if left_open else ""
    return _verdict(cell, cell.expected, cases, detail, signatures)


def _verdict(
    cell: Cell,
    outcome: Outcome,
    cases: Mapping[str, Case],
    detail: str,
    signatures: Mapping[str, str] | None = None,
) -> Verdict:
    results = [case.result for case in cases.values()]
    return Verdict(
        release=str(cell.release.version),
        fix=cell.fix.name,
        test=cell.suite.test,
        tree=cell.tree,
        expected=cell.expected,
        outcome=outcome,
        seconds=round(sum(case.seconds for case in cases.values()), 1),
        detail=detail,
        signatures=signatures or {},
        measured={name: case.measured for name, case in cases.items() if case.measured},
        durations={name: case.seconds for name, case in cases.items()},
        passed=results.count("passed"),
        skipped=results.count("skipped"),
    )


def _last_line(words: str) -> str:
    """The last exception's own line; SGLang's test case raises one more around each failure."""
    errors = [
        line
        for line in words.splitlines()
        if re.match(r"[\w.]*(Error|Exception)\b", line) and "retry() exceed" not in line
    ]
    return (errors or words.splitlines() or ["no message"])[-1][:300]
