"""The regression tests that need a GPU, on both trees of each release; what they find goes to `results/`."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import cuda, results
from sglang_patchset.proof.verify import Outcome, Tree, Verdict

pytestmark = pytest.mark.gpu

TABLES = catalog.load()
CACHE = Path(__file__).parents[2] / ".cache"
PAIRS = {f"{pair.release.version}-{Path(pair.suite.test).stem}": pair for pair in cuda.pairs(TABLES)}


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Mapping[tuple[str, str, Tree], Verdict]:
    """What every selected pair came to; all of them run at once."""
    names = {item.callspec.params["name"] for item in request.session.items}
    chosen = [pair for name, pair in PAIRS.items() if name in names]
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
    begin = time.monotonic()
    found = cuda.run(TABLES, chosen, box, CACHE, report)
    path = results.write(TABLES, box, chosen, found, time.monotonic() - begin)
    report(f"{path}: {time.monotonic() - begin:.0f} s")
    return {(each.release, each.test, each.tree): each for each in found}


@pytest.mark.parametrize("tree", list(Tree), ids=lambda tree: tree.value)
@pytest.mark.parametrize("name", PAIRS)
def test_cell(verdicts: Mapping[tuple[str, str, Tree], Verdict], name: str, tree: Tree) -> None:
    pair = PAIRS[name]
    verdict = verdicts.get((str(pair.release.version), pair.suite.test, tree))
    if verdict is None:
        pytest.skip(f"not run: needs {pair.suite.gpus} GPUs")
    if verdict.outcome is not verdict.expected:
        pytest.fail(verdict.detail, pytrace=False)
    assert bool(verdict.signatures) == (verdict.outcome is Outcome.RED)
