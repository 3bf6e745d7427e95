"""A fix goes upstream as one commit, with its test where upstream keeps such tests, and a text."""

from __future__ import annotations

import json
import runpy
import subprocess
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.version import Version

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog
from sglang_patchset.proof import evidence, expected, results
from sglang_patchset.proof.plan import Tree

from .conftest import HERE, ROOT, Command, change, copy, edit, from_copy, git

HASH, DSA, DSV4 = "hash-topk-dummy-weights", "dsa-index-sharing", "dsv4-expert-distribution"
HASH_TOPK = "python/sglang/srt/layers/moe/hash_topk.py"
TEST = "test/registered/unit/layers/moe/test_hash_topk_dummy_weights.py"
SECTIONS = ["Motivation", "Modifications", "Accuracy Tests", "Speed Tests and Profiling", "Checklist"]


@pytest.fixture
def plain(checkout: Path) -> Path:
    """0.5.12 as published."""
    git(checkout, "checkout", "--quiet", "-b", "main", "release/0.5.12")
    return checkout


@pytest.mark.parametrize("release", ["0.5.11", "0.5.12"])
def test_each_fix(
    release: str, checkouts: Mapping[str, Path], tables: Catalog, command: Command, tmp_path: Path
) -> None:
    checkout = copy(checkouts[release], tmp_path / "checkout")
    git(checkout, "checkout", "--quiet", "-b", "main", f"release/{release}")
    (series,) = (patches.load(tables, each) for key, each in tables.releases.items() if str(key) == release)
    state = git(checkout, "status", "--porcelain"), git(checkout, "rev-parse", "HEAD")
    for number, patch in enumerate(series.patches):
        text = tmp_path / f"{patch.fix}.md"
        for need in patch.needs:
            git(checkout, "checkout", "--quiet", f"fix/{need}")
        base = git(checkout, "rev-parse", "HEAD").strip()
        result = command("export", patch.fix, checkout, text)
        assert (result.code, result.err) == (0, "")
        assert f": one commit, the patch of {release} and test/registered/unit/" in result.out
        branch = f"fix/{patch.fix}"
        changed = git(checkout, "diff", "--name-only", base, branch).split()
        (test,) = (path for path in changed if path.startswith("test/"))
        assert sorted(changed) == sorted([*(f"python/{path}" for path in patch.files), test])
        assert git(checkout, "rev-list", "--count", f"{base}..{branch}") == "1\n"
        # Beside the tests of the code, as upstream's mirror the package.
        folder = Path(test).parent.relative_to("test/registered/unit")
        assert any(path.startswith(f"sglang/srt/{folder}/") for path in tables.fix(patch.fix).code)
        assert (
            git(checkout, "show", f"{branch}:{test}")
            == (ROOT / expected.load(tables, tables.fix(patch.fix)).suite.test).read_text()
        )

        message = git(checkout, "log", "-1", "--format=%an <%ae>%n%cn%n%B", branch)
        assert message.startswith("A Contributor <contributor@example.org>\nA Contributor\n")
        for word in ("atchset", "Regression-Test", "Signed-off-by", "Affects", "Upstream-Status"):
            assert word not in message
            assert word not in text.read_text()
        assert "Symptom: " in message
        assert "Fix: " in message
        page = text.read_text()
        assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == SECTIONS
        assert f"Without the change, on {release}, these of its tests fail" in page
        # What this clone's own results have of it.
        for seen in results.seen(tables):
            assert (f"«{seen.words}»; with it {seen.patched}" in page) == (seen.fix == patch.fix)

        # The mail gives the same tree.
        mail = git(checkout, "format-patch", "-1", "--stdout", branch)
        git(checkout, "checkout", "--quiet", "-b", f"mailed{number}", base)
        subprocess.run(["git", "-C", str(checkout), "am", "--quiet"], input=mail, text=True, check=True)
        assert git(checkout, "rev-parse", "HEAD^{tree}") == git(checkout, "rev-parse", f"{branch}^{{tree}}")
        git(checkout, "checkout", "--quiet", "main")
        assert (git(checkout, "status", "--porcelain"), git(checkout, "rev-parse", "HEAD")) == state


def test_the_suite_of_the_neighbours(plain: Path, command: Command, tmp_path: Path) -> None:
    """Upstream renamed it in 0.5.13; the checkout's own tests say what it is today."""
    neighbours = plain / "test" / "registered" / "unit" / "layers"
    neighbours.mkdir(parents=True)
    for name in ("a", "b"):
        (neighbours / f"test_{name}.py").write_text('register_cpu_ci(est_time=5, suite="base-a-test-cpu")\n')
    git(plain, "add", "--all")
    git(plain, "commit", "--quiet", "--message", "Neighbours")
    # What the checkout's maker wants to see of git is none of the test.
    for name in ("grep.lineNumber", "grep.column", "grep.fullName"):
        git(plain, "config", name, "true")
    for name in ("color.ui", "color.grep", "color.diff"):
        git(plain, "config", name, "always")
    assert command("export", HASH, plain, tmp_path / "text.md").code == 0
    test = git(plain, "show", f"fix/{HASH}:{TEST}")
    assert 'register_cpu_ci(est_time=2, suite="base-a-test-cpu")\n' in test
    assert "stage-a" not in test
    original = (ROOT / "tests" / "regression" / HASH / Path(TEST).name).read_text()
    assert test.replace("base-a", "stage-a") == original


