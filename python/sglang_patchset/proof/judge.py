"""What came of tests, against what had to come.

A red counts only with its signature: `expected.toml` says which tests fail on a published release, and with
what words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sglang_patchset.proof.plan import Job, Outcome, Tree
from sglang_patchset.proof.runner import Case


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


def judge(job: Job, cases: Mapping[str, Case], output: str) -> Verdict:
    """What cases say of a job; `output` is what pytest printed."""
    failed = {name: case.texts for name, case in cases.items() if case.result == "failed"}
    passed = [name for name, case in cases.items() if case.result == "passed"]
    if not cases:
        last = output.strip().splitlines()[-1:] or ["pytest printed nothing"]
        return _verdict(job, Outcome.ERROR, cases, f"no test ran: {last[0]}")
    if not passed and not failed:
        reasons = sorted({text for case in cases.values() for text in case.texts})
        return _verdict(job, Outcome.NOT_RUN, cases, f"every test skips: {'; '.join(reasons)}")
    reds = job.suite.reds_of(job.release.version)
    allowed = job.reds
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
    if job.tree is Tree.PATCHED:
        problems += [f"{name} did not run" for name in reds if name not in passed and name not in failed]
    if job.expected is Outcome.RED and not reds:
        problems.append("expected.toml names no red test")
    if job.expected is Outcome.GREEN and not passed:
        problems.append("no test passes")
    if problems:
        return _verdict(job, Outcome.ERROR, cases, "; ".join(problems), signatures)
    left_open = job.expected is Outcome.GREEN and signatures
    detail = f"left open: {', '.join(signatures)}" if left_open else ""
    return _verdict(job, job.expected, cases, detail, signatures)


def absent(job: Job, tree: Path) -> Verdict:
    """The verdict on a tree that lacks the code, or does not."""
    found = [path for path in job.fix.code if (tree / path).exists()]
    outcome = Outcome.ERROR if found else Outcome.ABSENT
    detail = f"has {', '.join(found)}" if found else ""
    return _verdict(job, outcome, {}, detail)


def not_run(job: Job) -> Verdict:
    """The verdict where something hinders."""
    return _verdict(job, Outcome.NOT_RUN, {}, job.hindrance)


def _verdict(
    job: Job,
    outcome: Outcome,
    cases: Mapping[str, Case],
    detail: str,
    signatures: Mapping[str, str] | None = None,
) -> Verdict:
    results = [case.result for case in cases.values()]
    return Verdict(
        release=str(job.release.version),
        fix=job.fix.name,
        test=job.suite.test,
        tree=job.tree,
        expected=job.expected,
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
