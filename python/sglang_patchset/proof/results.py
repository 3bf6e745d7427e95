"""What was seen on GPUs: `results/gpu-<GPU>-<date>.json`, written by a run, and a table of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog
from sglang_patchset.errors import PatchsetError
from sglang_patchset.proof import figures
from sglang_patchset.proof.cuda import Machine, Pair
from sglang_patchset.proof.plots import number
from sglang_patchset.proof.verify import Outcome, Tree, Verdict

_BEGIN = "<!-- from results/, by scripts/results_table.py -->\n"
_FIGURES = "<!-- figures from results/, by scripts/results_table.py -->\n"
_END = "<!-- end -->\n"


def write(
    catalog: Catalog, box: Machine, pairs: Sequence[Pair], verdicts: Sequence[Verdict], seconds: float
) -> Path:
    """Write what a run on GPUs found, into `results/` of the clone.

    `series` has the digest of each release's patches: a result is about those and no others. `seed` is the
    one that the tests made weights and prompts from, `seconds` what the whole run took, and `cold` whether it
    had every kernel to compile.
    """
    now = datetime.now(timezone.utc).replace(microsecond=0)
    found = {(each.release, each.test, each.tree): each for each in verdicts}
    releases = {pair.release.version: pair.release for pair in pairs}
    contents = {
        "date": now.isoformat(),
        "seconds": round(seconds),
        "cold": box.cold,
        "seed": int(os.environ.get("REGRESSION_SEED", "0")),
        "gpu": box.gpu,
        "gpus": len(box.gpus),
        "driver": box.driver,
        "versions": box.versions,
        "series": {
            str(version): patches.digest(patches.load(catalog, release).patches)
            for version, release in releases.items()
        },
        "cells": [
            {
                "release": str(pair.release.version),
                "fix": pair.fix.name,
                "test": pair.suite.test,
                "gpus": pair.suite.gpus,
                "behind": [
                    patch.fix
                    for patch in patches.load(catalog, pair.release).patches
                    if patch.fix in pair.suite.behind
                ],
                **{
                    tree.value: _outcome(found.get((str(pair.release.version), pair.suite.test, tree)))
                    for tree in Tree
                },
            }
            for pair in pairs
        ],
    }
    count = f"{len(box.gpus)}x" if len(box.gpus) > 1 else ""
    name = re.sub(r"[^A-Za-z0-9]+", "-", box.gpu.removeprefix("NVIDIA "))
    path = catalog.root.parent / "results" / f"gpu-{count}{name}-{now:%Y-%m-%dT%H%M%SZ}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return path


def _outcome(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {"outcome": Outcome.NOT_RUN.value, "detail": "fewer GPUs than it needs"}
    return {
        "outcome": verdict.outcome.value,
        "seconds": verdict.seconds,
        "passed": verdict.passed,
        "signatures": verdict.signatures,
        "measured": verdict.measured,
        "detail": verdict.detail,
    }


@dataclass(frozen=True)
class Seen:
    """What was seen of a fix on one release: on which GPUs, when, and what came out on its two trees.

    `words` is what the published release's reds said, `passed` how many tests the patched tree passes.
    """

    fix: str
    release: str
    test: str
    on: str
    date: str
    published: str
    words: str
    patched: str
    passed: int


def seen(catalog: Catalog) -> list[Seen]:
    """The newest outcome of each cell that was run, of the patches as they are now; in the catalogue's order.

    Raises:
        PatchsetError: a file in `results/` is not one that a run wrote.
    """
    newest: dict[tuple[str, str], Seen] = {}
    for _, cells in _read(catalog):
        for each in cells:
            key = (each.release, each.test)
            newest[key] = max(newest.get(key, each), each, key=lambda one: one.date)
    return [
        newest[key]
        for fix in catalog.fixes.values()
        for suite in fix.cuda
        for version in catalog.releases
        if (key := (str(version), suite.test)) in newest
    ]


def runs(catalog: Catalog) -> list[Mapping[str, Any]]:
    """The newest run on each kind of machine that saw patches as they are now; as `seen` otherwise."""
    newest: dict[str, Mapping[str, Any]] = {}
    for run, cells in _read(catalog):
        machine = f"{run['gpus']} {run['gpu']}"
        if cells and run["date"] > newest.get(machine, {"date": ""})["date"]:
            newest[machine] = run
    return [newest[machine] for machine in sorted(newest)]


def sentences(catalog: Catalog) -> list[str]:
    """How long the newest run of the most tests took on each kind of machine, cold and warm, in Markdown.

    Of a run whose patches are others by now, in part or all, nothing is said.
    """
    fullest: dict[tuple[int, str, bool], tuple[int, str, int]] = {}
    for run, cells in _read(catalog):
        ran = [cell for cell in run["cells"] if cell["patched"]["outcome"] != Outcome.NOT_RUN.value]
        if len(cells) < len(ran) or "cold" not in run:
            continue
        key = (run["gpus"], run["gpu"], run["cold"])
        fullest[key] = max(fullest.get(key, (0, "", 0)), (len(cells), run["date"], run["seconds"]))
    found = []
    for gpus, gpu, cold in sorted(key for key, (rows, _, _) in fullest.items() if rows):
        rows, date, seconds = fullest[gpus, gpu, cold]
        found.append(
            f"**The tests that need GPUs**, {gpus} x {gpu}: both trees of {rows} rows take {seconds} s, "
            f"{'all kernels to compile' if cold else 'kernels compiled before'}. ({date[:10]})"
        )
    return found


def _read(catalog: Catalog) -> Iterator[tuple[Mapping[str, Any], list[Seen]]]:
    """Each file, and what it has about the patches as they are now."""
    digests = {
        str(release.version): patches.digest(patches.load(catalog, release).patches)
        for release in catalog.releases.values()
    }
    for path in (catalog.root.parent / "results").glob("gpu-*.json"):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            cells = list(_cells(run, digests))
        except (ValueError, TypeError, LookupError):
            raise PatchsetError(f"{path}: not what a run writes: remove it and run again") from None
        yield run, cells


def _cells(run: dict[str, Any], digests: Mapping[str, str]) -> Iterator[Seen]:
    for cell in run["cells"]:
        published, patched = (cell[tree.value] for tree in Tree)
        ran = Outcome.NOT_RUN.value not in (published["outcome"], patched["outcome"])
        if ran and run["series"][cell["release"]] == digests.get(cell["release"]):
            yield Seen(
                fix=cell["fix"],
                release=cell["release"],
                test=cell["test"],
                on=(f"{cell['gpus']} x " if cell["gpus"] > 1 else "") + run["gpu"],
                date=run["date"],
                published=published["outcome"],
                words=" ".join(_words(published).split()),
                patched=patched["outcome"],
                passed=patched["passed"],
            )


def _words(outcome: dict[str, Any]) -> str:
    """What a reader wants of it: of a long fraction, three digits."""
    words = "; ".join(dict.fromkeys(outcome["signatures"].values())) or str(outcome["detail"])
    return re.sub(r"\d+\.\d{4,}", lambda fraction: number(float(fraction[0])), words)


def table(catalog: Catalog) -> str:
    """What was seen, as a Markdown table."""
    rows = [
        [
            f"`{each.fix}`",
            each.release,
            f"{each.published}: {each.words}".replace("|", "\\|"),
            f"{each.patched} ({each.passed} tests)" if each.passed > 1 else each.patched,
            f"{each.on}, {each.date[:10]}",
        ]
        for each in seen(catalog)
    ]
    if not rows:
        return ""
    header = ["fix", "release", "as published", "patched", "seen on"]
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_readme(catalog: Catalog, readme: str) -> str:
    """The README's text with the table and the figures of now between their marks."""
    figured = [*figures.sentences(catalog.root.parent), *sentences(catalog)]
    for mark, text in (
        (_BEGIN, table(catalog)),
        (_FIGURES, "".join(f"- {sentence}\n" for sentence in figured)),
    ):
        before, begin, rest = readme.partition(mark)
        if begin:
            _, end, after = rest.partition(_END)
            readme = f"{before}{begin}{f'{chr(10)}{text}{chr(10)}' if text else ''}{end}{after}"
    return readme
