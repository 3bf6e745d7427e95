"""A real SGLang server for a test, whose failure to start carries the reason."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO, Dict, Iterator, List, Optional, Tuple

import requests
from sglang.srt.utils import kill_process_tree

START_TIMEOUT = 420
PORTS_EACH = 300  # with DP attention, a server uses some from its port + 233 on
ERROR_LINE = re.compile(
    r"^.*?\w*(?:Error|Exception): .*$|^.*CUDA error.*$"
    r"|^Fatal Python error: .*$|^Current thread .*\n(?:  File .*\n){1,4}",
    re.M,
)


class Server:
    def __init__(self, url: str, log: IO[str]):
        self.url = url
        self._log = log

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def post(self, path: str, timeout: float = 300, **body):
        response = requests.post(f"{self.url}/{path}", json=body, timeout=timeout)
        response.raise_for_status()
        return response

    def generate(self, input_ids: List[List[int]], max_new_tokens: int, **body):
        """Greedy; one result for each list of input ids, in their order."""
        sampling_params = dict(
            temperature=0, max_new_tokens=max_new_tokens, ignore_eos=True
        )
        return self.post(
            "generate", input_ids=input_ids, sampling_params=sampling_params, **body
        ).json()

    def behind_the_best(self, prompt: List[int], output: List[int]) -> List[float]:
        """How far each output token's log-probability is from the best one's."""
        result = self.generate(
            [prompt + output],
            1,
            return_logprob=True,
            top_logprobs_num=1,
            logprob_start_len=len(prompt) - 1,
        )[0]["meta_info"]
        chosen = result["input_token_logprobs"][-len(output) :]
        best = result["input_top_logprobs"][-len(output) :]
        return [b[0][0] - c[0] for c, b in zip(chosen, best)]


def _wait_until_healthy(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"it exited with code {process.returncode}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health_generate", timeout=30).ok:
                return
        time.sleep(1)
    raise TimeoutError(f"it was not healthy within {START_TIMEOUT} s")


def reserve_ports() -> Tuple[int, socket.socket]:
    """The first of PORTS_EACH ports that are nobody else's while the socket is open.

    A server binds its ports half a minute after it chose them, and servers of other
    tests start meanwhile. These are below those that the system gives out itself.
    """
    starts = list(range(10000, 30000, PORTS_EACH))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", start + PORTS_EACH - 1))
            return start, guard
        except OSError:
            guard.close()
    raise RuntimeError("no free ports")


def _reason(log: str) -> str:
    return "\n".join(dict.fromkeys(ERROR_LINE.findall(log))) or log[-4000:]


@contextlib.contextmanager
def launch_server(
    model: str,
    args: List[str],
    env: Optional[Dict[str, str]] = None,
    command: Optional[List[str]] = None,
) -> Iterator[Server]:
    """Start a server on ports of its own; an AssertionError quotes its log if it dies.

    ``command`` replaces ``python -m sglang.launch_server``, for a test that runs the
    server behind a script of its own.
    """
    port, guard = reserve_ports()
    url = f"http://127.0.0.1:{port}"
    command = command or [sys.executable, "-m", "sglang.launch_server"]
    command = command + ["--model-path", model, "--port", str(port)]
    command += ["--nccl-port", str(port + 1), *args]
    with guard, tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **(env or {})}
        )
        server = Server(url, log)
        try:
            try:
                _wait_until_healthy(process, url)
            except (RuntimeError, TimeoutError) as e:
                reason = _reason(server.log)
                raise AssertionError(f"the server did not start: {e}\n{reason}") from e
            try:
                yield server
            except requests.RequestException as e:
                reason = _reason(server.log)
                raise AssertionError(f"the server failed: {e}\n{reason}") from e
        finally:
            kill_process_tree(process.pid)
