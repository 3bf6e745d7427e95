"""`results/` as one HTML page: the matrix in red and green, and the benchmarks with their plots.

Nothing in it is fetched and nothing runs: it can be sent as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sglang_patchset.catalog import Catalog
from sglang_patchset.proof import benchmarks, figures, plots, results
from sglang_patchset.proof.figures import OVERHEAD, REUSE, TESTS, TOOL
from sglang_patchset.proof.plots import Line, Range, number
from sglang_patchset.proof.results import Seen

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --dim: #5b636d; --rule: #d9dee3;
  --soft: #f3f5f7; --red: #b3261e; --green: #16703c; --link: #0b57a4;
  --c0: #1f6fb4; --c1: #c2571a; --c2: #16805f; --c3: #8a4bb0; --band: #dff0e4; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181c; --ink: #e4e8ec; --dim: #9aa4ae;
  --rule: #333b43; --soft: #1d2329; --red: #ff8a80; --green: #6fd694; --link: #7db8f0;
  --c0: #64aef0; --c1: #f0955a; --c2: #4fc7a0; --c3: #c69be6; --band: #1d3a29; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 66rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--rule); padding-top: 1.25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p, ul, ol { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
code { font: .9em ui-monospace, monospace; }
small, .dim { color: var(--dim); font-size: .875rem; }
.red { color: var(--red); font-weight: 600; } .green { color: var(--green); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--rule); }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--link); font-size: .875rem; }
.plots { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; max-width: 30rem; }
figcaption { font-size: .875rem; font-weight: 600; margin: .75rem 0 .25rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11.5px system-ui, sans-serif; fill: var(--ink); }
svg .small { font-size: 10.5px; fill: var(--dim); }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .band { fill: var(--band); }
svg path { fill: none; stroke-width: 2; } svg .dash { stroke-dasharray: 4 3; stroke-width: 1.5; }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
svg .s0 { stroke: var(--c0); } svg .s1 { stroke: var(--c1); } svg .s2 { stroke: var(--c2); }
svg .s3 { stroke: var(--c3); }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin-top: 1rem; font-size: .8125rem;
  color: var(--dim); }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .35rem; }
.k0 { background: var(--c0); } .k1 { background: var(--c1); } .k2 { background: var(--c2); }
.k3 { background: var(--c3); }
.cards code, .whole { white-space: nowrap; }
sup { line-height: 0; }
@media (max-width: 40rem) {
  .cards thead { display: none; }
  .cards tr { display: block; border-bottom: 1px solid var(--rule); padding: .5rem 0; }
  .cards td { display: block; border: 0; padding: .1rem 0; }
  .cards td::before { content: attr(data-label) " "; color: var(--dim); } }
"""


def write(catalog: Catalog, path: Path) -> None:
    """Write the page.

    Raises:
        PatchsetError: no clone, or a file in `results/` is not one that a run wrote.
    """
    path.write_text(page(catalog), encoding="utf-8")


def page(catalog: Catalog) -> str:
    """The page; a benchmark that nobody ran has no section."""
    root = catalog.clone()
    seen = results.seen(catalog)
    sections = [*_matrix(catalog, seen), *_seen(catalog, seen)]
    for what, section in ((OVERHEAD, _overhead), (REUSE, _reuse), (TOOL, _tool), (TESTS, _tests)):
        if result := benchmarks.newest(root, what):
            sections += [*section(result), _origin(result)]
    sentences = [*figures.sentences(root), *results.sentences(catalog)]
    summary = "".join(f"<li>{_markdown(sentence)}</li>" for sentence in sentences)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>sglang-patchset: results</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        "<h1>sglang-patchset: what was seen and measured</h1>\n"
        "<p>Bug fixes for pinned SGLang releases. Each is red on the release as published, for the reason "
        "that the bug gives, and green on the patched tree. All of this page comes from files in "
        "<code>results/</code> that runs wrote.</p>\n"
        f"<ul>{summary}</ul>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def _markdown(sentence: str) -> str:
    """The little Markdown that the sentences have."""
    text = escape(sentence, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    return re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text)


