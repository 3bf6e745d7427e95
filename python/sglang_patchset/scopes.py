"""Where a line of a Python file stands: the classes and functions around it, and what replaces those later.

Nothing of the file is run: it is parsed alone.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Iterator, Sequence

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@functools.lru_cache(maxsize=8)
def parsed(content: bytes) -> ast.Module:
    """The file's syntax tree.

    Raises:
        ValueError: it is no Python that this one reads.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(content)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError("nested too deeply") from None


def line_of(content: bytes, place: int) -> int:
    """The number of the line that a byte is in, as Python counts them."""
    return content[:place].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1


def enclosing(content: bytes, line: int) -> tuple[str, ...]:
    """The names of the classes and functions around a line, the outermost first.

    A blank line or a comment belongs to the code above it.
    """
    lines = content.splitlines()
    while line > 0 and lines[line - 1].strip()[:1] in (b"", b"#"):
        line -= 1
    names, body = [], parsed(content).body
    while inner := next((each for each in _definitions(body) if _spans(each, line)), None):
        names.append(inner.name)
        body = inner.body
    return tuple(names)


def replaced(content: bytes, first: int, last: int) -> str:
    """What takes the place of a definition that these lines are in, or that begins in them, and where.

    Empty where nothing does. The same name, bound again later in the same body, is what runs; so is what is
    assigned to a class's attribute.
    """
    module = parsed(content)
    assigned = list(_attributes(module.body))

    def look(body: Sequence[ast.stmt], outer: str) -> str:
        bound = list(_bindings(body))
        for each in _definitions(body):
            end = each.end_lineno or each.lineno
            if end < first or each.lineno > last:
                continue
            name = f"{outer}{each.name}"
            for other, line, accessor in bound:
                if other == each.name and line > end and not accessor:
                    return f"binds {name} again at line {line}"
            for other, line in assigned:
                if other == name and line > end:
                    return f"binds {name} again at line {line}"
            if reason := look(each.body, f"{name}."):
                return reason
        return ""

    return look(module.body, "")


def _spans(node: _Definition, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run in a body, those of its `if`s, `try`s and loops too."""
    for each in body:
        yield each
        if isinstance(each, _DEFINITIONS):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(each, name, []))
        for part in (*getattr(each, "handlers", []), *getattr(each, "cases", [])):
            yield from _statements(part.body)


def _definitions(body: Sequence[ast.stmt]) -> Iterator[_Definition]:
    return (each for each in _statements(body) if isinstance(each, _DEFINITIONS))


def _bindings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, int, bool]]:
    """Each name that a body binds, its line, and whether that only adds an accessor to a property."""
    for each in _statements(body):
        if isinstance(each, _DEFINITIONS):
            marks = (mark.value for mark in each.decorator_list if isinstance(mark, ast.Attribute))
            accessor = any(isinstance(mark, ast.Name) and mark.id == each.name for mark in marks)
            yield each.name, each.lineno, accessor
        elif isinstance(each, ast.Import | ast.ImportFrom):
            for alias in each.names:
                yield alias.asname or alias.name.partition(".")[0], each.lineno, False
        else:
            for target in _targets(each):
                if isinstance(target, ast.Name):
                    yield target.id, each.lineno, False


def _attributes(body: Sequence[ast.stmt]) -> Iterator[tuple[str, int]]:
    """Each attribute that a body assigns to, as `a.b`."""
    for each in _statements(body):
        for target in _targets(each):
            if isinstance(target, ast.Attribute):
                yield ast.unparse(target), each.lineno


def _targets(statement: ast.stmt) -> Iterator[ast.expr]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign | ast.Delete):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign | ast.For | ast.AsyncFor):
        targets = [statement.target] if getattr(statement, "value", True) else []
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
