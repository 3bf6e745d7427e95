"""The tests that need GPUs: what is chosen, how it is shared out, and what is written of it."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import cuda, pages, results
from sglang_patchset.proof.cuda import Machine
from sglang_patchset.proof.plan import Outcome, Tree
from sglang_patchset.proof.runner import Runner

from .conftest import ROOT

BOX = Machine("NVIDIA H200", ("0", "1"), 139 << 30, "580.1", {"torch": "2.11.0"})
VERSION = Version("0.5.12")
FIX = "dsa-index-sharing"
BASE = "hash-topk-dummy-weights"

TEST = """
import os, unittest
import sglang

class TestBug(unittest.TestCase):
    def test_bug(self):
        print(f"measured: {sglang.value} on {os.environ['CUDA_VISIBLE_DEVICES']}")
        self.assertLess(sglang.value, 10, f"value {sglang.value} is out of range")
"""


def test_every_patch_is_seen_on_a_gpu(tables: Catalog) -> None:
    """The cells that a GPU has to show; routed experts and EPLB take two, a pipeline of pairs four."""
    found = {(job.fix.name, str(job.release.version), job.suite.gpus) for job in cuda.jobs(tables)}
    assert found == {
        ("hash-topk-dummy-weights", "0.5.12", 1),
        *(
            (fix, release, gpus)
            for fix, gpus in (
                ("dsa-index-sharing", 1),
                ("dsa-pipeline-rows", 4),
                ("dsa-sharing-two-batch-overlap", 1),
                ("dsv4-expert-distribution", 1),
                ("eplb-double-mapping", 2),
                ("pipeline-allreduce-fusion", 4),
                ("routed-experts-capacity", 1),
            )
            for release in ("0.5.12", "0.5.12.post1")
        ),
        *(("routed-experts-dp-buffer", release, 2) for release in ("0.5.11", "0.5.12", "0.5.12.post1")),
        ("swa-graph-padding", "0.5.11", 1),
        *(
            (fix, release, gpus)
            for fix, gpus in (("dsa-pipeline-handoff", 2), ("mtp-index-reuse", 1))
            for release in ("0.5.12", "0.5.12.post1", "0.5.13")
        ),
    }


def test_suites_are_there_and_their_reds_are_in_them(tables: Catalog) -> None:
    for job in cuda.jobs(tables):
        source = (ROOT / job.suite.test).read_text()
        for name in job.suite.reds_of(job.release.version):
            owner, _, test = name.partition("::")
            assert f"class {owner}(" in source
            assert f"def {test}(" in source
        for name in job.suite.base_has:
            tables.fix(name)


EXPECTED = f"""
test = "test_mine.py"

[[cuda]]
test = "test_one.py"
gpus = 1

[cuda.reds."==0.5.12"]
"TestBug::test_bug" = 'value 9\\d is out of range'

[[cuda]]
test = "test_two.py"
gpus = 2
base-has = ["{BASE}"]

[cuda.reds."==0.5.12"]
"TestBug::test_bug" = 'value 9\\d is out of range'
"""
ONE, TWO = (f"tests/regression/{FIX}/test_{name}.py" for name in ("one", "two"))


@pytest.fixture
def clone(tables: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A clone with one suite for one GPU and one for two, whose trees are a single module each."""
    for fix, contents in ((FIX, EXPECTED), (BASE, 'test = "test_mine.py"\n')):
        tests = tmp_path / "clone" / "tests" / "regression" / fix
        tests.mkdir(parents=True)
        (tests / "expected.toml").write_text(contents)
    for test in (ONE, TWO):
        (tmp_path / "clone" / test).write_text(TEST)
    for name, value in (("published", 99), ("partly", 98), ("patched", 5)):
        tree = tmp_path / name
        tree.mkdir()
        (tree / "sglang.py").write_text(f"value = {value}\n")

    def partly(_: object, _release: object, base_has: tuple[str, ...], without: str) -> Path:
        assert (base_has, without) in (((), FIX), ((BASE,), FIX))
        return tmp_path / ("partly" if base_has else "published")

    def finish(run: results.Run, seconds: float = 0) -> None:
        original(run, 1.6 if seconds else 0)

    original = results.Run.finish
    monkeypatch.setattr(results.Run, "finish", finish)
    monkeypatch.setattr(cuda.Trees, "patched", lambda *_: tmp_path / "patched")
    monkeypatch.setattr(cuda.Trees, "partly", partly)
    root = tmp_path / "clone" / "patches"
    (root / "0.5.12").mkdir(parents=True)
    for file in (tables.root / "0.5.12").iterdir():
        (root / "0.5.12" / file.name).write_bytes(file.read_bytes())
    fixes = {
        name: dataclasses.replace(tables.fixes[name], patched=frozenset([VERSION])) for name in (FIX, BASE)
    }
    return dataclasses.replace(tables, root=root, releases={VERSION: tables.releases[VERSION]}, fixes=fixes)