def _matrix(catalog: Catalog, seen: Iterable[Seen]) -> Iterator[str]:
    outcomes: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for each in seen:
        outcomes.setdefault((each.fix, each.release), set()).add((each.published, each.patched))
    rows, notes = [], dict[tuple[str, str], int]()
    for fix in catalog.fixes.values():
        row = [f"<code>{fix.name}</code><br><small>{escape(fix.symptom)}</small>"]
        for version in catalog.releases:
            cell = fix.cell(version)
            if cell is None:
                text = "?"
            elif not cell.patch:
                text = f'<span class="dim">{cell.state.words}</span>'
            elif found := outcomes.get((fix.name, str(version))):
                text = ", ".join(f"{_outcome(one)} → {_outcome(other)}" for one, other in sorted(found))
            else:
                text = 'patch <span class="dim">(not seen on a GPU)</span>'
            for note in filter(None, (cell.note, cell.left) if cell else ()):
                text += f"&nbsp;<sup>{notes.setdefault((fix.name, note), len(notes) + 1)}</sup>"
            row.append(text)
        rows.append(row)
    yield "<h2>Fixes and releases</h2>"
    yield _table(["fix", *map(str, catalog.releases)], rows, cards=True)
    items = "".join(f"<li><code>{fix}</code>: {escape(note)}</li>" for fix, note in notes)
    if items:
        yield f'<ol class="dim">{items}</ol>'


def _outcome(words: str) -> str:
    return f'<span class="{escape(words)}">{escape(words)}</span>'


def _seen(catalog: Catalog, seen: Sequence[Seen]) -> Iterator[str]:
    if not seen:
        return
    yield "<h2>Seen on GPUs</h2>"
    yield "<p>The words are those of the tests that fail as published; the same files pass patched.</p>"
    rows = [
        [
            f"<code>{each.fix}</code>",
            each.release,
            f"{_outcome(each.published)} {escape(each.words)}",
            f"{_outcome(each.patched)} {each.passed} test{'s' * (each.passed != 1)}",
            f'<span class="whole">{escape(each.on)},</span> <span class="whole">{each.date[:10]}</span>',
        ]
        for each in seen
    ]
    yield _table(["fix", "release", "as published", "patched", "seen on"], rows, cards=True)
    for run in results.runs(catalog):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        took = f"; the run took {run['seconds']} s" if run.get("seconds") else ""
        yield (
            f"<p><small>{run['date'][:10]}, {run['gpus']} x {escape(run['gpu'])}, driver "
            f"{escape(run['driver'])}, {escape(versions)}{took}.</small></p>"
        )


