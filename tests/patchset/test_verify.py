"""What counts as a red, and as a green."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from sglang_patchset import catalog
from sglang_patchset.catalog import Catalog, Fix, State
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import expected, plan, verify
from sglang_patchset.proof.expected import Expected, Suite
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Outcome
from sglang_patchset.proof.runner import Runner

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


@dataclasses.dataclass(frozen=True)
class Bug:
    """A catalogue with one fix, and its tests."""

    tables: Catalog
    suite: Suite

    @property
    def root(self) -> Path:
        """The clone."""
        return self.tables.root.parent

    @property
    def trees(self) -> Path:
        return self.root.parent / "trees"

    def changed(self, fix: Mapping[str, Any] | None = None, **suite: Any) -> Bug:
        """With other values of the fix, or of its tests."""
        changed = dataclasses.replace(self.tables.fixes["bug"], **(fix or {}))
        tables = dataclasses.replace(self.tables, fixes={"bug": changed})
        return Bug(tables, dataclasses.replace(self.suite, **suite))

    def expected(self) -> Expected:
        return Expected(self.tables.fixes["bug"], self.suite)

    def verify(self, release: str = "0.5.12") -> list[Verdict]:
        """A run of its own each time."""
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        return verify.run(self.tables, [self.expected()], [self.tables.release(release)], self.root / "cache")


@pytest.fixture
def bug(tables: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bug:
    """A clone of a patch set with one fix for 0.5.12, whose trees are a single module each."""
    test = tmp_path / "clone" / "tests" / "regression" / "bug" / "test_bug.py"
    series = tmp_path / "clone" / "patches" / "0.5.12"
    for directory in (test.parent, series):
        directory.mkdir(parents=True)
    test.write_text(TESTS)
    (series / "bug.patch").write_text(
        "\ndiff --git a/python/sglang/bug.py b/python/sglang/bug.py\n"
        f"index {'0' * 40}..{'1' * 40} 100644\n"
        "--- a/python/sglang/bug.py\n+++ b/python/sglang/bug.py\n@@ -1 +1 @@\n-99\n+5\n"
    )
    version = Version("0.5.12")
    fix = Fix("bug", 1, "", "", ("sglang.py",), {}, patched=frozenset([version]))
    _tree(tmp_path / "trees" / "published", 99)
    _tree(tmp_path / "trees" / "patched", 5)
    monkeypatch.setattr(verify.Trees, "published", lambda *_: tmp_path / "trees" / "published")
    monkeypatch.setattr(verify.Trees, "patched", lambda *_: tmp_path / "trees" / "patched")
    monkeypatch.setattr(verify, "_check_interpreter", lambda: None)
    release = dataclasses.replace(tables.releases[version], fixes=("bug",))
    releases = {**tables.releases, version: release}
    made = dataclasses.replace(
        tables, root=tmp_path / "clone" / "patches", fixes={"bug": fix}, releases=releases
    )
    return Bug(made, Suite("tests/regression/bug/test_bug.py", {"==0.5.12": REDS}))


def _tree(directory: Path, value: int | str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sglang.py").write_text(f"value = {value}\n")


def _write_test(bug: Bug, source: str) -> None:
    (bug.root / bug.suite.test).write_text(source)


def test_red_and_green(bug: Bug) -> None:
    red, green = bug.verify()
    assert (red.outcome, red.detail) == (Outcome.RED, "")
    assert red.signatures == {
        "TestBug::test_bug": "value 99 is out of range",
        "TestBug::test_each": "subtest says so",
    }
    assert (green.outcome, green.detail, green.skipped) == (Outcome.GREEN, "", 1)
    assert red.holds
    assert green.holds


def test_red_without_its_signature(bug: Bug) -> None:
    reds = REDS | {"TestBug::test_bug": "illegal memory access"}
    red, _ = bug.changed(reds={"==0.5.12": reds}).verify()
    assert (red.outcome, red.holds) == (Outcome.ERROR, False)
    assert "TestBug::test_bug fails without its signature" in red.detail
    assert "value 99 is out of range" in red.detail


def test_failure_that_is_no_red(bug: Bug) -> None:
    red, _ = bug.changed(reds={"==0.5.12": {"TestBug::test_each": "subtest says so"}}).verify()
    assert red.outcome is Outcome.ERROR
    assert red.detail.startswith("TestBug::test_bug fails: ")


def test_bug_that_is_not_there(bug: Bug) -> None:
    _tree(bug.trees / "published", 6)
    red, _ = bug.verify()
    assert red.outcome is Outcome.ERROR
    assert red.detail == "TestBug::test_bug does not fail; TestBug::test_each does not fail"


def test_fix_that_does_not_work(bug: Bug) -> None:
    _tree(bug.trees / "patched", 99)
    _, green = bug.verify()
    assert (green.outcome, green.holds) == (Outcome.ERROR, False)
    assert "TestBug::test_bug fails: AssertionError: 99 not less than 10" in green.detail


def test_skipped_red_is_no_green(bug: Bug) -> None:
    _, green = bug.changed(reds={"==0.5.12": REDS | {"TestBug::test_optional": "any"}}).verify()
    assert (green.outcome, green.detail) == (Outcome.ERROR, "TestBug::test_optional did not run")


def test_words_of_the_source_are_no_signature(bug: Bug) -> None:
    _write_test(
        bug,
        "import unittest\n"
        "class TestBug(unittest.TestCase):\n"
        "    def test_bug(self):\n"
        "        self.assertTrue(open('/no/such/file'), 'value 99 is out of range')\n",
    )
    red, _ = bug.changed(reds={"==0.5.12": {"TestBug::test_bug": "value 99 is out of range"}}).verify()
    assert red.outcome is Outcome.ERROR
    assert "TestBug::test_bug fails without its signature: FileNotFoundError" in red.detail


def test_every_subtest_needs_the_signature(bug: Bug) -> None:
    _write_test(
        bug,
        "import unittest\n"
        "class TestBug(unittest.TestCase):\n"
        "    def test_bug(self):\n"
        "        for error in (ValueError('the bug'), ImportError('another')):\n"
        "            with self.subTest(error=error):\n"
        "                raise error\n",
    )
    red, _ = bug.changed(reds={"==0.5.12": {"TestBug::test_bug": "the bug"}}).verify()
    assert red.outcome is Outcome.ERROR


def test_what_upstream_left_open(bug: Bug) -> None:
    fixed = {"states": {"==0.5.12": State.IN_PART}, "patched": frozenset[Version]()}
    (verdict,) = bug.changed(fixed).verify()
    assert (verdict.outcome, verdict.holds) == (Outcome.GREEN, True)
    assert verdict.detail == "left open: TestBug::test_bug, TestBug::test_each"


def test_all_skipped_is_no_green(bug: Bug) -> None:
    _write_test(bug, "import unittest\nraise unittest.SkipTest('needs a GPU')\n")
    for verdict in bug.verify():
        assert (verdict.outcome, verdict.holds) == (Outcome.NOT_RUN, False)
        assert "needs a GPU" in verdict.detail


def test_import_error_is_no_red(bug: Bug) -> None:
    _tree(bug.trees / "published", "unknown")
    red, _ = bug.verify()
    assert red.outcome is Outcome.ERROR
    assert "the import fails: NameError: name 'unknown' is not defined" in red.detail


def _installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(plan.metadata, "version", versions.__getitem__)


def test_release_that_needs_its_own_packages(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others are installed, neither tree is run, and nothing passes for proved."""
    other = bug.changed(own_packages=("==0.5.12",))
    _tree(bug.trees / "published", "unknown")
    _installed(monkeypatch, torch="2.10.0+cpu", transformers="5.6.0")
    for verdict in other.verify():
        assert (verdict.outcome, verdict.holds, verdict.passed) == (Outcome.NOT_RUN, True, 0)
        assert verdict.detail == "on SGLang 0.5.12 this test needs torch 2.11.0: here is 2.10.0+cpu"
    # The same packages but for the build; then it is an error that the tree does not import.
    _installed(monkeypatch, torch="2.11.0+cpu", transformers="5.6.0")
    assert next((each.outcome, each.holds) for each in other.verify()) == (Outcome.ERROR, False)


