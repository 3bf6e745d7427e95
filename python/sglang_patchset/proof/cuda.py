"""The regression tests that need GPUs: what a CUDA box has, and the tests shared out among its GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_patchset.catalog import Catalog, CellState, Fix, Release, Suite
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof.trees import Trees
from sglang_patchset.proof.verify import IMPORTING, Cell, Outcome, Runner, Tree, Verdict

# What a test with its servers wants to itself: less makes it slow, or fail for want of memory.
_CORES = 2
_GPU_GIB = 12

ENVIRONMENT = IMPORTING | {
    # Compiling every kernel before it is asked for takes minutes.
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
    # Other tests fill one GPU more than the other.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}

# Where Triton, TileLang, FlashInfer, DeepGEMM and torch keep the kernels that they compiled.
_KERNELS = (
    ".triton",
    ".tilelang",
    ".cache/tvm-ffi",
    ".cache/flashinfer",
    ".cache/deep_gemm",
    ".cache/torch_extensions",
)

_DESCRIBE = """
import importlib.metadata, json, platform, torch
names = ("torch", "transformers", "sglang-kernel", "flashinfer-python", "triton", "tilelang", "sgl-deep-gemm")
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
for name in names:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"gpus": [[gpu.name, gpu.total_memory] for gpu in gpus], "versions": versions}))
"""


@dataclass(frozen=True)
class Machine:
    """A CUDA box; `gpus` are what CUDA_VISIBLE_DEVICES calls them, `memory` is one GPU's, in bytes.

    `cold` is whether it has no compiled kernels yet: a first run compiles them.
    """

    gpu: str
    gpus: tuple[str, ...]
    memory: int
    driver: str
    versions: Mapping[str, str]
    cold: bool = False


@dataclass(frozen=True)
class Pair:
    """One suite on the two trees of one release."""

    release: Release
    fix: Fix
    suite: Suite

    def cells(self) -> Iterator[Cell]:
        """The published tree has to be red, the patched one green."""
        yield Cell(self.release, self.fix, self.suite, Tree.PUBLISHED, Outcome.RED)
        yield Cell(self.release, self.fix, self.suite, Tree.PATCHED, Outcome.GREEN)


def machine() -> Machine:
    """What this machine has.

    Raises:
        PatchsetError: no GPU, no driver, or an interpreter without torch.
    """
    result = subprocess.run([sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PatchsetError(
            f"{sys.executable}: {last[0]}: run ./scripts/gpu_test.sh, which makes an environment"
        )
    found = json.loads(result.stdout)
    if not found["gpus"]:
        raise PatchsetError("no CUDA GPU: run this on a machine where nvidia-smi and torch show one")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise PatchsetError(f"nvidia-smi: {error}: put the driver's tools on PATH") from None
    name, memory = found["gpus"][0]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(len(found["gpus"]))]
    cold = not any((Path.home() / cache).exists() for cache in _KERNELS)
    return Machine(name, tuple(gpus[: len(found["gpus"])]), memory, driver, found["versions"], cold)


def pairs(catalog: Catalog) -> list[Pair]:
    """What there is to run: each suite on the patched releases that it has reds on."""
    return [
        Pair(release, fix, suite)
        for fix in catalog.fixes.values()
        for suite in fix.cuda
        for release in catalog.releases.values()
        if suite.reds_of(release.version)
        and (cell := fix.cell(release.version))
        and cell.state is CellState.PATCH
    ]


def run(
    catalog: Catalog, chosen: Sequence[Pair], box: Machine, cache: Path, report: Callable[[str], None]
) -> list[Verdict]:
    """Run these suites on both trees, several at a time; not those that need more GPUs than there are.

    Args:
        cache: a directory for the unpacked releases and the tests' output, kept for the next run.
        report: is told in a line what has come out, as it does.

    Raises:
        PatchsetError: a release cannot be got.
    """
    shelf = Trees(catalog, cache / "trees")
    slots = _Slots(box)
    begin = time.monotonic()

    def verify(cell: Cell, tree: Path) -> list[Verdict]:
        with slots.taken(cell.suite.gpus) as gpus:
            environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            (verdict,) = runner.verify(tree, [cell], environment)
        words = verdict.detail or next(iter(verdict.signatures.values()), "")
        report(
            f"[{time.monotonic() - begin:4.0f} s] {verdict.release} {Path(verdict.test).stem} "
            f"{verdict.tree.value}: {verdict.outcome.value}{f' ({words})' if words else ''}"
        )
        return [verdict]

    cells = [cell for pair in chosen if pair.suite.gpus <= len(box.gpus) for cell in pair.cells()]
    # Those with the most tests take longest.
    cells.sort(key=lambda cell: -len(cell.suite.reds_of(cell.release.version)))
    trees = [_tree(shelf, cell) for cell in cells]
    with (
        Runner(catalog.root.parent, cache / "gpu-logs") as runner,
        ThreadPoolExecutor(len(cells) or 1) as pool,
    ):
        results = [pool.submit(verify, cell, tree) for cell, tree in zip(cells, trees, strict=True)]
        return runner.wait(pool, results)


def _tree(shelf: Trees, cell: Cell) -> Path:
    if cell.tree is Tree.PATCHED:
        return shelf.patched(cell.release)
    return shelf.partly(cell.release, cell.suite.behind)


class _Slots:
    """Each GPU takes so many tests at a time."""

    def __init__(self, box: Machine) -> None:
        cores = (os.cpu_count() or 1) // len(box.gpus)
        each = max(1, min(cores // _CORES, (box.memory >> 30) // _GPU_GIB))
        self._free = dict.fromkeys(box.gpus, each)
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def taken(self, number: int) -> Iterator[list[str]]:
        """A slot on each of so many GPUs, those with the most free ones; in the order of asking."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: sum(map(bool, self._free.values())) >= number)
            gpus = sorted(self._free, key=lambda gpu: -self._free[gpu])[:number]
            for gpu in gpus:
                self._free[gpu] -= 1
        try:
            yield gpus
        finally:
            with self._changed:
                for gpu in gpus:
                    self._free[gpu] += 1
                self._changed.notify_all()
