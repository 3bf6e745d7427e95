"""What the newest benchmarks say, in a sentence each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from sglang_patchset.proof import benchmarks
from sglang_patchset.proof.plots import number

_Writer = Callable[[Mapping[str, Any]], Iterator[str]]
OVERHEAD, REUSE, TOOL, TESTS = "overhead", "mtp-reuse", "tool", "tests"


# The fixes whose code a benchmark of SGLang's speed runs, in the patched tree alone.
_ABOUT = {
    OVERHEAD: {"dsa-index-sharing", "dsv4-expert-distribution", "swa-graph-padding"},
    REUSE: {"dsa-index-sharing"},
}


def sentences(root: Path) -> list[str]:
    """The main figures of the clone at `root`, in Markdown; none of a benchmark that nobody ran."""
    writers = {OVERHEAD: _overhead, REUSE: _reuse, TOOL: _tool, TESTS: _tests}
    return [
        f"{sentence} ([{str(result['date'])[:10]}](results/{result['file']}))"
        for sentence, result in _written(root, writers)
    ]


def speed(root: Path, fix: str, releases: Set[str]) -> list[str]:
    """What was measured of SGLang's speed with a fix, on the releases that have a patch of it."""
    writers = {OVERHEAD: _overhead, REUSE: _reuse}
    about = {what: writer for what, writer in writers.items() if fix in _ABOUT[what]}
    return [
        f"{sentence} ({str(result['date'])[:10]})"
        for sentence, result in _written(root, about)
        if not releases.isdisjoint(_measured(result))
    ]


def _measured(result: Mapping[str, Any]) -> set[str]:
    """The releases that a benchmark ran on."""
    return {case["release"] for case in result["cases"]} if "cases" in result else {result["release"]}


def _written(root: Path, writers: Mapping[str, _Writer]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for what, writer in writers.items():
        if result := benchmarks.newest(root, what):
            yield " ".join(writer(result)), result


def steady(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every ratio of `overhead` in which the fixes should leave the work as it is, by the GPU's time."""
    return [
        (f"{case['name']}, {step}, {batch['batch']} in {batch['captured']}", batch[step]["gpu"])
        for case in result["cases"]
        if case["same work"]
        for step in ("decode", "prefill")
        for batch in case["batches"]
    ]


def launches(result: Mapping[str, Any]) -> int:
    """The most kernels, copies and fills that a replayed step runs more when it is patched."""
    counts = [batch["replay"]["ran"] for case in result["cases"] for batch in case["batches"]]
    return max(int(each["patched"]) - int(each["published"]) for each in counts)


def _overhead(result: Mapping[str, Any]) -> Iterator[str]:
    ratios = [each["ratio"] for _, each in steady(result)]
    noise = [each["noise"]["ratio"] for _, each in steady(result)]
    cases = [case for case in result["cases"] if case["same work"]]
    models = ", ".join(f"{case['name'].partition(',')[0]} on {case['release']}" for case in cases)
    yield f"**What a step costs**, {result['gpu']}, {models}, all patches: prefill and decode take"
    yield f"{min(ratios):.3f} to {max(ratios):.3f} times as long patched as they take published, where"
    yield f"a second process of the published tree takes {min(noise):.3f} to {max(noise):.3f}."
    yield f"A replayed decode step runs at most {launches(result)} kernel, copy or fill more."


def _reuse(result: Mapping[str, Any]) -> Iterator[str]:
    best = min(result["iterations"], key=lambda each: each["graph"]["ratio"])
    graph = best["graph"]
    yield f"**Draft steps that reuse their indices**, {result['gpu']}, GLM-5.2's dimensions on"
    yield f"{result['release']}: best at {best['context'] // 1024}k tokens, batch {best['batch']},"
    yield f"{best['steps']} steps, where an iteration's graph takes {graph['ratio']:.2f} of the time"
    yield f"(no indexer at all: {graph['limit']:.2f})"
    yield f"and its indexer's part is {graph['indexer speedup'] or 0:.1f} times faster."


def _tool(result: Mapping[str, Any]) -> Iterator[str]:
    verbs = result["verbs"]
    cpu = {verb: verbs[verb]["cpu"] for verb in verbs}
    yield f"**The tool**: `status` takes {number(cpu['status']['ours'])} s of CPU time and `apply`"
    yield f"{number(cpu['apply']['ours'])} s, of which Python's start and the tool's own are"
    yield f"{number(result['tool start']['cpu'])} s; `git apply` by hand and a start of"
    yield f"Python take {number(cpu['apply']['theirs'])} s. `wheel` takes {number(cpu['wheel']['ratio'])} of"
    yield "the CPU time of unzip, `git apply` and zip."


def _tests(result: Mapping[str, Any]) -> Iterator[str]:
    alone, together = sorted(result["runs"], key=lambda run: int(run["processes"]))
    yield f"**The tests**: the matrix without a GPU, {together['tests']} tests on {len(together['trees'])}"
    yield f"trees, takes {together['seconds']:.0f} s with two processes at a time and {alone['seconds']:.0f}"
    yield f"s with one, {together['cpu']:.0f} and {alone['cpu']:.0f} s of CPU time."
