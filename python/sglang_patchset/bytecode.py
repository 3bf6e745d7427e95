"""Bytecode that Python runs whatever its source says: compiled with a hash that is not checked (PEP 552)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from sglang_patchset.errors import PatchsetError, tell
from sglang_patchset.handles import Directory

_UNCHECKED = 1


def drop(directory: Directory, source: str) -> None:
    """Remove it where it is of this source file; say so where that cannot be."""
    stem = source.removesuffix(".py") + "."
    for path, opened in _caches(directory):
        try:
            with opened as cache:
                for name in cache.names():
                    if name.startswith(stem) and name.endswith(".pyc") and _is_unchecked(cache, name):
                        path = cache.path / name
                        cache.unlink(name)
        except FileNotFoundError:
            continue
        except (OSError, PatchsetError) as error:
            tell(f"{path}: may have bytecode of {source} as it was ({error}): remove it")


def _caches(directory: Directory) -> Iterator[tuple[Path, contextlib.AbstractContextManager[Directory]]]:
    """The directories in which Pythons keep the bytecode of this one's files."""
    yield directory.path / "__pycache__", _entered(directory, ["__pycache__"])
    # A Python that runs isolated, as this one may, takes no notice of it.
    if prefix := sys.pycache_prefix or os.environ.get("PYTHONPYCACHEPREFIX"):
        way = directory.path.parts[1:]
        yield Path(prefix, *way), _entered(None, [prefix, *way])


@contextlib.contextmanager
def _entered(directory: Directory | None, way: list[str]) -> Iterator[Directory]:
    with contextlib.ExitStack() as stack:
        for name in way:
            each = directory.enter(name) if directory else Directory.at(Path(name))
            directory = stack.enter_context(each)
        assert directory
        yield directory


def _is_unchecked(cache: Directory, name: str) -> bool:
    handle = cache.open(name)
    if handle is None:
        return False
    with os.fdopen(handle, "rb") as file:
        return file.read(8)[4:] == _UNCHECKED.to_bytes(4, "little")