@pytest.mark.parametrize("release", ["0.5.12", HERE[-1]])
def test_upstream_s_own_reader_of_registrations(
    release: str, plain: Path, wheels: Mapping[str, Path], command: Command, tmp_path: Path
) -> None:
    """That of the release, and today's, reads from the test which suite it is in."""
    registry = plain / "python" / "sglang" / "test" / "ci" / "ci_register.py"
    registry.unlink()
    registry.write_bytes(ZipFile(wheels[release]).read("sglang/test/ci/ci_register.py"))
    if git(plain, "status", "--porcelain"):
        git(plain, "commit", "--quiet", "--all", "--message", f"As {release} has it")
    assert command("export", HASH, plain, tmp_path / "text.md").code == 0
    git(plain, "checkout", "--quiet", f"fix/{HASH}")
    (found,), has_main = runpy.run_path(str(registry))["ut_parse_one_file"](str(plain / TEST))
    assert has_main
    assert (found.backend.name, found.est_time, found.disabled) == ("CPU", 2, None)
    assert found.suite == ("base" if Version(release) >= Version("0.5.13") else "stage") + "-a-test-cpu"


def test_three_way(plain: Path, command: Command, tmp_path: Path) -> None:
    """Upstream's main has moved on beside the fix, and git has the release's blobs."""
    line = "        self.routed_scaling_factor = routed_scaling_factor\n"
    change(plain / HASH_TOPK, line, line.replace("= r", "= 1.0 * r"))
    git(plain, "commit", "--quiet", "--all", "--message", "Move on")
    assert command("export", HASH, plain, tmp_path / "text.md").code == 0
    merged = git(plain, "show", f"fix/{HASH}:{HASH_TOPK}")
    assert "= 1.0 * routed_scaling_factor\n" in merged
    assert "token_ids.unsqueeze(1) + columns" in merged


