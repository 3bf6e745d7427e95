#!/usr/bin/env python3
"""Makes every patched wheel and lists their sha256 in `patches/`: ./scripts/list_patched.py [DIR]

The published wheels come from the directory DIR, or from pip's index.
"""

import sys
from pathlib import Path

from sglang_patchset import catalog
from sglang_patchset.queue import pins

pins.list_patched(catalog.load(), Path(sys.argv[1]) if len(sys.argv) > 1 else None)