def test_release_that_a_test_does_not_fit(bug: Bug) -> None:
    other = bug.changed(not_run={"<0.5.12": "older", "==0.5.12": "another class"})
    assert [(each.outcome, each.holds, each.detail) for each in other.verify()] == [
        (Outcome.NOT_RUN, True, "another class")
    ] * 2


def test_release_without_a_wheel_for_this_python(bug: Bug) -> None:
    version = Version("0.5.12")
    release = dataclasses.replace(bug.tables.releases[version], python=("3.99",))
    tables = dataclasses.replace(bug.tables, releases={**bug.tables.releases, version: release})
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert [(each.outcome, each.holds, each.detail) for each in Bug(tables, bug.suite).verify()] == [
        (Outcome.NOT_RUN, True, f"SGLang 0.5.12 has no wheel for Python {python}")
    ] * 2


def test_what_is_not_run_is_counted(bug: Bug, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    fix = bug.tables.fixes["bug"]
    fixes = {"bug": fix, "other": dataclasses.replace(fix, name="other")}
    (bug.root / "patches" / "0.5.12" / "other.patch").write_bytes(
        (bug.root / "patches" / "0.5.12" / "bug.patch").read_bytes()
    )
    release = dataclasses.replace(bug.tables.release("0.5.12"), fixes=("bug", "other"))
    releases = {**bug.tables.releases, release.version: release}
    tables = dataclasses.replace(bug.tables, fixes=fixes, releases=releases)
    monkeypatch.setattr(catalog, "load", lambda: tables)
    suites = {"bug": bug.suite, "other": dataclasses.replace(bug.suite, own_packages=("==0.5.12",))}
    monkeypatch.setattr(expected, "load", lambda _, fix: Expected(fix, suites[fix.name]))
    _installed(monkeypatch, torch="2.10.0", transformers="5.5.0")
    result = command("verify", "--release", "0.5.12")
    assert result.code == 0
    assert result.out.endswith("\n2 of 4 run, 2 as they should be\n")
    needed = "needs torch 2.11.0 and transformers 5.6.0: here is 2.10.0 and 5.5.0"
    assert result.out.count(needed) == 2
    # Where nothing can be run, nothing is proved.
    result = command("verify", "other", "--release", "0.5.12")
    assert (result.code, result.out.splitlines()[-1]) == (1, "0 of 2 run, 0 as they should be")


def test_a_run_that_was_cut_goes_on(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has seen is not run again; what is another by now is."""
    cache = bug.root / "cache"
    original = Runner.run

    def ran(limit: int) -> list[str]:
        names: list[str] = []

        def run(runner: Runner, tree: Path, *rest: Any) -> Any:
            names.append(tree.name)
            if len(names) > limit:
                raise KeyboardInterrupt
            return original(runner, tree, *rest)

        monkeypatch.setattr(Runner, "run", run)
        monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)
        with contextlib.suppress(KeyboardInterrupt):
            verify.run(bug.tables, [bug.expected()], [bug.tables.release("0.5.12")], cache)
        return names

    assert ran(limit=1) == ["published", "patched"]
    (file,) = (cache / "verify").iterdir()
    assert [each["tree"] for each in json.loads(file.read_text())["cells"]] == ["published"]
    assert ran(limit=9) == ["patched"]
    # After a whole one, all is run anew.
    assert ran(limit=1) == ["published", "patched"]
    _write_test(bug, TESTS + "\n# other words\n")
    assert ran(limit=9) == ["published", "patched"]


@pytest.fixture
def absent(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> Bug:
    """The bug came with 0.5.12, in a file that 0.5.11 lacks."""
    (bug.trees / "published" / "sglang_bug.py").touch()
    _tree(bug.trees / "0.5.11", 99)
    monkeypatch.setattr(
        verify.Trees,
        "published",
        lambda _, release: bug.trees / ("0.5.11" if str(release.version) == "0.5.11" else "published"),
    )
    return bug.changed({"states": {"==0.5.11": State.NOT_AFFECTED}, "code": ("sglang_bug.py",)})


def test_absent_code(absent: Bug) -> None:
    (verdict,) = absent.verify("0.5.11")
    assert (verdict.outcome, verdict.holds, verdict.detail) == (Outcome.ABSENT, True, "")
    (absent.trees / "0.5.11" / "sglang_bug.py").touch()
    (verdict,) = absent.verify("0.5.11")
    assert (verdict.outcome, verdict.detail) == (Outcome.ERROR, "has sglang_bug.py")


def test_mistyped_code_is_not_absent(absent: Bug) -> None:
    """Whatever the release, a path that none has would be missing from it."""
    mistyped = absent.changed({"code": ("python/sglang_bug.py",)})
    (verdict,) = mistyped.verify("0.5.11")
    assert (verdict.outcome, verdict.holds) == (Outcome.ERROR, False)
    words = "no python/sglang_bug.py in 0.5.12: correct `code` in patches/fixes/bug.toml"
    assert verdict.detail == words
    assert [(each.outcome, each.detail) for each in mistyped.verify()] == [(Outcome.ERROR, words)] * 2


def test_no_patch_yet(bug: Bug) -> None:
    """The red can be seen before there is a patch."""
    (red,) = bug.changed({"states": {"==0.5.12": State.VULNERABLE}, "patched": frozenset[Version]()}).verify()
    assert (red.outcome, red.holds, red.detail) == (Outcome.RED, True, "")


def test_a_patch_that_cannot_be_read(bug: Bug) -> None:
    (bug.root / "patches" / "0.5.12" / "bug.patch").write_text("nonsense")
    _, green = bug.verify()
    assert green.outcome is Outcome.ERROR
    assert "bug.patch: not a patch of files under python/sglang/" in green.detail


def test_no_such_test(bug: Bug) -> None:
    test = bug.root / bug.suite.test
    test.unlink()
    with pytest.raises(PatchsetError) as refusal:
        bug.verify()
    words = "no such file: write it, or correct `test` in expected.toml beside it"
    assert str(refusal.value) == f"{test}: {words}"
    shutil.rmtree(test.parents[1])
    with pytest.raises(PatchsetError, match="work in a clone of sglang-patchset"):
        bug.verify()


def test_what_is_ended_runs_no_further(bug: Bug, tmp_path: Path) -> None:
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
    arguments = (bug.trees / "published", [bug.suite.test], "log", {})
    with ThreadPoolExecutor() as pool:
        with Runner(bug.root) as runner:
            running = pool.submit(runner.run, *arguments)
            while not child.exists() or not child.read_text():
                assert not running.done()
        for each in (running, pool.submit(runner.run, *arguments)):
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
