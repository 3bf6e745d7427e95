"""The file inside a patched package that lists the files which are patched, as they were left.

It depends on those files alone: not on the tool's version, nor on how fixes are named or patches cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from packaging.version import Version

from sglang_patchset.git import blob_id

PATH = "sglang/_patchset.json"


@dataclass(frozen=True)
class Receipt:
    """The blob id of each patched file that had nobody else's changes in it, by its path in the wheel."""

    files: Mapping[str, str]

    def left(self, path: str, content: bytes) -> bool:
        """Whether a file is as some version of this tool left it, and has nobody else's changes."""
        return self.files.get(path) == blob_id(content)


def parse(data: bytes | None) -> Receipt | None:
    """Read a receipt; None where there is none, or none that this tool wrote.

    A receipt only explains: what is in a tree is told by the tree's own bytes.
    """
    try:
        files = json.loads(data or b"")["files"]
        return Receipt({str(path): str(blob) for path, blob in files.items()})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def render(version: Version, files: Mapping[str, bytes]) -> bytes:
    """The receipt of a release whose files are patched so. Equal input gives equal bytes."""
    blobs = {path: blob_id(content) for path, content in sorted(files.items())}
    return (json.dumps({"release": str(version), "files": blobs}, indent=2) + "\n").encode()