def test_evidence(project: Path, plain: Path, tables: Catalog, tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    assert from_copy(project, "export", HASH, plain, text).code == 0
    page = text.read_text()
    assert "On a GPU: not run." in page
    for name, signature in next(iter(expected.load(tables, tables.fix(HASH)).suite.reds.values())).items():
        assert f"- `{name}`: `{signature}`\n" in page
    assert (
        "\nSymptom: with --load-format dummy, DeepSeek-V4 dies in CUDA graph capture with an illegal" in page
    )
    text.unlink()
    git(plain, "branch", "--quiet", "--delete", "--force", f"fix/{HASH}")
    (project / "results").mkdir(exist_ok=True)
    release = tables.releases[Version("0.5.12")]
    cells = []
    for fix in (HASH, DSV4):
        suite = expected.load(tables, tables.fix(fix)).cuda[0]
        for each in Tree:
            red = {"TestCuda::test_it": "device-side assert triggered"} if each is Tree.PUBLISHED else {}
            cells.append(
                {
                    "release": "0.5.12",
                    "fix": fix,
                    "test": suite.test,
                    "tree": each.value,
                    "gpus": 1,
                    "rests on": evidence.grounds(tables, release, tables.fix(fix), suite, each),
                    "outcome": "red" if red else "green",
                    "seconds": 1,
                    "detail": "",
                    "signatures": red,
                    "measured": {},
                    "durations": {},
                    "passed": 1,
                    "skipped": 0,
                }
            )
    run = {"date": "2026-11-22T03:00:00+00:00", "gpu": "NVIDIA H200", "gpus": 1, "cells": cells, "seconds": 9}
    file = project / "results" / "gpu-H200-2026-11-22.json"
    file.write_text(json.dumps(run))
    assert from_copy(project, "export", HASH, plain, text).code == 0
    page = text.read_text()
    words = "without the change red, «device-side assert triggered»; with it green"
    assert page.count(f"- NVIDIA H200, 2026-11-22, 0.5.12: {words}\n") == 1
    assert "not run." not in page.partition("## Speed")[0]
    text.unlink()
    git(plain, "branch", "--quiet", "--delete", "--force", f"fix/{HASH}")
    file.write_text('{"fix": 1}')
    refusal = from_copy(project, "export", HASH, plain, text).refusal()
    assert "gpu-H200-2026-11-22.json: not what a run writes" in refusal
    assert not text.exists()
    assert git(plain, "branch", "--list", "fix/*") == ""


def test_speed(project: Path, plain: Path, tmp_path: Path) -> None:
    """What the newest benchmarks say, those of another fix aside."""

    def speed(fix: str) -> str:
        text = tmp_path / f"{fix}.md"
        assert from_copy(project, "export", fix, plain, text).code == 0
        _, _, rest = text.read_text().partition("## Speed Tests and Profiling\n\n")
        text.unlink()
        git(plain, "branch", "--quiet", "--delete", "--force", f"fix/{fix}")
        return rest.partition("\n\n## Checklist")[0]

    assert speed(HASH) == "Not run."
    head = {"date": "2026-11-22T03:00:00+00:00", "complete": True, "gpu": "NVIDIA H200"}
    steps = {
        "batch": 8,
        "captured": 8,
        "replay": {"ran": {"published": 86, "patched": 87}},
        "prefill": {"gpu": {"ratio": 0.999, "noise": {"ratio": 1.002}}},
        "decode": {"gpu": {"ratio": 1.001, "noise": {"ratio": 0.998}}},
    }
    case = {"name": "DeepSeek-V4", "release": "0.5.12", "same work": True, "batches": [steps]}
    graph = {"ratio": 0.71, "limit": 0.6, "indexer speedup": 3.1}
    iteration = {"context": 65536, "batch": 8, "steps": 3, "graph": graph}
    (project / "results").mkdir()
    for what, contents in (
        ("overhead", {"cases": [case]}),
        ("mtp-reuse", {"release": "0.5.12", "iterations": [iteration]}),
    ):
        file = project / "results" / f"bench-{what}-2026-11-22T0300Z.json"
        file.write_text(json.dumps(head | contents))
    overhead, reuse = speed(DSA).splitlines()
    # No benchmark runs its code.
    assert speed(HASH) == "Not run."
    assert "NVIDIA H200, DeepSeek-V4 on 0.5.12, all patches: prefill and decode take " in overhead
    assert "take 0.999 to 1.001 times as long" in overhead
    assert "a second process of the published tree takes 0.998 to 1.002." in overhead
    assert "runs at most 1 kernel, copy or fill more" in overhead
    assert "64k tokens, batch 8, 3 steps, where an iteration's graph takes 0.71 of the time" in reuse
    # Nothing was measured on a release that has a patch of it.
    (project / "results" / "bench-overhead-2026-11-22T0300Z.json").write_text(
        json.dumps(head | {"cases": [case | {"release": "0.5.14"}]})
    )
    assert speed(DSA) == reuse
    assert "results/" not in overhead + reuse


def test_what_cannot_be_exported(
    plain: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text.md"

    def refusal(fix: str, checkout: Path) -> str:
        line = command("export", fix, checkout, text).refusal()
        assert not text.exists()
        return line

    assert "unknown fix nonsense" in refusal("nonsense", plain)
    assert "not the top of a git repository" in refusal(HASH, plain / "python")
    subprocess.run(["git", "init", "--quiet", str(tmp_path / "empty")], check=True)
    assert "no python/sglang in its HEAD" in refusal(HASH, tmp_path / "empty")
    git(plain, "tag", "v0.5.13", "main")
    assert f"SGLang 0.5.13, by its tag, does not need {HASH}: see " in refusal(HASH, plain)
    git(plain, "tag", "--delete", "v0.5.13")
    git(plain, "checkout", "--quiet", "patchset")
    assert f"its HEAD has {HASH} already" in refusal(HASH, plain)
    git(plain, "checkout", "--quiet", "main")
    for part in ("name", "email"):
        git(plain, "config", "--unset", f"user.{part}")
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    assert "git knows no author" in refusal(HASH, plain)
    monkeypatch.setenv("GIT_AUTHOR_NAME", "A Contributor")
    monkeypatch.setenv("GIT_AUTHOR_EMAIL", "contributor@example.org")
    git(plain, "branch", f"fix/{HASH}")
    assert f"has a branch fix/{HASH}" in refusal(HASH, plain)
    git(plain, "branch", "--delete", f"fix/{HASH}")
    text.write_text("mine")
    assert f"{text}: is there already" in command("export", HASH, plain, text).refusal()
    assert text.read_text() == "mine"
    text.unlink()
    nowhere = tmp_path / "nowhere" / "text.md"
    assert f"{nowhere}: no directory {nowhere.parent}" in command("export", HASH, plain, nowhere).refusal()
    for part in ("name", "email"):
        git(plain, "config", f"user.{part}", "me")
    (plain / TEST).parent.mkdir(parents=True)
    (plain / TEST).write_text("theirs\n")
    git(plain, "add", "--all")
    git(plain, "commit", "--quiet", "--message", "Theirs")
    assert f"has {TEST} already" in refusal(HASH, plain)
    change(
        plain / HASH_TOPK,
        "torch.empty(vocab_size, topk - num_fused_shared_experts, dtype=torch.int32)",
        "mine",
    )
    edit(plain / HASH_TOPK, "# mine")
    git(plain, "commit", "--quiet", "--all", "--message", "Conflict")
    line = refusal(HASH, plain)
    assert f"{HASH}.patch: does not fit HEAD, three-way neither " in line
    assert f"patch failed: {HASH_TOPK}:37" in line
    assert git(plain, "branch", "--list", "fix/*") == ""
