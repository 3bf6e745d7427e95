#!/usr/bin/env python3
"""What the fixes cost where they are not meant to change the work: published against patched, in turns.

A second process of the published tree takes its turns too: two processes of the same code differ as well.

    export PATH=$PWD/.venv-gpu/bin:$PATH; PYTHONPATH=python python scripts/bench_overhead.py

takes one CUDA GPU with 80 GB free and the environment of scripts/gpu_test.sh, and writes
results/bench-overhead-<date>.json: five minutes on an H200 once the kernels are compiled.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_bench.process import Worker, WorkerError
from packaging.version import Version

from sglang_patchset import catalog
from sglang_patchset.proof import benchmarks, cuda
from sglang_patchset.proof.trees import Trees

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
ROUNDS = 42
# So many that what a round begins with, cold caches and a slow clock, is little of it.
DECODES = 96


@dataclass(frozen=True)
class Case:
    """A model on one release. `base_has` is in the published tree too: without it, that does not run.

    `batches` maps a batch size to the length of its prompts. `same_work` is whether the fixes leave the work
    as it is.
    """

    name: str
    release: str
    model: str
    batches: Mapping[int, int]
    server_args: Mapping[str, Any]
    base_has: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    same_work: bool = True


# The side that shows how far apart two processes of the same tree are.
AGAIN = "published again"

# A batch that was not captured is padded up to the next that was.
CASES = (
    Case(
        "DeepSeek-V4",
        "0.5.12",
        "deepseek_v4",
        # Up to 128 tokens, extend and decode share a kernel that takes long to compile.
        {4: 24, 3: 24},
        {"max_total_tokens": 32768, "cuda_graph_bs": [4]},
        base_has=("hash-topk-dummy-weights",),
    ),
    Case(
        "gpt-oss",
        "0.5.11",
        "gpt_oss",
        {8: 200, 5: 200, 32: 200, 25: 200},
        {"max_total_tokens": 65536, "cuda_graph_bs": [8, 32], "attention_backend": "triton"},
    ),
    Case(
        "GLM, every layer computes",
        "0.5.12",
        "glm_moe_dsa",
        # Longer than the top-k of 2048.
        {8: 2304, 5: 2304},
        {"max_total_tokens": 65536, "cuda_graph_bs": [8]},
        overrides={"index_topk_freq": 1},
    ),
    Case(
        "GLM, layers share",
        "0.5.12",
        "glm_moe_dsa",
        {8: 2304, 5: 2304},
        {"max_total_tokens": 65536, "cuda_graph_bs": [8]},
        same_work=False,
    ),
)
# A rank's prefill chunk and running requests: of the regression test, of a server with short chunks, and of
# one whose chunks are what the buffer is sized by.
BUFFERS_OF = "0.5.12"
BUFFERS = (
    {"dp": 2, "chunk": 64, "running": 512, "layers": 3, "topk": 4},
    {"dp": 8, "chunk": 1024, "running": 2048, "layers": 61, "topk": 8},
    {"dp": 8, "chunk": 2048, "running": 256, "layers": 61, "topk": 8},
)


def measure(contents: dict[str, Any]) -> None:
    """Every case; all workers load at once, and then one works at a time."""
    tables = catalog.load(ROOT / "patches")
    box = cuda.machine()
    contents |= {"gpu": box.gpu, "driver": box.driver, "versions": box.versions, "cases": [], "buffers": []}
    trees = Trees(tables, CACHE / "trees")

    def failed(case: Case, workers: Mapping[str, Worker], error: WorkerError) -> None:
        """The other cases are still worth their time, and want the GPU to themselves."""
        contents.setdefault("failed", {})[case.name] = str(error)
        print(error, flush=True)
        for worker in workers.values():
            worker.end()

    with ExitStack() as stack:
        pairs = []
        for case in CASES:
            release = tables.releases[Version(case.release)]
            published = trees.partly(release, case.base_has)
            sides = {"published": published, "patched": trees.patched(release), AGAIN: published}
            workers = {}
            for side, tree in sides.items():
                name = f"overhead-{case.model}-{case.same_work}-{side.replace(' ', '-')}.log"
                log = CACHE / "bench-logs" / name
                environment = cuda.ENVIRONMENT | {
                    "CUDA_VISIBLE_DEVICES": box.gpus[0],
                    "SGLANG_DSV4_FP4_EXPERTS": "0",
                }
                workers[side] = stack.enter_context(Worker("overhead.py", tree, log, environment))
                workers[side].tell(
                    "load", model=case.model, overrides=case.overrides, server_args=case.server_args
                )
            pairs.append((case, workers))
        ready = []
        for case, workers in pairs:
            try:
                for side, worker in workers.items():
                    print(f"{case.name}, {side}: captured {worker.answer()['graphs']}", flush=True)
                ready.append((case, workers))
            except WorkerError as error:
                failed(case, workers, error)
        if measuring := [workers for case, workers in ready if case.release == BUFFERS_OF]:
            contents["buffers"] = [buffer(sizes, measuring[0]) for sizes in BUFFERS]
        for case, workers in ready:
            found: dict[str, Any] = {
                "name": case.name,
                "release": case.release,
                "published has": case.base_has,
                "same work": case.same_work,
                "batches": [],
            }
            contents["cases"].append(found)
            try:
                for batch, prompt in case.batches.items():
                    found["batches"].append(alternate(case, workers, batch, prompt))
                # Last: a process that was profiled is slower from then on.
                for timed in found["batches"]:
                    timed["replay"] = replay(case, workers, timed["batch"], timed["prompt"])
            except WorkerError as error:
                failed(case, workers, error)
        if "failed" in contents:
            raise SystemExit(f"did not run: {', '.join(contents['failed'])}")


def alternate(case: Case, workers: Mapping[str, Worker], batch: int, prompt: int) -> dict[str, Any]:
    """One batch size: rounds of all in turn."""
    arguments = {"batch": batch, "prompt": prompt, "decodes": DECODES}
    for worker in workers.values():
        for _ in range(2):
            worker.ask("steps", **arguments)
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
    for order in itertools.islice(itertools.cycle(itertools.permutations(workers)), ROUNDS):
        for side in order:
            samples[side].append(workers[side].ask("steps", **arguments))
    captured = next(size for size in sorted(case.server_args["cuda_graph_bs"]) if size >= batch)
    found: dict[str, Any] = {"batch": batch, "prompt": prompt, "captured": captured}
    for step in ("prefill", "decode"):
        found[step] = {}
        for kind in ("wall", "gpu"):
            sides = {side: [each[step][kind] for each in samples[side]] for side in samples}
            each = found[step][kind] = {
                **{side: statistics.median(times) for side, times in sides.items()},
                **benchmarks.ratio(sides["patched"], sides["published"]),
                "noise": benchmarks.ratio(sides[AGAIN], sides["published"]),
            }
            print(
                f"{case.name}, {batch} in {captured}: {step} {kind} {each['patched'] * 1000:.3f} ms, "
                f"{each['ratio']:.4f} ({each['low']:.4f} to {each['high']:.4f}), "
                f"the same tree {each['noise']['ratio']:.4f}",
                flush=True,
            )
    return found


def replay(case: Case, workers: Mapping[str, Worker], batch: int, prompt: int) -> dict[str, Any]:
    """What a decode step runs and launches."""
    # The profiler's first step has its own start in it; the last one counts.
    profiles = {
        side: workers[side].ask("steps", batch=batch, prompt=prompt, decodes=3, profiled=True)
        for side in ("published", "patched")
    }
    found = {}
    for kind in ("ran", "launched"):
        published, patched = (collections.Counter(profile[kind]) for profile in profiles.values())
        found[kind] = {
            "published": published.total(),
            "patched": patched.total(),
            "more": dict(patched - published),
            "fewer": dict(published - patched),
        }
    print(f"{case.name}, batch {batch}: {found}", flush=True)
    return found


def buffer(sizes: Mapping[str, int], workers: Mapping[str, Worker]) -> dict[str, Any]:
    """The routed experts' buffer: what each tree allocates, and what every rank's rows take."""
    rows = sizes["dp"] * max(sizes["chunk"], sizes["running"])
    found = {
        **sizes,
        **{side: workers[side].ask("routed_experts", **sizes) for side in ("published", "patched")},
        "needed": rows * sizes["layers"] * sizes["topk"] * 4,
    }
    print(f"routed experts' buffer: {found}", flush=True)
    return found


def main() -> None:
    """Measure, and write what came out."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    benchmarks.recorded(ROOT, "overhead", measure)


if __name__ == "__main__":
    main()
