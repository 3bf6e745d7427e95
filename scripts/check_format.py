#!/usr/bin/env python3
"""Sees that black has nothing to say of the regression tests, nor of a patched file that was clean before."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from sglang_patchset import catalog, patches, repair, survey
from sglang_patchset.proof.trees import Trees

ROOT = Path(__file__).resolve().parents[1]


def unclean(directory: Path) -> set[str]:
    """The Python files below a directory that black would write otherwise, by their names in it."""
    command = [sys.executable, "-m", "black", "--check", "--quiet", "--target-version=py310"]
    files = [
        str(path.relative_to(directory))
        for path in sorted(directory.rglob("*.py"))
        if subprocess.run([*command, str(path)], check=False).returncode
    ]
    return set(files)


def main() -> int:
    """Check.

    Returns:
        The exit code: 1 where something is not as black would write it.
    """
    found = {f"tests/regression/{name}" for name in unclean(ROOT / "tests" / "regression")}
    tables = catalog.load(ROOT / "patches")
    trees = Trees(tables, ROOT / ".cache" / "trees")
    for release in tables.releases.values():
        series = patches.load(tables, release)
        published = trees.published(release)
        before = {path: (published / path).read_bytes() for path in series.files}
        whole = {patch.fix for patch in series.patches}
        after = repair.contents(survey.take(series, before.get), add=whole)
        with tempfile.TemporaryDirectory() as scratch:
            for side, contents in (("before", before), ("after", after)):
                for path, data in contents.items():
                    file = Path(scratch, side, path)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)
            worse = unclean(Path(scratch, "after")) - unclean(Path(scratch, "before"))
        found |= {f"{path}, as patches/{release.version} leaves it" for path in worse}
    for name in sorted(found):
        print(f"black would write it otherwise: {name}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
