"""«patched» and «vulnerable» are said of what runs: not of lines renamed away, or replaced later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sglang_patchset import patches, scopes, survey
from sglang_patchset.catalog import Catalog
from sglang_patchset.git import apply
from sglang_patchset.patches import Series
from sglang_patchset.repair import contents
from sglang_patchset.survey import Presence

from . import mutants
from .conftest import Command, change, edit

# To parse the larger ones again and again takes minutes.
LARGEST = 40_000


def answers(series: Series, base: Path, largest: int) -> Iterator[tuple[str, str, bool, Presence]]:
    """Each mutant of each file: its fix and kind, whether the lines are in effect, and the answer."""
    published = {path: (base / path).read_bytes() for path in series.files}
    found = survey.take(series, published.get)
    patched = {**published, **contents(found, add={patch.fix for patch in series.patches})}
    for patch in series.patches:
        for path in patch.files:
            if len(published[path]) > largest:
                continue
            for tree, other in ((patched, published), (published, patched)):
                for hunk in patch.hunks(path)[:1]:
                    lines = hunk.after if tree is patched else hunk.before
                    at = tree[path].find(lines)
                    # What needs another one has no place without it, and is out there whatever else is.
                    if (patch.needs and tree is published) or at < 0 or tree[path].count(lines) > 1:
                        continue
                    first = tree[path].count(b"\n", 0, at) + 1
                    last = first + lines.count(b"\n") - 1
                    for each in mutants.mutants(tree[path], first, last, other[path]):
                        state = survey._among_others(series, path, each.content)
                        known = Presence.IN if patch.fix in state.applied else Presence.OUT
                        presence = Presence.UNKNOWN if patch.fix in state.conflicts else known
                        yield patch.fix, each.kind, each.in_effect, presence


@pytest.mark.parametrize("release", ["0.5.12", "0.5.23"])
def test_mutants(release: str, tables: Catalog, unpacked: Mapping[str, Path]) -> None:
    if release not in unpacked:
        pytest.skip(f"{release} has no wheel for this Python")
    series = patches.load(
        tables, next(each for each in tables.releases.values() if str(each.version) == release)
    )
    seen: Counter[str] = Counter()
    wrong = set()
    for fix, kind, in_effect, presence in answers(series, unpacked[release], LARGEST):
        seen[kind] += 1
        if in_effect == (presence is Presence.UNKNOWN):
            wrong.add((fix, kind))
    assert wrong == set()
    assert release != "0.5.12" or min(seen["method renamed"], seen["old one appended"], seen["a comment"]) > 1


def test_every_hunk_is_headed_by_the_names_around_it(
    series: Series, unpacked: Mapping[str, Path], tmp_path: Path
) -> None:
    """As `refresh` writes it; git's own heading knows no method."""
    base = unpacked[str(series.release.version)]
    for path in series.files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((base / path).read_bytes())
    for patch in series.patches:
        data = patch.path.read_bytes()
        assert patches.headed(data, lambda path: (tmp_path / path).read_bytes()) == data, patch.path
        assert apply(patch.path, tmp_path, only=list(patch.files))


def test_a_method_that_was_renamed(tree: Path, command: Command) -> None:
    fix, file = "hash-topk-dummy-weights", tree / "sglang" / "srt" / "layers" / "moe" / "hash_topk.py"
    assert command("apply", tree, fix).code == 0
    edit(file, "# theirs")
    assert f"{fix} " in command("status", tree).out
    change(file, "    def __init__(", "    def theirs(")
    out = command("status", tree).out
    lines = out.splitlines()
    (number,) = (number for number, line in enumerate(lines) if line.startswith(f"{fix} "))
    assert lines[number].endswith("unknown")
    assert "other changes in the place of the hunk" in lines[number + 1]


def test_a_class_that_is_defined_again(tree: Path, command: Command) -> None:
    fix, file = "hash-topk-dummy-weights", tree / "sglang" / "srt" / "layers" / "moe" / "hash_topk.py"
    assert command("apply", tree, fix).code == 0
    number = len(file.read_text().splitlines()) + 3
    edit(file, "\n\nclass HashTopK(HashTopK):\n    pass")
    reason = f"binds HashTopK again at line {number}, after the hunk at line 37 of "
    assert reason in command("status", tree).out
    assert reason in command("revert", tree, fix).refusal()


def test_a_file_that_is_no_python(tree: Path, command: Command) -> None:
    edit(tree / "sglang" / "srt" / "layers" / "moe" / "hash_topk.py", "def (")
    assert "is no Python that this one reads (line " in command("apply", tree).refusal()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("class A:\n    def f(self):\n        x\n", ""),
        ("class A:\n    def f(self):\n        x\n    f = 1\n", "A.f"),
        ("class A:\n    @b\n    def f(self):\n        x\n    @f.setter\n    def f(self, y): ...\n", ""),
        ("class A:\n    def f(self):\n        x\nclass B:\n    def f(self):\n        pass\n", ""),
        ("class A:\n    def f(self):\n        x\nA.f, y = 1, 2\n", "A.f"),
        ("class A:\n    def f(self):\n        x\nA.f: int\n", ""),
        ("class A:\n    def f(self):\n        x\ntry:\n    pass\nexcept E:\n    import b as A\n", "A"),
        ("class A:\n    def f(self):\n        x\nmatch y:\n    case 1:\n        del A\n", "A"),
        ("class A:\n    def f(self):\n        x\nfor A in y:\n    pass\n", "A"),
        ("class A:\n    def f(self):\n        def g():\n            x\n        g = 1\n", "A.f.g"),
        ("if y:\n    class A:\n        def f(self):\n            x\n    def A():\n        pass\n", "A"),
    ],
)  # fmt: skip
def test_what_takes_a_definition_s_place(text: str, name: str) -> None:
    line = text[: text.index("x\n")].count("\n") + 1
    found = scopes.replaced(text.encode(), line, line)
    assert found.partition(" again")[0] == (f"binds {name}" if name else "")


def test_the_names_around_a_line() -> None:
    text = b"import a\n\n@b\nclass C(\n    d\n):\n    def e(self):\n        f\n\n    # g\n\n    h\nj\n"
    names = [scopes.enclosing(text, line) for line in range(14)]
    c, e = ("C",), ("C", "e")
    assert names == [(), (), (), (), c, c, c, e, e, e, e, e, c, ()]
    # Python counts these as lines too.
    assert scopes.line_of(b"a\r\nb\rc\n", 6) == 3
