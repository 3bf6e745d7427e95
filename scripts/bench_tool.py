#!/usr/bin/env python3
"""What the tool costs beside the bare commands that a user would type instead, and how that grows.

    PYTHONPATH=python python scripts/bench_tool.py      # no GPU; ten minutes on two cores

needs git, zip and unzip, and writes results/bench-tool-<date>.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_patchset import catalog, git, patches, releases
from sglang_patchset.proof import benchmarks
from sglang_patchset.proof.benchmarks import Usage
from sglang_patchset.proof.trees import Trees

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
ROUNDS = 15
WHEEL_ROUNDS = 7
GROWTH_ROUNDS = 7
START = (sys.executable, "-c", "pass")
# What grows, with the other one as it is.
PATCHES, FILES = (1, 10, 20, 30, 40, 50), (3000, 10000, 20000, 30000)

Operation = Callable[[], Usage]


def tool(*arguments: object, project: Path = ROOT, cwd: Path = ROOT) -> Usage:
    """The tool of a clone."""
    command = [sys.executable, "-m", "sglang_patchset", *map(str, arguments)]
    return benchmarks.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(project / "python")})


def bare(files: Sequence[Path], tree: Path, *options: str) -> Usage:
    """`git apply` for each patch."""
    return benchmarks.run(*(["git", "apply", "-p2", *options, str(file)] for file in files), cwd=tree)


def alternate(rounds: int, operations: Mapping[str, Operation]) -> dict[str, list[Usage]]:
    """Each operation once a round, in an order that turns; one round before them is not counted."""
    found: dict[str, list[Usage]] = {name: [] for name in operations}
    for number in range(rounds + 1):
        for name, operation in operations.items():
            usage = operation()
            if number:
                found[name].append(usage)
    return found


def medians(usages: Sequence[Usage]) -> dict[str, float]:
    """By wall clock and by CPU time."""
    return {kind: statistics.median(getattr(each, kind) for each in usages) for kind in ("wall", "cpu")}


def comparison(ours: Sequence[Usage], theirs: Sequence[Usage]) -> dict[str, Any]:
    """Medians of both, and their ratios, by wall clock and by CPU time."""
    by_us, by_them = medians(ours), medians(theirs)
    return {
        kind: {
            "ours": by_us[kind],
            "theirs": by_them[kind],
            **benchmarks.ratio(
                [getattr(each, kind) for each in ours], [getattr(each, kind) for each in theirs]
            ),
        }
        for kind in by_us
    }


def measure(contents: dict[str, Any], scratch: Path) -> None:
    """All of it, into `contents`."""
    tables = catalog.load(ROOT / "patches")
    release = tables.default
    files = [patch.path for patch in patches.load(tables, release).patches]
    published = Trees(tables, CACHE / "trees").published(release)
    mine, theirs = scratch / "mine", scratch / "theirs"
    for tree in (mine, theirs):
        shutil.copytree(published, tree)
    contents |= {"release": str(release.version), "patches": len(files), "verbs": {}}

    found = alternate(
        ROUNDS,
        {
            "start": lambda: benchmarks.run(START, cwd=scratch),
            # The tool's own: its modules are imported and its tables read.
            "tool start": lambda: tool("--version"),
            "status": lambda: tool("status", mine),
            "bare status": lambda: bare(files, theirs, "--check"),
            "apply": lambda: tool("apply", mine),
            "bare apply": lambda: bare(files, theirs),
            "revert": lambda: tool("revert", mine),
            "bare revert": lambda: bare(files[::-1], theirs, "--reverse"),
        },
    )
    for name in ("start", "tool start"):
        contents[name] = medians(found[name])
    for verb in ("status", "apply", "revert"):
        # A user of git has no interpreter to start; whoever chose a tool in Python has.
        commands = [each + start for each, start in zip(found[f"bare {verb}"], found["start"], strict=True)]
        contents["verbs"][verb] = comparison(found[verb], commands)
        report(verb, contents["verbs"][verb])

    wheels = scratch / "wheels"
    wheels.mkdir()
    source = releases.fetch(release, wheels)
    out, unpacked, packed = scratch / "out", scratch / "unpacked", scratch / "packed.whl"

    def by_hand() -> Usage:
        shutil.rmtree(unpacked, ignore_errors=True)
        packed.unlink(missing_ok=True)
        usage = benchmarks.run(("unzip", "-q", str(source), "-d", str(unpacked)), cwd=scratch)
        usage += bare(files, unpacked)
        return usage + benchmarks.run(("zip", "-qr", str(packed), "."), cwd=unpacked)

    found = alternate(WHEEL_ROUNDS, {"wheel": lambda: tool("wheel", source, out), "by hand": by_hand})
    contents["verbs"]["wheel"] = comparison(found["wheel"], found["by hand"])
    report("wheel", contents["verbs"]["wheel"])

    for what, sizes in (("patches", PATCHES), ("files", FILES)):
        contents[what + " growth"] = []
        for size in sizes:
            number, count = (size, FILES[0]) if what == "patches" else (len(files), size)
            grown = growth(scratch / f"{what}-{size}", number, count)
            contents[what + " growth"].append({what: size, **grown})
            words = ", ".join(f"{verb} {grown[verb]['ours']['cpu']:.3f} s" for verb in grown)
            print(f"{size} {what}: {words} of CPU", flush=True)


def report(verb: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """A line of progress."""
    for kind, each in found.items():
        print(
            f"{verb}: {each['ours']:.3f} s {kind}, bare {each['theirs']:.3f} s, "
            f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})",
            flush=True,
        )


def growth(scratch: Path, number: int, count: int) -> dict[str, dict[str, Any]]:
    """Medians of the verbs with so many patches on a tree of so many files, and of `git apply` for each."""
    project = made_up(scratch, number, count)
    files = sorted((project / "patches" / VERSION).glob("*.patch"))
    mine, theirs = scratch / "mine", scratch / "theirs"
    found = alternate(
        GROWTH_ROUNDS,
        {
            "status": lambda: tool("status", mine, project=project),
            "bare status": lambda: bare(files, theirs, "--check"),
            "apply": lambda: tool("apply", mine, project=project),
            "bare apply": lambda: bare(files, theirs),
            "revert": lambda: tool("revert", mine, project=project),
            "bare revert": lambda: bare(files[::-1], theirs, "--reverse"),
        },
    )
    shutil.rmtree(scratch)
    return {
        verb: {
            whose: medians(usages)
            for whose, usages in (("ours", found[verb]), ("theirs", found[f"bare {verb}"]))
        }
        for verb in ("status", "apply", "revert")
    }


# A release that nobody published, with as many patches and files as are asked for.
VERSION = "0.5.12"
LINES = [f"value_{line} = {line}\n" for line in range(300)]


def made_up(scratch: Path, number: int, count: int) -> Path:
    """A clone whose only release has so many patches, of a file each, and two trees of it."""
    project = scratch / "project"
    series = project / "patches" / VERSION
    series.mkdir(parents=True)
    (project / "patches" / "fixes").mkdir()
    shutil.copytree(ROOT / "python", project / "python")
    changed = [*LINES[:150], "value_150 = 'mended'\n", *LINES[151:]]
    old, new = ("".join(lines).encode() for lines in (LINES, changed))
    hunk = "".join(f" {line}" for line in LINES[147:150])
    hunk += f"-{LINES[150]}+{changed[150]}" + "".join(f" {line}" for line in LINES[151:154])
    names, touched = "", []
    for index in range(number):
        path = f"sglang/srt/touched_{index}.py"
        touched.append(path)
        name = f"fix-{index}.patch"
        names += f"{name}\n"
        (series / name).write_text(
            f"Subject: [PATCH] Mend {path}\n---\n"
            f"diff --git a/python/{path} b/python/{path}\n"
            f"index {git.blob_id(old)}..{git.blob_id(new)} 100644\n"
            f"--- a/python/{path}\n+++ b/python/{path}\n@@ -148,7 +148,7 @@\n{hunk}"
        )
        (project / "patches" / "fixes" / f"fix-{index}.toml").write_text(
            f'upstream-pr = {index}\ntitle = "made up"\nsymptom = "none"\ncode = ["{path}"]\n'
        )
    (series / "series").write_text(names)
    (series / "wheels.sha256").touch()
    (series / "release.toml").write_text(
        f'date = "2026-01-01"\npatchset = 1\npython = ["3.12"]\ntree = "{"0" * 40}"\nruns-with = {{}}\n'
    )
    (project / "patches" / "default").write_text(f"{VERSION}\n")
    others = [f"sglang/srt/package_{index // 100}/module_{index}.py" for index in range(count - number)]
    for tree in (scratch / "mine", scratch / "theirs"):
        (tree / "sglang" / "srt").mkdir(parents=True)
        (tree / "sglang" / "__init__.py").touch()
        (tree / "sglang" / "_version.py").write_text(f"__version__ = version = '{VERSION}'\n")
        for path in (*touched, *others):
            file = tree / path
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(old)
        info = tree / f"sglang-{VERSION}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: sglang\nVersion: {VERSION}\n")
        lines = [f"{path},sha256=unchecked,{len(old)}\n" for path in (*touched, *others)]
        (info / "RECORD").write_text("sglang/__init__.py,,\n" + "".join(lines))
    return project


def main() -> None:
    """Measure, and write what came out."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name in ("git", "zip", "unzip"):
        if shutil.which(name) is None:
            sys.exit(f"bench_tool.py: there is no {name} on the PATH: install it")
    with tempfile.TemporaryDirectory(prefix="bench-tool-") as scratch:
        benchmarks.recorded(ROOT, "tool", lambda contents: measure(contents, Path(scratch)))


if __name__ == "__main__":
    main()
