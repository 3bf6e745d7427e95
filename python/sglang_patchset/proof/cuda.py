"""The regression tests that need GPUs: what a CUDA box has, and the tests shared out among its GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import expected, judge
from sglang_patchset.proof.judge import Verdict
from sglang_patchset.proof.plan import Job, Outcome, Tree
from sglang_patchset.proof.results import Run
from sglang_patchset.proof.runner import IMPORTING, Runner
from sglang_patchset.proof.trees import Trees
from sglang_patchset.proof.verify import completed

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

    @property
    def name(self) -> str:
        """How a result's file names it."""
        count = f"{len(self.gpus)}x" if len(self.gpus) > 1 else ""
        return count + re.sub(r"[^A-Za-z0-9]+", "-", self.gpu.removeprefix("NVIDIA "))

    def header(self) -> dict[str, Any]:
        """What a result says of it; `seed` is the one that the tests make weights and prompts from."""
        return {
            "gpu": self.gpu,
            "gpus": len(self.gpus),
            "driver": self.driver,
            "versions": dict(self.versions),
            "cold": self.cold,
            "seed": int(os.environ.get("REGRESSION_SEED", "0")),
        }


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


def jobs(catalog: Catalog) -> list[Job]:
    """What there is to run: each suite on both trees of the patched releases that it has reds on."""
    return [
        Job(release, each.fix, suite, tree, Outcome.RED if tree is Tree.PUBLISHED else Outcome.GREEN)
        for each in expected.load_all(catalog)
        for suite in each.cuda
        for release in catalog.releases.values()
        if suite.reds_of(release.version) and release.version in each.fix.patched
        for tree in Tree
    ]


def run(
    catalog: Catalog, chosen: Sequence[Job], box: Machine, cache: Path, report: Callable[[str], None]
) -> tuple[Path, list[Verdict]]:
    """Run these, several at a time; not those that need more GPUs than there are.

    What comes out is written to `results/` of the clone as it comes; a run that was cut is gone on with.

    Args:
        cache: a directory for the unpacked releases and the tests' output, kept for the next run.
        report: is told in a line what has come out, as it does.

    Returns:
        The file in `results/`, and the verdicts.

    Raises:
        PatchsetError: a release cannot be got.
    """
    trees = Trees(catalog, cache / "trees")
    slots = _Slots(box)
    begin = time.monotonic()
    record = Run.start(catalog, catalog.clone() / "results", f"gpu-{box.name}", box.header())

    def told(verdict: Verdict, how: str) -> Verdict:
        words = verdict.detail or next(iter(verdict.signatures.values()), "")
        report(
            f"[{how}] {verdict.release} {Path(verdict.test).stem} "
            f"{verdict.tree.value}: {verdict.outcome.value}{f' ({words})' if words else ''}"
        )
        return verdict

    def verify(job: Job, tree: Path) -> list[Verdict]:
        with slots.taken(job.suite.gpus) as gpus:
            environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            log = f"{job.release.version}-{Path(job.suite.test).stem}-{job.tree.value}"
            cases, output = runner.run(tree, [job.suite.test], log, environment)
        verdict = judge.judge(job, cases.get(job.suite.test, {}), output)
        record.add([(job, verdict)])
        return [told(verdict, f"{time.monotonic() - begin:4.0f} s")]

    wanted = [job for job in chosen if job.suite.gpus <= len(box.gpus)]
    verdicts = [told(verdict, "before") for job in wanted if (verdict := record.found(job))]
    missing = [job for job in wanted if not record.found(job)]
    # The default release's first: a run may be cut. Those with more GPUs, and with more tests, take longer.
    missing.sort(
        key=lambda job: (
            job.release != catalog.default,
            -job.suite.gpus,
            -len(job.suite.reds_of(job.release.version)),
        )
    )
    places = [_tree(trees, job) for job in missing]
    with Runner(catalog.clone(), cache / "gpu-logs") as runner, ThreadPoolExecutor(len(missing) or 1) as pool:
        futures = [pool.submit(verify, job, tree) for job, tree in zip(missing, places, strict=True)]
        for future in completed(pool, runner, futures):
            verdicts += future.result()
    # One that was gone on with tells nothing of how long it takes.
    record.finish(0 if len(missing) < len(wanted) else time.monotonic() - begin)
    return record.path, verdicts


def _tree(trees: Trees, job: Job) -> Path:
    if job.tree is Tree.PATCHED:
        return trees.patched(job.release)
    return trees.partly(job.release, job.suite.base_has, without=job.fix.name)


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