def _overhead(result: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>What a step costs</h2>"
    yield (
        "<p>Time of a step on the patched tree over the published one's, processes in turns: the median of "
        "the rounds' ratios, and where half of them lie. The aim is the band. Below each stands what a "
        "second process of the published tree takes: what does not stand out from that is not seen here. "
        "<i>5 in 8</i> is a batch of 5 in a graph of 8. A case that is not meant to keep its work is in the "
        "table alone.</p>"
    )
    drawn = []
    for step in ("decode", "prefill"):
        rows = [
            Range(label, each["ratio"], each["low"], each["high"], colour)
            for name, ours in figures.steady(result)
            if f", {step}, " in name
            for label, each, colour in ((name, ours, 0), ("published again", ours["noise"], 1))
        ]
        plot = plots.ranges(f"{step} steps, patched over published", rows, (0.995, 1.005), "GPU time, ratio")
        drawn.append(_figure(f"{step.capitalize()} steps", plot))
    yield _key(["patched", "published again"])
    yield f'<div class="plots">{"".join(drawn)}</div>'
    table, launches = [], []
    for case in result["cases"]:
        for batch in case["batches"]:
            name = f"{case['name']}, {batch['batch']} in {batch['captured']}"
            name += "" if case["same work"] else " (other work)"
            for step in ("decode", "prefill"):
                for kind in ("gpu", "wall"):
                    each = batch[step][kind]
                    times = [f"{each[side] * 1000:.3f} ms" for side in ("published", "patched")]
                    ratio = [
                        f"{of[key]:.4f}" for of in (each, each["noise"]) for key in ("ratio", "low", "high")
                    ]
                    table.append([escape(name), f"{step}, {kind}", *times, *ratio])
            for kind, each in batch["replay"].items():
                more = ", ".join(f"{count} {what}" for what, count in each["more"].items())
                fewer = ", ".join(f"{count} {what}" for what, count in each["fewer"].items())
                what = {"ran": "on the GPU", "launched": "by the CPU"}[kind]
                counts = [str(each[side]) for side in ("published", "patched")]
                launches.append(
                    [escape(name), what, *counts, escape(more or "none"), escape(fewer or "none")]
                )
    head = ["case", "step", "published", "patched", "ratio", "half of the rounds from", "to"]
    head += ["published again", "from", "to"]
    yield _more("All times", _table(head, table, numbers=range(2, 10)))
    head = ["case", "launched", "published", "patched", "more when patched", "fewer when patched"]
    yield "<h3>A replayed decode step's kernels, copies and fills</h3>"
    yield f"<p>At most {figures.launches(result)} more when patched.</p>"
    yield _more("All counts", _table(head, launches, numbers=(2, 3)))
    if result["buffers"]:
        yield "<h3>The buffer of returned experts</h3>"
        head = ["ranks", "chunk", "requests", "layers", "experts", "published", "patched", "needed"]
        keys = ["dp", "chunk", "running", "layers", "topk", "published", "patched", "needed"]
        rows_of = [
            [number(each[key] / 2**20) + " MiB" if key in keys[5:] else str(each[key]) for key in keys]
            for each in result["buffers"]
        ]
        yield _table(head, rows_of, numbers=range(8))


def _reuse(result: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>What draft steps gain by reuse</h2>"
    yield (
        "<p>One next-token layer with GLM-5.2's dimensions. The first draft step's top-k indices serve the "
        "later ones: the time of an iteration's graph over the time without, against the context. Dashed is "
        "the limit, an iteration that runs no indexer at all.</p>"
    )
    iterations = result["iterations"]
    batches = sorted({each["batch"] for each in iterations})
    contexts = sorted({each["context"] for each in iterations})
    drawn = []
    for steps in sorted({each["steps"] for each in iterations}):
        series = []
        for colour, batch in enumerate(batches):
            chosen = [each for each in iterations if (each["steps"], each["batch"]) == (steps, batch)]
            for key, dashed in (("ratio", False), ("limit", True)):
                points = [(each["context"], each["graph"][key]) for each in chosen]
                series.append(Line(f"batch {batch}", points, colour, dashed))
        title = f"{steps} steps"
        plot = plots.lines(
            title,
            series,
            "tokens of context",
            "time with reuse / without",
            x_ticks=contexts,
            x_name=_kibi,
            log=True,
        )
        drawn.append(_figure(title, plot))
    yield _key([f"batch {batch}" for batch in batches])
    yield f'<div class="plots">{"".join(drawn)}</div>'
    rows = []
    for each in iterations:
        graph, whole = each["graph"], each["iteration"]
        rows.append(
            [
                _kibi(each["context"]),
                str(each["batch"]),
                str(each["steps"]),
                *(f"{graph[key] * 1000:.3f}" for key in ("without", "with", "none")),
                f"{graph['ratio']:.3f} ({graph['low']:.3f} to {graph['high']:.3f})",
                f"{whole['ratio']:.3f}",
                f"{graph['indexer share']:.1%}",
                f"{graph['indexer speedup']:.2f}" if graph["indexer speedup"] else "",
                f"{graph['of the limit']:.0%}" if graph["of the limit"] else "",
            ]
        )
    head = ["context", "batch", "steps", "without, ms", "with, ms", "no indexer, ms", "ratio"]
    head += [
        "ratio with what surrounds the graph",
        "indexer's share",
        "indexer's speedup",
        "of what is possible",
    ]
    yield _more("All iterations", _table(head, rows, numbers=range(11)))


def _tool(result: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>The tool</h2>"
    yield (
        f"<p>{result['patches']} patches on SGLang {result['release']}, beside the commands that a user "
        "would type instead: <code>git apply</code> for each patch and a start of Python; unzip, "
        "<code>git apply</code> and zip. CPU time, medians.</p>"
    )
    groups = [
        (verb, [(each["cpu"][whose], colour) for colour, whose in enumerate(("ours", "theirs"))])
        for verb, each in result["verbs"].items()
    ]
    starts = [
        ("a start of Python", [(result["start"]["cpu"], 1)]),
        ("of the tool", [(result["tool start"]["cpu"], 0)]),
    ]
    verbs = _figure("CPU time", plots.bars("CPU time of each verb", groups, "s"))
    start = _figure("Of that, to start", plots.bars("CPU time of a start", starts, "s"))
    yield _key(["sglang-patchset", "by hand"])
    yield f'<div class="plots">{verbs}{start}</div>'
    drawn = []
    for what in ("patches", "files"):
        growth = result[f"{what} growth"]
        series = [
            Line(verb, [(each[what], each[verb]["ours"]["cpu"]) for each in growth], colour)
            for colour, verb in enumerate(("status", "apply", "revert"))
        ]
        series.append(
            Line(
                "git apply", [(each[what], each["apply"]["theirs"]["cpu"]) for each in growth], 3, dashed=True
            )
        )
        title = f"As the {what} grow"
        ticks = [each[what] for each in growth]
        plot = plots.lines(
            title, series, what, "s of CPU time", x_ticks=ticks, x_name=lambda tick: f"{tick:g}"
        )
        drawn.append(_figure(title, plot))
    yield _key(["status", "apply", "revert", "git apply, dashed"])
    yield f'<div class="plots">{"".join(drawn)}</div>'
    rows = [
        [
            verb,
            {"cpu": "CPU", "wall": "clock"}[kind],
            *(f"{times[whose]:.3f} s" for whose in ("ours", "theirs")),
            *(f"{times[key]:.2f}" for key in ("ratio", "low", "high")),
        ]
        for verb, each in result["verbs"].items()
        for kind, times in each.items()
    ]
    head = ["verb", "by", "ours", "by hand", "ratio", "half of the rounds from", "to"]
    yield _more("All times", _table(head, rows, numbers=range(2, 7)))


def _tests(result: Mapping[str, Any]) -> Iterator[str]:
    together = max(result["runs"], key=lambda run: int(run["processes"]))
    yield "<h2>The tests</h2>"
    runs = "; ".join(
        f"{run['processes']} at a time: {run['seconds']:.0f} s ({run['cpu']:.0f} s of CPU time)"
        for run in result["runs"]
    )
    yield f"<p>Every cell of the matrix without a GPU, a process for each tree. {runs}.</p>"
    rows = []
    for tree in together["trees"]:
        tests = sum(tree["cells"].values())
        rows.append((f"{tree['release']} {tree['tree']}", [(max(tree["seconds"] - tests, 0), 0), (tests, 1)]))
    yield _key(["to start: imports of torch and SGLang", "tests"])
    yield f'<div class="plots">{_figure("Each tree", plots.stacks("Seconds of each tree", rows, "s"))}</div>'
    slowest = [
        [
            escape(each["on"]),
            f"<code>{escape(each['test'].replace('::', ' '))}</code>",
            f"{each['seconds']:.2f} s",
        ]
        for each in together["slowest"]
    ]
    yield _more("The slowest ten tests", _table(["on", "test", "time"], slowest, numbers=(2,)))
    fixes = sorted({fix for tree in together["trees"] for fix in tree["cells"]})
    cells = [
        [f"{tree['release']} {tree['tree']}", *(f"{tree['cells'].get(fix, 0):.1f} s" for fix in fixes)]
        for tree in together["trees"]
    ]
    yield _more("By cell", _table(["tree", *fixes], cells, numbers=range(1, len(fixes) + 1)))


def _origin(result: Mapping[str, Any]) -> str:
    words = [str(result["date"])[:10], f"{result['cores']} cores", f"Python {result['python']}"]
    if "gpu" in result:
        words += [result["gpu"], f"driver {result['driver']}"]
        words += [f"{name} {version}" for name, version in result["versions"].items() if name != "python"]
    words += [f"the run took {result['seconds']:.0f} s", str(result["file"])]
    return f"<p><small>{escape(', '.join(words))}</small></p>"


def _kibi(tokens: float) -> str:
    return f"{tokens / 1024:g}k"


def _figure(caption: str, plot: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{plot}</figure>"


def _key(names: Iterable[str]) -> str:
    items = "".join(f'<span><i class="k{n}"></i>{escape(name)}</span>' for n, name in enumerate(names))
    return f'<div class="key">{items}</div>'


def _more(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), cards: bool = False
) -> str:
    """A table whose cells are HTML; `cards` makes each row a block on a narrow screen."""
    right = set(numbers)

    def cell(tag: str, place: int, text: str) -> str:
        kind = ' class="number"' if place in right else ""
        label = f' data-label="{escape(head[place])}"' if cards and tag == "td" and place else ""
        return f"<{tag}{kind}{label}>{text}</{tag}>"

    top = "".join(cell("th", place, escape(text)) for place, text in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell('td', place, text) for place, text in enumerate(row))}</tr>" for row in rows
    )
    kind = " class=cards" if cards else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
