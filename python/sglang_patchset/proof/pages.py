"""The pages that are generated: the README's matrix, and `docs/evidence.md`."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_patchset import matrix
from sglang_patchset.catalog import Catalog, Fix
from sglang_patchset.proof import cuda, figures, results
from sglang_patchset.proof.results import markdown_table

_BEGIN = "<!-- by scripts/write_docs.py, from patches/ -->\n"
_END = "<!-- end -->\n"
_PULL = "https://github.com/sgl-project/sglang/pull"


def readme(catalog: Catalog, text: str) -> str:
    """The README's text with the matrix of now between its marks."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return f"{before}{begin}\n{_matrix(catalog)}\n{end}{after}" if begin and end else text


def evidence(catalog: Catalog) -> str:
    """The page that says what was seen on GPUs, and what the fixes and the tool cost."""
    return "\n".join(_evidence(catalog)) + "\n"


def _matrix(catalog: Catalog) -> str:
    return markdown_table(
        ["fix", "what goes wrong", "patch", "as published"],
        [
            [
                f"`{fix.name}` [#{fix.upstream_pr}]({_PULL}/{fix.upstream_pr})",
                fix.symptom.replace("|", "\\|"),
                _places(catalog, fix, patch=True),
                _places(catalog, fix, patch=False),
            ]
            for fix in catalog.fixes.values()
        ],
    )


def _places(catalog: Catalog, fix: Fix, patch: bool) -> str:
    states = matrix.states(catalog, fix)
    if patch:
        return "".join(places for state, places in states if state == "patch")
    return "; ".join(f"{state}: {places}" for state, places in states if state != "patch")


def _evidence(catalog: Catalog) -> Iterator[str]:
    seen = results.seen(catalog)
    yield "# Evidence\n"
    yield "Written by `scripts/write_docs.py` from the files that runs wrote, in [`results/`](../results).\n"
    yield "## On GPUs\n"
    there = {(each.fix, each.release) for each in seen}
    every = {(fix.name, str(version)) for fix in catalog.fixes.values() for version in fix.patched}
    tested = {(job.fix.name, str(job.release.version)) for job in cuda.jobs(catalog)}
    yield (
        f"{len(there)} of {len(every)} patches were seen red and green on a GPU, by the same file: red on "
        "the release as published, for the reason that the bug gives, and green on the patched tree. "
        f"There are tests that need GPUs for {len(tested)}; `./scripts/test.sh` proves all without one.\n"
    )
    yield results.table(catalog)
    if missing := sorted(every - there):
        by_fix: dict[str, list[str]] = {}
        for fix, release in missing:
            by_fix.setdefault(fix, []).append(release)
        yield "Not seen on a GPU:\n"
        for fix, releases in by_fix.items():
            order = [str(version) for version in catalog.releases]
            yield f"- `{fix}` on {', '.join(sorted(releases, key=order.index))}"
        yield ""
    if failed := results.failed(catalog):
        yield "Run, and not as they should be; not repeated since:\n"
        for fix, release, tree, words in failed:
            yield f"- `{fix}` on {release}, {tree}: {' '.join(words.split())[:300]}"
        yield ""
    figured = [*figures.sentences(catalog.clone()), *results.sentences(catalog)]
    if figured:
        yield "## What it costs, what it brings\n"
        yield "\n".join(f"- {sentence}" for sentence in figured).replace("(results/", "(../results/")
        yield ""
    yield (
        "`sglang-patchset report` makes one page of all of `results/`, with plots and spreads. The runs "
        "behind it: `scripts/gpu_test.sh`; `scripts/bench_tool.py` and `scripts/bench_tests.py` anywhere; "
        "`scripts/bench_overhead.py` and `scripts/bench_mtp_reuse.py` on a GPU, in the environment of "
        "`scripts/gpu_test.sh`."
    )
