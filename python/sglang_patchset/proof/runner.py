"""Tests of a clone run on a tree, in processes of their own that end with the caller."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

# What a tree's tests may take, in seconds; a hang is a failure too.
_TIMEOUT = 1800

# Of every process that imports SGLang: it asks no hub, and keeps its bytecode, which container images turn
# off. To compile that takes longer than most of the tests.
IMPORTING = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

# How a line begins in which a test says what it measured.
_MEASURED = "measured: "


@dataclass(frozen=True)
class Case:
    """One test: `passed`, `failed` or `skipped`.

    `texts` has each failure's words, or the reason to skip; `measured` the figures that the test printed.
    """

    result: str
    seconds: float
    texts: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


class Runner:
    """Runs tests of the clone at `root`, each call in a process of its own, which ends with this."""

    def __init__(self, root: Path, logs: Path | None = None) -> None:
        self._root = root
        self._logs = logs
        self._processes: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill what runs; nothing starts any more."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                if process.poll() is None:
                    _kill(process)

    def run(
        self, tree: Path, files: Sequence[str], log: str, extra: Mapping[str, str]
    ) -> tuple[dict[str, dict[str, Case]], str]:
        """Run files of tests on a tree, which stands on the Python path.

        Args:
            log: the name of the file in `logs` for what pytest prints.
            extra: of the environment.

        Returns:
            Each file's cases by `Class::test`, and what pytest printed.
        """
        with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as scratch:
            report = Path(scratch, "report.xml")
            command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-W", "ignore"]
            command += ["--rootdir", str(self._root), "--import-mode", "importlib"]
            for override in ("addopts=", "junit_family=xunit1", "junit_logging=system-out"):
                command += ["--override-ini", override]
            if not self._logs:
                # Nobody reads the source around a failure: to find it takes pytest longer than the tests.
                command.append("--tb=line")
            command += [f"--junitxml={report}", *files]
            environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
            process = self._start(command, {**environment, "PYTHONPATH": str(tree), **extra})
            try:
                output, _ = process.communicate(timeout=_TIMEOUT)
            except subprocess.TimeoutExpired:
                _kill(process)
                output = process.communicate()[0] + f"\nnot done within {_TIMEOUT} s"
            else:
                _kill(process)
            if self._ended:
                raise CancelledError
            cases: dict[str, dict[str, Case]] = {}
            if report.exists():
                for file, name, case in _cases(report):
                    known = cases.setdefault(file, {})
                    known[name] = _worse(known[name], case) if name in known else case
        if self._logs:
            self._logs.mkdir(parents=True, exist_ok=True)
            (self._logs / f"{log}.log").write_text(output, encoding="utf-8")
        return cases, output

    def _start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise CancelledError
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env={**environment, **IMPORTING},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # What it starts ends with it.
                start_new_session=True,
            )
            self._processes.append(process)
        return process


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _cases(report: Path) -> Iterator[tuple[str, str, Case]]:
    for element in ElementTree.parse(report).iter("testcase"):
        file = element.get("file", element.get("name", ""))
        # A class is a.b.file.Class; what stands for a whole file has none.
        owner = element.get("classname", "").rpartition(".")[2]
        name = f"{owner}::{element.get('name')}" if element.get("classname") else ""
        seconds = float(element.get("time", 0))
        printed = element.findtext("system-out", "").splitlines()
        measured = tuple(line.removeprefix(_MEASURED) for line in printed if line.startswith(_MEASURED))
        failures = [*element.findall("failure"), *element.findall("error")]
        if failures:
            texts = tuple(_words(each.text or "") for each in failures)
            yield file, name, Case("failed", seconds, texts, measured)
        elif (skip := element.find("skipped")) is not None:
            # Where a whole file skips itself, the reason stands in the text alone.
            yield file, name, Case("skipped", seconds, (f"{skip.get('message', '')} {skip.text or ''}",))
        else:
            yield file, name, Case("passed", seconds, (), measured)


def _words(text: str) -> str:
    """What was raised, without the source around it: that may have a message in it that nobody raised."""
    words: list[str] = []
    inside = False
    for line in text.splitlines():
        # Where pytest shows no source, it marks a message's first line alone and indents the others.
        inside = line.startswith("E ") or (inside and line.startswith("    "))
        if inside:
            words.append(line[1:].strip())
    return "\n".join(words)


def _worse(one: Case, other: Case) -> Case:
    """Subtests have their test's name; one that fails is the test's failure, and each has to be judged."""
    seconds = one.seconds + other.seconds
    measured = tuple(dict.fromkeys((*one.measured, *other.measured)))
    failed = [case for case in (one, other) if case.result == "failed"]
    if failed:
        return Case("failed", seconds, tuple(text for case in failed for text in case.texts), measured)
    return replace(one, seconds=seconds, measured=measured)
