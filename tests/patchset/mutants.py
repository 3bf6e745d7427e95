"""Files with a fix, or without it, in which its lines stand and are not what runs, and others.

What each one is, is known by how it is made; nothing of the tool has a part in that.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mutant:
    """A file, how it was made, and whether the lines of the fix are still what runs."""

    kind: str
    content: bytes
    in_effect: bool


def around(content: bytes, first: int, last: int) -> list[Definition]:
    """The classes and functions that all these lines are in, their heads not, the outermost first."""
    found = [
        each
        for each in ast.walk(ast.parse(content))
        if isinstance(each, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and each.lineno < first <= last <= (each.end_lineno or 0)
    ]
    return sorted(found, key=lambda each: each.lineno)


def mutants(content: bytes, first: int, last: int, published: bytes) -> Iterator[Mutant]:
    """Mutants of a file in which the lines from `first` to `last` are a hunk's.

    Args:
        published: the file as the release has it, or one in the other state.
    """
    lines = content.splitlines(keepends=True)
    nodes = around(content, first, last)
    for depth, node in enumerate(nodes):
        renamed = list(lines)
        old = node.name.encode()
        head = renamed[node.lineno - 1]
        renamed[node.lineno - 1] = re.sub(rb"\b%s\b" % re.escape(old), b"theirs", head, count=1)
        kind = "class" if isinstance(node, ast.ClassDef) else "method" if depth else "function"
        yield Mutant(f"{kind} renamed", b"".join(renamed), in_effect=False)
    if nodes:
        top = nodes[0]
        name = top.name.encode()
        other = next(each for each in ast.parse(published).body if getattr(each, "name", "") == top.name)
        text = b"".join(published.splitlines(keepends=True)[other.lineno - 1 : other.end_lineno])
        yield Mutant("old one appended", content + b"\n\n" + text, in_effect=False)
        yield Mutant("other one appended", content + b"\n\nclass %s:\n    pass\n" % name, in_effect=False)
        yield Mutant("bound again", content + b"\n\n%s = None\n" % name, in_effect=False)
        yield Mutant(
            "bound again in an if", content + b"\n\nif True:\n    %s = None\n" % name, in_effect=False
        )
        yield Mutant("imported again", content + b"\n\nfrom theirs import %s\n" % name, in_effect=False)
        if isinstance(top, ast.ClassDef) and len(nodes) > 1:
            path = b"%s.%s" % (name, nodes[1].name.encode())
            yield Mutant("method assigned", content + b"\n\n%s = None\n" % path, in_effect=False)
            body = "".join(f"{' ' * 4}{text}\n" for text in (f"def {nodes[1].name}(self):", "    pass"))
            after = list(lines)
            after.insert(top.end_lineno or 0, f"\n{body}".encode())
            yield Mutant("method defined again", b"".join(after), in_effect=False)
        yield Mutant("another appended", content + b"\n\nclass Theirs_:\n    pass\n", in_effect=True)
        yield Mutant("bound before", b"%s = None\n" % name + content, in_effect=True)
        yield Mutant(
            "a local of that name", content + b"\n\ndef theirs_():\n    %s = 1\n" % name, in_effect=True
        )
    yield Mutant("old file appended", content + b"\n\n" + published, in_effect=False)
    yield Mutant("a comment", content + b"# theirs\n", in_effect=True)
