"""Which fixes are in a tree, told by the bytes of the files that they touch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sglang_patchset import git
from sglang_patchset.errors import PatchsetError
from sglang_patchset.patches import Patch, Series
from sglang_patchset.targets import Reader


class Presence(Enum):
    """Whether a fix is in a tree."""

    IN = "in"
    OUT = "out"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class FileState:
    """One touched file: its bytes, and the fixes that are in it; or why nobody can tell."""

    content: bytes = b""
    applied: frozenset[str] = frozenset()
    problem: str = ""


@dataclass(frozen=True)
class Survey:
    """The state of every file that a release's series touches, in one tree."""

    series: Series
    files: Mapping[str, FileState]

    def presence(self, patch: Patch) -> tuple[Presence, str]:
        """Whether a patch is in the tree, and the reason where it is unknown."""
        states = {path: self.files[path] for path in patch.files}
        problems = [f"{path} {state.problem}" for path, state in states.items() if state.problem]
        if problems:
            return Presence.UNKNOWN, "; ".join(problems)
        having = [path for path, state in states.items() if patch.fix in state.applied]
        if not having:
            return Presence.OUT, ""
        if len(having) == len(states):
            return Presence.IN, ""
        lacking = [path for path in states if path not in having]
        return Presence.UNKNOWN, f"half patched: {', '.join(having)} has it, {', '.join(lacking)} lacks it"


def take(series: Series, read: Reader) -> Survey:
    """Look at every file that the series touches."""
    return Survey(series, {path: _inspect(series, path, read(path)) for path in series.files})


def matches(series: Series, read: Reader) -> bool:
    """Whether every touched file is the release's own, with any of the fixes in it."""
    # Files that one patch touches come first: blob ids alone settle those.
    paths = sorted(series.files, key=lambda path: len(series.files[path]))
    return not any(_inspect(series, path, read(path)).problem for path in paths)


def rewrite(found: Survey, wanted: Mapping[str, Set[str]]) -> Mapping[str, bytes]:
    """The bytes of these files, by path, each with exactly the wanted fixes in it.

    Raises:
        PatchsetError: git is missing, or a patch file is broken.
    """
    series, states = found.series, {path: found.files[path] for path in wanted}
    with _scratch({path: state.content for path, state in states.items()}) as tree:
        for patch in reversed(series.patches):
            paths = [path for path, state in states.items() if patch.fix in state.applied]
            _must(git.apply(patch.path, tree, only=paths, reverse=True), patch)
        for patch in series.patches:
            paths = [path for path in wanted if patch.fix in wanted[path] and path in patch.files]
            _must(git.apply(patch.path, tree, only=paths), patch)
        contents = {path: (tree / path).read_bytes() for path in wanted}
    for path, content in contents.items():
        touching = series.files[path]
        whole = wanted[path] >= {patch.fix for patch in touching}
        if whole and git.blob_id(content) != series.patched_id(path):
            directory = touching[0].path.parent
            raise PatchsetError(
                f"{directory}: {path} does not become what these patches say: install sglang-patchset again"
            )
    return contents


def _inspect(series: Series, path: str, content: bytes | None) -> FileState:
    release = series.release.version
    if content is None:
        return FileState(problem="is missing")
    patches = series.files[path]
    found = git.blob_id(content)
    if found == series.published_id(path):
        return FileState(content)
    if found == series.patched_id(path):
        return FileState(content, frozenset(patch.fix for patch in patches))
    # With two patches or more, some of them may be in.
    if len(patches) > 1 and (applied := _take_off(series, path, content)):
        state = FileState(content, applied)
        if rewrite(Survey(series, {path: state}), {path: applied})[path] == content:
            return state
    return FileState(content, problem=f"differs from SGLang {release}")


def _take_off(series: Series, path: str, content: bytes) -> frozenset[str]:
    """The fixes whose removal leads back to the release's own file; none where nothing leads there."""
    applied = set()
    with _scratch({path: content}) as tree:
        for patch in reversed(series.files[path]):
            if git.apply(patch.path, tree, only=[path], reverse=True):
                applied.add(patch.fix)
        if git.blob_id((tree / path).read_bytes()) != series.published_id(path):
            return frozenset()
    return frozenset(applied)


@contextmanager
def _scratch(contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary tree that has these files."""
    with tempfile.TemporaryDirectory(prefix="sglang-patchset-") as directory:
        for path, content in contents.items():
            file = Path(directory, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        yield Path(directory)


def _must(done: bool, patch: Patch) -> None:
    if not done:
        release = patch.path.parent.name
        raise PatchsetError(f"{patch.path}: does not fit SGLang {release}: install sglang-patchset again")
