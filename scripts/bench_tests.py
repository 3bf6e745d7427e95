#!/usr/bin/env python3
"""How long the regression tests without a GPU take, by cell and by test, one process at a time and two.

    PYTHONPATH=python .venv-test/bin/python scripts/bench_tests.py      # ten minutes on two cores

runs every cell of the matrix twice, and writes results/bench-tests-<date>.json.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sglang_patchset import catalog
from sglang_patchset.proof import benchmarks, expected, plan, verify
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Job
from sglang_patchset.proof.runner import Runner
from sglang_patchset.proof.trees import Trees

ROOT = Path(__file__).parents[1]
SLOWEST = 10


def measure(contents: dict[str, Any]) -> None:
    """Two at a time, as `verify` runs them on two cores, and one."""
    tables = catalog.load(ROOT / "patches")
    releases = list(tables.releases.values())
    trees = Trees(tables, ROOT / ".cache" / "trees")
    groups = plan.grouped(expected.load_all(tables), releases, trees)
    contents["runs"] = []
    for processes in (2, 1):
        print(f"{len(groups)} trees, {processes} at a time", flush=True)
        contents["runs"].append(run(groups, processes))


def run(groups: Sequence[tuple[Path, list[Job]]], processes: int) -> dict[str, Any]:
    """Every tree's process, so many at a time."""
    trees: list[dict[str, Any]] = []

    def timed(path: Path, jobs: list[Job]) -> list[Verdict]:
        begin = time.monotonic()
        verdicts = [verdict for _, verdict in verify.judged(runner, path, jobs)]
        seconds = time.monotonic() - begin
        tests = [(each.fix, name, took) for each in verdicts for name, took in each.durations.items()]
        release, tree = verdicts[0].release, verdicts[0].tree.value
        print(f"{release} {tree}: {seconds:.0f} s, tests {sum(took for *_, took in tests):.0f} s", flush=True)
        trees.append(
            {
                "release": release,
                "tree": tree,
                "seconds": seconds,
                "cells": {each.fix: each.seconds for each in verdicts},
                "tests": tests,
                "holds": all(each.holds for each in verdicts),
            }
        )
        return verdicts

    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with Runner(ROOT) as runner, ThreadPoolExecutor(processes) as pool:
        list(verify.completed(pool, runner, [pool.submit(timed, path, jobs) for path, jobs in groups]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tests = [(f"{each['release']} {each['tree']}", *test) for each in trees for test in each.pop("tests")]
    return {
        "processes": processes,
        "seconds": time.monotonic() - begin,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "tests": len(tests),
        "tests seconds": sum(test[-1] for test in tests),
        "trees": sorted(trees, key=lambda each: (each["release"], each["tree"])),
        "slowest": [
            {"on": on, "fix": fix, "test": name, "seconds": took}
            for on, fix, name, took in sorted(tests, key=lambda test: -test[-1])[:SLOWEST]
        ],
    }


def main() -> None:
    """Measure, and write what came out."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    benchmarks.recorded(ROOT, "tests", measure)


if __name__ == "__main__":
    main()
