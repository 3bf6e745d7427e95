"""The tests that need GPUs: what is chosen, how it is shared out, and what is written of it."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog, CellState, Suite
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import cuda, results
from sglang_patchset.proof.cuda import Machine, Pair
from sglang_patchset.proof.verify import Outcome, Tree

from .conftest import ROOT

BOX = Machine("NVIDIA H200", ("0", "1"), 139 << 30, "580.1", {"torch": "2.11.0"})
VERSION = Version("0.5.12")
FIX = "swa-graph-padding"

TEST = """
import os, unittest
import sglang

class TestBug(unittest.TestCase):
    def test_bug(self):
        print(f"measured: {sglang.value} on {os.environ['CUDA_VISIBLE_DEVICES']}")
        self.assertLess(sglang.value, 10, f"value {sglang.value} is out of range")
"""


def test_every_patch_is_seen_on_a_gpu(tables: Catalog) -> None:
    """The cells of the matrix that a GPU has to show; routed experts and EPLB take two."""
    found = {(pair.fix.name, str(pair.release.version), pair.suite.gpus) for pair in cuda.pairs(tables)}
    assert found == {
        ("hash-topk-dummy-weights", "0.5.12", 1),
        *(
            (fix, release, 1)
            for fix in ("dsa-index-sharing", "dsa-sharing-two-batch-overlap")
            for release in ("0.5.12", "0.5.12.post1")
        ),
        *(
            ("dsv4-expert-distribution", release, gpus)
            for release in ("0.5.12", "0.5.12.post1")
            for gpus in (1, 2)
        ),
        *(("routed-experts-dp-buffer", release, 2) for release in ("0.5.11", "0.5.12", "0.5.12.post1")),
        ("swa-graph-padding", "0.5.11", 1),
        *(("dsa-pipeline-handoff", release, 2) for release in ("0.5.12", "0.5.12.post1", "0.5.13")),
        ("mtp-index-reuse", "0.5.13", 1),
        *(("routed-experts-capacity", release, 1) for release in ("0.5.12", "0.5.12.post1")),
    }


def test_suites_are_there_and_their_reds_are_in_them(tables: Catalog) -> None:
    for pair in cuda.pairs(tables):
        source = (ROOT / pair.suite.test).read_text()
        for name in pair.suite.reds_of(pair.release.version):
            owner, _, test = name.partition("::")
            assert f"class {owner}(" in source
            assert f"def {test}(" in source
        for name in pair.suite.behind:
            tables.fix(name)


@pytest.fixture
def clone(tables: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A clone with one suite for one GPU and one for two, whose trees are a single module each."""
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / "clone" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "clone" / name).write_text(TEST)
    for name, value in (("published", 99), ("partly", 98), ("patched", 5)):
        tree = tmp_path / name
        tree.mkdir()
        (tree / "sglang.py").write_text(f"value = {value}\n")
    monkeypatch.setattr(cuda.Trees, "patched", lambda *_: tmp_path / "patched")
    monkeypatch.setattr(
        cuda.Trees, "partly", lambda *args: tmp_path / ("partly" if args[-1] else "published")
    )
    reds = {"==0.5.12": {"TestBug::test_bug": r"value 9\d is out of range"}}
    fix = dataclasses.replace(
        tables.fixes["dsa-index-sharing"],
        cuda=(Suite("test_one.py", reds, 1), Suite("test_two.py", reds, 2, ("hash-topk-dummy-weights",))),
    )
    release = tables.releases[VERSION]
    root = tmp_path / "clone" / "patches"
    (root / "0.5.12").mkdir(parents=True)
    for file in (tables.root / "0.5.12").iterdir():
        (root / "0.5.12" / file.name).write_bytes(file.read_bytes())
    return dataclasses.replace(tables, root=root, releases={VERSION: release}, fixes={fix.name: fix})


def _run(tables: Catalog, box: Machine) -> tuple[list[str], Path]:
    pairs = cuda.pairs(tables)
    lines: list[str] = []
    verdicts = cuda.run(tables, pairs, box, tables.root.parent / ".cache", lines.append)
    return lines, results.write(tables, box, pairs, verdicts, 1.6)


