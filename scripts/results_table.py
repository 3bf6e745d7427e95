#!/usr/bin/env python3
"""Writes the README's table of GPU results and its figures again, from `results/`."""

import argparse
from pathlib import Path

from sglang_patchset import catalog
from sglang_patchset.proof import results

README = Path(__file__).parents[1] / "README.md"

argparse.ArgumentParser(description=__doc__).parse_args()
README.write_text(results.in_readme(catalog.load(), README.read_text(encoding="utf-8")), encoding="utf-8")
