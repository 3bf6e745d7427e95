"""What counts as a red, and as a green."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.version import Version

from sglang_patchset import catalog
from sglang_patchset.catalog import Catalog, Cell, CellState, Fix, Suite
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import verify
from sglang_patchset.proof.verify import Outcome, Verdict

from .conftest import Command

TESTS = """
import unittest
import sglang

class TestBug(unittest.TestCase):
    def test_bug(self):
        self.assertLess(sglang.value, 10, f"value {sglang.value} is out of range")

    def test_each(self):
        for number in range(3):
            with self.subTest(number=number):
                self.assertNotEqual(sglang.value, 99 + number, "subtest says so")

    def test_guard(self):
        self.assertGreater(sglang.value, 0)

    @unittest.skipIf(sglang.value == 5, "no such thing here")
    def test_optional(self):
        pass
"""
REDS = {"TestBug::test_bug": r"value 99 is out of range", "TestBug::test_each": "subtest says so"}


@pytest.fixture
def bug(tables: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A clone of a patch set with one fix for 0.5.12, whose trees are a single module each."""
    test = tmp_path / "clone" / "tests" / "regression" / "test_bug.py"
    series = tmp_path / "clone" / "patches" / "0.5.12"
    for directory in (test.parent, series):
        directory.mkdir(parents=True)
    test.write_text(TESTS)
    (series / "series").write_text("0001-bug.patch\n")
    (series / "0001-bug.patch").write_text(
        "diff --git a/python/sglang/bug.py b/python/sglang/bug.py\n"
        f"index {'0' * 40}..{'1' * 40} 100644\n"
        "--- a/python/sglang/bug.py\n+++ b/python/sglang/bug.py\n@@ -1 +1 @@\n-99\n+5\n"
    )
    fix = Fix(
        name="bug",
        upstream_pr=1,
        title="",
        symptom="",
        code=("sglang.py",),
        cells={"==0.5.12": Cell(CellState.PATCH)},
        suite=Suite("tests/regression/test_bug.py", {"==0.5.12": REDS}),
    )
    _tree(tmp_path / "trees" / "published", 99)
    _tree(tmp_path / "trees" / "patched", 5)
    monkeypatch.setattr(verify.Trees, "published", lambda *_: tmp_path / "trees" / "published")
    monkeypatch.setattr(verify.Trees, "patched", lambda *_: tmp_path / "trees" / "patched")
    monkeypatch.setattr(verify, "_check_interpreter", lambda: None)
    return dataclasses.replace(tables, root=tmp_path / "clone" / "patches", fixes={"bug": fix})


