"""docs/messages.md has every refusal that the tool can make, and no other."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from .conftest import ROOT

TREES = [ast.parse(file.read_text()) for file in sorted((ROOT / "python").rglob("*.py"))]


def refusals() -> Iterator[str]:
    """The text of each PatchsetError, with `…` for what differs."""
    for tree in TREES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PatchsetError":
                yield from texts(node.args[0], tree)


def texts(node: ast.expr, tree: ast.Module) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield from map("".join, itertools.product(*(part(value, tree) for value in node.values)))
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_EDITED.format":
        (value,) = (each.value for each in tree.body if ast.unparse(each).startswith("_EDITED = "))
        yield value.value.replace("{}", "…")
    else:
        # A function that makes the text, here or in another module.
        assert isinstance(node, ast.Call), ast.unparse(node)
        name = ast.unparse(node.func).rpartition(".")[2]
        functions = (each for module in TREES for each in module.body if isinstance(each, ast.FunctionDef))
        (function,) = (each for each in functions if each.name == name)
        for each in ast.walk(function):
            if isinstance(each, ast.Return):
                assert each.value
                yield from texts(each.value, tree)


def part(value: ast.expr, tree: ast.Module) -> list[str]:
    if isinstance(value, ast.Constant):
        return [str(value.value)]
    assert isinstance(value, ast.FormattedValue)
    # The words of one refusal, which another begins with.
    words = isinstance(value.value, ast.Call) and ast.unparse(value.value.func) == "without_a_fix"
    return list(texts(value.value, tree)) if words else ["…"]


def test_every_refusal_is_documented() -> None:
    page = (ROOT / "docs" / "messages.md").read_text()
    documented = re.findall(r"^    (.+)$", page, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    made = set(refusals())
    assert len(made) > 80
    assert made - set(documented) == set()
    assert set(documented) - made == set()


def test_every_refusal_says_where_and_what_next() -> None:
    for text in refusals():
        assert ": " in text
        assert "\n" not in text
