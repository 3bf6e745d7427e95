"""Benchmarks as files, and the page of all results."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sglang_patchset import benchmarks, catalog, figures, report, results
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError

from .conftest import ROOT, Command

sys.path.insert(0, str(ROOT / "scripts"))
from gpu_bench.process import Worker, WorkerError

HEAD = {"complete": True, "cores": 16, "python": "3.12.3", "seconds": 240.0}
GPU = {"gpu": "NVIDIA H200", "driver": "580.1", "versions": {"python": "3.12.3", "torch": "2.11.0"}}
TIME = {"published": 0.002, "patched": 0.002002, "ratio": 1.001, "low": 0.998, "high": 1.002, "rounds": 24}
STEP = {"gpu": TIME, "wall": TIME}
COUNT = {"published": 9, "patched": 10, "more": {"fill<int>": 1}, "fewer": {}}
OVERHEAD = {
    "cases": [
        {
            "name": name,
            "same work": same,
            "batches": [
                {
                    "batch": 5,
                    "captured": 8,
                    "decode": STEP,
                    "prefill": STEP,
                    "replay": {"ran": COUNT, "launched": COUNT},
                }
            ],
        }
        for name, same in (("DeepSeek-V4", True), ("GLM, layers share", False))
    ],
    "buffers": [
        {
            "dp": 2,
            "chunk": 64,
            "running": 512,
            "layers": 3,
            "topk": 4,
            "published": 24576,
            "patched": 49152,
            "needed": 49152,
        }
    ],
}
GRAPH = {
    "without": 0.002,
    "with": 0.0012,
    "none": 0.001,
    "ratio": 0.6,
    "low": 0.59,
    "high": 0.61,
    "limit": 0.5,
}
GRAPH |= {"rounds": 15, "indexer share": 0.5, "indexer speedup": 5.0, "of the limit": 0.8}
REUSE = {
    "release": "0.5.12",
    "iterations": [
        {"steps": steps, "batch": batch, "context": context, "iteration": GRAPH, "graph": GRAPH}
        for steps in (3, 7)
        for batch in (1, 32)
        for context in (4096, 131072)
    ],
}


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


def add(clone: Catalog, what: str, contents: dict[str, Any], date: str = "2026-11-22T06:00:00+00:00") -> Path:
    path = clone.clone() / "results" / f"bench-{what}-{date[:10]}.json"
    path.write_text(json.dumps({**HEAD, "date": date, **contents}))
    return path


def test_page_without_benchmarks(clone: Catalog) -> None:
    page = Page(report.page(clone))
    assert page.headings == ["Fixes and releases", "Seen on GPUs"]
    assert page.fetched == []
    words = " ".join(page.words)
    for each in results.seen(clone):
        assert each.words in words
    for fix in clone.fixes.values():
        assert fix.symptom in words


def test_page_of_patches_that_nobody_saw(clone: Catalog) -> None:
    shutil.rmtree(clone.clone() / "results")
    page = Page(report.page(clone))
    assert page.headings == ["Fixes and releases"]
    assert "green" not in "".join(page.words).replace("green on the patched tree", "")


def test_page_with_every_benchmark(clone: Catalog) -> None:
    for path in (ROOT / "results").glob("bench-t*.json"):
        shutil.copy(path, clone.clone() / "results")
    add(clone, "overhead", OVERHEAD | GPU)
    add(clone, "mtp-reuse", REUSE | GPU)
    text = report.page(clone)
    page = Page(text)
    assert page.headings[2:] == [
        "Nothing on the hot path",
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
    # The one that changes the work is in the tables, not in the plot of those that should not.
    assert [name for name, _ in figures.steady(OVERHEAD)] == [
        "DeepSeek-V4, decode, 5 in 8",
        "DeepSeek-V4, prefill, 5 in 8",
    ]
    assert "GLM, layers share, 5 in 8 (other work)" in text


def test_report_writes_a_file(command: Command, tmp_path: Path) -> None:
    done = command("report", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}\n")
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_report_of_an_installed_package(tables: Catalog, tmp_path: Path) -> None:
    installed = dataclasses.replace(tables, root=tmp_path / "patches")
    with pytest.raises(PatchsetError, match="work in a clone"):
        report.page(installed)


def test_figures_are_of_the_newest_complete_run(clone: Catalog) -> None:
    root = clone.clone()
    assert figures.sentences(root) == []
    add(clone, "overhead", OVERHEAD | GPU, "2026-11-20T06:00:00+00:00")
    newest = add(clone, "overhead", OVERHEAD | GPU, "2026-11-21T06:00:00+00:00")
    add(clone, "overhead", {"complete": False}, "2026-11-22T06:00:00+00:00")
    (sentence,) = figures.sentences(root)
    assert "1.001 to 1.001" in sentence
    assert f"(results/{newest.name})" in sentence
    newest.write_text("[]")
    with pytest.raises(PatchsetError, match="not what a run writes"):
        figures.sentences(root)


def test_ratio_of_rounds_that_alternated() -> None:
    found = benchmarks.ratio([2, 4, 6, 8], [1, 2, 3, 8])
    assert found == {"ratio": 5 / 2.5, "low": 1.25, "high": 2.0, "rounds": 4}
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