def _tree(directory: Path, value: int | str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sglang.py").write_text(f"value = {value}\n")


def _write_test(tables: Catalog, source: str) -> None:
    (tables.root.parent / tables.fixes["bug"].suite.test).write_text(source)


def _verify(tables: Catalog) -> list[Verdict]:
    release = tables.releases[Version("0.5.12")]
    return verify.run(tables, list(tables.fixes.values()), [release], tables.root)


def _with(
    tables: Catalog,
    cells: Mapping[str, Cell] | None = None,
    reds: Mapping[str, Mapping[str, str]] | None = None,
    code: str = "sglang.py",
) -> Catalog:
    fix = tables.fixes["bug"]
    suite = fix.suite if reds is None else dataclasses.replace(fix.suite, reds=reds)
    fix = dataclasses.replace(fix, cells=cells or fix.cells, suite=suite, code=(code,))
    return dataclasses.replace(tables, fixes={"bug": fix})


def test_red_and_green(bug: Catalog) -> None:
    red, green = _verify(bug)
    assert (red.outcome, red.detail) == (Outcome.RED, "")
    assert red.signatures == {
        "TestBug::test_bug": "value 99 is out of range",
        "TestBug::test_each": "subtest says so",
    }
    assert (green.outcome, green.detail, green.skipped) == (Outcome.GREEN, "", 1)
    assert red.holds
    assert green.holds


def test_red_without_its_signature(bug: Catalog) -> None:
    reds = REDS | {"TestBug::test_bug": "illegal memory access"}
    red, _ = _verify(_with(bug, reds={"==0.5.12": reds}))
    assert (red.outcome, red.holds) == (Outcome.ERROR, False)
    assert "TestBug::test_bug fails without its signature" in red.detail
    assert "value 99 is out of range" in red.detail


def test_failure_that_is_no_red(bug: Catalog) -> None:
    red, _ = _verify(_with(bug, reds={"==0.5.12": {"TestBug::test_each": "subtest says so"}}))
    assert red.outcome is Outcome.ERROR
    assert red.detail.startswith("TestBug::test_bug fails: ")


def test_bug_that_is_not_there(bug: Catalog) -> None:
    _tree(bug.root.parents[1] / "trees" / "published", 6)
    red, _ = _verify(bug)
    assert red.outcome is Outcome.ERROR
    assert red.detail == "TestBug::test_bug does not fail; TestBug::test_each does not fail"


def test_fix_that_does_not_work(bug: Catalog) -> None:
    _tree(bug.root.parents[1] / "trees" / "patched", 99)
    _, green = _verify(bug)
    assert (green.outcome, green.holds) == (Outcome.ERROR, False)
    assert "TestBug::test_bug fails: AssertionError: 99 not less than 10" in green.detail


def test_skipped_red_is_no_green(bug: Catalog) -> None:
    _, green = _verify(_with(bug, reds={"==0.5.12": REDS | {"TestBug::test_optional": "any"}}))
    assert (green.outcome, green.detail) == (Outcome.ERROR, "TestBug::test_optional did not run")


def test_words_of_the_source_are_no_signature(bug: Catalog) -> None:
    _write_test(
        bug,
        "import unittest\n"
        "class TestBug(unittest.TestCase):\n"
        "    def test_bug(self):\n"
        "        self.assertTrue(open('/no/such/file'), 'value 99 is out of range')\n",
    )
    red, _ = _verify(_with(bug, reds={"==0.5.12": {"TestBug::test_bug": "value 99 is out of range"}}))
    assert red.outcome is Outcome.ERROR
    assert "TestBug::test_bug fails without its signature: FileNotFoundError" in red.detail


def test_every_subtest_needs_the_signature(bug: Catalog) -> None:
    _write_test(
        bug,
        "import unittest\n"
        "class TestBug(unittest.TestCase):\n"
        "    def test_bug(self):\n"
        "        for error in (ValueError('the bug'), ImportError('another')):\n"
        "            with self.subTest(error=error):\n"
        "                raise error\n",
    )
    red, _ = _verify(_with(bug, reds={"==0.5.12": {"TestBug::test_bug": "the bug"}}))
    assert red.outcome is Outcome.ERROR


def test_what_upstream_left_open(bug: Catalog) -> None:
    tables = _with(bug, cells={"==0.5.12": Cell(CellState.UPSTREAM)})
    (verdict,) = _verify(tables)
    assert (verdict.outcome, verdict.holds) == (Outcome.GREEN, True)
    assert verdict.detail == "left open: TestBug::test_bug, TestBug::test_each"


def test_all_skipped_is_no_green(bug: Catalog) -> None:
    _write_test(bug, "import unittest\nraise unittest.SkipTest('needs a GPU')\n")
    for verdict in _verify(bug):
        assert (verdict.outcome, verdict.holds) == (Outcome.NOT_RUN, False)
        assert "needs a GPU" in verdict.detail


def test_import_error_is_no_red(bug: Catalog) -> None:
    _tree(bug.root.parents[1] / "trees" / "published", "unknown")
    red, _ = _verify(bug)
    assert red.outcome is Outcome.ERROR
    assert "the import fails: NameError: name 'unknown' is not defined" in red.detail


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(verify.metadata, "version", versions.__getitem__)


def test_release_that_needs_its_own_packages(bug: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others are installed, neither tree is run, and nothing passes for proved."""
    fix = bug.fixes["bug"]
    suite = dataclasses.replace(fix.suite, own_packages=("==0.5.12",))
    tables = dataclasses.replace(bug, fixes={"bug": dataclasses.replace(fix, suite=suite)})
    _tree(bug.root.parents[1] / "trees" / "published", "unknown")
    _installed(monkeypatch, torch="2.10.0+cpu", transformers="5.6.0")
    for verdict in _verify(tables):
        assert (verdict.outcome, verdict.holds, verdict.passed) == (Outcome.NOT_RUN, True, 0)
        assert verdict.detail == "on SGLang 0.5.12 this test needs torch 2.11.0: here is 2.10.0+cpu"
    # The same packages but for the build; then it is an error that the tree does not import.
    _installed(monkeypatch, torch="2.11.0+cpu", transformers="5.6.0")
    assert next((each.outcome, each.holds) for each in _verify(tables)) == (Outcome.ERROR, False)


def test_release_that_a_test_does_not_fit(bug: Catalog) -> None:
    fix = bug.fixes["bug"]
    suite = dataclasses.replace(fix.suite, not_run={"<0.5.12": "older", "==0.5.12": "another class"})
    tables = dataclasses.replace(bug, fixes={"bug": dataclasses.replace(fix, suite=suite)})
    assert [(each.outcome, each.holds, each.detail) for each in _verify(tables)] == [
        (Outcome.NOT_RUN, True, "another class")
    ] * 2


def test_release_without_a_wheel_for_this_python(bug: Catalog) -> None:
    version = Version("0.5.12")
    release = dataclasses.replace(bug.releases[version], python=("3.99",))
    tables = dataclasses.replace(bug, releases={**bug.releases, version: release})
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert [(each.outcome, each.holds, each.detail) for each in _verify(tables)] == [
        (Outcome.NOT_RUN, True, f"SGLang 0.5.12 has no wheel for Python {python}")
    ] * 2


def test_what_is_not_run_is_counted(bug: Catalog, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = bug.fixes["bug"]
    other = dataclasses.replace(fix.suite, own_packages=("==0.5.12",))
    fixes = {"bug": fix, "other": dataclasses.replace(fix, name="other", suite=other)}
    monkeypatch.setattr(catalog, "load", lambda: dataclasses.replace(bug, fixes=fixes))
    _installed(monkeypatch, torch="2.10.0", transformers="5.5.0")
    result = command("verify", "--release", "0.5.12")
    assert result.code == 0
    assert result.out.endswith("\n2 of 4 run, 2 as they should be\n")
    needed = "needs torch 2.11.0 and transformers 5.6.0: here is 2.10.0 and 5.5.0"
    assert result.out.count(needed) == 2
    # Where nothing can be run, nothing is proved.
    result = command("verify", "other", "--release", "0.5.12")
    assert (result.code, result.out.splitlines()[-1]) == (1, "0 of 2 run, 0 as they should be")


@pytest.fixture
def absent(bug: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """The bug came with 0.5.12, in a file that 0.5.11 lacks."""
    trees = tmp_path / "trees"
    (trees / "published" / "sglang_bug.py").touch()
    _tree(trees / "0.5.11", 99)
    monkeypatch.setattr(
        verify.Trees,
        "published",
        lambda _, release: trees / ("0.5.11" if str(release.version) == "0.5.11" else "published"),
    )
    cells = {"==0.5.11": Cell(CellState.NOT_AFFECTED), "==0.5.12": Cell(CellState.PATCH)}
    return _with(bug, cells=cells, code="sglang_bug.py")


def _verify_the_older(tables: Catalog) -> Verdict:
    (verdict,) = verify.run(tables, [tables.fixes["bug"]], [tables.releases[Version("0.5.11")]], tables.root)
    return verdict


def test_absent_code(absent: Catalog, tmp_path: Path) -> None:
    verdict = _verify_the_older(absent)
    assert (verdict.outcome, verdict.holds, verdict.detail) == (Outcome.ABSENT, True, "")
    (tmp_path / "trees" / "0.5.11" / "sglang_bug.py").touch()
    verdict = _verify_the_older(absent)
    assert (verdict.outcome, verdict.detail) == (Outcome.ERROR, "has sglang_bug.py")


def test_mistyped_code_is_not_absent(absent: Catalog) -> None:
    """Whatever the release, a path that none has would be missing from it."""
    tables = _with(absent, code="python/sglang_bug.py")
    verdict = _verify_the_older(tables)
    assert (verdict.outcome, verdict.holds) == (Outcome.ERROR, False)
    words = "no python/sglang_bug.py in 0.5.12: correct `code` of bug in fixes.toml"
    assert verdict.detail == words
    assert [(each.outcome, each.detail) for each in _verify(tables)] == [(Outcome.ERROR, words)] * 2


def test_no_patch_yet(bug: Catalog) -> None:
    (bug.root / "0.5.12" / "series").write_text("")
    _tree(bug.root.parents[1] / "trees" / "patched", 99)
    red, green = _verify(bug)
    assert (red.outcome, red.detail) == (Outcome.RED, "")
    assert green.outcome is Outcome.ERROR
    assert green.detail.startswith("no patch of bug in patches/0.5.12/series; TestBug::test_bug fails: ")


def test_no_such_test(bug: Catalog) -> None:
    test = bug.root.parent / bug.fixes["bug"].suite.test
    test.unlink()
    with pytest.raises(PatchsetError) as refusal:
        _verify(bug)
    words = "no such file: write it, or correct `test` of bug in fixes.toml"
    assert str(refusal.value) == f"{test}: {words}"
    test.parent.rmdir()
    with pytest.raises(PatchsetError, match="work in a clone of sglang-patchset"):
        _verify(bug)


def test_what_is_ended_runs_no_further(bug: Catalog, tmp_path: Path) -> None:
    """Neither the test that runs, nor what it started, nor one that comes later."""
    child = tmp_path / "child"
    _write_test(
        bug,
        "import subprocess, sys, time, unittest\n"
        "class TestBug(unittest.TestCase):\n"
        "    def test_bug(self):\n"
        "        process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"        open({str(child)!r}, 'w').write(f'{{process.pid}}\\n')\n"
        "        time.sleep(600)\n",
    )
    fix = bug.fixes["bug"]
    release = bug.releases[Version("0.5.12")]
    cell = verify.Cell(release, fix, fix.suite, verify.Tree.PUBLISHED, Outcome.RED)
    with ThreadPoolExecutor() as pool:
        with verify.Runner(bug.root.parent) as runner:
            running = pool.submit(runner.verify, tmp_path / "trees" / "published", [cell])
            while not child.exists() or not child.read_text():
                assert not running.done()
        for each in (running, pool.submit(runner.verify, tmp_path / "trees" / "published", [cell])):
            with pytest.raises(CancelledError):
                each.result(timeout=30)
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_interpreter_without_torch(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.util, "find_spec", lambda name: None if name == "torch" else object())
    assert "has no torch: run ./scripts/test.sh once" in command("verify").refusal()


def test_the_tool_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, sglang_patchset.cli; sys.exit(bool({'torch', 'sglang'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
