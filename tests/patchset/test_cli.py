"""What the command does with its arguments, its output and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_patchset import status

from .conftest import ROOT, Command


def shell(line: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which $TOOL is the command; the exit code is the tool's own."""
    tool = f"{sys.executable} -m sglang_patchset"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, "TOOL": tool, "PYTHONPATH": str(ROOT / "python"), **env},
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [("verify", "--release", "0.5.10"), ("nonsense",), ("status", "--nonsense"), (), ("checkout", "0.5.12")],
)
def test_arguments_that_nobody_knows(arguments: tuple[str, ...], command: Command) -> None:
    assert "--help`" in command(*arguments).refusal()


def test_help(command: Command) -> None:
    result = command("--help")
    assert (result.code, result.err) == (0, "")
    assert "verify" in result.out


def test_ctrl_c(tree: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "examine", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = command("apply", tree)
    assert (result.code, result.out) == (130, "")
    assert result.err == "sglang-patchset: interrupted: run it again\n"


def test_a_reader_that_has_enough(tree: Path) -> None:
    result = shell(f"$TOOL status {tree} | true; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (1, "")


def test_output_that_cannot_be_written(tree: Path) -> None:
    result = shell(f"$TOOL apply {tree} >/dev/full")
    assert result.returncode == 1
    assert result.stderr.startswith("sglang-patchset: done, but stdout cannot be written to: ")
    assert result.stderr.count("\n") == 1
    result = shell(f"$TOOL status {tree} >&-")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_path_that_stdout_cannot_say(tree: Path) -> None:
    named = tree.rename(tree.with_name("Bäume"))
    result = shell(f"$TOOL status {named}", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (result.returncode, result.stderr) == (1, "")
    assert "B\\xe4ume" in result.stdout
