"""What runs found: a file for each, written as it comes, and what all of them together say of the patches.

A run on GPUs writes `results/gpu-<GPU>-<date>.json`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from threading import Lock
from typing import Any

from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import evidence, expected
from sglang_patchset.proof.expected import Suite
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Job, Outcome, Tree
from sglang_patchset.proof.plots import number


class Run:
    """A run's file; `header` says on what machine, with which packages.

    Each cell is a suite on a tree, with what it rests on. A run that was cut has no `seconds`.
    """

    def __init__(self, catalog: Catalog, path: Path, contents: dict[str, Any]) -> None:
        self.path = path
        self._catalog = catalog
        self._contents = contents
        self._lock = Lock()

    @classmethod
    def start(cls, catalog: Catalog, directory: Path, name: str, header: Mapping[str, Any]) -> Run:
        """Begin a run, or go on with the one that was cut on this machine, with these packages."""
        for path in sorted(directory.glob(f"{name}-*.json"), reverse=True):
            contents = _read(path)
            # The cut run has compiled what this one need not.
            same = all(contents.get(key) == value for key, value in header.items() if key != "cold")
            if same and "seconds" not in contents:
                return cls(catalog, path, contents)
        now = datetime.now(timezone.utc).replace(microsecond=0)
        contents = {"date": now.isoformat(), **header, "cells": []}
        return cls(catalog, directory / f"{name}-{now:%Y-%m-%dT%H%M%SZ}.json", contents)

    def found(self, job: Job) -> Verdict | None:
        """What this run has found of a job already; None where that is nothing, or not what it should be."""
        for cell in self._contents["cells"]:
            if _whose(cell) == _whose(self._cell(job)) and cell["rests on"] == self._grounds(job):
                verdict = _verdict(job, cell)
                reds = {
                    name: re.search(words, verdict.signatures.get(name, ""))
                    for name, words in job.reds.items()
                }
                return verdict if verdict.holds and all(reds.values()) else None
        return None

    def add(self, found: Sequence[tuple[Job, Verdict]]) -> None:
        """Write what came of jobs."""
        with self._lock:
            for job, verdict in found:
                cell = {
                    **self._cell(job),
                    "gpus": job.suite.gpus,
                    "rests on": self._grounds(job),
                    **{key: getattr(verdict, key) for key in _OUTCOME},
                    "outcome": verdict.outcome.value,
                }
                others = [each for each in self._contents["cells"] if _whose(each) != _whose(cell)]
                self._contents["cells"] = [*others, cell]
            self._write()

    def finish(self, seconds: float = 0) -> None:
        """Say that nothing is missing."""
        with self._lock:
            self._contents["seconds"] = round(seconds)
            self._write()

    @staticmethod
    def _cell(job: Job) -> dict[str, str]:
        return {
            "release": str(job.release.version),
            "fix": job.fix.name,
            "test": job.suite.test,
            "tree": job.tree.value,
        }

    def _grounds(self, job: Job) -> evidence.Grounds:
        return evidence.grounds(self._catalog, job.release, job.fix, job.suite, job.tree)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self._contents, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)


# What a verdict says beyond whose it is.
_OUTCOME = ("outcome", "seconds", "detail", "signatures", "measured", "durations", "passed", "skipped")


def _whose(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(cell[key] for key in ("release", "fix", "test", "tree"))


def _verdict(job: Job, cell: Mapping[str, Any]) -> Verdict:
    values = {key: cell[key] for key in _OUTCOME} | {"outcome": Outcome(cell["outcome"])}
    whose = (str(job.release.version), job.fix.name, job.suite.test, job.tree)
    return Verdict(*whose, expected=job.expected, **values)


@dataclass(frozen=True)
class Seen:
    """What was seen of a fix on one release: on which GPUs, when, and what came out on its two trees.

    `words` is what the published release's reds said, `passed` how many tests the patched tree passes.
    """

    fix: str
    release: str
    test: str
    on: str
    date: str
    published: str
    words: str
    patched: str
    passed: int


@dataclass(frozen=True)
class Gone:
    """A row that was seen once, and what it rested on that is another by now."""

    fix: str
    release: str
    on: str
    date: str
    why: Sequence[str]


def seen(catalog: Catalog) -> list[Seen]:
    """The newest outcome of each suite on each kind of GPU, of the files as they are now.

    Raises:
        PatchsetError: a file in `results/` is not one that a run wrote.
    """
    found, _ = _rows(catalog)
    return found


def gone(catalog: Catalog) -> list[Gone]:
    """The rows that no longer hold, where none has taken their place; as `seen` otherwise."""
    _, lost = _rows(catalog)
    return lost


def failed(catalog: Catalog) -> list[tuple[str, str, str, str]]:
    """The newest outcome of each cell that is not what it should be: fix, release, tree, and what came."""
    suites = _suites(catalog)
    newest = {
        _whose(cell): cell
        for run in _files(catalog)
        for cell in run["cells"]
        if not _stale(catalog, suites, cell)
    }
    return [
        (fix, release, tree, cell["detail"])
        for (release, fix, _, tree), cell in sorted(newest.items())
        if cell["outcome"] == Outcome.ERROR.value
    ]


def runs(catalog: Catalog) -> list[Mapping[str, Any]]:
    """The newest run on each kind of machine that has a row; as `seen` otherwise."""
    rows = {(each.on.rpartition(" x ")[2], each.date) for each in seen(catalog)}
    newest: dict[str, Mapping[str, Any]] = {}
    for run in _files(catalog):
        if (run["gpu"], run["date"]) in rows:
            newest[f"{run['gpus']} {run['gpu']}"] = run
    return [newest[machine] for machine in sorted(newest)]


def sentences(catalog: Catalog) -> list[str]:
    """How long the newest run of the most tests took on each kind of machine, cold and warm, in Markdown.

    Of a run in which something is another by now, or that was cut and gone on with, nothing is said.
    """
    fullest: dict[tuple[int, str, bool], tuple[int, str, int]] = {}
    suites = _suites(catalog)
    for run in _files(catalog):
        if (
            not run.get("seconds")
            or "cold" not in run
            or any(_stale(catalog, suites, cell) for cell in run["cells"])
        ):
            continue
        key = (run["gpus"], run["gpu"], run["cold"])
        row = (len(run["cells"]) // 2, run["date"], run["seconds"])
        fullest[key] = max(fullest.get(key, (0, "", 0)), row)
    found = []
    for gpus, gpu, cold in sorted(fullest):
        rows, date, seconds = fullest[gpus, gpu, cold]
        found.append(
            f"**The tests that need GPUs**, {gpus} x {gpu}: both trees of {rows} rows take {seconds} s, "
            f"{'all kernels to compile' if cold else 'kernels compiled before'}. ({date[:10]})"
        )
    return found


def table(catalog: Catalog) -> str:
    """What was seen, as a Markdown table."""
    rows = [
        [
            f"`{each.fix}`",
            each.release,
            f"{each.published}: {each.words}".replace("|", "\\|"),
            f"{each.patched} ({each.passed} tests)" if each.passed > 1 else each.patched,
            f"{each.on}, {each.date[:10]}",
        ]
        for each in seen(catalog)
    ]
    return markdown_table(["fix", "release", "as published", "patched", "seen on"], rows) if rows else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(catalog: Catalog) -> tuple[list[Seen], list[Gone]]:
    """Every suite's newest red and green on one kind of GPU, and those that rest on something else by now."""
    suites = _suites(catalog)
    holding: dict[tuple[str, str, str], dict[str, tuple[str, Mapping[str, Any]]]] = {}
    lost: dict[tuple[str, str, str], Gone] = {}
    for run in _files(catalog):
        for cell in run["cells"]:
            on = (f"{cell['gpus']} x " if cell["gpus"] > 1 else "") + run["gpu"]
            key = (cell["release"], cell["test"], on)
            if why := _stale(catalog, suites, cell):
                lost[key] = Gone(cell["fix"], cell["release"], on, run["date"], why)
            elif cell["outcome"] != Outcome.NOT_RUN.value:
                holding.setdefault(key, {})[cell["tree"]] = (run["date"], cell)
    rows = []
    for (release, test, on), trees in holding.items():
        outcomes = {tree: cell["outcome"] for tree, (_, cell) in trees.items()}
        if outcomes == {Tree.PUBLISHED.value: Outcome.RED.value, Tree.PATCHED.value: Outcome.GREEN.value}:
            (_, published), (date, patched) = trees[Tree.PUBLISHED.value], trees[Tree.PATCHED.value]
            rows.append(
                Seen(
                    fix=patched["fix"],
                    release=release,
                    test=test,
                    on=on,
                    date=date,
                    published=published["outcome"],
                    words=" ".join(_words(published).split()),
                    patched=patched["outcome"],
                    passed=patched["passed"],
                )
            )
    order = [(test, str(version)) for test in suites for version in catalog.releases]
    rows.sort(key=lambda each: (order.index((each.test, each.release)), each.on))
    there = {(each.release, each.test, each.on) for each in rows}
    return rows, [each for key, each in sorted(lost.items()) if key not in there]


