#!/usr/bin/env python3
"""What draft steps gain when they reuse the first one's top-k indices (dsa-index-sharing).

    export PATH=$PWD/.venv-gpu/bin:$PATH; PYTHONPATH=python python scripts/bench_mtp_reuse.py

takes one CUDA GPU with 80 GB free and the environment of scripts/gpu_test.sh, and writes
results/bench-mtp-reuse-<date>.json: four minutes on an H200 once the kernels are compiled.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_bench.process import Worker

from sglang_patchset import catalog
from sglang_patchset.proof import benchmarks, cuda
from sglang_patchset.proof.trees import Trees

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
STEPS = (3, 5, 7)
BATCHES = (1, 8, 32)
CONTEXTS = (4096, 16384, 65536, 131072)


def measure(contents: dict[str, Any]) -> None:
    """Every iteration, in one process of the default release's patched tree."""
    tables = catalog.load(ROOT / "patches")
    box = cuda.machine()
    contents |= {"gpu": box.gpu, "driver": box.driver, "versions": box.versions}
    contents |= {"release": str(tables.default.version), "iterations": []}
    tree = Trees(tables, CACHE / "trees").patched(tables.default)
    environment = cuda.ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": box.gpus[0]}
    with Worker("mtp_reuse.py", tree, CACHE / "bench-logs" / "mtp-reuse.log", environment) as worker:
        contents |= worker.ask("load", steps=STEPS, batches=BATCHES, contexts=CONTEXTS)
        print(f"captured in {contents['capture seconds']:.0f} s", flush=True)
        for context in CONTEXTS:
            for batch in BATCHES:
                for steps in STEPS:
                    sizes = {"steps": steps, "batch": batch, "context": context}
                    found = sizes | judged(worker.ask("iterate", **sizes))
                    contents["iterations"].append(found)
                    report(found)


def judged(times: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Medians and ratios of one iteration, by the clock and of the graph alone.

    What the indexer takes is what is gone without it: it may run beside something else.
    """
    found: dict[str, Any] = {}
    for kind in ("iteration", "graph"):
        without, reused, none = (times[variant][kind] for variant in ("without", "with", "none"))
        medians = [statistics.median(each) for each in (without, reused, none)]
        indexer = medians[0] - medians[2]
        found[kind] = {
            **dict(zip(("without", "with", "none"), medians, strict=True)),
            **benchmarks.ratio(reused, without),
            "limit": benchmarks.ratio(none, without)["ratio"],
            "indexer share": indexer / medians[0],
            # How many times faster the indexer's part is, and how much of it is gone.
            "indexer speedup": indexer / rest if (rest := medians[1] - medians[2]) > 0 else None,
            "of the limit": (medians[0] - medians[1]) / indexer if indexer > 0 else None,
        }
    return found


def report(found: Mapping[str, Any]) -> None:
    """A line of progress."""
    graph = found["graph"]
    speedup = graph["indexer speedup"]
    print(
        f"{found['context']} tokens, batch {found['batch']}, {found['steps']} steps: "
        f"graph {graph['without'] * 1000:.3f} -> {graph['with'] * 1000:.3f} ms, {graph['ratio']:.3f}, "
        f"limit {graph['limit']:.3f}, indexer {graph['indexer share']:.1%}, "
        f"{f'{speedup:.2f} x' if speedup else 'no time'}; whole {found['iteration']['ratio']:.3f}",
        flush=True,
    )


def main() -> None:
    """Measure, and write what came out."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    benchmarks.recorded(ROOT, "mtp-reuse", measure)


if __name__ == "__main__":
    main()
