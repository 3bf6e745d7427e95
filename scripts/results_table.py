#!/usr/bin/env python3
"""Writes the README's table of GPU results again, from `results/`."""

from pathlib import Path

from sglang_patchset import catalog, results

readme = Path(__file__).parents[1] / "README.md"
readme.write_text(results.in_readme(catalog.load(), readme.read_text(encoding="utf-8")), encoding="utf-8")