def _run(tables: Catalog, box: Machine, *tests: str) -> tuple[list[str], Path]:
    jobs = [job for job in cuda.jobs(tables) if not tests or job.suite.test in tests]
    lines: list[str] = []
    path, verdicts = cuda.run(tables, jobs, box, tables.root.parent / ".cache", lines.append)
    assert len(verdicts) == len(lines)
    return lines, path


def _cells(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    found = {(cell["test"], cell["tree"]): cell for cell in cells}
    assert len(found) == len(cells)
    return found


def test_red_and_green_on_two_gpus(clone: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRESSION_SEED", "3")
    lines, path = _run(clone, BOX)
    assert len(lines) == 4
    assert path.name.startswith("gpu-2xH200-20")
    found = json.loads(path.read_text())
    assert {key: found[key] for key in found if key not in ("date", "cells")} == {
        "gpu": "NVIDIA H200",
        "gpus": 2,
        "driver": "580.1",
        "versions": {"torch": "2.11.0"},
        "seed": 3,
        "seconds": 2,
        "cold": False,
    }
    cells = _cells(path)
    assert len(cells) == 4
    base = patches.load(clone, clone.releases[VERSION]).patch(BASE)
    assert base
    for test, count, has, value, gpus in (
        (ONE, 1, {}, 99, {"0", "1"}),
        (TWO, 2, {BASE: base.digest}, 98, {"0,1", "1,0"}),
    ):
        published, patched = cells[test, "published"], cells[test, "patched"]
        assert (published["gpus"], patched["gpus"]) == (count, count)
        assert (published["rests on"]["base"], patched["rests on"]["base"]) == (has, {})
        assert (published["outcome"], patched["outcome"]) == ("red", "green")
        assert published["signatures"] == {"TestBug::test_bug": f"value {value} is out of range"}
        (measured,) = patched["measured"]["TestBug::test_bug"]
        assert measured.removeprefix("5 on ") in gpus
    logs = clone.root.parent / ".cache" / "gpu-logs"
    assert "value 98 is out of range" in (logs / "0.5.12-test_two-published.log").read_text()


def test_two_gpus_that_are_not_there(clone: Catalog) -> None:
    lines, path = _run(clone, dataclasses.replace(BOX, gpus=("0",)))
    assert len(lines) == 2
    cells = _cells(path)
    assert cells.keys() == {(ONE, "published"), (ONE, "patched")}
    assert cells[ONE, "patched"]["outcome"] == "green"
    assert "not run" not in results.table(clone)
    assert results.table(clone).count("\n") == 3


def test_a_run_that_was_cut_goes_on(clone: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has seen is not run again; of how long it takes, nothing is said then."""
    ran: list[str] = []
    original = Runner.run

    def run(runner: Runner, tree: Path, files: list[str], *rest: Any) -> Any:
        ran.extend(f"{Path(file).stem} {tree.name}" for file in files)
        if TWO in files:
            raise KeyboardInterrupt
        return original(runner, tree, files, *rest)

    monkeypatch.setattr(Runner, "run", run)
    with pytest.raises(KeyboardInterrupt):
        _run(clone, BOX, TWO)
    assert not (clone.clone() / "results").exists()
    _, cut = _run(clone, BOX, ONE)
    contents = json.loads(cut.read_text())
    del contents["seconds"]
    cut.write_text(json.dumps(contents))
    monkeypatch.setattr(Runner, "run", original)
    lines, path = _run(clone, dataclasses.replace(BOX, cold=True))
    assert path == cut
    assert len([line for line in lines if line.startswith("[before] 0.5.12 test_one ")]) == 2
    assert len([line for line in lines if re.match(r"\[ *[0-9]+ s\] 0\.5\.12 test_two ", line)]) == 2
    assert len(_cells(path)) == len(lines) == 4
    assert json.loads(path.read_text())["seconds"] == 0
    assert results.sentences(clone) == []
    assert [each.test for each in results.seen(clone)] == [ONE, TWO]


def test_table_is_of_the_patches_as_they_are(clone: Catalog) -> None:
    _, path = _run(clone, BOX)
    rows = results.table(clone).splitlines()[2:]
    assert [row.count("0.5.12") for row in rows] == [1, 1]
    assert "red: value 99 is out of range" in rows[0]
    assert "2 x NVIDIA H200" in rows[1]
    assert all(f"{row}\n" in pages.evidence(clone) for row in rows)
    assert results.gone(clone) == []
    old = json.loads(path.read_text())
    for cell in old["cells"]:
        changed = min(cell["rests on"]["files"])
        cell["rests on"]["files"][changed] = "0" * 40
    path.write_text(json.dumps(old))
    assert results.table(clone) == ""
    assert not any(row in pages.evidence(clone) for row in rows)
    assert f"\n- `{FIX}` on 0.5.12\n" in pages.evidence(clone)
    assert [(each.fix, each.release, each.on, each.why) for each in results.gone(clone)] == [
        (FIX, "0.5.12", "NVIDIA H200", [changed]),
        (FIX, "0.5.12", "2 x NVIDIA H200", [changed]),
    ]


def test_readme_keeps_what_is_around_the_matrix(clone: Catalog) -> None:
    readme = f"a\n{pages._BEGIN}old\n{pages._END}b\n"
    written = pages.readme(clone, readme)
    assert written.startswith(f"a\n{pages._BEGIN}")
    assert written.endswith(f"{pages._END}b\n")
    assert "old" not in written
    assert all(f"| `{name}` " in written for name in clone.fixes)
    assert pages.readme(clone, written) == written


def test_times_are_of_the_fullest_runs_cold_and_warm(clone: Catalog) -> None:
    _run(clone, dataclasses.replace(BOX, gpus=("0",)))
    _, path = _run(clone, BOX)
    warm = json.loads(path.read_text())
    fewer = [cell for cell in warm["cells"] if cell["test"] == ONE]
    runs = {
        "fewer-cells-later": warm | {"date": "2027-01-01", "seconds": 1, "cells": fewer},
        "cold": warm | {"date": "2026-01-01", "seconds": 400, "cold": True},
    }
    for name, contents in runs.items():
        path.with_name(f"gpu-{name}.json").write_text(json.dumps(contents))
    one, two, cold = results.sentences(clone)
    assert "1 x NVIDIA H200: both trees of 1 rows take 2 s, kernels compiled before." in one
    assert "2 x NVIDIA H200: both trees of 2 rows take 2 s, kernels compiled before." in two
    assert "2 x NVIDIA H200: both trees of 2 rows take 400 s, all kernels to compile. (2026-01-01)" in cold
    assert f"- {cold}\n" in pages.evidence(clone)


@pytest.mark.parametrize("cache", [".triton", ".cache/deep_gemm"])
def test_machine_with_and_without_compiled_kernels(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(cuda, "_DESCRIBE", 'print(\'{"gpus": [["H", 1]], "versions": {}}\')')
    assert cuda.machine().cold
    (tmp_path / cache).mkdir(parents=True)
    assert not cuda.machine().cold


def test_readme_has_the_table(tables: Catalog) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages._BEGIN in readme
    assert pages._END in readme.partition(pages._BEGIN)[2]
    assert readme == pages.readme(tables, readme), "run scripts/write_docs.py"


def test_evidence_has_the_table(tables: Catalog) -> None:
    evidence = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert evidence == pages.evidence(tables), "run scripts/write_docs.py"


def test_every_result_is_red_or_green_or_told(tables: Catalog) -> None:
    """What did not come out as it should is on the page of evidence, and in no row."""
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    told = {(fix, release, tree) for fix, release, tree, _ in results.failed(tables)}
    assert all(f"- `{fix}` on {release}, {tree}: " in page for fix, release, tree in told)
    assert {(each.published, each.patched) for each in results.seen(tables)} == {("red", "green")}
    for path in (ROOT / "results").glob("gpu-*.json"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert cell["outcome"] in ("red", "green", "error"), path


def test_slots_are_given_back_and_never_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.os, "cpu_count", lambda: 8)
    slots = cuda._Slots(BOX)
    used = dict.fromkeys(BOX.gpus, 0)
    most = dict(used)
    lock = threading.Lock()

    def take(number: int) -> None:
        with slots.taken(number) as gpus:
            assert len(set(gpus)) == number
            with lock:
                for gpu in gpus:
                    used[gpu] += 1
                    most[gpu] = max(most[gpu], used[gpu])
            threading.Event().wait(0.01)
            with lock:
                for gpu in gpus:
                    used[gpu] -= 1

    threads = [threading.Thread(target=take, args=(1 + n % 2,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert set(used.values()) == {0}
    assert max(most.values()) <= 2


def test_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_DESCRIBE", 'print(\'{"gpus": [], "versions": {}}\')')
    with pytest.raises(PatchsetError, match="no CUDA GPU: run this on a machine"):
        cuda.machine()
    monkeypatch.setattr(cuda, "_DESCRIBE", "import no_such_torch")
    with pytest.raises(PatchsetError, match=r"No module named 'no_such_torch': run \./scripts/gpu_test\.sh"):
        cuda.machine()


def test_jobs_are_of_patched_releases(tables: Catalog) -> None:
    jobs = cuda.jobs(tables)
    for job in jobs:
        cell = job.fix.cell(job.release.version)
        assert cell
        assert cell.patch
        assert cell.state in (State.VULNERABLE, State.IN_PART)
        assert patches.load(tables, job.release).patch(job.fix.name)
    for published, patched in zip(jobs[::2], jobs[1::2], strict=True):
        assert (published.tree, published.expected) == (Tree.PUBLISHED, Outcome.RED)
        assert patched == dataclasses.replace(published, tree=Tree.PATCHED, expected=Outcome.GREEN)
