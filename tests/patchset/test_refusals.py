"""Bad input: one line that says what to do next, exit code 2, nothing changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_patchset import cli
from sglang_patchset.git import blob_id

from .conftest import ROOT, Command, Result, change, digest, edit, from_copy

HASH_TOPK = "sglang/srt/layers/moe/hash_topk.py"


def test_an_edited_file_is_named_with_the_fixes_that_need_it(tree: Path, command: Command) -> None:
    change(tree / HASH_TOPK, "self.score_func = scoring_func", "self.score_func = mine")
    change(tree / HASH_TOPK, "environ import envs\n", "environ import mine\n")
    before = digest(tree)
    for verb in ("apply", "revert"):
        refusal = command(verb, tree).refusal()
        for fix, hunk in (
            ("hash-topk-dummy-weights", "37 of hash-topk-dummy-weights.patch"),
            ("dsv4-expert-distribution", "7 of dsv4-expert-distribution.patch"),
        ):
            reason = f"{fix}: {HASH_TOPK} has other changes in the place of the hunk at line {hunk}"
            assert reason in refusal
        assert digest(tree) == before
    # Fixes that do not need the file go in and out.
    assert command("apply", tree, "routed-experts-dp-buffer", "swa-graph-padding").code == 0
    assert command("revert", tree, "routed-experts-dp-buffer", "swa-graph-padding").code == 0
    assert digest(tree) == before


def test_an_edit_of_a_patched_line_is_refused(tree: Path, command: Command) -> None:
    assert command("apply", tree).code == 0
    change(tree / HASH_TOPK, "(token_ids.unsqueeze(1) + columns)", "(columns)")
    before = digest(tree)
    assert f"{HASH_TOPK} has other changes in the place of the hunk" in command("revert", tree).refusal()
    assert digest(tree) == before


def test_an_edit_elsewhere_stays(tree: Path, command: Command) -> None:
    edit(tree / "sglang" / "utils.py", "# mine")
    before = digest(tree)
    assert command("apply", tree).code == 0
    assert command("revert", tree).code == 0
    assert digest(tree) == before


def test_an_unknown_fix(tree: Path, command: Command) -> None:
    before = digest(tree)
    assert (
        "unknown fix hash-topk: choose from dsa-index-sharing, "
        in command("apply", tree, "hash-topk").refusal()
    )
    assert digest(tree) == before


def test_status_of_a_fix(command: Command) -> None:
    assert "a fix: `status` takes a target alone" in command("status", "hash-topk-dummy-weights").refusal()


def test_a_fix_named_twice(tree: Path, command: Command) -> None:
    fix = "hash-topk-dummy-weights"
    assert f"applied {fix}: restart" in command("apply", tree, fix, fix).out


def test_no_sglang(command: Command, tmp_path: Path) -> None:
    assert "no SGLang in it" in command("apply", tmp_path).refusal()
    assert "neither a fix, nor a directory" in command("apply", tmp_path / "nowhere").refusal()
    assert "this interpreter has no sglang" in command("status").refusal()


def test_another_version_s_patch(tree: Path, command: Command) -> None:
    """What another version of the tool applied is taken out by that version."""
    assert command("apply", tree).code == 0
    record = tree / "sglang" / "_patchset.json"
    edit(tree / HASH_TOPK, "# as the other version's patch has it")
    entry = json.loads(record.read_text())
    entry["files"][HASH_TOPK] = blob_id((tree / HASH_TOPK).read_bytes())
    record.write_text(json.dumps(entry))
    refusal = command("revert", tree).refusal()
    assert f"{HASH_TOPK} as another version of this tool left it" in refusal
    assert "revert it with that version" in refusal


def test_no_git(tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(tree)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert command("status", tree).code == 1
    assert "there is no git on the PATH: install git" in command("apply", tree).refusal()
    assert digest(tree) == before


def test_git_configuration_changes_nothing(
    tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configuration = tmp_path / "gitconfig"
    configuration.write_text("[apply]\n whitespace = error\n[core]\n autocrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(configuration))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    before = digest(tree)
    assert command("apply", tree).code == 0
    assert command("status", tree).code == 0
    assert command("revert", tree).code == 0
    assert digest(tree) == before


def test_no_permission(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = digest(tree)
    package = tree / "sglang"
    if os.geteuid() == 0:
        # Nothing is forbidden to root, so a child becomes somebody else.
        for directory in (tree, *tree.parents[:3]):
            directory.chmod(0o755)
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            os._exit(cli.main(["apply", str(tree)]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        package.chmod(0o555)
        code = cli.main(["apply", str(tree)])
        package.chmod(0o755)
    refusal = Result(code, *capfd.readouterr()).refusal()
    assert f"{package}: no permission to write there, or mounted read-only" in refusal
    assert digest(tree) == before


def test_broken_patch_files(tree: Path, project: Path) -> None:
    before = digest(tree)
    patch = project / "patches" / "0.5.12" / "hash-topk-dummy-weights.patch"
    whole = patch.read_text()
    for text, message in [
        (whole[: whole.rindex("\n ")], "git cannot read it"),
        (whole.replace("\nindex ", "\nINDEX "), "not a patch of files under python/"),
        ("", "not a patch of files under python/"),
    ]:
        assert text != whole
        patch.write_text(text)
        refusal = from_copy(project, "apply", tree, patch.stem).refusal()
        assert f"{patch}: {message}" in refusal
        assert "install sglang-patchset again" in refusal
        assert digest(tree) == before
    patch.write_text(whole.replace("\n+        # ", "\n+        ## "))
    refusal = from_copy(project, "apply", tree).refusal()
    assert f"{patch.parent}: {HASH_TOPK} does not become what these patches say" in refusal
    assert digest(tree) == before
    patch.unlink()
    assert f"{patch}: No such file or directory" in from_copy(project, "status", tree).out


def test_checkout_needs_a_new_directory(wheels: Mapping[str, Path], command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    refusal = command("checkout", wheels["0.5.12"], tmp_path).refusal()
    assert "not an empty directory" in refusal
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_checkout_is_not_the_working_directory(
    wheels: Mapping[str, Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal = command("checkout", wheels["0.5.12"], ".").refusal()
    assert f"{tmp_path}: the working directory, or a mount" in refusal
    assert list(tmp_path.iterdir()) == []


def test_patch_sh_says_what_it_lacks() -> None:
    script = str(ROOT / "scripts" / "patch.sh")
    for python, arguments, message in [
        ("nonexist", [], "patch.sh: nonexist: no such Python: "),
        (sys.executable, ["0.5.12", "--find-links"], "patch.sh: --find-links: name a directory"),
    ]:
        env = {**os.environ, "PYTHON": python}
        done = subprocess.run([script, *arguments], capture_output=True, text=True, env=env, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(message)
