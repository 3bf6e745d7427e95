"""Red on the release as published, green on the patched tree: the regression tests planned, run and judged.

Each tree has a process of its own, with the same interpreter and test files; nothing but the Python path
differs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog, Fix, Release, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import judge, plan
from sglang_patchset.proof.expected import Expected
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Job, Outcome, Tree
from sglang_patchset.proof.results import Run
from sglang_patchset.proof.runner import ONE_THREAD, Runner
from sglang_patchset.proof.trees import Trees


def run(
    catalog: Catalog,
    suites: Sequence[Expected],
    releases: Sequence[Release],
    cache: Path,
    report: Callable[[str], None] = lambda _: None,
) -> list[Verdict]:
    """Run the regression tests of these fixes, those without a GPU, on both trees of these releases.

    What comes out is written to `cache/verify` as it comes; a run that was cut is gone on with.

    Args:
        catalog: the tables of a clone, which has the tests beside them.
        cache: a directory for the unpacked releases, kept for the next run, and for what comes out.
        report: is told in a line what has come out, as it does.

    Raises:
        PatchsetError: no clone, an interpreter without SGLang's dependencies, or a release cannot be got.
    """
    _check_interpreter()
    plan.check_tests(catalog, suites)
    trees = Trees(catalog, cache / "trees")
    versions = {name: metadata.version(name) for name in ("torch", "transformers") if util.find_spec(name)}
    record = Run.start(catalog, cache / "verify", "cpu", {"python": sys.version.split()[0], **versions})
    known = {
        (job.release.version, job.fix.name, job.tree): verdict
        for release in releases
        for tree in Tree
        for job in plan.jobs(release, tree, suites)
        if (verdict := judge.not_run(job) if job.hindrance else record.found(job))
    }

    def done(path: Path, jobs: Sequence[Job]) -> list[Verdict]:
        verdicts = [
            _checked(catalog, trees, path, job, verdict) for job, verdict in judged(runner, path, jobs)
        ]
        record.add(list(zip(jobs, verdicts, strict=True)))
        holding = sum(verdict.holds for verdict in verdicts)
        report(f"{jobs[0].release.version} {jobs[0].tree.value}: {holding} of {len(jobs)} as they should be")
        return verdicts

    groups = [
        (path, missing)
        for path, jobs in plan.grouped(suites, releases, trees)
        if (missing := [job for job in jobs if (job.release.version, job.fix.name, job.tree) not in known])
    ]
    with Runner(catalog.clone()) as runner, ThreadPoolExecutor(os.cpu_count()) as pool:
        # There are as many processes as cores.
        running = {pool.submit(done, path, jobs): jobs for path, jobs in groups}
        for future in completed(pool, runner, list(running)):
            for job, verdict in zip(running[future], future.result(), strict=True):
                known[job.release.version, job.fix.name, job.tree] = verdict
    record.finish()
    return [
        known[release.version, job.fix.name, tree]
        for release in releases
        for tree in Tree
        for job in plan.jobs(release, tree, suites)
    ]


def completed(
    pool: ThreadPoolExecutor, runner: Runner, futures: Sequence[Future[list[Verdict]]]
) -> Iterator[Future[list[Verdict]]]:
    """The futures as they are done; when one raises, or Ctrl-C does, nothing runs on."""
    try:
        for future in as_completed(futures):
            future.result()
            yield future
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.end()
        raise


def judged(runner: Runner, tree: Path, jobs: Sequence[Job]) -> Iterator[tuple[Job, Verdict]]:
    """Run the suites of these jobs on their tree, in one process, and judge each."""
    files = [job.suite.test for job in jobs if job.expected is not Outcome.ABSENT]
    log = f"{jobs[0].release.version}-{jobs[0].tree.value}"
    cases, output = runner.run(tree, files, log, ONE_THREAD) if files else ({}, "")
    for job in jobs:
        if job.expected is Outcome.ABSENT:
            yield job, judge.absent(job, tree)
        else:
            yield job, judge.judge(job, cases.get(job.suite.test, {}), output)


def _checked(catalog: Catalog, trees: Trees, tree: Path, job: Job, verdict: Verdict) -> Verdict:
    return _without_patch(catalog, job, _without_code(catalog, trees, tree, job, verdict))


def _without_code(catalog: Catalog, trees: Trees, tree: Path, job: Job, verdict: Verdict) -> Verdict:
    """The verdict, or what is wrong with `code`: where a path is mistyped, that it is absent says nothing."""
    fix = job.fix
    if job.expected is not Outcome.ABSENT:
        missing = [] if any((tree / path).exists() for path in fix.code) else list(fix.code)
        places = verdict.release
    else:
        having = [each for each in catalog.releases.values() if _has_code(fix, each)]
        missing = list(fix.code)
        for release in having:
            if missing:
                published = trees.published(release)
                missing = [path for path in missing if not (published / path).exists()]
        places = ", ".join(str(each.version) for each in having) or "any release that has the bug"
    if not missing and fix.code:
        return verdict
    paths = f"no {' and no '.join(missing)} in {places}" if missing else "no path"
    detail = f"{paths}: correct `code` in patches/fixes/{fix.name}.toml"
    return replace(verdict, outcome=Outcome.ERROR, detail=detail)


def _has_code(fix: Fix, release: Release) -> bool:
    cell = fix.cell(release.version)
    return cell is not None and cell.state is not State.NOT_AFFECTED


def _without_patch(catalog: Catalog, job: Job, verdict: Verdict) -> Verdict:
    """The verdict, which says first that a patch cannot be read."""
    series = patches.load(catalog, job.release)
    if job.tree is Tree.PUBLISHED or series.patch(job.fix.name):
        return verdict
    words = series.damaged[job.fix.name]
    return replace(verdict, outcome=Outcome.ERROR, detail="; ".join(filter(None, (words, verdict.detail))))


def _check_interpreter() -> None:
    missing = [name for name in ("pytest", "torch", "transformers") if util.find_spec(name) is None]
    if missing:
        raise PatchsetError(
            f"{sys.executable}: has no {' and no '.join(missing)}: run ./scripts/test.sh once, "
            "then .venv-test/bin/sglang-patchset verify"
        )
