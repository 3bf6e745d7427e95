"""The regression tests that need a GPU, on both trees of each release; what they find goes to `results/`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import cuda
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Outcome

pytestmark = pytest.mark.gpu

TABLES = catalog.load()
CACHE = Path(__file__).parents[2] / ".cache"
JOBS = {
    f"{job.release.version}-{Path(job.suite.test).stem}-{job.tree.value}": job for job in cuda.jobs(TABLES)
}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Mapping[tuple[str, str, str], Verdict]:
    """What every selected job came to; all of them run at once."""
    names = {item.callspec.params["name"] for item in request.session.items}
    chosen = [job for name, job in JOBS.items() if name in names]
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    lock = threading.Lock()

    def report(line: str) -> None:
        with lock, capture.global_and_fixture_disabled():
            terminal.write_line(line)

    try:
        box = cuda.machine()
    except PatchsetError as error:
        pytest.exit(str(error), returncode=2)
    report(f"\n{len(box.gpus)} x {box.gpu}, driver {box.driver}, {box.versions}")
    path, found = cuda.run(TABLES, chosen, box, CACHE, report)
    report(str(path))
    return {(each.release, each.test, each.tree.value): each for each in found}


@pytest.mark.parametrize("name", JOBS)
def test_cell(verdicts: Mapping[tuple[str, str, str], Verdict], name: str) -> None:
    job = JOBS[name]
    verdict = verdicts.get((str(job.release.version), job.suite.test, job.tree.value))
    if verdict is None:
        pytest.skip(f"not run: needs {job.suite.gpus} GPUs")
    if verdict.outcome is not job.expected:
        pytest.fail(verdict.detail, pytrace=False)
    assert bool(verdict.signatures) == (verdict.outcome is Outcome.RED)