def test_red_and_green_on_two_gpus(clone: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRESSION_SEED", "3")
    lines, path = _run(clone, BOX)
    assert len(lines) == 4
    assert path.name.startswith("gpu-2xH200-20")
    found = json.loads(path.read_text())
    assert {key: found[key] for key in found if key not in ("date", "series", "cells")} == {
        "gpu": "NVIDIA H200",
        "gpus": 2,
        "driver": "580.1",
        "versions": {"torch": "2.11.0"},
        "seed": 3,
        "seconds": 2,
        "cold": False,
    }
    one, two = found["cells"]
    assert (one["test"], one["gpus"], one["behind"]) == ("test_one.py", 1, [])
    assert (two["test"], two["gpus"], two["behind"]) == ("test_two.py", 2, ["hash-topk-dummy-weights"])
    for cell, value, gpus in ((one, 99, {"0", "1"}), (two, 98, {"0,1", "1,0"})):
        published, patched = cell["published"], cell["patched"]
        assert (published["outcome"], patched["outcome"]) == ("red", "green")
        assert published["signatures"] == {"TestBug::test_bug": f"value {value} is out of range"}
        (measured,) = patched["measured"]["TestBug::test_bug"]
        assert measured.removeprefix("5 on ") in gpus
    logs = clone.root.parent / ".cache" / "gpu-logs"
    assert "value 98 is out of range" in (logs / "0.5.12-test_two-published.log").read_text()


def test_two_gpus_that_are_not_there(clone: Catalog) -> None:
    lines, path = _run(clone, dataclasses.replace(BOX, gpus=("0",)))
    assert len(lines) == 2
    one, two = json.loads(path.read_text())["cells"]
    assert one["patched"]["outcome"] == "green"
    assert two["published"]["outcome"] == two["patched"]["outcome"] == "not run"
    assert "not run" not in results.table(clone)
    assert results.table(clone).count("\n") == 3


def test_table_is_of_the_patches_as_they_are(clone: Catalog) -> None:
    _, path = _run(clone, BOX)
    rows = results.table(clone).splitlines()[2:]
    assert [row.count("0.5.12") for row in rows] == [1, 1]
    assert "red: value 99 is out of range" in rows[0]
    assert "2 x NVIDIA H200" in rows[1]
    readme = f"a\n{results._BEGIN}old\n{results._END}b\n"
    written = results.in_readme(clone, readme)
    assert written.startswith("a\n")
    assert written.endswith("b\n")
    assert "old" not in written
    assert results.in_readme(clone, written) == written
    old = json.loads(path.read_text())
    old["series"]["0.5.12"] = "0" * 64
    path.write_text(json.dumps(old))
    assert results.table(clone) == ""
    assert results.in_readme(clone, written) == readme.replace("old\n", "")


def test_times_are_of_the_fullest_runs_cold_and_warm(clone: Catalog) -> None:
    _run(clone, dataclasses.replace(BOX, gpus=("0",)))
    _, path = _run(clone, BOX)
    warm = json.loads(path.read_text())
    runs = {
        "fewer-cells-later": warm | {"date": "2027-01-01", "seconds": 1, "cells": warm["cells"][:1]},
        "cold": warm | {"date": "2026-01-01", "seconds": 400, "cold": True},
    }
    for name, contents in runs.items():
        path.with_name(f"gpu-{name}.json").write_text(json.dumps(contents))
    one, two, cold = results.sentences(clone)
    assert "1 x NVIDIA H200: both trees of 1 rows take 2 s, kernels compiled before." in one
    assert "2 x NVIDIA H200: both trees of 2 rows take 2 s, kernels compiled before." in two
    assert "2 x NVIDIA H200: both trees of 2 rows take 400 s, all kernels to compile. (2026-01-01)" in cold
    assert "- " + cold in results.in_readme(clone, f"{results._FIGURES}{results._END}")


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
    assert readme == results.in_readme(tables, readme), "run scripts/results_table.py"


def test_every_result_is_of_a_red_and_a_green() -> None:
    for path in (ROOT / "results").glob("gpu-*.json"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            outcomes = (cell["published"]["outcome"], cell["patched"]["outcome"])
            assert outcomes in ((Outcome.RED.value, Outcome.GREEN.value), ("not run", "not run")), path


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


def test_pairs_are_patched_releases(tables: Catalog) -> None:
    for pair in cuda.pairs(tables):
        assert isinstance(pair, Pair)
        cell = pair.fix.cell(pair.release.version)
        assert cell
        assert cell.state is CellState.PATCH
        assert pair.fix.name in {patch.fix for patch in patches.load(tables, pair.release).patches}
        assert [each.tree for each in pair.cells()] == [Tree.PUBLISHED, Tree.PATCHED]
