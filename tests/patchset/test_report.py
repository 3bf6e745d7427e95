"""Benchmarks as files, and the page of all results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sglang_patchset import catalog
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import benchmarks, cuda, figures, report, results
from sglang_patchset.proof.cuda import Machine

from .conftest import ROOT, Command, digest, from_copy
from .test_evidence import verdict

sys.path.insert(0, str(ROOT / "scripts"))
from gpu_bench.process import Worker, WorkerError

BOX = Machine("NVIDIA H200", ("0",), 139 << 30, "580.1", {"python": "3.12.3", "torch": "2.11.0"})
DATE = "2026-11-22T06:00:00+00:00"


class Fake:
    """A worker that answers at once; patched, a step takes a thousandth longer and one fill more."""

    def __init__(self, script: str, tree: Path, *_: object) -> None:
        assert (ROOT / "scripts" / "gpu_bench" / script).is_file()
        self._patched = tree.name == "patched"
        self._asked: list[tuple[str, dict[str, Any]]] = []

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._asked == []

    def end(self) -> None:
        self._asked.clear()

    def tell(self, what: str, **arguments: Any) -> None:
        self._asked.append((what, json.loads(json.dumps(arguments))))

    def answer(self) -> Any:
        what, arguments = self._asked.pop(0)
        return getattr(self, what)(**arguments)

    def ask(self, what: str, **arguments: Any) -> Any:
        self.tell(what, **arguments)
        return self.answer()

    def load(self, **arguments: Any) -> dict[str, Any]:
        return {"graphs": [8]} if "model" in arguments else {"capture seconds": 1.5}

    def steps(self, batch: int, prompt: int, decodes: int, profiled: bool = False) -> dict[str, Any]:
        assert min(batch, prompt, decodes) > 0
        if profiled:
            return {"ran": {"gemm": 4, "fill<int>": self._patched}, "launched": {"cudaGraphLaunch": 1}}
        times = {"wall": 0.002, "gpu": 0.001 + 0.000001 * self._patched}
        return {"prefill": times, "decode": times}

    def routed_experts(self, dp: int, chunk: int, running: int, layers: int, topk: int) -> int:
        return max(chunk * dp, running * (dp if self._patched else 1)) * layers * topk * 4

    def iterate(self, steps: int, batch: int, context: int) -> dict[str, dict[str, list[float]]]:
        indexer = batch * context * 1e-10
        runs = {"without": steps - 1, "with": 1, "none": 0}
        times = {variant: [0.001 + indexer * runs[variant]] * 3 for variant in runs}
        return {variant: {"iteration": each, "graph": each} for variant, each in times.items()}


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What bench_overhead.py makes of such workers."""
    return measured("bench_overhead", monkeypatch)


