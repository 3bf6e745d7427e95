"""What a result rests on: the bytes of the files that were run, and of the tests that ran them.

A result holds as long as those are the same, whatever else changes: messages, other fixes, other releases.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sglang_patchset import patches
from sglang_patchset.catalog import Catalog, Fix, Release
from sglang_patchset.proof.expected import Suite
from sglang_patchset.proof.plan import Tree

# Maps "files" to the blob ids of the tree's files, "base" to the digests of what patches change that the
# published tree has all the same, "tests" to the sha256 of the test and of what it imports from the suite.
Grounds = Mapping[str, Mapping[str, str]]


def grounds(catalog: Catalog, release: Release, fix: Fix, suite: Suite, tree: Tree) -> Grounds:
    """What a result of these tests on that tree rests on: the files of the fix and of what it needs."""
    series = patches.load(catalog, release)
    fixes = {fix.name} | catalog.needed(fix.name, release.version)
    paths = sorted({path for patch in series.patches if patch.fix in fixes for path in patch.files})
    blob_id = series.patched_id if tree is Tree.PATCHED else series.published_id
    base = [patch for patch in series.patches if patch.fix in suite.base_has and tree is Tree.PUBLISHED]
    return {
        "files": {path: blob_id(path) for path in paths},
        "base": {patch.fix: patch.digest for patch in base},
        "tests": tests(catalog.clone(), suite.test),
    }


def differences(then: Mapping[str, Any], now: Grounds) -> list[str]:
    """What a result rested on that is another by now, by name."""
    return [
        name
        for kind in now
        for name in sorted({*then.get(kind, {}), *now[kind]})
        if then.get(kind, {}).get(name) != now[kind].get(name)
    ]


def tests(root: Path, test: str) -> Mapping[str, str]:
    """The sha256 of a test, and of what it imports from the modules in `tests/regression`.

    Of a module that it takes single names from, what those consist of counts: a model that is added for
    another test changes nothing.
    """
    source = (root / test).read_text(encoding="utf-8")
    found = {test: hashlib.sha256(source.encode()).hexdigest()}
    suite = Path(test).parents[1]
    wanted: dict[str, set[str]] = {}
    ahead = list(_imports(root / suite, ast.parse(source)))
    while ahead:
        module, name = ahead.pop()
        if name in wanted.setdefault(module, set()):
            continue
        wanted[module].add(name)
        tree = ast.parse((root / suite / f"{module}.py").read_text(encoding="utf-8"))
        ahead += _imports(root / suite, tree)
    for module, names in sorted(wanted.items()):
        path = suite / f"{module}.py"
        used = _used((root / path).read_text(encoding="utf-8"), names)
        found[str(path)] = hashlib.sha256(used.encode()).hexdigest()
    return found


def _imports(suite: Path, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The modules of the suite that a module imports, with each name that it takes; `*` is all of one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs = [(alias.name, "*") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            pairs = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        yield from (pair for pair in pairs if (suite / f"{pair[0]}.py").is_file())


def _used(source: str, names: set[str]) -> str:
    """The parts of a module that these names consist of: definitions, and statements that run at import."""
    tree = ast.parse(source)
    definitions: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for name in _defined(node):
            definitions.setdefault(name, []).append(node)
    if not names <= definitions.keys():
        return source
    used: set[str] = set()
    plain = [node for node in tree.body if not _defined(node)]
    ahead = [*names, *(name for node in plain for name in _names(node))]
    while ahead:
        name = ahead.pop()
        if name in definitions and name not in used:
            used.add(name)
            ahead += [each for node in definitions[name] for each in _names(node)]
    lines = source.splitlines()
    kept = [node for node in tree.body if not _defined(node) or not used.isdisjoint(_defined(node))]
    return "\n".join(_part(node, used, lines) for node in kept if not _is_text(node))


def _part(node: ast.stmt, used: set[str], lines: list[str]) -> str:
    """A statement's lines; of an import, the names that are used."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", "")
        return "\n".join(f"{module} {ast.unparse(each)}" for each in node.names if _bound(each) in used)
    return "\n".join(lines[_first_line(node) - 1 : node.end_lineno])


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(each.lineno for each in decorators)])


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [_bound(each) for each in node.names]
    if isinstance(node, ast.Assign):
        targets = node.targets
    else:
        targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _names(node: ast.AST) -> list[str]:
    return [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