def _suites(catalog: Catalog) -> Mapping[str, Suite]:
    return {suite.test: suite for each in expected.load_all(catalog) for suite in each.cuda}


def _stale(catalog: Catalog, suites: Mapping[str, Suite], cell: Mapping[str, Any]) -> list[str]:
    """What a cell rests on that is another by now; empty where it holds."""
    fix, suite = catalog.fixes.get(cell["fix"]), suites.get(cell["test"])
    release = next((each for each in catalog.releases.values() if str(each.version) == cell["release"]), None)
    if fix is None or suite is None or release is None or release.version not in fix.patched:
        return [f"{cell['fix']} of {cell['release']}"]
    now = evidence.grounds(catalog, release, fix, suite, Tree(cell["tree"]))
    return evidence.differences(cell["rests on"], now)


def _files(catalog: Catalog) -> Iterator[Mapping[str, Any]]:
    """Every run on GPUs, the oldest first."""
    found = [_read(path) for path in (catalog.clone() / "results").glob("gpu-*.json")]
    yield from sorted(found, key=lambda run: str(run["date"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for cell in run["cells"]:
            _whose(cell), cell["rests on"], *(cell[key] for key in _OUTCOME)
        run["date"]
    except (ValueError, TypeError, LookupError, AttributeError):
        raise PatchsetError(f"{path}: not what a run writes: remove it and run again") from None
    return run


def _words(cell: Mapping[str, Any]) -> str:
    """What a reader wants of it: of a long fraction, three digits."""
    words = "; ".join(dict.fromkeys(cell["signatures"].values())) or str(cell["detail"])
    return re.sub(r"\d+\.\d{4,}", lambda fraction: number(float(fraction[0])), words)