@pytest.fixture
def reuse(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What bench_mtp_reuse.py makes of such a worker."""
    return measured("bench_mtp_reuse", monkeypatch)


def measured(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    measured_into(contents, name, monkeypatch)
    return contents


def measured_into(contents: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script(name)
    monkeypatch.setattr(module, "Worker", Fake)
    monkeypatch.setattr(module.cuda, "machine", lambda: BOX)
    monkeypatch.setattr(module.Trees, "partly", lambda *_: Path("published"))
    monkeypatch.setattr(module.Trees, "patched", lambda *_: Path("patched"))
    module.measure(contents)


class Page(HTMLParser):
    """Sees that every element is closed, and collects what a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "onload", "onclick")]
        self.fetched += [tag] * (tag in ("script", "link", "img", "iframe"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture
def clone(tmp_path: Path) -> Catalog:
    """A clone with the results of GPU tests that this one has, and no benchmark."""
    for name in ("patches", "tests/regression", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (tmp_path / "results").glob("bench-*.json"):
        path.unlink()
    return catalog.load(tmp_path / "patches")


def add(clone: Catalog, what: str, contents: dict[str, Any], date: str = DATE) -> Path:
    """A result of that day."""
    path = benchmarks.write(clone.clone(), what, {"complete": True, "seconds": 240.0, **contents})
    dated = path.with_name(f"bench-{what}-{date[:10]}.json")
    dated.write_text(json.dumps(json.loads(path.read_text()) | {"date": date}))
    path.unlink()
    return dated


def test_page_without_benchmarks(clone: Catalog) -> None:
    page = Page(report.page(clone))
    assert page.headings == ["Fixes and releases", "Seen on GPUs"]
    assert page.fetched == []
    words = " ".join(page.words)
    for each in results.seen(clone):
        assert each.words in words
    for fix in clone.fixes.values():
        assert fix.symptom in words
        assert all(cell.note in words for cell in map(fix.cell, clone.releases) if cell)
        assert all(cell.left in words for cell in map(fix.cell, clone.releases) if cell)


def test_page_of_a_run_that_was_cut(clone: Catalog) -> None:
    """What it found is there; how long it took, nobody knows, nor of one that was gone on with."""
    for path in (clone.clone() / "results").glob("gpu-*.json"):
        path.unlink()
    job, other = cuda.jobs(clone)[:2]
    run = results.Run.start(clone, clone.clone() / "results", f"gpu-{BOX.name}", BOX.header())
    run.add([(job, verdict(job)), (other, verdict(other))])
    (row,) = results.seen(clone)
    assert (row.fix, row.words, row.patched) == (job.fix.name, "the words", "green")
    for _ in range(2):
        page = Page(report.page(clone))
        assert page.headings == ["Fixes and releases", "Seen on GPUs"]
        words = " ".join(page.words)
        assert "driver 580.1" in words
        assert "the run took" not in words
        run.finish(0)


def test_page_of_patches_that_nobody_saw(clone: Catalog) -> None:
    shutil.rmtree(clone.clone() / "results")
    page = Page(report.page(clone))
    assert page.headings == ["Fixes and releases"]
    assert "green" not in "".join(page.words).replace("green on the patched tree", "")


def test_page_with_every_benchmark(clone: Catalog, overhead: dict[str, Any], reuse: dict[str, Any]) -> None:
    for path in (ROOT / "results").glob("bench-t*.json"):
        shutil.copy(path, clone.clone() / "results")
    add(clone, "overhead", overhead)
    add(clone, "mtp-reuse", reuse)
    text = report.page(clone)
    page = Page(text)
    assert page.headings[2:] == [
        "What a step costs",
        "What draft steps gain by reuse",
        "The tool",
        "The tests",
    ]
    assert page.fetched == []
    assert text.count("<svg") >= 8
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "fill&lt;int&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    # The case that changes the work is in the tables, not in the plot of those that should not.
    assert "GLM, layers share, 5 in 8 (other work)" in text
    assert "GLM, layers share, decode" not in text


def test_overhead_compares_the_two_trees(overhead: dict[str, Any]) -> None:
    assert overhead["gpu"] == BOX.gpu
    assert {name.partition(",")[0] for name, _ in figures.steady(overhead)} == {
        "DeepSeek-V4",
        "gpt-oss",
        "GLM",
    }
    for case in overhead["cases"]:
        for batch in case["batches"]:
            assert batch["decode"]["gpu"]["ratio"] == pytest.approx(1.001)
            assert batch["decode"]["gpu"]["noise"]["ratio"] == 1
            assert batch["decode"]["wall"]["ratio"] == 1
            assert batch["replay"]["ran"]["more"] == {"fill<int>": 1}
            assert batch["replay"]["launched"]["more"] == {}
            assert batch["captured"] >= batch["batch"]
    grown = [each["patched"] / each["published"] for each in overhead["buffers"]]
    assert grown == [2, 2, 1]
    assert all(each["patched"] == each["needed"] for each in overhead["buffers"])


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Fake, model: str, **_arguments: Any) -> dict[str, Any]:
        if model == "gpt_oss":
            raise WorkerError("no memory")
        return {"graphs": [8]}

    monkeypatch.setattr(Fake, "load", load)
    contents: dict[str, Any] = {}
    with pytest.raises(SystemExit, match="did not run: gpt-oss"):
        measured_into(contents, "bench_overhead", monkeypatch)
    assert contents["failed"] == {"gpt-oss": "no memory"}
    assert len(contents["cases"]) == 3
    assert len(contents["buffers"]) == 3


def test_reuse_is_judged_by_what_the_indexer_takes(reuse: dict[str, Any]) -> None:
    assert len(reuse["iterations"]) == 36
    for each in reuse["iterations"]:
        graph = each["graph"]
        assert graph["indexer speedup"] == pytest.approx(each["steps"] - 1)
        assert graph["of the limit"] == pytest.approx(1 - 1 / (each["steps"] - 1))
        assert graph["limit"] < graph["ratio"] < 1


def test_report_writes_a_file(command: Command, tmp_path: Path) -> None:
    done = command("report", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}\n")
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_report_of_an_installed_package(tables: Catalog, tmp_path: Path) -> None:
    installed = dataclasses.replace(tables, root=tmp_path / "patches")
    with pytest.raises(PatchsetError, match="work in a clone"):
        report.page(installed)


def test_figures_are_of_the_newest_complete_run(clone: Catalog, overhead: dict[str, Any]) -> None:
    root = clone.clone()
    assert figures.sentences(root) == []
    add(clone, "overhead", overhead, "2026-11-20T06:00:00+00:00")
    newest = add(clone, "overhead", overhead, "2026-11-21T06:00:00+00:00")
    add(clone, "overhead", {"complete": False}, "2026-11-22T06:00:00+00:00")
    (sentence,) = figures.sentences(root)
    assert "1.001 to 1.001" in sentence
    assert f"(results/{newest.name})" in sentence
    newest.write_text("[]")
    with pytest.raises(PatchsetError, match="not what a run writes"):
        figures.sentences(root)


def test_ratio_of_rounds_that_alternated() -> None:
    found = benchmarks.ratio([2, 4, 6, 8], [1, 2, 3, 8])
    assert found == {"ratio": 2.0, "low": 1.25, "high": 2.0, "rounds": 4}
    assert benchmarks.ratio([3], [2]) == {"ratio": 1.5, "low": 1.5, "high": 1.5, "rounds": 1}


def test_usage_counts_what_a_command_starts(tmp_path: Path) -> None:
    burn = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    usage = benchmarks.run([sys.executable, "-c", nested], cwd=tmp_path)
    assert usage.cpu >= 0.2
    assert usage.wall >= 0.2


def test_an_interrupted_run_leaves_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(contents: dict[str, Any]) -> None:
        contents["first"] = 1 / 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmarks.recorded(tmp_path, "tool", measure)
    (path,) = (tmp_path / "results").iterdir()
    found = json.loads(path.read_text())
    assert (found["first"], found["complete"]) == (0.333333, False)
    assert capsys.readouterr().out.endswith(", not complete\n")
    assert benchmarks.newest(tmp_path, "tool") is None


def test_worker_answers_fails_and_ends(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "sglang.py").write_text("value = 5\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts' / 'gpu_bench')!r})\n"
        "import process, sglang\n"
        "def add(number):\n"
        "    print('noise on stdout', flush=True)\n"
        "    return sglang.value + number\n"
        "process.serve({'add': add, 'exit': lambda: os._exit(3)})\n"
    )
    with Worker(str(script), tree, tmp_path / "logs" / "log", {}) as worker:
        assert worker.ask("add", number=2) == 7
        with pytest.raises(WorkerError, match=r"failed: Traceback(.|\n)*TypeError"):
            worker.ask("add", number="two")
        assert worker.ask("add", number=3) == 8
        with pytest.raises(WorkerError, match=r"the worker ended\n(.|\n)*noise on stdout"):
            worker.ask("exit")


def test_made_up_release_is_one_that_the_tool_patches(tmp_path: Path) -> None:
    """What bench_tool.py measures growth on: our tree and the one of `git apply` become the same."""
    module = script("bench_tool")
    project = module.made_up(tmp_path, 3, 12)
    assert from_copy(project, "status", tmp_path / "mine").code == 1
    assert from_copy(project, "apply", tmp_path / "mine").code == 0
    module.bare(sorted((project / "patches" / module.VERSION).glob("*.patch")), tmp_path / "theirs")
    mine, theirs = (digest(tmp_path / each / "sglang" / "srt") for each in ("mine", "theirs"))
    assert mine == theirs
    assert len([path for path in mine if path.endswith(".py")]) == 12
    assert from_copy(project, "revert", tmp_path / "mine").code == 0
