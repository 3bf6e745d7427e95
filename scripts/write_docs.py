#!/usr/bin/env python3
"""Writes what is generated: the README's matrix from the catalogue, docs/evidence.md from `results/`."""

import argparse
from pathlib import Path

from sglang_patchset import catalog
from sglang_patchset.proof import pages, results

ROOT = Path(__file__).parents[1]

argparse.ArgumentParser(description=__doc__).parse_args()
tables = catalog.load()
readme = ROOT / "README.md"
readme.write_text(pages.readme(tables, readme.read_text(encoding="utf-8")), encoding="utf-8")
(ROOT / "docs" / "evidence.md").write_text(pages.evidence(tables), encoding="utf-8")
for row in results.gone(tables):
    print(f"{row.fix} {row.release} on {row.on} of {row.date[:10]} is gone: {', '.join(row.why)} changed")
