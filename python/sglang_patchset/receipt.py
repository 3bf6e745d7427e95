"""The file inside a patched package that tells what was applied and by which version of this tool."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sglang_patchset import __version__
from sglang_patchset.patches import Series

PATH = "sglang/_patchset.json"
_TOOL = re.compile(r"sglang-patchset [0-9a-z.+]+")


@dataclass(frozen=True)
class Receipt:
    """Who applied what: `fixes` maps each fix to its patch file's sha256."""

    tool: str
    fixes: Mapping[str, str]


def parse(data: bytes | None) -> Receipt | None:
    """Read a receipt; None where there is none, or none that this tool wrote.

    A receipt only explains: what is in a tree is told by the tree's own bytes.
    """
    try:
        entry = json.loads(data or b"")
        if not _TOOL.fullmatch(entry["tool"]):
            return None
        return Receipt(entry["tool"], {name: fix["sha256"] for name, fix in entry["fixes"].items()})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def render(series: Series, fixes: frozenset[str]) -> bytes | None:
    """The receipt of a tree that has these fixes; None where it has none. Equal input gives equal bytes."""
    if not fixes:
        return None
    receipt = {
        "tool": f"sglang-patchset {__version__}",
        "release": str(series.release.version),
        "patchset": series.release.patchset,
        "fixes": {
            patch.fix: {"patch": patch.path.name, "sha256": patch.sha256}
            for patch in series.patches
            if patch.fix in fixes
        },
    }
    return (json.dumps(receipt, indent=2) + "\n").encode()
