"""Timings of two things side by side; `results/bench-<what>-<date>.json`, which runs write of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sglang_patchset.errors import PatchsetError


@dataclass(frozen=True)
class Usage:
    """What commands took, in seconds; `cpu` is theirs and that of all that they started."""

    wall: float
    cpu: float

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.wall + other.wall, self.cpu + other.cpu)


def run(*commands: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run commands one after another, each a process of its own; their output and exit codes are nobody's."""
    begin, cpu = time.perf_counter(), 0.0
    for command in commands:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu += usage.ru_utime + usage.ru_stime
    return Usage(time.perf_counter() - begin, cpu)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The median of the ratios of rounds that alternated, with its spread.

    Each is of ours over its neighbour of theirs: a machine that changes its pace half way slows both. Half
    of the rounds lie from `low` to `high`.
    """
    rounds = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else (rounds[0],) * 3
    return {
        "ratio": middle,
        "low": low,
        "high": high,
        "rounds": len(rounds),
    }


def rounded(value: Any) -> Any:
    """The same value with every number in it to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


def write(root: Path, what: str, contents: Mapping[str, Any]) -> Path:
    """Write `results/bench-<what>-<date>.json` of the clone at `root`, with the date and the machine."""
    now = datetime.now(timezone.utc).replace(microsecond=0)
    path = root / "results" / f"bench-{what}-{now:%Y-%m-%dT%H%M%SZ}.json"
    path.parent.mkdir(exist_ok=True)
    head = {"date": now.isoformat(), "python": platform.python_version(), "cores": os.cpu_count()}
    path.write_text(json.dumps(head | rounded(contents), indent=1) + "\n", encoding="utf-8")
    return path


def newest(root: Path, what: str) -> Mapping[str, Any] | None:
    """The newest result of a benchmark that ran to its end; None where there is none.

    Raises:
        PatchsetError: a file in `results/` is not one that a run wrote.
    """
    found: list[Mapping[str, Any]] = []
    for path in (root / "results").glob(f"bench-{what}-*.json"):
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if contents["complete"]:
                found.append(contents | {"file": path.name})
        except (ValueError, TypeError, LookupError):
            raise PatchsetError(f"{path}: not what a run writes: remove it and run again") from None
    return max(found, key=lambda contents: str(contents["date"]), default=None)


def recorded(root: Path, what: str, measure: Callable[[dict[str, Any]], None]) -> Path:
    """Have `measure` fill in a result, and write it; or what there is of it, if it stops half way."""
    contents: dict[str, Any] = {"complete": False}
    begin = time.monotonic()
    try:
        measure(contents)
        contents["complete"] = True
    finally:
        contents["seconds"] = time.monotonic() - begin
        path = write(root, what, contents)
        print(f"{path}: {contents['seconds']:.0f} s{'' if contents['complete'] else ', not complete'}")
        sys.stdout.flush()
    return path
