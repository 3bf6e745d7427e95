"""Tables for a terminal: columns, colours where it is one, and paragraphs below a row."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
# A cell is its text, or that and a colour.
Cell = str | tuple[str, str]


def is_terminal() -> bool:
    """Whether what is printed is read by a person."""
    return sys.__stdout__ is not None and sys.__stdout__.isatty()


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """The lines of a table, the header's first. The last column is not padded."""
    texts = [[_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(_coloured(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def paragraphs(texts: Iterable[str], indent: int = 4) -> list[str]:
    """Lines of text below a row: folded to a terminal's width, whole for other programs."""
    blank = " " * indent
    if not is_terminal():
        return [blank + text for text in texts if text]
    width = max(shutil.get_terminal_size().columns, 40)
    return [
        line
        for text in texts
        for line in textwrap.wrap(
            text, width, initial_indent=blank, subsequent_indent=blank, break_on_hyphens=False
        )
    ]


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _coloured(cell: Cell, width: int) -> str:
    text = _text(cell)
    padding = " " * (width - len(text))
    if isinstance(cell, str) or not is_terminal() or not cell[1]:
        return text + padding
    codes = ";".join(COLOURS[name] for name in cell[1].split())
    return f"\x1b[{codes}m{text}\x1b[0m{padding}"
