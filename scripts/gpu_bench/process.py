"""A process that stays alive on one tree of SGLang and is told by another one, a line of JSON at a time."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# A first start compiles kernels.
TIMEOUT = 480
TAIL = 3000


class WorkerError(Exception):
    """A worker failed, ended or hangs; the message ends with what it printed last."""


class Worker:
    """Runs a script of this directory with a tree on its Python path."""

    def __init__(self, script: str, tree: Path, log: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / script)],
                env={**os.environ, **environment, "PYTHONPATH": str(tree)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                # What it starts ends with it.
                start_new_session=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it and what it started, if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def tell(self, what: str, **arguments: Any) -> None:
        """Ask for something; `answer` has to follow."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None

    def answer(self) -> Any:
        """What it answers.

        Raises:
            WorkerError: it cannot, or not in time.
        """
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT):
                raise self._failed(f"did not answer within {TIMEOUT} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failed("ended")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer["value"]

    def ask(self, what: str, **arguments: Any) -> Any:
        """`tell`, then `answer`."""
        self.tell(what, **arguments)
        return self.answer()

    def _failed(self, why: str) -> WorkerError:
        time.sleep(1)  # for the last lines
        last = self._log.read_text(errors="replace")[-TAIL:]
        return WorkerError(f"{self._log}: the worker {why}\n{last}")


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer until nobody asks any more; runs in the worker.

    SGLang prints to stdout: that goes where stderr goes.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": handlers[request.pop("what")](**request)}
        except Exception:
            answer = {"error": "failed: " + traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
